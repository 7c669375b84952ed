"""The benchmarks run, on the smallest problems, and their rows hold together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import step
from sgr_kernels.cli import main


def test_step_benchmark_writes_rows_for_every_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "step.json"
    ways = ["sgr", "sgr, finite-difference"]
    options = ["--networks", "carlini-wagner-mnist", "--batch", "4", "--rounds", "2", "--device", "cpu"]
    assert main(["bench", "step", *options, "--ways", *ways, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [row["way"] for row in result["rows"]] == ["clean", *ways]
    assert {"device", "torch", "commit"} <= set(result["machine"])
    for row in result["rows"]:
        assert row["milliseconds"] > 0
        assert row["peak_bytes"] > 0
    assert result["rows"][0]["time_ratio"] == 1
    assert "sgr, finite-difference" in capsys.readouterr().out


@pytest.mark.parametrize("way", step.WAYS)
def test_every_way_takes_a_step(way: str) -> None:
    import torch

    training = step.Training("vit" if way == "sgr" else "carlini-wagner-mnist", way, 2, torch.device("cpu"))
    before = [p.clone() for p in training.model.parameters()]
    training.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, training.model.parameters()))
