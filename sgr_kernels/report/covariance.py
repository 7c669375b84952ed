"""The figure of covariance functions against displacement, within and between channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sgr_kernels.report.plots import Line, Panel, line_figure


@dataclass(frozen=True)
class DisplacementFunction:
    """A covariance function of pixel displacement.

    Attributes:
        name: What it is the covariance of.
        values: (C, C, K); ``values[c, d, k]`` is the covariance of channels c and d at displacement k.
        decay_length: Displacement at which it has fallen to 1/e, mean over the channels; infinite if it never does.
    """

    name: str
    values: np.ndarray
    decay_length: float

    @property
    def variance(self) -> float:
        """Mean over the channels of the value at displacement 0."""
        return float(np.diagonal(self.values[:, :, 0]).mean())

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, which has no infinity: a decay length that is not finite becomes None."""
        return {"values": self.values.tolist(), "decay_length": _finite(self)}


# Channels in their own colours (numbers of the palette), pairs of channels in others.
_CHANNELS = {"red": 1, "green": 3, "blue": 2}
_PAIRS = {("red", "green"): 5, ("red", "blue"): 4, ("green", "blue"): 6}


def covariance_figure(functions: Sequence[DisplacementFunction], title: str = "") -> Figure:
    """Covariance functions divided by their own variance, decay lengths as dotted verticals.

    Functions of one channel share a panel. Functions of several channels have one each, with the intra-channel
    functions as solid and the inter-channel ones as dashed lines.
    """
    if all(function.values.shape[0] == 1 for function in functions):
        return line_figure([single_channel_panel("Covariance function", functions)], title)
    return line_figure([_panel(_with_length(f), _channel_lines(f), mark=_finite(f)) for f in functions], title)


def single_channel_panel(
    title: str, functions: Sequence[DisplacementFunction], *, until: int | None = None, markers: bool = False
) -> Panel:
    """Covariance functions of one channel in one panel, divided by their variances.

    Args:
        title: Above the panel.
        functions: What to draw.
        until: Last displacement shown; None: the last there is.
        markers: Whether whole displacements are marked.
    """
    stop = None if until is None else until + 1
    lines = []
    for function in functions:
        values: Sequence[float] = (function.values[0, 0, :stop] / (function.variance or 1)).tolist()
        lines.append(Line(_with_length(function), range(len(values)), values, mark=_finite(function)))
    return _panel(title, lines, markers=markers)


def _panel(title: str, lines: Sequence[Line], *, markers: bool = False, mark: float | None = None) -> Panel:
    return Panel(
        title,
        "displacement [pixels]",
        "covariance / variance",
        lines,
        levels=[(0, ""), (float(np.exp(-1)), "1/e")],
        mark=mark,
        markers=markers,
    )


def _channel_lines(function: DisplacementFunction) -> list[Line]:
    channels = function.values.shape[0]
    names = list(_CHANNELS) if channels == 3 else [f"channel {c}" for c in range(channels)]
    lines = []
    for c in range(channels):
        for d in range(c, channels):
            pair = names[c], names[d]
            label = names[c] if c == d else f"{names[c]} and {names[d]}"
            color = _CHANNELS.get(names[c]) if c == d else _PAIRS.get(pair)
            values = function.values[c, d] / (function.variance or 1)
            lines.append(Line(label, range(len(values)), values, color=color, dashed=c != d))
    return sorted(lines, key=lambda line: line.dashed)


def _with_length(function: DisplacementFunction) -> str:
    return f"{function.name} (decay length {function.decay_length:.1f})"


def _finite(function: DisplacementFunction) -> float | None:
    return function.decay_length if np.isfinite(function.decay_length) else None
