"""Trainings and measurements several at a time: the same as one after the other, whatever ends them."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from sgr_kernels.reproduce import leaking
from sgr_kernels.reproduce.measurements import Measurement, MeasurementError
from sgr_kernels.training.loop import TrainingError
from sgr_kernels.training.methods import Settings
from tests.tiny_lab import TINY, lab_in

METHODS = ["clean", "sgr_exp", "lrc"]
LONG = replace(TINY, epochs=100_000)


@pytest.fixture(autouse=True)
def _two_threads():
    """One for each of two trainings, and one for one alone: the same sums in the same order."""
    torch.set_num_threads(2)


def parallel(folder, say=lambda line: None, scale=TINY, jobs=2):
    lab = lab_in(folder, say, scale)
    lab.jobs = jobs
    return lab


def weights(lab, methods):
    networks = lab.first(methods)
    lab.train(networks.values())
    return {name: network.model.state_dict() for name, network in networks.items()}


@pytest.mark.slow
def test_two_at_a_time_are_those_of_one_after_the_other(tmp_path):
    said = []
    together = weights(parallel(tmp_path / "together", said.append), METHODS)
    torch.set_num_threads(1)
    for name, expected in weights(lab_in(tmp_path / "alone"), METHODS).items():
        assert all(torch.equal(expected[key], value) for key, value in together[name].items()), name
    starts = [line for line in said if line.startswith("training")]
    ends = [line for line in said if line.startswith("trained")]
    assert len(starts) == len(ends) >= len(METHODS)
    assert said.index(starts[-1]) > said.index(ends[0])  # never more than two
    assert sum(line.startswith("training trial") for line in said[: said.index(ends[0])]) == 2  # and two at once


def test_a_training_that_fails_stops_the_others(tmp_path):
    """Their processes too, which would go on for hours."""
    lab = parallel(tmp_path, scale=LONG)
    broken = Settings("mnist", method="gn", strength=1.0, learning_rate=1e30, batch_size=16)
    started = time.monotonic()
    with pytest.raises(TrainingError, match=r"^doomed \(seed 0, strength 1\): the loss is no longer"):
        lab.train(lab.planned([(broken, "doomed"), (Settings("mnist", batch_size=16), "clean")]))
    assert time.monotonic() - started < 60
    assert not _children(os.getpid())


def test_an_interrupt_stops_all(tmp_path):
    def interrupt(line):
        if line.startswith("training lrc"):
            raise KeyboardInterrupt

    settings = [(Settings("mnist", method=method, batch_size=16), method) for method in ("clean", "lrc")]
    lab = parallel(tmp_path, interrupt, LONG)
    networks = lab.planned(settings)
    with pytest.raises(KeyboardInterrupt):
        lab.train(networks)
    assert not _children(os.getpid())


@pytest.mark.slow
def test_measurements_at_a_time_are_those_of_one_after_the_other(tmp_path):
    scale = replace(TINY, methods=("clean", "fgsm"))
    said = []
    lab = parallel(tmp_path, said.append, scale)
    torch.set_num_threads(1)
    lab.jobs = 1
    alone = leaking.measure(lab)
    shutil.move(tmp_path / "measurements", tmp_path / "before")
    said.clear()
    torch.set_num_threads(2)
    lab.jobs = 2
    assert leaking.measure(lab) == alone
    assert said[:2] == ["measuring label leaking: 2", "measuring label leaking: 1"]
    assert sorted(said[2:]) == ["measured label leaking: 1", "measured label leaking: 2"]
    assert sorted(path.name for path in tmp_path.glob("before/*/*")) == sorted(
        path.name for path in tmp_path.glob("measurements/*/*")
    )


@pytest.mark.slow
def test_a_measurement_that_fails_stops_the_others(tmp_path):
    wanted = [Measurement("x", "bad", [], partial(int, "nine")), Measurement("x", "long", [], partial(time.sleep, 600))]
    with pytest.raises(MeasurementError, match=r"^numbers: ValueError: invalid literal"):
        parallel(tmp_path).measured(wanted, "numbers")
    assert not _children(os.getpid())
    assert parallel(tmp_path, jobs=1).measured([replace(wanted[0], measure=partial(int, "9"))], "numbers") == [9]


@pytest.mark.slow
def test_trainings_end_when_the_reproduction_is_killed(tmp_path):
    script = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "from test_jobs import *\n"
        "if __name__ == '__main__':\n"
        "    settings = [(Settings('mnist', method=m, batch_size=16), m) for m in ('clean', 'lrc')]\n"
        "    lab = parallel(Path(sys.argv[3]), scale=LONG)\n"
        "    lab.train(lab.planned(settings))\n"
    )
    (tmp_path / "script.py").write_text(script)
    here = Path(__file__).parent
    command = [sys.executable, str(tmp_path / "script.py"), str(here), str(here.parents[1]), str(tmp_path)]
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "networks").glob("*/checkpoint.safetensors"))) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        children = _children(process.pid)
        process.send_signal(signal.SIGKILL)
    assert len(children) >= 2
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, children
        time.sleep(0.1)


def test_processes_are_kept_for_the_next_tasks(tmp_path):
    """And end with the lab."""
    lab = parallel(tmp_path)
    wanted = [Measurement("x", str(number), [], os.getpid) for number in range(6)]
    first = set(lab.measured(wanted[:3], "processes"))
    assert first | set(lab.measured(wanted, "processes")) == first == set(map(int, _children(os.getpid())))
    assert len(first) == 2
    with pytest.raises(MeasurementError):
        lab.measured([Measurement("x", "bad", [], partial(int, "nine")), Measurement("x", "good", [], int)], "numbers")
    assert not _children(os.getpid())
    again = set(lab.measured([Measurement("y", str(number), [], os.getpid) for number in range(2)], "processes"))
    assert len(again) == 2
    assert not again & first
    del lab
    assert not _children(os.getpid())


def test_a_process_that_is_killed_is_said_to_be(tmp_path):
    wanted = [
        Measurement("x", "killed", [], partial(os._exit, 3)),
        Measurement("x", "long", [], partial(time.sleep, 60)),
    ]
    with pytest.raises(MeasurementError, match=r"^numbers: its process ended with exit code 3"):
        parallel(tmp_path).measured(wanted, "numbers")
    assert not _children(os.getpid())


def _stubborn():
    """Goes on when told to exit, as code may that catches everything."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(SystemExit):
            time.sleep(0.1)


def test_a_task_that_does_not_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("sgr_kernels.reproduce.jobs._PATIENCE", 1.0)
    wanted = [Measurement("x", "long", [], _stubborn), Measurement("x", "bad", [], partial(_soon, 3))]
    started = time.monotonic()
    with pytest.raises(MeasurementError, match="too late"):
        parallel(tmp_path).measured(wanted, "numbers")
    assert time.monotonic() - started < 30
    assert not _children(os.getpid())


def _soon(seconds):
    time.sleep(seconds)
    raise ValueError("too late")


def _children(parent):
    """Processes that train for a parent; not the tracker of resources, which outlives them."""
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
