"""Figures from plain numbers, drawn through matplotlib's objects: no global state, no display needed."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, TextArea, VPacker

# Okabe and Ito's palette and a brown for their yellow, which is pale on white: told apart by colour-blind readers too.
# With the markers, also in print.
COLORS = ("#4d4d4d", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b4226")
_MARKERS = "osD^vPX*"
_LEGEND_MARK, _LEGEND_LETTER, _LEGEND_LINE = 0.6, 0.075, 0.25  # inches, of a legend below the panels
_TITLE_LETTER = 0.0078  # inches for each point of its size: a little wide
_LINES_INSIDE = 4  # names of more would cover the lines
_RIGHT, _WRONG = "#00794f", "#c40000"
_DOTS_PER_INCH = 140


@dataclass(frozen=True)
class Line:
    """One line of a panel.

    Attributes:
        label: Its name in the legend.
        x, y: Its points.
        low, high: Ends of the error bar at each point.
        color: A number in ``COLORS``; None: the line's place in its panel.
        dashed: Whether it is dashed.
        mark: An x at which a dotted vertical is drawn in the line's colour.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    color: int | None = None
    dashed: bool = False
    mark: float | None = None


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: Above it.
        x_label, y_label: Along the axes.
        lines: What is drawn.
        levels: Horizontal reference lines as (y, name).
        mark: An x at which a dotted grey vertical is drawn.
        y_range: Limits of y; None: as the lines need.
        x_ticks: Ticks of x, spaced evenly whatever their values; None: as matplotlib sees fit.
        markers: Whether points are marked.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    levels: Sequence[tuple[float, str]] = ()
    mark: float | None = None
    y_range: tuple[float, float] | None = None
    x_ticks: Sequence[float] | None = None
    markers: bool = True


@dataclass(frozen=True)
class Tile:
    """One picture of a grid.

    Attributes:
        image: (H, W), or (H, W, 3), values in [0, 1].
        answers: Texts below it, each with whether it is right.
        title: Text above it.
    """

    image: np.ndarray
    answers: Sequence[tuple[str, bool]] = ()
    title: str = ""


def line_figure(panels: Sequence[Panel], title: str = "", *, columns: int | None = None) -> Figure:
    """Panels side by side, or in rows of so many columns, with one legend where it serves them all.

    That of a single panel with many lines stands beside it.
    """
    columns = columns or len(panels)
    rows = -(-len(panels) // columns)
    width, height = (4.8, 4.2) if rows == 1 else (3.4, 2.9)
    beside = len(panels) == 1 and len(panels[0].lines) > _LINES_INSIDE
    room = 0.8 + _LEGEND_LETTER * max(len(line.label) for line in panels[0].lines) if beside else 0.0
    figure = Figure(figsize=(width * columns + room, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    row = grid[: len(panels)]
    for axes, panel in zip(row, panels):
        _draw_panel(axes, panel)
    handles, labels = row[0].get_legend_handles_labels()
    if beside:
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    elif len(panels) > 1 and all(axes.get_legend_handles_labels()[1] == labels for axes in row):
        wide = _LEGEND_MARK + _LEGEND_LETTER * max(map(len, labels))
        fitting = max(1, int(figure.get_figwidth() / wide))
        lines = -(-len(labels) // fitting)
        figure.set_figheight(figure.get_figheight() + _LEGEND_LINE * (lines - 1))
        figure.legend(handles, labels, loc="outside lower center", ncols=-(-len(labels) // lines), frameon=False)
    else:
        for axes in row:
            axes.legend(frameon=False, fontsize=9)
    write_title(figure, title, 12)
    return figure


def image_grid(rows: Sequence[tuple[str, Sequence[Tile]]], title: str = "") -> Figure:
    """Rows of pictures, each row under its name; right answers below them are green, wrong ones red."""
    columns = max(len(tiles) for _, tiles in rows)
    figure = Figure(figsize=(1.25 * columns + 1.6, 1.75 * len(rows) + 0.3), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for row, (name, tiles) in zip(grid, rows):
        for axes in row:
            axes.set_axis_off()
        for axes, tile in zip(row, tiles):
            axes.imshow(np.clip(tile.image, 0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(tile.title, fontsize=9, pad=3)
            if tile.answers:
                _write_answers(axes, tile.answers)
        row[0].text(
            -0.15, 0.5, name, transform=row[0].transAxes, ha="right", va="center", fontsize=10, multialignment="right"
        )
    write_title(figure, title, 11)
    return figure


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG."""
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})


def write_title(figure: Figure, title: str, size: int) -> None:
    """Above all panels, in as many lines as the figure's width asks for."""
    if title:
        letters = int(figure.get_figwidth() / (_TITLE_LETTER * size))
        figure.suptitle("\n".join(textwrap.wrap(title, letters, break_on_hyphens=False)), fontsize=size)


def _draw_panel(axes: Axes, panel: Panel) -> None:
    positions = {tick: k for k, tick in enumerate(panel.x_ticks)} if panel.x_ticks is not None else None
    for k, line in enumerate(panel.lines):
        index = (k if line.color is None else line.color) % len(COLORS)
        # Error bars at the same x would hide one another.
        shift = 0.05 * (k - (len(panel.lines) - 1) / 2) if positions is not None and line.low is not None else 0.0
        x = [positions[value] + shift for value in line.x] if positions is not None else list(line.x)
        style: dict[str, Any] = {
            "label": line.label,
            "color": COLORS[index],
            "marker": _MARKERS[index] if panel.markers else None,
            "markersize": 5,
            "linestyle": "--" if line.dashed else "-",
            "linewidth": 1.8,
        }
        if line.low is not None and line.high is not None:
            points = np.asarray(line.y)
            errors = np.stack([points - np.asarray(line.low), np.asarray(line.high) - points]).clip(min=0)
            axes.errorbar(x, points, yerr=errors, capsize=3, elinewidth=1, **style)
        else:
            axes.plot(x, line.y, **style)
        if line.mark is not None:
            axes.axvline(line.mark, color=COLORS[index], linestyle=":", linewidth=1.2)
    for y, name in panel.levels:
        axes.axhline(y, color="#777777", linestyle=":", linewidth=1.2, label=name)
    if panel.mark is not None:
        axes.axvline(panel.mark, color="#999999", linestyle=":", linewidth=1.2)
    if panel.x_ticks is not None:
        axes.set_xticks(range(len(panel.x_ticks)), [f"{tick:g}" for tick in panel.x_ticks])
    if panel.y_range is not None:
        axes.set_ylim(*panel.y_range)
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _write_answers(axes: Axes, answers: Sequence[tuple[str, bool]]) -> None:
    """The answers below the picture, in green or red and, for readers who see neither, ticked or crossed."""
    parts: list[Artist] = [
        TextArea(
            f"{text} {'✓' if right else '✗'}",
            textprops={"color": _RIGHT if right else _WRONG, "size": 8, "family": "DejaVu Sans"},
        )
        for text, right in answers
    ]
    box = VPacker(children=parts, pad=0, sep=1)
    axes.add_artist(
        AnnotationBbox(box, (0.5, -0.03), xycoords="axes fraction", box_alignment=(0.5, 1), frameon=False, pad=0)
    )
