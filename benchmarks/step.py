"""Cost of a training step: clean, gradient norm, SGR by each method and cadence, adversarial training.

``sgr bench step`` (or ``python -m benchmarks.step``) measures all ways of one network in turn, round after round, so
that drifts of the machine hit all alike; what counts are ratios of medians to the clean step of the same run. Networks
that the file holds with all these ways, of this machine and commit, are not measured again. A lazy penalty is measured
over whole periods. Peak memory is that of a process of its own, above what it holds between steps.

On a GPU each way is measured twice, eagerly and with its gradients captured as CUDA graphs
(`sgr_kernels.training.cuda_graphs`), the optimizer beside them; ratios of captured steps are to the captured clean one,
and a sample is of several steps, between which nothing waits but what a step itself waits for.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sgr_kernels as sgr
from benchmarks.memory import ENVIRONMENT
from benchmarks.networks import NETWORKS
from sgr_kernels.commands.common import whole
from sgr_kernels.penalty.statistics import Criterion
from sgr_kernels.reproduce import machine
from sgr_kernels.training import cuda_graphs
from sgr_kernels.training.cuda_graphs import Parts, StepGraphs

WAYS = {
    "clean": {},
    "gn": {"covariance": "identity"},
    "sgr": {"method": "double-backward"},
    "sgr, forward-mode": {"method": "forward-mode"},
    "sgr, finite-difference": {"method": "finite-difference", "allow_kinks": True},
    "sgr, every 4th step": {"penalty_every": 4},
    "sgr, every 16th step": {"penalty_every": 16},
    "sgr, a quarter by importance": {"fraction": 1 / 4},
    "sgr, an eighth by importance": {"fraction": 1 / 8},
    "sgr, a sixteenth by importance": {"fraction": 1 / 16},
    "sgr, a quarter at random": {"fraction": 1 / 4, "sampling": "uniform"},
    "pgd-7": {"pgd": 7},
    "pgd-10": {"pgd": 10},
}
"""Ways to train. SGR learns its covariance from the sign of the gradient, on steps that have a penalty."""

CAPTURED = ", captured"
"""After the name of a way whose steps are captured."""
_STEPS = 8
"""Of a sample on a GPU, at least."""


@functools.cache
def graphs_on(device: torch.device) -> Any:
    """What makes graphs: one for all ways, which never run at the same time and so can share the graphs' memory."""
    return cuda_graphs.graphs_on(device)


class NotCaptured(Exception):
    """Why a way's steps cannot be captured."""


class _Function(Criterion):
    """A loss without state."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Any) -> torch.Tensor:
        return self.function(*arguments)


class _Adversarial(Criterion):
    """Cross-entropy on images that PGD has moved from a random start."""

    def __init__(self, steps: int, device: torch.device) -> None:
        super().__init__()
        self.attack_steps, self.generator = steps, torch.Generator(device).manual_seed(0)

    def generators(self) -> list[torch.Generator]:
        return [self.generator]

    def forward(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        moved = sgr.attacks.pgd(model, images, labels, eps=8 / 255, steps=self.attack_steps, generator=self.generator)
        return nn.functional.cross_entropy(model(moved), labels)


def _criterion(way: dict[str, Any], shape: tuple[int, ...], device: torch.device) -> Callable[..., torch.Tensor]:
    if "pgd" in way:
        return _Adversarial(way["pgd"], device)
    if not way:
        return lambda model, images, labels: nn.functional.cross_entropy(model(images), labels)
    if way.get("covariance") == "identity":
        return sgr.SGRLoss(sgr.IdentityCovariance(), 0.1)
    covariance = sgr.CovarianceFunction(shape[0], shape[1:], target_variance=0.06)
    return sgr.SGRLoss(covariance, 0.1, update_every=way.get("penalty_every", 1), **way)


class Training:
    """A model in training on a fixed batch."""

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., torch.Tensor],
        images: torch.Tensor,
        labels: Any,
        period: int = 1,
    ) -> None:
        self.model, self.criterion, self.images, self.labels, self.period = model, criterion, images, labels, period
        self.optimizer = torch.optim.Adam(model.parameters(), 1e-4)
        self.graphs: StepGraphs | None = None

    @classmethod
    def of(cls, network: str, way: str, batch: int, device: torch.device) -> Training:
        """One of the networks, one way, on random images."""
        torch.manual_seed(0)
        captured, way = way.endswith(CAPTURED), way.removesuffix(CAPTURED)
        build, shape = NETWORKS[network]
        model = build().to(device).train()
        criterion = _criterion(WAYS[way], shape, device)
        if isinstance(criterion, nn.Module):
            criterion.to(device)
        images = torch.rand(batch, *shape, device=device)
        labels = torch.randint(0, 10, (batch,), device=device)
        training = cls(model, criterion, images, labels, WAYS[way].get("penalty_every", 1))
        if captured:
            training.capture()
        return training

    def capture(self) -> None:
        """Take steps until those of each kind are captured.

        Raises:
            NotCaptured: If they cannot be.
        """
        criterion = self.criterion if isinstance(self.criterion, Criterion) else _Function(self.criterion)
        self.graphs = StepGraphs(self.model, criterion, self._gradients, graphs_on(self.images.device))
        for _ in range(4 * self.period):
            self.step()
        if self.graphs.reasons:
            raise NotCaptured(self.graphs.reasons[0])

    def _gradients(self, parts: Parts) -> None:
        self.optimizer.zero_grad()
        for images, labels in parts:
            self.criterion(self.model, images, labels).backward()

    def step(self) -> None:
        batch = [(self.images, self.labels)]
        if self.graphs is None:
            self._gradients(batch)
        else:
            self.graphs(batch)
        self.optimizer.step()

    def seconds(self) -> list[float]:
        """Times of the steps of one period; on a GPU their mean over some periods."""
        if not self.images.is_cuda:
            return [self._timed(self.step) for _ in range(self.period)]
        steps = self.period * -(-_STEPS // self.period)
        return [self._timed(lambda: [self.step() for _ in range(steps)]) / steps]

    def operator_seconds(self) -> tuple[float, float]:
        """Times of the penalty with its gradient in g, from g, and of the covariance's update."""
        covariance = self.criterion.covariance
        gradient = torch.randn_like(self.images).requires_grad_()
        signs = gradient.detach().sign()
        covariance.update(signs)
        return (
            self._timed(lambda: covariance.quadratic_form(gradient).sum().backward()),
            self._timed(lambda: covariance.update(signs)),
        )

    def _timed(self, call: Callable[[], Any]) -> float:
        synchronize = torch.cuda.synchronize if self.images.is_cuda else lambda: None
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        return time.perf_counter() - start


def memory_of_a_step(training: Training) -> int:
    """Peak bytes of a step above what is held between steps; for a process of its own with `ENVIRONMENT`."""
    training.step()
    device = training.images.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        training.step()
        return torch.cuda.max_memory_allocated(device) - before
    training.optimizer.zero_grad()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    status = Path("/proc/self/status")

    def kilobytes(field: str) -> int:
        match = re.search(rf"{field}:\s+(\d+)", status.read_text())
        assert match is not None
        return int(match[1])

    before = kilobytes("VmRSS")
    training.criterion.steps = 0  # a step with a penalty, whatever the cadence
    training.step()
    return (kilobytes("VmHWM") - before) * 1024


def peak_memory(network: str, way: str, batch: int, device: torch.device) -> int:
    """`memory_of_a_step`; on a CPU in a fresh process, whose allocator holds nothing."""
    if device.type == "cuda":
        return memory_of_a_step(Training.of(network, way, batch, device))
    arguments = ["--networks", network, "--ways", way, "--batch", str(batch), "--device", str(device), "--memory-only"]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.step", *arguments],
        env={**os.environ, **ENVIRONMENT},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(result.stdout)


def measure(network: str, ways: list[str], batch: int, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """One row a way: median time with quartiles, peak memory, and both as ratios to the clean step.

    A captured one's time is to the captured clean step, and has the eager step's as a multiple of it; its memory is not
    measured.
    """
    trainings, reasons = {}, {}
    for way in ways:
        try:
            trainings[way] = Training.of(network, way, batch, device)
            trainings[way].seconds()
        except (sgr.PenaltyGradientError, NotCaptured) as error:
            reasons[way] = " ".join(str(error).split())
            trainings.pop(way, None)
    for way in set(trainings) if "clean" + CAPTURED in reasons else ():
        if way.endswith(CAPTURED):
            trainings.pop(way)
            reasons[way] = f"there is no captured clean step to compare with: {reasons['clean' + CAPTURED]}"
    times: dict[str, list[list[float]]] = {way: [] for way in trainings}
    operators: list[tuple[float, float]] = []
    for _ in range(rounds):
        for way, training in trainings.items():
            times[way].append(training.seconds())
        if "sgr" in trainings:
            operators.append(trainings["sgr"].operator_seconds())
    trainings.clear()
    rows: list[dict[str, Any]] = []
    milliseconds: dict[str, float] = {}
    for way in ways:
        row = {"network": network, "way": way, "batch": batch}
        rows.append(row)
        if way in reasons:
            row["reason"] = reasons[way]
            continue
        # Each step of a period has its own median; a mean over the period would let in every disturbance.
        low, median, high = (
            statistics.mean(quartile)
            for quartile in zip(*(statistics.quantiles(steps, n=4) for steps in zip(*times[way])))
        )
        milliseconds[way] = row["milliseconds"] = 1e3 * median
        row["quartiles"] = [1e3 * low, 1e3 * high]
        eager = way.removesuffix(CAPTURED)
        if eager != way:
            row["time_ratio"] = row["milliseconds"] / milliseconds["clean" + CAPTURED]
            row["eager_ratio"] = milliseconds[eager] / row["milliseconds"]
            continue
        row["time_ratio"] = row["milliseconds"] / milliseconds["clean"]
        row["peak_bytes"] = peak_memory(network, way, batch, device)
        row["memory_ratio"] = row["peak_bytes"] / rows[0]["peak_bytes"]
        if way == "sgr":
            penalty, update = map(statistics.median, zip(*operators))
            row["penalty_share"], row["update_share"] = (1e3 * part / row["milliseconds"] for part in (penalty, update))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    lines = ["| network | batch | way | ms | / clean | peak MB | / clean | operator + update |", "|---" * 8 + "|"]
    for row in rows:
        head = f"| {row['network']} | {row['batch']} | {row['way']} |"
        if "reason" in row:
            lines.append(f"{head} no | | | | |")
            continue
        share = f"{row['penalty_share']:.1%} + {row['update_share']:.1%}" if "penalty_share" in row else ""
        memory = f"{row['peak_bytes'] / 1e6:.0f} | {row['memory_ratio']:.2f}" if "peak_bytes" in row else "|"
        digits = 1 if row["milliseconds"] >= 10 else 3
        lines.append(f"{head} {row['milliseconds']:.{digits}f} | {row['time_ratio']:.2f} | {memory} | {share} |")
    return "\n".join(lines)


def _rounds(text: str) -> int:
    """Argument type: so many that they have quartiles."""
    rounds = whole(text)
    if rounds < 2:
        raise argparse.ArgumentTypeError(f"expected at least 2, got {text}")
    return rounds


def _rows_before(out: Path | None, head: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the same machine, versions and commit that a file holds."""
    if out is None or not out.exists():
        return []
    result = json.loads(out.read_text())
    return result["rows"] if result["machine"] == head["machine"] else []


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, and write the rows as JSON."""
    parser = argparse.ArgumentParser(prog="sgr bench step", description=__doc__.split("\n")[0])
    for name, choices in (("--networks", NETWORKS), ("--ways", WAYS)):
        listed = ", ".join(f'"{choice}"' for choice in choices)
        parser.add_argument(
            name, nargs="+", choices=choices, default=list(choices), metavar="NAME", help=f"of {listed}; none: all"
        )
    parser.add_argument("--batch", type=int, help="none: 128, but on a CPU 16 for resnet18 and vit, 8 for the larger")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=_rounds, help="none: 15, but on a CPU 5 for all but the paper's networks")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--memory-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if options.memory_only:
        print(memory_of_a_step(Training.of(options.networks[0], options.ways[0], options.batch, device)))
        return
    large = {"resnet18": 16, "vit": 16, "resnet50": 8, "vit-s": 8} if device.type == "cpu" else {}
    ways = list(dict.fromkeys(["clean", *options.ways]))
    if device.type == "cuda":
        ways += [way + CAPTURED for way in ways]
    head = {"machine": machine.describe(device)}
    rows = _rows_before(options.out, head)
    for network in options.networks:
        if set(ways) <= {row["way"] for row in rows if row["network"] == network}:
            continue
        rows = [row for row in rows if row["network"] != network]
        batch = options.batch or large.get(network, 128)
        rounds = options.rounds or (5 if network in large else 15)
        rows += measure(network, ways, batch, device, rounds)
        if options.out is not None:
            options.out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    print(json.dumps(head["machine"]))
    print(table(rows))


if __name__ == "__main__":
    main()
