"""``sgr train`` as several processes: the weights of one, whatever their number; ends that are not waited for."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed

from sgr_kernels.cli import main
from sgr_kernels.training.batches import Augmentation, Batches
from sgr_kernels.training.datasets import DataSet, load
from sgr_kernels.training.loop import CHECKPOINT_FILE, HISTORY_FILE, Trainer
from sgr_kernels.training.methods import Settings
from sgr_kernels.training.processes import Processes
from sgr_kernels.training.trained import load_model
from tests.data_files import write_idx
from tests.own_network import write_network

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")

TIME_LIMIT = 100  # a deadlock is a failure
OPTIONS = ["--device", "cpu", "--batch-size", "49"]  # parts of 24 and 25 digits


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with 149 training and 41 test digits: the last of four batches holds 2."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    write_idx(folder, 149, 41)
    return str(folder)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def torchrun(processes: int, *arguments: str) -> str:
    """What ``sgr train`` prints under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, "-m", "sgr_kernels.cli", "train", *OPTIONS, *arguments]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=TIME_LIMIT, check=False)
    # Now and then PyTorch's own threads abort a process that has finished, while the interpreter shuts down.
    aborted_at_exit = "terminate called without an active exception" in result.stderr and "trained: " in result.stdout
    assert result.returncode == 0 or aborted_at_exit, result.stderr
    return result.stdout


# Several trainings, each with a port of its own, in one process; which ends before PyTorch's own threads may abort it.
IN_TURN = """
import json, os, sys
from sgr_kernels.cli import main
for port, *arguments in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = port
    if code := main(["train", *arguments]):
        sys.exit(code)
sys.stdout.flush()
os._exit(0)
"""


@contextlib.contextmanager
def started(*commands: Sequence[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes of ``sgr train``, in the environment that torchrun gives them, of commands one after the other."""
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in commands]
        for listener in free:
            listener.bind(("localhost", 0))
        ports = [str(listener.getsockname()[1]) for listener in free]
    turns = json.dumps([[port, *OPTIONS, *command] for port, command in zip(ports, commands)])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", IN_TURN, turns],
            env=environment() | {"RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def in_two(*commands: Sequence[str]) -> str:
    """What two processes print that train so, one command after the other; to start them takes longer than that."""
    with started(*commands) as processes:
        outputs = [process.communicate(timeout=TIME_LIMIT) for process in processes]
    for process, (_, error) in zip(processes, outputs):
        assert process.returncode == 0, error
    return "".join(printed for printed, _ in outputs)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + TIME_LIMIT
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.exists()


def weights(folder: Path) -> Tensor:
    return torch.cat([value.flatten() for value in load_model(folder)[0].state_dict().values()])


def assert_close(found: Path, expected: Path, tolerance: float) -> None:
    mine, wanted = weights(found), weights(expected)
    assert (mine - wanted).norm() <= tolerance * wanted.norm()


def check_first_epoch(two: Path, one: Path) -> None:
    assert_close(two, one, 1e-5)
    mine, wanted = (json.loads((folder / HISTORY_FILE).read_text())["epochs"][0] for folder in (two, one))
    for name in ("loss", "cross_entropy", "penalty", "train_accuracy", "test_accuracy"):
        assert mine[name] == pytest.approx(wanted[name], rel=1e-4)


def test_torchrun_trains_the_network_of_one_process(data: str, tmp_path: Path) -> None:
    command = ["--data", data, "--method", "clean", "--epochs", "1", "--out"]
    printed = torchrun(2, *command, str(tmp_path / "two"))
    assert printed.count("epoch 1/1") == 1
    assert printed.count("trained:") == 1
    assert main(["train", *OPTIONS, *command, str(tmp_path / "one")]) == 0
    check_first_epoch(tmp_path / "two", tmp_path / "one")


def test_two_processes_train_the_network_of_one_and_either_continues_the_other(data: str, tmp_path: Path) -> None:
    one, two, continued = tmp_path / "one", tmp_path / "two", tmp_path / "continued"
    short, long = (["--data", data, "--epochs", epochs] for epochs in ("1", "2"))
    assert main(["train", *OPTIONS, *short, "--out", str(one)]) == 0
    shutil.copytree(one, continued)
    printed = in_two([*short, "--out", str(two)], [*long, "--out", str(continued), "--resume"])
    assert printed.count("epoch 1/1") == 1
    assert printed.count("trained:") == 2
    assert "after 1 epochs and 0 steps" in printed
    check_first_epoch(two, one)
    assert main(["train", *OPTIONS, *long, "--out", str(two), "--resume"]) == 0
    assert main(["train", *OPTIONS, *long, "--out", str(tmp_path / "whole")]) == 0
    for folder in (continued, two):
        assert_close(folder, tmp_path / "whole", 1e-4)


def test_a_network_of_ones_own_with_all_options_is_that_of_one_process(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    own = ["--model", f"{write_network(tmp_path)}:flat", "--data", data, "--epochs", "2", "--method", "sgr_sign"]
    own += ["--optimizer", "sgd", "--schedule", "cosine", "--learning-rate-warmup", "2", "--learning-rate", "0.05"]
    own += ["--label-smoothing", "0.1", "--ema", "0.5", "--accumulate", "2", "--clip-gradient", "1"]
    in_two([*own, "--out", str(tmp_path / "two")])
    assert main(["train", *OPTIONS, *own, "--out", str(tmp_path / "one")]) == 0
    assert_close(tmp_path / "two", tmp_path / "one", 1e-4)


def test_resuming_on_as_many_processes_gives_the_same_bits(data: str, tmp_path: Path) -> None:
    """Each process's attacks begin at random places, or its penalized subsets are of parts of another size."""
    commands = []
    for method in (["pgd"], ["pgd_sgr", "--fraction", "0.5"]):
        common = ["--data", data, "--attack-steps", "2", "--method", *method, "--epochs"]
        resumed, whole = (["--out", str(tmp_path / method[0] / name)] for name in ("resumed", "whole"))
        # The whole one in between leaves the process another state than that to continue from.
        commands += [[*common, "1", *resumed], [*common, "2", *whole], [*common, "2", *resumed, "--resume"]]
    in_two(*commands)
    for method in ("pgd", "pgd_sgr"):
        assert torch.equal(weights(tmp_path / method / "resumed"), weights(tmp_path / method / "whole"))


def test_a_killed_process_ends_the_other_with_an_error(data: str, tmp_path: Path) -> None:
    command = ["--data", data, "--epochs", "10000", "--checkpoint-every", "1", "--out", str(tmp_path)]
    with started(command) as processes:
        wait_for(tmp_path / CHECKPOINT_FILE)
        processes[1].send_signal(signal.SIGKILL)
        _, error = processes[0].communicate(timeout=TIME_LIMIT)
        assert processes[0].returncode == 2
        assert "sgr: error: " in error
    load_model(tmp_path)


def test_an_interrupt_of_one_process_ends_all_between_the_same_two_steps(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--data", data, "--epochs", "10000", "--out", str(tmp_path)]
    with started([*common, "--checkpoint-every", "1"]) as processes:
        wait_for(tmp_path / CHECKPOINT_FILE)
        processes[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=TIME_LIMIT)[0] for process in processes]
        assert [process.returncode for process in processes] == [1, 1]
    assert "the same command with --resume" in outputs[0]
    assert "resume" not in outputs[1]
    position = load_model(tmp_path)[1]["position"]
    options = [*common[:2], "--out", str(tmp_path), "--resume", "--epochs", str(position["epoch"] + 1)]
    assert main(["train", *OPTIONS, *options]) == 0
    assert f"after {position['epoch']} epochs and {position['step']} steps" in capsys.readouterr().out


@pytest.mark.parametrize("size", [2, 3, 7])
def test_parts_make_up_the_batches_of_one_process(size: int) -> None:
    images = load("mnist-sample").train.first(23)
    options = {"seed": 3, "shuffle": True, "augmentation": Augmentation(flip=True)}
    parts = [Batches(images, 5, processes=Processes(rank, size), **options) for rank in range(size)]
    for step, (whole, labels) in enumerate(Batches(images, 5, **options)):
        mine = [list(part.epoch(0))[step] for part in parts]
        assert torch.equal(torch.cat([images for images, _ in mine]), whole)
        assert torch.equal(torch.cat([labels for _, labels in mine]), labels)
        assert max(len(labels) for _, labels in mine) - min(len(labels) for _, labels in mine) <= 1


@pytest.mark.parametrize("method", ["double-backward", "forward-mode", "finite-difference"])
@pytest.mark.parametrize("source", ["sign", "pgd"])
def test_an_empty_part_takes_its_step(method: str, source: str) -> None:
    sample = load("mnist-sample")
    settings = Settings("mnist", perturbation=source, penalty_method=method, allow_kinks=True)
    trainer = Trainer(settings, DataSet(sample.train.first(2), sample.test.first(2)))
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer._train_step(sample.train.images[:0] / 255, sample.train.labels[:0])
    for parameter, old in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


def test_processes_draw_other_numbers_each_and_the_same_after_a_resumption(digits: DataSet) -> None:
    def drawn(rank: int, step: int) -> list[float]:
        trainer = Trainer(Settings("mnist", method="clean"), digits)
        trainer.processes, trainer.step = Processes(rank, 2), step
        trainer._seed_others()
        return torch.rand(3).tolist()

    assert drawn(1, 0) == drawn(1, 0)
    assert len({tuple(drawn(rank, step)) for rank, step in ((0, 0), (1, 0), (1, 1), (2, 0))}) == 4
    assert drawn(0, 0) == drawn(0, 1)  # the first goes on with the stream that a checkpoint holds
