"""The commands as a user meets them: what they print, what they leave behind, how they fail."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from sgr_kernels.cli import COMMANDS, main
from sgr_kernels.commands import common
from sgr_kernels.demo.run import Options, run
from sgr_kernels.evaluation.certificates import CertificatePlan
from sgr_kernels.evaluation.suite import Plan
from sgr_kernels.training.methods import METHODS
from sgr_kernels.training.records import claimed
from sgr_kernels.training.trained import load_model
from tests.commands.outcomes import fails, refuses, weights


@pytest.fixture(scope="session")
def trained(digits, tmp_path_factory):
    """A training's folder."""
    out = tmp_path_factory.mktemp("runs") / "clean"
    options = ["--method", "clean", "--epochs", "4", "--batch-size", "32", "--no-augment", "--device", "cpu"]
    assert main(["train", "--data", digits, "--out", str(out), *options]) == 0
    return out


def test_help_lists_the_commands_without_loading_them(capsys):
    heavy = ("matplotlib", "safetensors", "sgr_kernels.training.loop", "sgr_kernels.report")
    script = (
        "import sys\nfrom sgr_kernels.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        f"print([module for module in {heavy} if module in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert all(f"    {command}" in result.stdout for command in COMMANDS)
    assert result.stdout.endswith("[]\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_its_options(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert "--out" in capsys.readouterr().out


def test_train_reports_each_epoch_and_can_be_continued(digits, tmp_path, capsys):
    out = tmp_path / "runs" / "sgr"
    command = ["train", "--data", digits, "--out", str(out), "--perturbation", "sign", "--batch-size", "64"]
    assert main([*command, "--epochs", "1"]) == 0
    first = capsys.readouterr().out
    assert "epoch 1/1  loss " in first
    assert "penalty" in first
    assert "holds a checkpoint: add --resume" in fails([*command, "--epochs", "2"], capsys)
    assert main([*command, "--epochs", "3", "--resume"]) == 0
    resumed = capsys.readouterr().out
    assert "after 1 epochs and 0 steps" in resumed
    plain = ["train", "--data", digits, "--out", str(tmp_path / "plain"), "--method", "clean", "--epochs", "1"]
    assert main(plain) == 0
    assert "penalty" not in capsys.readouterr().out
    assert "epoch 3/3" in resumed
    assert main([*command[:3], "--out", str(tmp_path / "whole"), *command[5:], "--epochs", "3"]) == 0
    other = weights(tmp_path / "whole")
    assert all(torch.equal(value, other[name]) for name, value in weights(out).items())
    history = json.loads((out / "history.json").read_text())
    assert [record["epoch"] for record in history["epochs"]] == [1, 2, 3]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_is_continued_to_the_same_weights(digits, tmp_path, number):
    options = ["--data", digits, "--method", "clean", "--batch-size", "16", "--device", "cpu"]
    out, whole = tmp_path / "interrupted", tmp_path / "whole"
    script = (
        "import sys, torch; torch.set_num_threads(1); from sgr_kernels.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "train", *options, "--epochs", "1000", "--checkpoint-every", "1"]
    with subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (out / "checkpoint.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the same command with --resume" in output
    epochs = str(load_model(out)[1]["position"]["epoch"] + 1)
    assert main(["train", *options, "--epochs", epochs, "--out", str(out), "--resume"]) == 0
    assert main(["train", *options, "--epochs", epochs, "--out", str(whole)]) == 0
    other = weights(whole)
    assert all(torch.equal(value, other[name]) for name, value in weights(out).items())


@pytest.mark.parametrize(("text", "value"), [("1/8", 0.125), ("0.125", 0.125), ("3/1", 3.0)])
def test_numbers_may_be_fractions(text, value):
    assert common.positive(text) == value


@pytest.mark.parametrize("text", ["1/0", "1/", "/8", "1/8/2", "one", "-1/8", "0/3", "inf"])
def test_what_is_no_positive_number_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"^expected a (finite )?number >"):
        common.positive(text)


@pytest.mark.parametrize("text", ["1e3", "0", "-1", "2.0", "many", ""])
def test_what_is_no_whole_number_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"^expected a whole number >= 1, got {text}$"):
        common.whole(text)


def test_train_on_cifar10_flips_and_pads_mid_range(cifar, tmp_path, capsys):
    options = ["--perturbation", "exponential", "--decay-length", "4", "--epochs", "1", "--batch-size", "25"]
    assert main(["train", "--data", cifar, "--out", str(tmp_path / "c"), *options]) == 0
    settings = json.loads((tmp_path / "c" / "history.json").read_text())["settings"]
    assert settings["flip"] is True
    assert settings["architecture"] == "cifar10"
    picture = tmp_path / "c.png"
    assert main(["covariance", str(tmp_path / "c"), "--data", cifar, "--source", "sign", "--out", str(picture)]) == 0
    values = torch.tensor(json.loads(picture.with_suffix(".json").read_text())["functions"]["sign"]["values"])
    assert values.shape == (3, 3, 45)
    assert torch.allclose(values[:, :, 0].diagonal(), torch.ones(3), atol=0.1)


def test_evaluate_prints_tables_and_writes_json(trained, digits, tmp_path, capsys):
    out = tmp_path / "e" / "result.json"
    options = ["--eps", "0", "64", "--pgd-steps", "3", "--decay-lengths", "2", "16", "--noise-eps", "0", "2"]
    command = ["evaluate", str(trained), "--data", digits, *options, "--draws", "3", "--out", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "decay length  eps 0  eps 2" in printed
    result = json.loads(out.read_text())
    intervals = [i for curves in (result["attacks"], result["noise"]) for c in curves.values() for i in c["interval95"]]
    assert f"below at most ± {50 * max(high - low for low, high in intervals):.1f})" in printed
    assert result["images"] == 40
    assert result["settings"]["method"] == "clean"
    clean = result["clean"]["accuracy"][0]
    assert clean == pytest.approx(json.loads((trained / "history.json").read_text())["epochs"][-1]["test_accuracy"])
    for curve in (*result["attacks"].values(), *result["noise"].values()):
        assert curve["accuracy"][0] == clean
        assert curve["accuracy"][1] < clean
    assert set(result["noise"]) == {"2", "16"}
    assert main([*command, "--images", "7", "--strong-pgd"]) == 0
    assert "strong: 5 starts of 50 steps that shrink" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["images"] == 7
    assert result["attacks"]["strong pgd"]["accuracy"][1] <= result["attacks"]["pgd"]["accuracy"][1]


@pytest.mark.parametrize("command", ["evaluate", "covariance"])
def test_an_unwritable_place_is_found_before_anything_is_measured(
    trained, digits, tmp_path, command, monkeypatch, capsys
):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(f"sgr_kernels.commands.{command}.Batches", None)  # whoever measured would call it
    for out in (tmp_path / "file" / "result.png", tmp_path / "folder.png"):
        fails([command, str(trained), "--data", digits, "--out", str(out)], capsys)


@pytest.mark.parametrize("command", ["evaluate", "covariance"])
def test_what_cannot_be_written_has_been_printed(trained, few_digits, tmp_path, command, monkeypatch, capsys):
    def full(path, content):
        raise OSError("no space left")

    monkeypatch.setattr(f"sgr_kernels.commands.{command}.write_atomically", full)
    options = ["--draws", "1", "--eps", "8", "--pgd-steps", "1"] if command == "evaluate" else ["--source", "data"]
    arguments = [command, str(trained), "--data", few_digits, *options, "--out", str(tmp_path / "x.png")]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert "decay length" in printed.out
    assert printed.err == "sgr: error: no space left\n"


def test_a_folder_in_which_a_training_runs_is_left_to_it(few_digits, tmp_path, capsys):
    command = ["train", "--data", few_digits, "--out", str(tmp_path), "--method", "clean", "--epochs", "1"]
    with claimed(tmp_path):
        assert f"{tmp_path} is being written by process {os.getpid()}" in fails(command, capsys)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert main(command) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.safetensors", "history.json"]


def test_covariance_of_images_and_of_perturbations(trained, digits, tmp_path, capsys):
    picture = tmp_path / "c.png"
    command = ["covariance", str(trained), "--data", digits, "--source", "data", "gradient", "fgsm", "pgd"]
    assert main([*command, "--images", "20", "--out", str(picture)]) == 0
    assert "decay length" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    functions = json.loads(picture.with_suffix(".json").read_text())["functions"]
    assert list(functions) == ["data", "gradient", "fgsm", "pgd"]
    assert all(torch.tensor(f["values"]).shape == (1, 1, 39) for f in functions.values())
    assert functions["fgsm"]["values"][0][0][0] == pytest.approx((8 / 255) ** 2, rel=0.6)


@pytest.mark.parametrize("binning", ["rounded", "even", "offset"])
def test_covariance_that_a_network_was_trained_with(few_digits, tmp_path, binning):
    folder = tmp_path / "signs"
    options = ["--data", few_digits, "--epochs", "1", "--strength", "1", "--binning", binning, "--out", str(folder)]
    assert main(["train", "--method", "sgr_sign", *options]) == 0
    assert main(["covariance", str(folder), "--images", "10"]) == 0
    functions = json.loads((folder / "covariance.json").read_text())["functions"]
    assert list(functions) == ["data", "trained", "pgd"]
    learned = functions["trained"]["values"][0][0]
    assert learned[0] == pytest.approx(1.0)  # squares of signs
    values = load_model(folder)[1]["criterion"]["covariance.values"][0, 0]
    if binning == "offset":
        values = (values + values.flip(0, 1))[27:, 27:] / 2
    if binning != "rounded":
        values = (values[0] + values[:, 0]) / 2  # along the axes
    assert learned == pytest.approx(values.tolist())


@pytest.mark.parametrize("method", METHODS)
def test_every_training_can_be_diagnosed(method, few_digits, tmp_path):
    """With the covariance of its penalty, or of its noise, where there is one, else with an exponential one."""
    folder = tmp_path / "trained"
    options = ["--data", few_digits, "--epochs", "1", "--strength", "0.1", "--out", str(folder)]
    assert main(["train", "--method", method, *options]) == 0
    assert main(["diagnose", str(folder), "--images", "4", "--draws", "2", "--strengths", "0.1", "1"]) == 0
    found = json.loads((folder / "diagnosis.json").read_text())
    own = (METHODS[method].penalized and method != "l1") or method == "lrc"
    assert found["source"] == ("trained" if own else "exponential")
    assert found["penalty"] > 0


@pytest.mark.parametrize("command", ["train", "certify", "covariance"])
def test_a_plain_installation_names_the_extra_that_a_command_needs(command):
    """Modules are imported before a command's options are read: in a process of their own."""
    program = (
        "import sys; sys.modules.update(matplotlib=None, safetensors=None); from sgr_kernels.cli import main; "
        f"sys.exit(main(['{command}', '--help']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"sgr: error: \w+ is not installed: pip install 'sgr_kernels\[train\]'\n", done.stderr), (
        done.stderr
    )


def test_demo_writes_its_report(tmp_path):
    options = Options(epochs=1, images=20, draws=2, train_images=160, plan=Plan((0, 8), 2, (1.0, 16.0), (0.5, 1.5)))
    options = replace(options, certified=3, certificate_plan=CertificatePlan((2.0, 16.0), (0.25,), 20, 5))
    lines = []
    result = run(tmp_path / "report", options, say=lines.append)
    assert any("training SGR" in line for line in lines)
    summary = result.terminal_summary()
    assert all(name in summary for name in ("clean", "GN", "SGR", "noise 16"))
    page = (tmp_path / "report" / "report.md").read_text()
    pictures = {path.name for path in (tmp_path / "report").glob("*.png")}
    assert {name for name in pictures if f"({name})" in page} == pictures
    assert {"accuracy-against-eps.png", "accuracy-against-decay-length.png", "covariance-functions.png"} <= pictures
    assert "certified-accuracy.png" in pictures
    numbers = json.loads((tmp_path / "report" / "results.json").read_text())
    assert list(numbers["networks"]) == ["clean", "GN", "SGR"]
    assert [(c["network"], c["decay_length"], c["images"]) for c in numbers["certificates"]["certificates"]] == [
        (name, length, 3) for length in (2, 16) for name in ("clean", "GN", "SGR")
    ]
    sgr = numbers["networks"]["SGR"]
    assert sgr["settings"]["perturbation"] == "exponential"
    assert sgr["noise"]["16"]["accuracy"] == result.evaluations["SGR"].noise[16.0].accuracy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "/nowhere"], "data must be 'mnist-sample' or a folder, got '/nowhere'"),
        (["train", "--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
        (["train", "--device", "meta"], "device 'meta' cannot be used here"),
        (["evaluate", "/nowhere"], "no checkpoint at /nowhere"),
        (["covariance", "--source", "pgd"], "--source pgd needs a CHECKPOINT"),
        (["covariance", "--out", "c.pdf"], "--out must end in .png, got c.pdf"),
    ],
)
def test_bad_input_gets_one_clear_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fails(arguments, capsys)
    assert not list(tmp_path.glob("*.*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--method", "magic"], "invalid choice: 'magic'"),
        (["train", "--strength", "-1"], "argument --strength: expected a finite number >= 0, got -1"),
        (["train", "--strength", "nan"], "argument --strength: expected a finite number >= 0, got nan"),
        (["train", "--epochs", "0"], "argument --epochs: expected a whole number >= 1, got 0"),
        (["train", "--decay-length", "0"], "argument --decay-length: expected a number > 0, got 0"),
        (["evaluate", "x", "--seed", "-1"], "argument --seed: expected a whole number >= 0, got -1"),
        *(
            (
                [*command, "--seed", str(2**64)],
                "argument --seed: expected a whole number below 2**64, got 18446744073709551616",
            )
            for command in (["train"], ["evaluate", "x"], ["covariance"], ["demo"])
        ),
        (["sing"], "invalid choice: 'sing'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    assert message in refuses(arguments, capsys)


def test_a_checkpoint_needs_images_of_its_own_kind(trained, cifar, tmp_path, capsys):
    message = fails(["evaluate", str(trained), "--data", cifar], capsys)
    assert "the checkpoint was trained on mnist" in message
    assert "holds cifar10" in message
    damaged = tmp_path / "checkpoint.safetensors"
    damaged.write_bytes((trained / "checkpoint.safetensors").read_bytes()[:1000])
    assert "damaged or no checkpoint" in fails(["evaluate", str(damaged)], capsys)


def test_resuming_with_other_settings_is_refused(trained, digits, capsys):
    command = ["train", "--data", digits, "--out", str(trained), "--resume", "--method", "gn", "--batch-size", "32"]
    assert "trained with other settings (method: 'gn', not 'clean')" in fails([*command, "--no-augment"], capsys)


def test_a_traceback_is_shown_on_request():
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        main(["--traceback", "evaluate", "/nowhere"])
