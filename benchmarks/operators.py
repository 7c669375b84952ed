"""The operators against their peers: time, bandwidth, memory and error, shape by shape.

``sgr bench operators`` (or ``python -m benchmarks.operators``) measures cell after cell, a cell being a shape and an
operation. All providers of a cell are built, compared with float64, and warmed up before the first is timed; then they
take turns (``timing.py``). A speed-up is the ratio of two medians of one cell, with its 95 % bootstrap interval, and is
against peers of the same precision or better; a wrong answer gets none. What is measured is written at once: the same
command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import memory, providers, tables
from benchmarks.peers import Unsupported
from benchmarks.providers import TOLERANCES, Provider
from benchmarks.shapes import OPERATIONS, SERIES, SERIES_OPERATIONS, Exact, Problem
from benchmarks.timing import Samples, Timer, interleave, paired_ratio, summary, timer
from sgr_kernels.reproduce import machine

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
    images, exact = given(problem, device)
    # Streams, events and graphs are those of the current device.
    with torch.cuda.device_of(images):
        rows, samples = _rows(problem, operation, chosen, images, exact, budget)
    _compare(rows, samples, problem, operation)
    cell: Cell = {"series": series, "problem": vars(problem), "operation": operation, "rows": list(rows.values())}
    other = _fastest(rows, [n for n, r in rows.items() if n != "sgr auto" and r["precision"] == "highest"])
    if other and rows.get("sgr auto", {}).get("correct"):
        cell["auto_to_fastest"] = {"provider": other, **paired_ratio(samples["sgr auto"], samples[other])}
    return cell


def _rows(
    problem: Problem, operation: str, chosen: list[Provider], images: torch.Tensor, exact: Exact, budget: float
) -> tuple[dict[str, dict[str, Any]], Samples]:
    """Errors, memory and times of each provider, or the reason why it has none."""
    rows: dict[str, dict[str, Any]] = {}
    timers: dict[str, Timer] = {}
    for provider in chosen:
        row = rows[provider.name] = {"provider": provider.name, "kind": provider.kind, "precision": provider.precision}
        try:
            run = provider.build(problem, operation, images.device)
            outputs = run(images)
            if provider.kind != "bound":
                row["error"] = exact.error(operation, outputs)
                row["correct"] = provider.correct(row["error"])
            del outputs
            if memory.supported(images.device):
                row["peak_bytes"] = memory.peak(run, images)
            timers[provider.name] = timer(run, images)
            row["method"] = timers[provider.name].method
        except Unsupported as error:
            row["reason"] = str(error)
        except torch.OutOfMemoryError:
            row["reason"] = "out of memory"
            torch.cuda.empty_cache()
        except Exception as error:  # of a compiler, or a launch: the others are to be measured all the same
            if images.is_cuda:
                torch.cuda.synchronize()  # raises where the device no longer answers
            row["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    samples = interleave(timers, budget)
    for name, values in samples.items():
        rows[name] |= summary(values)
    return rows, samples


@functools.lru_cache(maxsize=1)
def given(problem: Problem, device: torch.device) -> tuple[torch.Tensor, Exact]:
    """Images and exact answers; kept for the next operation of the same problem."""
    images = problem.images(device)
    return images, Exact(problem, images, problem.covariance(device).table)


def _fastest(rows: dict[str, dict[str, Any]], names: list[str]) -> str | None:
    """Of some providers, the fastest whose answer is right."""
    right = [name for name in names if rows[name].get("correct") and "milliseconds" in rows[name]]
    return min(right, key=lambda name: rows[name]["milliseconds"], default=None)


def _compare(rows: dict[str, dict[str, Any]], samples: Samples, problem: Problem, operation: str) -> None:
    """Add bandwidth, the fraction of the copy's bandwidth, and the speed-ups."""
    for name in samples:
        row = rows[name]
        passes = 2 if row["kind"] == "bound" or operation in ("v+q", "forward+backward") else 1
        row["gigabytes_per_second"] = passes * problem.bytes / row["milliseconds"] / 1e6
    for name in samples:
        row = rows[name]
        if "copy" in samples:
            row["copy_fraction"] = row["gigabytes_per_second"] / rows["copy"]["gigabytes_per_second"]
        if not row.get("correct"):
            continue
        as_accurate = _LEVELS[: _LEVELS.index(row["precision"]) + 1]
        peers = [n for n, r in rows.items() if r["kind"] == "peer" and r["precision"] in as_accurate and n != name]
        peer, dense = _fastest(rows, peers), _fastest(rows, [n for n in peers if n == _DENSE[row["precision"]]])
        for key, base in (("over_dense", dense), ("over_best_peer", peer)):
            if base is not None:
                row[key] = {"provider": base, **paired_ratio(samples[base], samples[name])}


def _peaks(cells: list[Cell], device: torch.device) -> None:
    """Print the peak bytes of each provider of some cells, a line each; in a process with `memory.ENVIRONMENT`."""
    for index, cell in enumerate(cells):
        problem = Problem(**cell["problem"])
        images = problem.images(device)
        missing = {r["provider"] for r in cell["rows"] if "milliseconds" in r and "peak_bytes" not in r}
        for provider in providers.named(sorted(missing), device):
            run = provider.build(problem, cell["operation"], device)
            print(json.dumps([index, provider.name, memory.peak(run, images)]), flush=True)


def add_peaks(result: dict[str, Any], out: Path, device: torch.device) -> None:
    """Measure on a CPU the peak memory of all rows that have none, in one fresh process, and write the file again."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.operators",
        "--device",
        str(device),
        "--out",
        str(out),
        "--memory-only",
    ]
    cwd = Path(__file__).parent.parent
    environment = {**os.environ, **memory.ENVIRONMENT}
    with subprocess.Popen(command, env=environment, cwd=cwd, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            index, name, peak = json.loads(line)
            row = next(r for r in result["cells"][index]["rows"] if r["provider"] == name)
            row["peak_bytes"] = peak
            write(out, result)
    if process.returncode:
        print(f"peak memory: the process that measures it ended with status {process.returncode}", file=sys.stderr)


def write(out: Path, result: dict[str, Any]) -> None:
    """Replace the file at once, so that an interrupt leaves the old one or the new one."""
    part = out.with_name(out.name + ".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(out)


def resume(out: Path | None, description: dict[str, Any], fresh: bool) -> dict[str, Any]:
    """What an earlier run on the same machine and commit has measured, or an empty result.

    Raises:
        ValueError: If the file holds something else, or results of another machine, version or commit.
    """
    empty: dict[str, Any] = {"machine": description, "cells": []}
    if out is None or fresh or not out.exists():
        return empty
    result = json.loads(out.read_text())
    if not {"machine", "cells"} <= result.keys():
        raise ValueError(f"{out}: expected results of sgr bench operators; name another file, or add --fresh")
    differing = [key for key in description if result["machine"].get(key) != description[key]]
    if differing:
        key = differing[0]
        raise ValueError(
            f"{out} holds results of another run ({key}: {result['machine'].get(key)}, now {description[key]}); "
            "name another file, or overwrite it with --fresh"
        )
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sgr bench operators", description=__doc__.split("\n")[0])
    parser.add_argument("--series", nargs="+", choices=SERIES, default=["shapes", "truncated"])
    parser.add_argument(
        "--shapes", nargs="+", type=Problem.parse, metavar="B,C,H,W[,R]", help="these, instead of the series"
    )
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, help="default: all; v+q for the scaling series")
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, help="seconds of sampling for each cell")
    parser.add_argument("--limit", type=float, default=math.inf, help="begin no cell after so many seconds")
    parser.add_argument("--out", type=Path, help="JSON file to write, or to go on with")
    parser.add_argument("--fresh", action="store_true", help="overwrite the file instead of going on with it")
    parser.add_argument("--memory-only", action="store_true", help=argparse.SUPPRESS)
    return parser


def _todo(options: argparse.Namespace) -> list[tuple[str, Problem, str]]:
    if options.shapes:
        return [("shapes", p, o) for p in options.shapes for o in options.operations or OPERATIONS]
    return [
        (series, problem, operation)
        for series in options.series
        for problem in SERIES[series]
        for operation in options.operations or SERIES_OPERATIONS.get(series, ["v+q"])
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure what is not in the file yet, writing after every cell, and print the table."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    if options.memory_only:
        _peaks(json.loads(options.out.read_text())["cells"], device)
        return
    chosen = providers.named(options.providers, device)
    result = resume(options.out, machine.describe(device), options.fresh)
    print(json.dumps(result["machine"]), flush=True)
    done = {(c["series"], Problem(**c["problem"]), c["operation"]) for c in result["cells"]}
    todo = [cell for cell in _todo(options) if cell not in done]
    budget = options.budget or _BUDGET[device.type]
    start = time.monotonic()
    for count, (series, problem, operation) in enumerate(todo):
        if time.monotonic() - start > options.limit:
            print(f"{len(todo) - count} cells left; the same command goes on with them", file=sys.stderr)
            break
        cell = measure(problem, operation, chosen, device, budget, series)
        result["cells"].append(cell)
        if options.out is not None:
            write(options.out, result)
        print(f"\n{tables.cell_table(cell)}", flush=True)
    if device.type == "cpu" and options.out is not None and Path("/proc/self/clear_refs").exists():
        add_peaks(result, options.out, device)
    print(f"\n{tables.overview(result['cells'])}")


if __name__ == "__main__":
    main()
