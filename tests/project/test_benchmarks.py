"""The benchmarks run, on the smallest problems, and their rows hold together."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import dense_covariance, dense_product

from benchmarks import lazy, operators, plot, providers, solve, step, tables, timing
from benchmarks.peers import Unsupported
from benchmarks.plot_step import step_figure
from benchmarks.providers import Provider
from benchmarks.shapes import OPERATIONS, Exact, Problem
from benchmarks.timing import interleave, paired_ratio
from sgr_kernels.cli import main
from tests.data_files import write_idx
from tests.graph_emulator import EmulatedGraph

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
    assert main(["bench", "step", *options, "--ways", "sgr", "--out", str(out)]) == 0
    assert json.loads(out.read_text()) == result  # nothing was left to measure
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- steps -->\nold\n<!-- /steps -->\nafter\n")
    assert main(["bench", "tables", str(out), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert "old" not in text
    assert f"| sgr | {result['rows'][1]['time_ratio']:.2f} (" in text
    assert text.endswith("<!-- /steps -->\nafter\n")
    assert main(["bench", "tables", str(out)]) == 0
    assert "| sgr, finite-difference |" in capsys.readouterr().out
    assert main(["bench", "plot", str(out), "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.glob("*.svg")] == ["step.svg"]


def test_agreement_of_finite_differences_with_exact_gradients(tmp_path: Path) -> None:
    out = tmp_path / "agreement.json"
    options = ["--epochs", "0", "1", "--train-images", "32", "--batches", "1", "--strengths", "1"]
    assert main(["bench", "agreement", *options, "--precisions", "float32", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["epochs"], row["precision"]) for row in rows] == [(0, "float32"), (1, "float32")]
    for row in rows:
        assert -1 <= row["penalty_cosine"]["min"] <= row["penalty_cosine"]["mean"] <= 1
        assert 0.9 < row["cosine"]["min"] <= 1


@pytest.mark.parametrize("way", step.WAYS)
def test_every_way_takes_a_step(way: str) -> None:
    training = step.Training.of("vit" if way == "sgr" else "carlini-wagner-mnist", way, 2, torch.device("cpu"))
    before = [p.clone() for p in training.model.parameters()]
    training.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, training.model.parameters()))


@pytest.mark.parametrize("way", ["clean", "sgr", "sgr, every 4th step", "pgd-7"])
def test_captured_steps_are_those_of_eager_ones(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "graphs_on", lambda device: EmulatedGraph)
    captured = step.Training.of("carlini-wagner-mnist", way + step.CAPTURED, 2, CPU)
    eager = step.Training.of("carlini-wagner-mnist", way, 2, CPU)
    period = eager.period
    for _ in range(4 * period):
        eager.step()
    for _ in range(period):
        captured.step()
        eager.step()
    assert captured.graphs is not None
    assert captured.graphs.captured == min(2, period)
    for one, other in zip(captured.model.parameters(), eager.model.parameters()):
        assert torch.equal(one, other)


def test_rows_of_captured_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "graphs_on", lambda device: EmulatedGraph)
    monkeypatch.setattr(step, "peak_memory", lambda *args: 1)
    monkeypatch.setitem(step.WAYS, "of attacks", {"perturbation": "deepfool"})
    ways = ["clean", "sgr", "of attacks"]
    ways += [way + step.CAPTURED for way in ways]
    rows = {row["way"]: row for row in step.measure("carlini-wagner-mnist", ways, 2, CPU, 2)}
    assert rows["clean, captured"]["time_ratio"] == 1
    captured, eager = rows["sgr, captured"], rows["sgr"]
    assert captured["time_ratio"] == captured["milliseconds"] / rows["clean, captured"]["milliseconds"]
    assert captured["eager_ratio"] == eager["milliseconds"] / captured["milliseconds"]
    assert rows["of attacks, captured"]["reason"].startswith("deepfool: this part of an attack takes the host")
    result = {"machine": {}, "rows": list(rows.values())}
    assert f"| sgr, captured | {captured['time_ratio']:.2f} |" in tables.step_overview(result)
    assert "| of attacks, captured | no |" in step.table(result["rows"])
    assert [axes.get_xlabel() for axes in step_figure(result, "").axes] == [
        "time of a step / clean step",
        "peak memory of a step / clean step",
    ]


def test_without_a_captured_clean_step_no_captured_one_has_a_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(self: step.Training) -> None:
        if not isinstance(self.criterion, torch.nn.Module):
            raise step.NotCaptured("the network counts")

    monkeypatch.setattr(step.Training, "capture", capture)
    monkeypatch.setattr(step, "peak_memory", lambda *args: 1)
    ways = ["clean", "gn", "clean, captured", "gn, captured"]
    rows = {row["way"]: row for row in step.measure("carlini-wagner-mnist", ways, 2, CPU, 2)}
    assert rows["gn"]["time_ratio"] > 0
    assert "the network counts" in rows["gn, captured"]["reason"]


def test_a_way_that_a_network_does_not_support_gets_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoSecondDerivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return NoSecondDerivative.apply(self.linear(x.flatten(1)).relu())

    monkeypatch.setitem(step.NETWORKS, "once", (Network, (1, 8, 8)))
    monkeypatch.setattr(step, "peak_memory", lambda *args: 1)
    ways = ["clean", "sgr", "sgr, finite-difference", "sgr, every 4th step"]
    rows = {row["way"]: row for row in step.measure("once", ways, 4, CPU, 2)}
    assert rows["sgr"]["reason"].startswith("method: ")
    assert rows["sgr, finite-difference"]["time_ratio"] > 0
    assert "| sgr | no |" in step.table(list(rows.values()))


def row(way: str, seed: int, value: float) -> dict:
    return {"way": way, "seed": seed, "test_accuracy": 0.9, "pgd_area": value, "noise_accuracy": value}


def test_lazy_summary_compares_ways_seed_by_seed() -> None:
    rows = [row("clean", seed, 0.2) for seed in range(3)]
    rows += [row("every step", seed, 0.4 + 0.1 * seed) for seed in range(3)]
    rows += [row("every 4th", seed, 0.39 + 0.1 * seed) for seed in range(3)]
    rows += [row("every 16th", seed, value) for seed, value in enumerate((0.3, 0.42, 0.44))]
    result = lazy.summary(rows)
    fourth, sixteenth = (result[way]["pgd_area"] for way in ("every 4th", "every 16th"))
    assert fourth["kept"] == pytest.approx(0.29 / 0.3)
    assert fourth["behind"]["mean"] == pytest.approx(0.01)
    assert fourth["behind"]["interval95"] == pytest.approx([0.01, 0.01])  # the seeds' own spread is in both
    assert fourth["keeps"]
    assert sixteenth["kept"] == pytest.approx((0.38667 - 0.2) / 0.3, rel=1e-3)
    differences = (0.1, 0.08, 0.16)
    half = 4.303 * (sum((d - 0.34 / 3) ** 2 for d in differences) / 2) ** 0.5 / 3**0.5
    assert sixteenth["behind"]["interval95"] == pytest.approx([0.34 / 3 - half, 0.34 / 3 + half])
    assert not sixteenth["keeps"]
    assert not result["every step"]["pgd_area"].get("kept")
    assert "| every 4th | 90.0 (90.0 to 90.0)" in lazy.table(result)


def test_lazy_benchmark_goes_on_and_refuses_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = lazy.Plan((0, 8), pgd_steps=2, decay_lengths=(4.0,), noise_eps=(0.5,), draws=2)
    monkeypatch.setitem(lazy.PLANS, "mnist", plan)
    write_idx(tmp_path / "digits", 100, 20)
    out = tmp_path / "lazy.json"
    command = ["bench", "lazy", "--data", str(tmp_path / "digits"), "--out", str(out), "--epochs", "1"]
    command += ["--train-images", "100", "--images", "10"]
    assert main([*command, "--ways", "clean", "every step", "--seeds", "0"]) == 0
    first = json.loads(out.read_text())["rows"]
    assert main([*command, "--ways", "clean", "finite difference", "--seeds", "0"]) == 0
    assert "1 of 1 networks" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["rows"][:2] == first
    assert [row["way"] for row in result["rows"]] == ["clean", "every step", "finite difference"]
    assert result["summary"]["finite difference"]["pgd_area"]["behind"]["interval95"] is None
    assert main([*command, "--strength", "1"]) == 2
    assert "holds results of another run (strength: 10.0, now 1.0)" in capsys.readouterr().err


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


def test_auto_is_measured_as_it_is_whatever_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    from sgr_kernels.backends import registry

    asked: list[str] = []
    call = providers.ops.call
    monkeypatch.setattr(registry, "_choice", "reference")
    monkeypatch.setattr(providers.ops, "call", lambda op, name, *args: (asked.append(name), call(op, name, *args))[1])
    monkeypatch.setattr(
        providers.functional.operators, "call", lambda op, name, *args: providers.ops.call(op, name, *args)
    )
    problem = Problem(2, 1, 16, 16)
    for operation in ("v+q", "accumulation"):
        providers.named(["sgr auto"], CPU)[0].build(problem, operation, CPU)(problem.images(CPU))
    assert len(asked) == 2
    assert "reference" not in asked
    assert registry._choice == "reference"


def test_times_are_taken_on_the_images_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams, events and graphs belong to the current device, which need not be the one that is measured."""
    current: list[torch.Tensor] = []

    @contextlib.contextmanager
    def device_of(images: torch.Tensor) -> Iterator[None]:
        current.append(images)
        yield
        current.pop()

    def timer(run: providers.Run, images: torch.Tensor) -> timing.CpuTimer:
        assert current[0] is images
        return timing.CpuTimer(run, images)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(operators, "timer", timer)
    cell = operators.measure(Problem(2, 1, 4, 4), "v+q", providers.named(["copy"], CPU), CPU, 0.01)
    assert cell["rows"][0]["milliseconds"] > 0
    assert not current


def test_a_file_of_something_else_is_refused_by_name(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    out.write_text(json.dumps({"machine": {}, "rows": []}))
    with pytest.raises(ValueError, match=r"step\.json: expected results of sgr bench operators"):
        operators.resume(out, {}, fresh=False)
    assert operators.resume(out, {}, fresh=True)["cells"] == []


@pytest.mark.parametrize("command", ["tables", "plot"])
def test_tables_and_figures_of_other_results_are_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "lazy.json"
    file.write_text(json.dumps({"machine": {"device": "x"}, "rows": [row("clean", 0, 0.2)]}))
    assert main(["bench", command, str(file)]) == 2
    assert "lazy.json: expected results of sgr bench operators or step" in capsys.readouterr().err


def test_a_figure_names_every_commit_it_was_measured_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = operators.measure(Problem(1, 1, 4, 4), "v+q", providers.named(["copy"], CPU), CPU, 0.01, "N")
    files = []
    for commit in ("first", "second"):
        files.append(tmp_path / f"{commit}.json")
        machine = {"device": "x", "torch": "y", "commit": commit}
        files[-1].write_text(json.dumps({"machine": machine, "cells": [cell]}))
    drawn: list[str] = []
    title = plot._title
    monkeypatch.setattr(plot, "_title", lambda result: (drawn.append(title(result)), drawn[-1])[1])
    assert main(["bench", "plot", *map(str, files), "--out", str(tmp_path)]) == 0
    assert drawn == ["x, torch y, commit first, second"]


def test_columns_of_the_overview_agree_where_they_say_the_same() -> None:
    """A slow peer sits out rounds: the ratio over common rounds is not that of the medians over all."""
    samples = {"sgr auto": [1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0], "dense": [6.0, 6.0, 6.0]}
    kinds = {"sgr auto": "ours", "dense": "peer"}
    rows = {
        name: {"provider": name, "kind": kinds[name], "precision": "highest", "correct": True, **timing.summary(values)}
        for name, values in samples.items()
    }
    problem = Problem(2, 1, 4, 4)
    operators._compare(rows, samples, problem, "v+q")
    text = tables.overview([{"problem": vars(problem), "operation": "v+q", "rows": list(rows.values())}])
    assert text.splitlines()[-1] == "| (2,1,4,4) | v+q | 2e+03 | – | 6 | – | – | 6 (dense) |"


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


def test_solve_benchmark_goes_on_and_every_solver_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "solve.json"
    command = ["bench", "solve", "--device", "cpu", "--budget", "0.01", "--out", str(out), "--decay-lengths", "2"]
    assert main([*command, "--shapes", "4,1,9,12"]) == 0
    first = json.loads(out.read_text())["cells"]
    for row in first[0]["rows"]:
        assert row.get("reason") == "linear_operator is not installed" or row["residual"] < 1e-5
    assert first[0]["iterations"]["most"] < first[0]["iterations"]["without a preconditioner"]
    assert "| (4,1,9,12) | 2 |" in capsys.readouterr().out
    assert main([*command, "--shapes", "4,1,9,12", "4,2,3,5", "--providers", "sgr", "dense solve float64"]) == 0
    cells = json.loads(out.read_text())["cells"]
    assert cells[:1] == first
    assert [row["provider"] for row in cells[1]["rows"]] == ["sgr", "dense solve float64"]
    assert cells[1]["rows"][1]["over sgr"]["ratio"] > 0


def test_the_solve_benchmark_refuses_matrices_that_are_too_large() -> None:
    problem = Problem(1, 3, 224, 224)
    covariance = solve.covariance_of(problem, 1.0, CPU)
    with pytest.raises(Unsupported, match=r"the matrix takes 181\.3 GB"):
        solve.dense(torch.float64)(covariance, problem)
