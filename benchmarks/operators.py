"""The operators against their peers: time, bandwidth, memory and error, shape by shape.

``sgr bench operators`` (or ``python -m benchmarks.operators``) measures cell after cell, a cell being a shape and an
operation. All providers of a cell are built, compared with float64, and warmed up before the first is timed; then they
take turns (``timing.py``). A speed-up is the ratio of two medians of one cell, with its 95 % bootstrap interval, and is
against peers of the same precision or better; a wrong answer gets none. What is measured is written at once: the same
command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, memory, providers, tables
from benchmarks.peers import Unsupported
from benchmarks.providers import TOLERANCES, Provider
from benchmarks.shapes import OPERATIONS, SERIES, SERIES_OPERATIONS, Exact, Problem
from benchmarks.timing import Samples, Timer, interleave, paired_ratio, summary, timer

Cell = dict[str, Any]
_DENSE = {"highest": "dense", "high": "dense tf32", "medium": "dense bf16"}
_LEVELS = list(TOLERANCES)
_BUDGET = {"cpu": 3.0, "cuda": 2.0}


def measure(
    problem: Problem,
    operation: str,
    chosen: list[Provider],
    device: torch.device,
    budget: float,
    series: str = "shapes",
) -> Cell:
    """One cell: a row for each provider, and how ``auto`` compares with the fastest of the others.

    Args:
        problem: Shape and covariance.
        operation: One of `OPERATIONS`.
        chosen: Providers to compare.
        device: Where to compute.
        budget: Seconds of sampling for all providers together.
        series: Name under which the plots find the cell.
    """
    images = problem.images(device)
    exact = Exact(problem, images, problem.covariance(device).table)
    rows: dict[str, dict[str, Any]] = {}
    timers: dict[str, Timer] = {}
    for provider in chosen:
        row = rows[provider.name] = {"provider": provider.name, "kind": provider.kind, "precision": provider.precision}
        try:
            run = provider.build(problem, operation, device)
            outputs = run(images)
            if provider.kind != "bound":
                row["error"] = exact.error(operation, outputs)
                row["correct"] = all(e <= TOLERANCES[provider.precision][name] for name, e in row["error"].items())
            del outputs
            if memory.supported(device):
                row["peak_bytes"] = memory.peak(run, images)
            timers[provider.name] = timer(run, images)
            row["method"] = timers[provider.name].method
        except Unsupported as error:
            row["reason"] = str(error)
        except torch.OutOfMemoryError:
            row["reason"] = "out of memory"
            torch.cuda.empty_cache()
    samples = interleave(timers, budget)
    for name, values in samples.items():
        rows[name] |= summary(values)
    _compare(rows, samples, problem.bytes * (2 if operation in ("v+q", "forward+backward") else 1))
    cell: Cell = {"series": series, "problem": vars(problem), "operation": operation, "rows": list(rows.values())}
    others = _fastest(rows, [n for n, r in rows.items() if n != "sgr auto" and r["precision"] == "highest"])
    if others and rows.get("sgr auto", {}).get("correct"):
        cell["auto_to_fastest"] = {"provider": others, **paired_ratio(samples["sgr auto"], samples[others])}
    return cell


def _fastest(rows: dict[str, dict[str, Any]], names: list[str]) -> str | None:
    """Of some providers, the fastest whose answer is right."""
    right = [name for name in names if rows[name].get("correct") and "milliseconds" in rows[name]]
    return min(right, key=lambda name: rows[name]["milliseconds"], default=None)


def _compare(rows: dict[str, dict[str, Any]], samples: Samples, moved: int) -> None:
    """Add bandwidth, the fraction of the copy bound, and the speed-ups."""
    for name, row in rows.items():
        if name not in samples:
            continue
        moved_here = 2 * moved if row["kind"] == "bound" and moved == _input_bytes(moved, row) else moved
        row["gigabytes_per_second"] = moved_here / row["milliseconds"] / 1e6
