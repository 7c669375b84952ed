"""``sgr certify``: what it prints and writes, and that an interrupted run goes on where it was."""

from __future__ import annotations

import json

import pytest
import torch

from sgr_kernels.cli import main
from sgr_kernels.commands import certify
from tests.commands.outcomes import fails
from tests.data_files import write_idx

OPTIONS = ["--images", "6", "--decay-lengths", "2", "8", "--sigmas", "0.25", "0.5", "--draws", "30", "--selection", "5"]


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """The digits' folder and two trainings' folders."""
    root = tmp_path_factory.mktemp("certify")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    write_idx(root / "digits", 96, 20)
    for name, options in (("clean", ["--method", "clean"]), ("gn", ["--method", "gn", "--strength", "3"])):
        training = ["--epochs", "1", "--batch-size", "32", "--no-augment", "--device", "cpu", *options]
        assert main(["train", "--data", str(root / "digits"), "--out", str(root / name), *training]) == 0
    yield str(root / "digits"), [str(root / "clean"), str(root / "gn")]
    torch.set_num_threads(threads)


def command(networks, out, *more):
    digits, folders = networks
    return ["certify", *folders, "--data", digits, *OPTIONS, "--device", "cpu", "--out", str(out), *more]


def test_it_prints_tables_and_writes_json_and_a_picture(networks, tmp_path, capsys):
    out = tmp_path / "certificates"
    assert main(command(networks, out)) == 0
    printed = capsys.readouterr().out
    assert "noise of decay length 8; at radius 1: a shift of all pixels by " in printed
    assert "network  sigma" in printed
    record = json.loads((out / "certificates.json").read_text())
    found = record["certificates"]
    assert [(c["network"], c["decay_length"], c["sigma"]) for c in found] == [
        (name, length, sigma) for length in (2, 8) for sigma in (0.25, 0.5) for name in ("clean", "gn")
    ]
    for cell in found:
        assert cell["images"] == len(cell["radii"]) == 6
        assert all(sum(counts) == 30 for counts in cell["counts"])
    assert [unit["decay_length"] for unit in record["units"]] == [2, 8]
    assert (out / "certificates.png").read_bytes().startswith(b"\x89PNG")
    assert "already holds certificates: add --resume" in fails(command(networks, out), capsys)
    before = (out / "certificates.json").read_bytes()
    assert main(command(networks, out, "--resume")) == 0
    assert (out / "certificates.json").read_bytes() == before


def test_an_interrupted_run_goes_on_to_the_same_numbers(networks, tmp_path, monkeypatch, capsys):
    """The interrupt is honoured between two images, and what is counted is not counted again."""
    whole, out = tmp_path / "whole", tmp_path / "interrupted"
    assert main(command(networks, whole)) == 0
    rounds = iter([False] * 7 + [True] + [False] * 9 + [True] + [False] * 99)

    class Interrupt:
        def __enter__(self):
            return lambda: next(rounds)

        def __exit__(self, *error):
            return False

    monkeypatch.setattr(certify.common, "interrupt_between_steps", Interrupt)
    assert main(command(networks, out)) == 1
    assert "the same command with --resume" in "".join(capsys.readouterr())
    kept = json.loads((out / "certificates.json").read_text())["rows"]
    assert [len(cell["rows"]) for cell in kept] == [6, 2]
    assert main(command(networks, out, "--resume")) == 1
    assert main(command(networks, out, "--resume")) == 0
    first, second = (json.loads((folder / "certificates.json").read_text()) for folder in (whole, out))
    assert first == second


def test_certificates_of_something_else_are_not_continued(networks, tmp_path, capsys):
    out = tmp_path / "c"
    small = ["--images", "1", "--decay-lengths", "2", "--sigmas", "0.5"]
    assert main(command(networks, out, *small)) == 0
    for change, words in (
        (["--draws", "40"], "draws: 40, not 30"),
        (["--seed", "1"], "seed: 1, not 0"),
        (["--images", "2"], "images: 2, not 1"),
    ):
        error = fails(command(networks, out, *small, *change, "--resume"), capsys)
        assert f"another run ({words})" in error
    (out / "certificates.json").write_text("{}")
    assert "holds no certificates" in fails(command(networks, out, *small, "--resume"), capsys)


def test_bad_input_gets_one_line(networks, tmp_path, capsys):
    digits, folders = networks
    assert "draws: expected at least 10, got 9" in fails(command(networks, tmp_path / "a", "--draws", "9"), capsys)
    twice = ["certify", folders[0], f"{folders[0]}/", "--data", digits, "--out", str(tmp_path / "b")]
    assert "got one twice" in fails(twice, capsys)
    assert "alpha: expected" in fails(command(networks, tmp_path / "c", "--alpha", "1.5"), capsys)
    (tmp_path / "file").write_text("in the way")
    fails(command(networks, tmp_path / "file"), capsys)
