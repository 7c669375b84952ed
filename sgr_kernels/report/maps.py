"""Figures of matrices: heat maps with their numbers in them, and covariance matrices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from sgr_kernels.report.plots import write_title


def heat_map(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    row_title: str,
    column_title: str,
    bar_title: str,
) -> Figure:
    """A matrix of shares in colour, each cell with its number in %; NaN cells are left blank.

    Args:
        values: (rows, columns), shares.
        rows: Names of the rows.
        columns: Names of the columns.
        title: Above.
        row_title: Along the rows' axis.
        column_title: Along the columns' axis.
        bar_title: Along the colour bar.
    """
    figure = Figure(figsize=(0.62 * len(columns) + 3.2, 0.5 * len(rows) + 2.2), layout="constrained")
    axes = figure.subplots()
    high = float(np.nanmax(values))
    low = min(high - 0.1, float(np.nanmin(values)))  # differences of a point or two shall not look large
    image = axes.imshow(values, cmap="cividis", vmin=low, vmax=high, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        text = "–" if np.isnan(value) else f"{100 * value:.1f}"
        dark = not np.isnan(value) and value < (low + high) / 2
        axes.text(column, row, text, ha="center", va="center", size=8, color="white" if dark else "black")
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(column_title)
    axes.set_ylabel(row_title)
    axes.set_title(title, fontsize=11)
    figure.colorbar(image, ax=axes, label=f"{bar_title} [%]", format=PercentFormatter(1, symbol=""))
    return figure


def matrix_figure(matrices: Sequence[tuple[str, np.ndarray]], title: str = "", note: str = "") -> Figure:
    """Square matrices side by side, each with its largest absolute entry at the end of a colour scale about zero."""
    figure = Figure(figsize=(3.3 * len(matrices) + 0.8, 3.9), layout="constrained")
    row = figure.subplots(1, len(matrices), squeeze=False)[0]
    image = None
    for axes, (name, matrix) in zip(row, matrices):
        scale = float(np.abs(matrix).max()) or 1.0
        image = axes.imshow(matrix / scale, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(name, fontsize=11)
        axes.set_xticks([])
        axes.set_yticks([])
    row[0].set_ylabel("pixel, row by row")
    row[0].set_xlabel(note, fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=list(row), label="covariance / largest", shrink=0.8)
    write_title(figure, title, 12)
    return figure
