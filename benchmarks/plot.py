"""Figures of results, from their JSON alone: time against size, roofline, scaling; training steps.

``sgr bench plot FILE... --out FOLDER`` draws what the files hold: ``time.svg`` and ``roofline.svg`` from the shapes,
``scaling.svg`` from the series N, C and B, ``step.svg`` from training steps.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks.plot_step import step_figure
from benchmarks.shapes import OPERATIONS, Problem

matplotlib.use("Agg")

Cell = dict[str, Any]
Points = dict[str, list[tuple[float, float, float, float]]]
SLOPES = {
    "N": {"sgr auto": (3, "N³: matrix transforms"), "dense": (4, "N⁴: dense"), "copy": (2, "N²: copy")},
    "C": {"sgr auto": (1, "C: transforms"), "dense": (2, "C²: dense"), "copy": (1, "C: copy")},
    "B": {"sgr auto": (1, "B"), "dense": (1, "B"), "copy": (1, "B")},
}
"""Growth of the cost with a scaling variable by the count of operations; of an image for N, of a batch else."""
_SIZES = {"N": "image size N (pixels)", "C": "channels C", "B": "batch B"}


def _right(cell: Cell) -> dict[str, dict[str, Any]]:
    """Rows by provider that were measured and are not wrong."""
    return {r["provider"]: r for r in cell["rows"] if "milliseconds" in r and r.get("correct", True)}


def _points(cells: list[Cell], x: Any, unit: Any) -> Points:
    """For each provider (x, time, 20 %, 80 %) of its cells in microseconds, divided by ``unit(problem)``."""
    points: Points = {}
    for cell in cells:
        problem = Problem(**cell["problem"])
        for name, row in _right(cell).items():
            times = (1e3 * row[key] / unit(problem) for key in ("milliseconds", "p20", "p80"))
            points.setdefault(name, []).append((x(problem), *times))
    return {name: sorted(values) for name, values in points.items()}


def _lines(axes: Axes, points: Points, names: list[str]) -> None:
    """Draw each provider in the colour of its place in ``names``."""
    for name, values in sorted(points.items()):
        x, median, low, high = np.array(values).T
        ours = name.startswith("sgr")
        style = {"color": "black", "linestyle": ":"} if name == "copy" else {"color": _colour(names.index(name))}
        axes.plot(x, median, marker="o" if ours else "s", markersize=3, linewidth=2 if ours else 1, label=name, **style)
        axes.fill_between(x, low, high, alpha=0.15, linewidth=0, color=style["color"])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)


def _colour(index: int) -> Any:
    return matplotlib.colormaps["tab20"](index % 20)


def _names(result: dict[str, Any]) -> list[str]:
    return sorted({row["provider"] for cell in result["cells"] for row in cell["rows"]})


def _full_range(result: dict[str, Any], operation: str) -> list[Cell]:
    return [
        cell
        for cell in result["cells"]
        if cell["series"] == "shapes" and cell["operation"] == operation and cell["problem"]["max_displacement"] is None
    ]


def _title(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return f"{machine['device']}, torch {machine['torch']}, commit {machine['commit']}"


def time_figure(result: dict[str, Any]) -> plt.Figure:
    """Time of one channel image against its size, a panel an operation; full-range covariances."""
    figure, panels = plt.subplots(2, 2, figsize=(11, 8), sharex=True, layout="constrained")
    for axes, operation in zip(panels.flat, OPERATIONS):
        cells = _full_range(result, operation)
        # Of several batches of one size, the largest: small ones show the cost of a launch.
        largest: dict[int, Cell] = {}
        for cell in sorted(cells, key=lambda c: c["problem"]["batch"]):
            largest[cell["problem"]["height"]] = cell
        _lines(
            axes, _points(list(largest.values()), lambda p: p.height, lambda p: p.batch * p.channels), _names(result)
        )
        axes.set_title(operation)
        axes.set_xlabel(_SIZES["N"])
        axes.set_ylabel("µs a channel image")
    handles = {label: h for axes in panels.flat for h, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    figure.suptitle(_title(result), fontsize=9)
    return figure


def flops(problem: Problem, provider: str) -> float:
    """Operations of v and q: of the dense product, or of the parity-split transforms and the channel mixing."""
    if provider == "dense":
        return 2.0 * problem.batch * problem.dimension**2
    images, pixels = problem.batch * problem.channels, problem.height * problem.width
    return images * pixels * (6.0 * (problem.height + problem.width) + 8.0 * problem.channels)


def roofline_figure(result: dict[str, Any]) -> plt.Figure:
    """Operations a second against operations a byte for v+q, under the copy's bandwidth and the best dense rate.

    An FFT inside a backend does fewer operations than are counted for it, so that its point may lie above the roof.
    """
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    cells = _full_range(result, "v+q")
    bandwidth, peak = 0.0, 0.0
    for index, name in enumerate(("sgr auto", "dense")):
        for cell in cells:
            rows, problem = _right(cell), Problem(**cell["problem"])
            if name not in rows:
                continue
            count, seconds = flops(problem, name), rows[name]["milliseconds"] / 1e3
            moved = 2 * problem.bytes + (4 * problem.dimension**2 if name == "dense" else 0)
            axes.plot(count / moved, count / seconds / 1e9, "os"[index], color=f"C{index}")
            axes.annotate(str(problem), (count / moved, count / seconds / 1e9), fontsize=6)
            peak = max(peak, count / seconds / 1e9)
            if "copy" in rows:
                bandwidth = max(bandwidth, rows["copy"]["gigabytes_per_second"])
    if bandwidth and peak:
        x = np.geomspace(1, 4096, 100)
        axes.plot(
            x, np.minimum(bandwidth * x, peak), color="gray", label=f"copy {bandwidth:.3g} GB/s, {peak:.3g} Gflop/s"
        )
    for index, name in enumerate(("sgr auto", "dense")):
        axes.plot([], [], "os"[index], color=f"C{index}", label=name)
    axes.set(xscale="log", yscale="log", xlabel="flop a byte", ylabel="Gflop/s", title=f"v+q; {_title(result)}")
    axes.title.set_fontsize(9)
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def scaling_figure(result: dict[str, Any]) -> plt.Figure:
    """Time of v+q against N, C and B, with theory's slopes through the last point of each."""
    figure, panels = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")
    for axes, (series, slopes) in zip(panels, SLOPES.items()):
        cells = [c for c in result["cells"] if c["series"] == series and c["operation"] == "v+q"]
        variable = {"N": "height", "C": "channels", "B": "batch"}[series]
        unit = (lambda p: p.batch) if series == "N" else (lambda p: 1)
        points = _points(cells, lambda p, variable=variable: getattr(p, variable), unit)
        _lines(axes, points, _names(result))
        for name, (power, label) in slopes.items():
            if len(points.get(name, [])) > 1:
                x = np.array([p[0] for p in points[name]])
                last = points[name][-1]
                axes.plot(x, last[1] * (x / last[0]) ** power, "--", color="gray", linewidth=0.8)
                axes.annotate(label, (x[0], last[1] * (x[0] / last[0]) ** power), fontsize=7, color="gray")
        axes.set(xlabel=_SIZES[series], ylabel="µs an image" if series == "N" else "µs a batch")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.suptitle(_title(result), fontsize=9)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Draw the figures that the files have cells for."""
    parser = argparse.ArgumentParser(prog="sgr bench plot", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="JSON of sgr bench operators or step, of one machine")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the figures")
    parser.add_argument("--format", choices=("svg", "png", "pdf"), default="svg")
    options = parser.parse_args(arguments)
    results = [json.loads(file.read_text()) for file in options.files]
    devices = {r["machine"]["device"] for r in results}
    if len(devices) > 1:
        raise ValueError(f"files: expected results of one machine, got {', '.join(sorted(devices))}")
    cells = [cell for result in results for cell in result.get("cells", [])]
    rows = [row for result in results for row in result.get("rows", [])]
    merged = {"machine": results[0]["machine"], "cells": cells, "rows": rows}
    series = {cell["series"] for cell in merged["cells"]}
    figures = {"time": time_figure, "roofline": roofline_figure} if "shapes" in series else {}
    if series & SLOPES.keys():
        figures["scaling"] = scaling_figure
    if rows:
        figures["step"] = lambda result: step_figure(result, _title(result))
    options.out.mkdir(parents=True, exist_ok=True)
    for name, draw in figures.items():
        path = options.out / f"{name}.{options.format}"
        figure = draw(merged)
        figure.savefig(path, dpi=150)
        plt.close(figure)
        print(path)


if __name__ == "__main__":
    main()
