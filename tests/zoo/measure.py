"""Each model of the zoo under each way to the penalty's gradient: ``python -m tests.zoo.measure [PASS]``.

Three passes, each of which can be run alone and goes on where it was stopped (``--again`` starts anew):

- ``gradients``: the penalty's part of the parameters' gradient, against an oracle in float64 that shares nothing with
  the methods but first derivatives: the central difference of cross-entropy's gradient along ``v = Sigma g``, Sigma the
  frozen exponential covariance of decay length 3. Of several step lengths the best counts, for a kink may lie within
  one, or rounding hide a small penalty. Casts to float32 inside of a model are taken out for the float64 runs. Random
  numbers are replayed from a seed, BatchNorm is in training mode.
- ``memory``: peak of a training step, as `benchmarks.step` has it.
- ``times``: of a training step, by turns with a plain one; to be run on a quiet machine.

Every model has a process of its own with one thread and a time limit. A line of JSON for each model and method goes to
``benchmarks/results/zoo.jsonl``, of which `tests.zoo.table` makes the table in docs/support.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import sgr_kernels as sgr
from benchmarks.memory import ENVIRONMENT
from benchmarks.step import Training, memory_of_a_step
from sgr_kernels.penalty import choice, proof
from sgr_kernels.penalty.choice import METHODS
from sgr_kernels.reproduce import machine
from tests.zoo.models import ENTRIES, Entry

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "zoo.jsonl"
LENGTHS = (1e-8, 1e-9, 1e-10, 1e-11, 1e-12, 1e-7, 1e-6)
"""Of the oracle's steps, relative to the images."""
PART = "fraction=1/4"
WAYS: dict[str, dict[str, Any]] = {
    **{method: {"method": method, "allow_kinks": True} for method in METHODS},
    PART: {"fraction": 1 / 4},
}
Row = dict[str, Any]


class Wide(TorchFunctionMode):
    """While active, what is of float64 stays so where a model asks for float32."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Leave out the cast."""
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


class Problem:
    """A model, a batch and a covariance in one precision; each gradient starts from the same buffers and streams."""

    def __init__(self, entry: Entry, dtype: torch.dtype) -> None:
        self.model, (images, self.labels) = entry.model().to(dtype), entry.batch()
        self.images, self.loss_fn, self.wide = images.to(dtype), entry.loss_fn, dtype == torch.float64
        channels, *size = entry.shape[1:]
        self.covariance = sgr.CovarianceFunction.exponential(channels, tuple(size), 3.0).to(dtype)
        self._buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}

    def criterion(self, strength: float, **options: Any) -> sgr.SGRLoss:
        """On this covariance."""
        return sgr.SGRLoss(self.covariance, strength, loss_fn=self.loss_fn, **options)

    def losses(self, images: Tensor) -> Tensor:
        """Of a plain pass."""
        return self.loss_fn(self.model(images), self.labels)

    def gradient(self, loss: Callable[[], Tensor]) -> Tensor:
        """Of a loss in all parameters, one vector, float64."""
        self._start()
        self.model.zero_grad()
        with Wide() if self.wide else warnings.catch_warnings():
            loss().backward()
        parameters = (p for p in self.model.parameters() if p.requires_grad)
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double() for p in parameters])

    def plain(self, images: Tensor | None = None) -> Tensor:
        """Gradient of the mean loss."""
        return self.gradient(lambda: self.losses(self.images if images is None else images).mean())

    def direction(self) -> Tensor:
        """``v = Sigma g``."""
        self._start()
        leaf = self.images.clone().requires_grad_()
        with Wide() if self.wide else warnings.catch_warnings():
            (gradient,) = torch.autograd.grad(self.losses(leaf).sum(), leaf)
        return self.covariance.product(gradient)

    def _start(self) -> None:
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(self._buffers[name])
        torch.manual_seed(2)
        np.random.seed(2)  # noqa: NPY002
        random.seed(2)


class Oracle:
    """The penalty's gradient by central differences of plain gradients, in float64."""

    def __init__(self, problem: Problem) -> None:
        self._problem, self._direction = problem, problem.direction()
        self._found: list[Tensor] = []
        self.best = 0

    def __getitem__(self, index: int) -> Tensor:
        """By the step of `LENGTHS`."""
        while len(self._found) <= index:
            images = self._problem.images
            step = LENGTHS[len(self._found)] * float(images.norm() / self._direction.norm())
            ahead, behind = (self._problem.plain(images + side * step * self._direction) for side in (1, -1))
            self._found.append((ahead - behind) / (2 * step))
        return self._found[index]

    def error(self, found: Tensor) -> float:
        """Relative, of the best step's."""
        errors: list[float] = []
        for index in range(len(LENGTHS)):
            errors.append(float((found - self[index]).norm() / self[index].norm()))
            if errors[-1] <= 1e-6:
                break
        self.best = errors.index(min(errors))
        return min(errors)


class Said(logging.Handler):
    """What the package says to its log meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self.lines.append(record.getMessage())

    def __enter__(self) -> Said:
        logger = logging.getLogger("sgr_kernels")
        self._level = logger.level
        logger.addHandler(self)
        logger.setLevel(logging.INFO)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("sgr_kernels").removeHandler(self)
        logging.getLogger("sgr_kernels").setLevel(self._level)


def gradients(entry: Entry) -> Iterator[Row]:
    """A row a method, and what ``"auto"`` chose."""
    wide, narrow = Problem(entry, torch.float64), Problem(entry, torch.float32)
    oracle, clean = Oracle(wide), {problem: problem.plain() for problem in (wide, narrow)}
    own = float((clean[narrow] - clean[wide]).norm() / clean[wide].norm())

    def balanced() -> float:
        """The strength that makes the penalty's part as large as the other; so it must not be a kink's."""
        return float(clean[wide].norm() / oracle[oracle.best].norm())

    def penalty(problem: Problem, method: str) -> Tensor:
        strength = balanced()
        criterion = problem.criterion(strength, method=method, allow_kinks=True)
        return (problem.gradient(lambda: criterion(problem.model, problem.images, problem.labels)) - clean[problem]) / (
            strength
        )

    for method in METHODS:
        row: Row = {"method": method, "parameters": clean[wide].numel(), "plain32": own}
        with Said() as said:
            try:
                # The first time tells which of the oracle's steps is the best.
                row["error64"] = oracle.error(penalty(wide, method))
            except sgr.PenaltyGradientError as error:
                row["reason64"] = " ".join(str(error).split())
            try:
                found, wanted = penalty(narrow, method), oracle[oracle.best]
                row["error32"] = float((found - wanted).norm() / wanted.norm())
                row["cosine32"] = float(found @ wanted / (found.norm() * wanted.norm()))
                row["norm32"] = float(found.norm() / wanted.norm())
            except sgr.PenaltyGradientError as error:
                row["reason32"] = " ".join(str(error).split())
        row["said"] = [" ".join(line.split())[:200] for line in said.lines]
        yield row
    with Said() as said:
        try:
            criterion = narrow.criterion(balanced(), method="auto")
            narrow.gradient(lambda: criterion(narrow.model, narrow.images, narrow.labels))
            yield {
                "method": "auto",
                "chose": next(m for m in METHODS for line in said.lines if f"method {m!r}" in line),
            }
        except sgr.PenaltyGradientError as error:
            yield {"method": "auto", "reason32": " ".join(str(error).split())}


def _training(entry: Entry, way: str) -> Training:
    model, (images, labels) = entry.model(), entry.batch()
    channels, *size = entry.shape[1:]
    if way == "plain":
        return Training(model, lambda model, x, y: entry.loss_fn(model(x), y).mean(), images, labels)
    covariance = sgr.CovarianceFunction(channels, tuple(size), target_variance=0.06)
    return Training(model, sgr.SGRLoss(covariance, 0.1, loss_fn=entry.loss_fn, **WAYS[way]), images, labels)


def memory(entry: Entry) -> Iterator[Row]:
    """A row a way, each from a process of its own."""
    plain = 0
    for way in ("plain", *WAYS):
        if reader := _forked(lambda send, way=way: send(_peak(entry, way))):
            row = {"method": way, **reader}
            plain = row.get("bytes", 0) if way == "plain" else plain
            yield row if "bytes" not in row else {**row, "memory_ratio": row["bytes"] / plain}


def _peak(entry: Entry, way: str) -> Row:
    # Between steps nothing is left of the trial before the first one, which takes the longest.
    choice.prove = lambda name, trial: proof.WAYS[name]()
    try:
        return {"bytes": memory_of_a_step(_training(entry, way))}
    except sgr.PenaltyGradientError as error:
        return {"reason32": " ".join(str(error).split())}


def times(entry: Entry) -> Iterator[Row]:
    """A row a way; all in turn, round after round, so that drifts of the machine hit all alike."""
    trainings, first, reasons = {}, {}, {}
    for way in ("plain", *WAYS):
        training = _training(entry, way)
        try:
            start = time.perf_counter()
            training.step()
            first[way], trainings[way] = time.perf_counter() - start, training
        except sgr.PenaltyGradientError as error:
            reasons[way] = " ".join(str(error).split())
    seconds: dict[str, list[float]] = {way: [] for way in trainings}
    start = time.perf_counter()
    while len(seconds["plain"]) < 3 or (time.perf_counter() - start < 4 and len(seconds["plain"]) < 15):
        for way, training in trainings.items():
            seconds[way] += training.seconds()
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    for way, median in medians.items():
        yield {
            "method": way,
            "milliseconds": 1e3 * median,
            "time_ratio": median / medians["plain"],
            "first_ratio": first[way] / medians["plain"],
            "rounds": len(seconds[way]),
        }
    for way, reason in reasons.items():
        yield {"method": way, "reason32": reason}


PASSES: dict[str, Callable[[Entry], Iterator[Row]]] = {"gradients": gradients, "memory": memory, "times": times}
LIMITS = {"gradients": 600.0, "memory": 300.0, "times": 120.0}
"""Seconds of a model."""


def _forked(task: Callable[[Callable[[Row], None]], None], limit: float = 300.0) -> Row:
    """What a forked process sends, or why it sends nothing."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=task, args=(sender.send,))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(limit) else {"failed": f"no answer in {limit:.0f} seconds"}
    except EOFError:
        process.join()
        return {"failed": f"the process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _run(entry: Entry, which: str) -> list[Row]:
    """Rows of a model in a pass, whatever becomes of it."""

    def task(send: Callable[[Row], None]) -> None:
        torch.set_num_threads(1)
        rows: list[Row] = []
        try:
            for row in PASSES[which](entry):
                rows.append(row)
        except Exception as error:  # a library may raise anything
            rows.append({"method": "all", "failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]})
        send({"rows": rows})

    answer = _forked(task, LIMITS[which])
    return answer.get("rows") or [{"method": "all", **answer}]


def read(file: Path = RESULTS) -> list[Row]:
    """The rows that there are."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _write(file: Path, rows: list[Row]) -> None:
    order = {name: index for index, name in enumerate(ENTRIES)}
    passes = list(PASSES)
    rows = sorted(rows, key=lambda row: (order.get(row["model"], -1), passes.index(row["pass"])))
    scratch = file.with_suffix(".part")
    scratch.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scratch.replace(file)


def main() -> None:
    """Run passes over models."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.measure", description=__doc__.split("\n")[0])
    parser.add_argument("which", nargs="?", default=None, choices=PASSES, help=f"one of {', '.join(PASSES)}; none: all")
    parser.add_argument("--models", nargs="+", default=list(ENTRIES), metavar="NAME", help="or parts of names")
    parser.add_argument("--again", action="store_true", help="also what there are results of")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="of one process at a time")
    options = parser.parse_args()
    if options.which == "memory" and not ENVIRONMENT.items() <= os.environ.items():
        # An allocator's settings are read at its start.
        os.execve(sys.executable, [sys.executable, "-m", "tests.zoo.measure", *sys.argv[1:]], os.environ | ENVIRONMENT)
    if options.which is None:
        for which in PASSES:
            subprocess.run([sys.executable, "-m", "tests.zoo.measure", which, *sys.argv[1:]], check=True)
        return
    # Before the forks, which then begin at once.
    import timm
    import torchvision
    import transformers

    about = machine.describe(torch.device("cpu")) | {"threads": 1}
    made = {key: about[key] for key in ("device", "torch", "commit", "threads")}
    made |= {library.__name__: library.__version__ for library in (timm, torchvision, transformers)}
    names = [name for name in ENTRIES if any(part in name for part in options.models)]
    which = options.which
    done = {row["model"] for row in read(options.results) if row["pass"] == which}
    for name in names:
        if name in done and not options.again:
            continue
        start = time.perf_counter()
        found = [{"model": name, "pass": which, **row, **made} for row in _run(ENTRIES[name], which)]
        others = [row for row in read(options.results) if (row["model"], row["pass"]) != (name, which)]
        _write(options.results, others + found)
        brief = [{k: v for k, v in row.items() if k not in {*made, "model", "pass", "said"}} for row in found]
        print(f"{which} {name} {time.perf_counter() - start:.0f} s", *map(json.dumps, brief), sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
