"""Figures of results, from their JSON alone: time against size, roofline, scaling; training steps.

``sgr bench plot FILE... --out FOLDER`` draws what the files hold: ``time.svg`` and ``roofline.svg`` from the shapes,
``scaling.svg`` from the series N, C and B, ``step.svg`` from training steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks import tables
from benchmarks.plot_step import step_figure
from benchmarks.shapes import OPERATIONS, Problem

matplotlib.use("Agg")

Cell = dict[str, Any]
Points = dict[str, list[tuple[float, float, float, float]]]
SLOPES = {
    "N": {"sgr auto": (3, "N³: one level of transforms"), "dense": (4, "N⁴: dense"), "copy": (2, "N²: copy")},
    "C": {"sgr auto": (1, "C: transforms"), "dense": (2, "C²: dense"), "copy": (1, "C: copy")},
    "B": {"sgr auto": (1, "B: transforms"), "dense": (1, "B: dense"), "copy": (1, "B: copy")},
}
"""Growth of the cost with a scaling variable by the count of operations; of an image for N, of a batch else."""
_GUIDES = {"sgr auto": (0, (6, 2)), "dense": (0, (2, 2)), "copy": (0, (1, 3))}
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


def _transform(extent: int, device: str) -> float:
    """Multiply-adds of one axis of one vector, there or back, at full range.

    On a GPU a matrix product for each parity; in the C++ kernels half of that, or for large extents two levels, of the
    length with the fewest operations (``Axis::best_length`` in csrc/cpu/axis.cpp).
    """
    if device == "cuda":
        return float(extent**2)
    lengths = [n for n in range(1, extent + 1) if extent % n == 0]
    counts = {n: extent**2 / (2 * n) + (extent * n if n > 1 else 0) for n in lengths}
    return counts[min(lengths, key=lambda n: counts[n] + (24 * extent if n > 1 else 0))]


def flops(problem: Problem, provider: str, device: str) -> float:
    """Operations of v and q: of the dense product, or of the transforms and the channel mixing."""
    if provider == "dense":
        return 2.0 * problem.batch * problem.dimension**2
    columns = problem.width * _transform(problem.height, device)
    rows = 2 * problem.height * _transform(problem.width, device)  # a cosine and a sine row for each
    mixing = 4 * problem.channels * problem.height * problem.width
    return 2.0 * problem.batch * problem.channels * (2 * (columns + rows) + mixing)


def roofline_figure(result: dict[str, Any]) -> plt.Figure:
    """Operations a second against operations a byte for v+q, under the copy's bandwidth and the best dense rate."""
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    cells = _full_range(result, "v+q")
    device = "cuda" if result["machine"].get("cuda") else "cpu"
    bandwidth, peak = 0.0, 0.0
    for index, name in enumerate(("sgr auto", "dense")):
        for number, cell in enumerate(cells):
            rows, problem = _right(cell), Problem(**cell["problem"])
            if name not in rows:
                continue
            count, seconds = flops(problem, name, device), rows[name]["milliseconds"] / 1e3
            moved = 2 * problem.bytes + (4 * problem.dimension**2 if name == "dense" else 0)
            at = (count / moved, count / seconds / 1e9)
            axes.plot(*at, "os"[index], color=f"C{index}")
            left = number % 2 == 0
            axes.annotate(
                str(problem),
                at,
                (-6 if left else 6, -3),
                textcoords="offset points",
                ha="right" if left else "left",
                fontsize=7,
                color=f"C{index}",
            )
            peak = max(peak, at[1] if name == "dense" else 0)
            if "copy" in rows:
                bandwidth = max(bandwidth, rows["copy"]["gigabytes_per_second"])
    if bandwidth and peak:
        x = np.geomspace(0.25, 1024, 200)
        roof = f"best copy, {bandwidth:.0f} GB/s, and best dense product, {peak:.0f} Gflop/s"
        axes.plot(x, np.minimum(bandwidth * x, peak), color="gray", label=roof)
    for index, name in enumerate(("sgr auto", "dense")):
        axes.plot([], [], "os"[index], color=f"C{index}", label=name)
    axes.set(xscale="log", yscale="log", xlabel="flop a byte", ylabel="Gflop/s", title=f"v+q; {_title(result)}")
    axes.title.set_fontsize(9)
    axes.legend(loc="lower right", fontsize=8)
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
        guides: list[Any] = []
        for name, (power, label) in slopes.items():
            if len(points.get(name, [])) > 1:
                x = np.array([p[0] for p in points[name]])
                last = points[name][-1]
                y = last[1] * (x / last[0]) ** power
                guides += axes.plot(x, y, linestyle=_GUIDES[name], color="gray", linewidth=0.9, label=label)
        axes.add_artist(axes.legend(handles=guides, loc="upper left", fontsize=7, title="slopes", title_fontsize=7))
        axes.set(xlabel=_SIZES[series], ylabel="µs an image" if series == "N" else "µs a batch")
    known = _names(result)
    handles = {label: h for axes in panels for h, label in zip(*axes.get_legend_handles_labels()) if label in known}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    figure.suptitle(_title(result), fontsize=9)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Draw the figures that the files have cells for."""
    parser = argparse.ArgumentParser(prog="sgr bench plot", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="JSON of sgr bench operators or step, of one machine")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the figures")
    parser.add_argument("--format", choices=("svg", "png", "pdf"), default="svg")
    options = parser.parse_args(arguments)
    results = [tables.read(file) for file in options.files]
    devices = {r["machine"]["device"] for r in results}
    if len(devices) > 1:
        raise ValueError(f"files: expected results of one machine, got {', '.join(sorted(devices))}")
    cells = [cell for result in results for cell in result.get("cells", [])]
    rows = [row for result in results for row in result.get("rows", [])]
    commits = dict.fromkeys(result["machine"]["commit"] for result in results)
    merged = {"machine": {**results[0]["machine"], "commit": ", ".join(commits)}, "cells": cells, "rows": rows}
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
