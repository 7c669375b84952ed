"""The figure of training steps: time and peak memory of each way, over the clean step's."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure


def step_figure(result: dict[str, Any], title: str) -> Figure:
    """One group of bars a way, one bar a network; time on the left, peak memory on the right."""
    rows = {(row["way"], row["network"]): row for row in result["rows"] if "milliseconds" in row}
    networks = list(dict.fromkeys(network for _, network in rows))
    ways = [way for way in dict.fromkeys(way for way, _ in rows) if way != "clean"]
    figure, panels = plt.subplots(1, 2, figsize=(10, 0.5 * len(ways) + 1.5), sharey=True, layout="constrained")
    height = 0.8 / len(networks)
    for axes, name, label in zip(panels, ("time_ratio", "memory_ratio"), ("time", "peak memory")):
        for place, network in enumerate(networks):
            found = [(i + place * height, rows.get((way, network), {})) for i, way in enumerate(ways)]
            drawn = [(y, row) for y, row in found if name in row]
            bars = axes.barh([y for y, _ in drawn], [row[name] for _, row in drawn], height, label=network)
            axes.bar_label(bars, fmt="%.2f", fontsize=6, padding=2)
        axes.margins(x=0.08)  # room for the labels of the longest bars
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlabel(f"{label} of a step / clean step")
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks([i + 0.4 - height / 2 for i in range(len(ways))], ways)
    panels[0].invert_yaxis()
    panels[1].legend(fontsize=7, loc="lower right")
    figure.suptitle(title, fontsize=9)
    return figure
