"""What ``sgr evaluate --corruptions`` adds: accuracy under common corruptions."""

from __future__ import annotations

import argparse

import torch
from torch import nn

from sgr_kernels.evaluation.corrupt import (
    KINDS,
    SEVERITIES,
    SMALLEST,
    CorruptionUnavailable,
    check_kinds,
    check_severities,
    corrupt,
    require_package,
)
from sgr_kernels.evaluation.corruptions import CorruptionCurves, corruption_curves
from sgr_kernels.evaluation.curves import RobustnessCurve
from sgr_kernels.report.page import percent, text_table
from sgr_kernels.training.batches import Batches
from sgr_kernels.training.images import ImageSet, pixels


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--corruptions`` and what goes with it."""
    add = parser.add_argument
    add(
        "--corruptions",
        choices=KINDS,
        nargs="*",
        metavar="KIND",
        help=f"under common corruptions as well; none named: {', '.join(KINDS)}",
    )
    add("--severities", type=int, choices=SEVERITIES, nargs="+", default=SEVERITIES, help="of the corruptions")


def kinds(arguments: argparse.Namespace) -> list[str] | None:
    """Kinds of corruption asked for; None: all there are. Checked before anything is measured.

    Raises:
        ModuleNotFoundError: without the package that makes them.
        ValueError: one of them twice.
    """
    if arguments.corruptions is None:
        return []
    require_package()
    check_severities(arguments.severities)
    return check_kinds(arguments.corruptions) if arguments.corruptions else None


def check_kinds_of(kinds: list[str] | None, images: ImageSet) -> None:
    """Raises ValueError if the images, or the kinds that were named, cannot be: before the attacks have run."""
    first = pixels(images.read(torch.arange(1))[0])
    try:
        for kind in KINDS[:1] if kinds is None else kinds:
            corrupt(first, kind, SEVERITIES[0])
    except CorruptionUnavailable:
        if kinds is not None:
            raise


def measure(
    arguments: argparse.Namespace, model: nn.Module, batches: Batches, kinds: list[str] | None
) -> CorruptionCurves:
    """Accuracy of a network under the corruptions asked for."""
    return corruption_curves(model, batches, kinds, arguments.severities, seed=arguments.seed)


def summary(result: CorruptionCurves) -> str:
    """The table of corruptions for the terminal."""
    first = next(iter(result.curves.values()))
    table = text_table(
        ["severity", *(f"{severity:g}" for severity in first.eps), "mean", "95 %"],
        [
            [kind, *(f"{100 * share:.1f}" for share in curve.accuracy), f"{100 * curve.area:.1f}", _width(curve)]
            for kind, curve in result.curves.items()
        ],
    )
    lines = [f"common corruptions (imagecorruptions; severities as for photographs of 224 pixels)\n{table}"]
    lines.append(f"mean over {len(result.curves)} kinds and their severities: {percent(result.mean_accuracy)}")
    if result.padded:
        lines.append(f"the images are continued by their edges to {SMALLEST} pixels, corrupted, and cropped back")
    lines += [f"not made: {reason}" for reason in result.unavailable.values()]
    return "\n".join(lines)


def _width(curve: RobustnessCurve) -> str:
    """The widest interval of a curve, as ± points."""
    return f"± {max(50 * (high - low) for low, high in curve.interval()):.1f}"
