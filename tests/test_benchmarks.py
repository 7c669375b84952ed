"""The benchmarks run, on the smallest problems, and their rows hold together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import dense_covariance, dense_product

from benchmarks import operators, providers, step, tables
from benchmarks.peers import Unsupported
from benchmarks.providers import Provider
from benchmarks.shapes import OPERATIONS, Exact, Problem
from benchmarks.timing import interleave, paired_ratio
from sgr_kernels.cli import main

CPU = torch.device("cpu")


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
    training = step.Training("vit" if way == "sgr" else "carlini-wagner-mnist", way, 2, torch.device("cpu"))
    before = [p.clone() for p in training.model.parameters()]
    training.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, training.model.parameters()))


@pytest.mark.parametrize("problem", [Problem(5, 1, 7, 6), Problem(4, 3, 8, 9), Problem(4, 2, 9, 9, 3)], ids=str)
def test_float64_answers_are_those_of_the_definition(problem: Problem) -> None:
    images, covariance = problem.images(CPU), problem.covariance(CPU)
    exact = Exact(problem, images, covariance.table)
    v, q = dense_product(images, covariance.table, "even")
    torch.testing.assert_close(exact.product[0], v, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(exact.product[1], q, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(exact.estimate, dense_covariance(images, "radial")[..., : problem.bins])


@pytest.mark.parametrize(
    "provider", [p for p in providers.all_providers(CPU) if p.kind != "bound"], ids=lambda p: p.name
)
@pytest.mark.parametrize("problem", [Problem(3, 3, 8, 7), Problem(4, 1, 9, 9, 3)], ids=str)
def test_every_provider_is_right_or_says_why_it_cannot(problem: Problem, provider: Provider) -> None:
    images = problem.images(CPU)
    exact = Exact(problem, images, problem.covariance(CPU).table)
    reasons: list[str] = []
    for operation in [o for o in OPERATIONS if (provider.name, o) != ("rfft2 compiled", "v+q")]:  # seconds to compile
        try:
            outputs = provider.build(problem, operation, CPU)(images)
        except Unsupported as reason:
            reasons.append(str(reason))
            continue
        assert provider.correct(exact.error(operation, outputs))
    assert all(reasons)


def test_large_matrices_are_refused_with_the_memory_they_need() -> None:
    dense = providers.named(["dense"], CPU)[0]
    with pytest.raises(Unsupported, match=r"the matrix takes 90\.6 GB"):
        dense.build(Problem(64, 3, 224, 224), "v+q", CPU)


def test_a_wrong_answer_gets_no_ratio_and_is_no_base_of_one() -> None:
    def twice(problem: Problem, operation: str, device: torch.device) -> providers.Run:
        right = providers.named(["dense"], device)[0].build(problem, operation, device)
        return lambda images: tuple(2 * output for output in right(images))

    chosen = [Provider("dense", "peer", twice), *providers.named(["sgr torch", "rfft2"], CPU)]
    cell = operators.measure(Problem(2, 1, 8, 8), "v+q", chosen, CPU, 0.01)
    rows = {row["provider"]: row for row in cell["rows"]}
    assert not rows["dense"]["correct"]
    assert not {"over_dense", "over_best_peer"} & rows["dense"].keys()
    assert "over_dense" not in rows["sgr torch"]
    assert rows["sgr torch"]["over_best_peer"]["provider"] == "rfft2"
    assert "wrong" in tables.cell_table(cell)


def test_operators_benchmark_resumes_draws_and_fills_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, names = tmp_path / "operators.json", ["copy", "sgr auto", "dense", "dense tf32", "conv2d"]
    command = ["bench", "operators", "--device", "cpu", "--budget", "0.01", "--out", str(out), "--providers", *names]
    monkeypatch.setattr(operators, "add_peaks", lambda *args: None)
    assert main([*command, "--shapes", "2,1,8,8"]) == 0
    first = json.loads(out.read_text())
    assert [cell["operation"] for cell in first["cells"]] == list(OPERATIONS)
    assert main([*command, "--shapes", "2,1,8,8", "2,1,8,8,3", "--operations", "v+q"]) == 0
    both = json.loads(out.read_text())
    assert both["cells"][:4] == first["cells"]
    assert [cell["problem"]["max_displacement"] for cell in both["cells"]] == [None] * 4 + [3]
    row = next(row for row in both["cells"][4]["rows"] if row["provider"] == "sgr auto")
    assert row["correct"]
    assert row["p20"] <= row["milliseconds"] <= row["p80"]
    assert row["over_dense"]["low"] <= row["over_dense"]["ratio"] <= row["over_dense"]["high"]
    assert "TF32 is a format of GPUs" in capsys.readouterr().out

    both["machine"]["commit"] = "another"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(both))
    assert main([*command[: -len(names) - 2], str(other), "--shapes", "2,1,8,8"]) == 2
    assert "commit: another" in capsys.readouterr().err

    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- operators -->\nold\n<!-- /operators -->\nafter\n")
    assert main(["bench", "tables", str(out), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| (2,1,8,8) | v+q |" in text
    assert main(["bench", "plot", str(out), "--out", str(tmp_path)]) == 0
    assert {"time.svg", "roofline.svg"} <= {path.name for path in tmp_path.iterdir()}


def test_peak_memory_comes_from_a_process_of_its_own(tmp_path: Path) -> None:
    problem = Problem(256, 1, 128, 128)
    cell = operators.measure(problem, "v+q", providers.named(["copy"], CPU), CPU, 0.01)
    result = {"machine": {}, "cells": [cell]}
    out = tmp_path / "operators.json"
    out.write_text(json.dumps(result))
    operators.add_peaks(result, out, CPU)
    assert 0.9 * problem.bytes < cell["rows"][0]["peak_bytes"] < 1.5 * problem.bytes


def test_timers_take_turns_and_slow_ones_leave_early() -> None:
    class Clock:
        method = "counted"

        def __init__(self, name: str, seconds: float) -> None:
            self.name, self.seconds = name, seconds

        def sample(self) -> float:
            order.append(self.name)
            now[0] += self.seconds
            return self.seconds

    order: list[str] = []
    now = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.timing.time.perf_counter", lambda: now[0])
        samples = interleave({"fast": Clock("fast", 0.01), "slow": Clock("slow", 1.0)}, budget=10.0)
    rounds = [tuple(order[i : i + 2]) for i in range(0, 10, 2)]
    assert {frozenset(pair) for pair in rounds} == {frozenset(("fast", "slow"))}
    assert len(set(rounds)) == 2  # nobody always follows the same neighbour
    assert len(samples["slow"]) == 5
    assert len(samples["fast"]) > 20


def test_paired_ratio_cancels_a_drift_of_the_machine() -> None:
    drift = [1.0 + 0.1 * i for i in range(20)]
    ratio = paired_ratio([3 * d for d in drift], drift)
    assert list(ratio.values()) == pytest.approx([3, 3, 3])


def test_scaling_figure_has_all_three_series(tmp_path: Path) -> None:
    chosen = providers.named(["copy", "sgr auto", "dense"], CPU)
    problems = {"N": [Problem(1, 1, n, n) for n in (4, 8)], "B": [Problem(b, 1, 4, 4) for b in (1, 2)]}
    problems["C"] = [Problem(1, c, 4, 4) for c in (1, 2)]
    cells = [operators.measure(p, "v+q", chosen, CPU, 0.01, s) for s in problems for p in problems[s]]
    file = tmp_path / "scaling.json"
    file.write_text(json.dumps({"machine": {"device": "x", "torch": "y", "commit": "z"}, "cells": cells}))
    assert main(["bench", "plot", str(file), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "scaling.svg").exists()
