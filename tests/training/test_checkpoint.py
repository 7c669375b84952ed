"""Checkpoints: nothing is changed on the way through the file, and a file that is no checkpoint is refused."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from sgr_kernels.training import checkpoint
from sgr_kernels.training.checkpoint import CheckpointError


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return type(a) is type(b) and a == b


def test_nested_states_come_back_as_they_were(tmp_path):
    shared = torch.randn(4, 3)
    state = {
        "tensors": {"x": shared, "view": shared[1], "transposed": shared.T, "scalar": torch.tensor(3), "none": None},
        "dtypes": [torch.zeros(2, dtype=d) for d in (torch.float64, torch.bfloat16, torch.uint8, torch.bool)],
        "empty": torch.zeros(0, 3),
        0: {"exp_avg": torch.randn(2), "betas": (0.9, 0.999)},
        "a.b": torch.ones(1),
        "a": {"b": torch.zeros(1)},
        "__tensor__": "a name the format uses itself",
        "numbers": [1, 2.5, True, "text", float("inf")],
    }
    checkpoint.save(tmp_path / "c", state)
    assert same(checkpoint.load(tmp_path / "c"), state)


def test_optimizer_states_round_trip(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    checkpoint.save(tmp_path / "c", {"optimizer": optimizer.state_dict()})
    loaded = checkpoint.load(tmp_path / "c")["optimizer"]
    assert same(loaded, optimizer.state_dict())
    torch.optim.Adam(model.parameters()).load_state_dict(loaded)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "c", {"x": 1})

    def crash(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tmp_path / "c", {"x": 2})
    assert checkpoint.load(tmp_path / "c") == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_temporary_files_of_killed_runs_are_cleaned_by_the_next(tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    (tmp_path / f".c.{killed.pid}").write_bytes(b"half a")
    for name in (f".c.{os.getppid()}", ".c.old", f".other.{killed.pid}"):  # of the living, and what is not ours
        (tmp_path / name).write_bytes(b"kept")
    checkpoint.save(tmp_path / "c", {"x": 1})
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"c", f".c.{os.getppid()}", ".c.old", f".other.{killed.pid}"}


def test_a_newer_version_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "VERSION", 2)
    checkpoint.save(tmp_path / "c", {"x": 1})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="version 2, this sgr_kernels reads up to 1"):
        checkpoint.load(tmp_path / "c")


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    checkpoint.save(tmp_path / "c", {"x": torch.randn(100)})
    whole = (tmp_path / "c").read_bytes()
    for name, content in {"cut": whole[:-8], "header": whole[:50], "empty": b"", "text": b"hello " * 100}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
            checkpoint.load(tmp_path / name)
    save_file({"x": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(CheckpointError, match="no checkpoint of sgr_kernels"):
        checkpoint.load(tmp_path / "other")
    damaged = {"format": checkpoint.FORMAT, "version": "1", "tree": json.dumps({"x": {"__tensor__": "y"}})}
    save_file({"x": torch.ones(1)}, tmp_path / "lacking", damaged)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(tmp_path / "lacking")
    nested = "[" * 100_000 + "]" * 100_000
    for number, (version, tree) in enumerate(
        [("one", "{}"), ("1", "[]"), ("1", "3"), ("1", "{"), ("1", '{"x": {"__items__": 3}}'), ("1", nested),
         ("1", '{"x": {"__tensor__": ["x"]}}'), ("1", '{"x": {"__items__": [[["k"], 1]]}}')]
    ):  # fmt: skip
        path = tmp_path / f"edited{number}"
        save_file({"x": torch.ones(1)}, path, {"format": checkpoint.FORMAT, "version": version, "tree": tree})
        with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
            checkpoint.load(path)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "nowhere")


def test_values_that_json_cannot_hold_are_named(tmp_path):
    with pytest.raises(TypeError, match=r"cannot hold set \(at 'a.0'\)"):
        checkpoint.save(tmp_path / "c", {"a": [{1, 2}]})
    assert not list(tmp_path.iterdir())


def test_states_of_another_shape_are_refused():
    state = torch.nn.Linear(3, 2).state_dict()
    with pytest.raises(CheckpointError, match=r"model has 'weight' of shape \(2, 3\), expected \(2, 4\)"):
        checkpoint.load_module(torch.nn.Linear(4, 2), state, "model")
    with pytest.raises(CheckpointError, match="model has 'bias', which is unknown here"):
        checkpoint.load_module(torch.nn.Linear(3, 2, bias=False), state, "model")
    del state["bias"]
    with pytest.raises(CheckpointError, match="model lacks 'bias'"):
        checkpoint.load_module(torch.nn.Linear(3, 2), state, "model")


def test_generators_are_restored():
    state = checkpoint.rng_state()
    drawn = torch.rand(3)
    checkpoint.restore_rng(state)
    assert torch.equal(torch.rand(3), drawn)
