"""Accuracy under common corruptions, against their severity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgr_kernels.attacks.guard import Model, model_device, random_streams
from sgr_kernels.checks import check_count
from sgr_kernels.evaluation.corrupt import (
    SEVERITIES,
    SMALLEST,
    CorruptionUnavailable,
    check_kinds,
    check_severities,
    corrupt,
    require_package,
)
from sgr_kernels.evaluation.curves import RobustnessCurve, correct_answers
from sgr_kernels.evaluation.loaders import Loader, batches


@dataclass(frozen=True)
class CorruptionCurves:
    """Which images are classified correctly under each kind of corruption, for each severity.

    Attributes:
        curves: By kind; ``eps`` are the severities, ``attack`` is the kind.
        unavailable: Kinds that the packages installed here cannot make, and why: no average holds them.
        padded: Whether the images are smaller than 32 pixels and were continued by their edges to be corrupted.
    """

    curves: dict[str, RobustnessCurve]
    unavailable: dict[str, str]
    padded: bool

    @property
    def clean_accuracy(self) -> float:
        """Fraction of images classified correctly as they are."""
        return next(iter(self.curves.values())).clean_accuracy

    @property
    def mean_accuracy(self) -> float:
        """Mean over kinds and severities. One minus it is the mean corruption error, not divided by a reference's."""
        return sum(curve.area for curve in self.curves.values()) / len(self.curves)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the masks, ready for JSON."""
        first = next(iter(self.curves.values()))
        return {
            "images": len(first.clean),
            "padded": self.padded,
            "clean_accuracy": self.clean_accuracy,
            "mean_accuracy": self.mean_accuracy,
            "severities": [int(severity) for severity in first.eps],
            "kinds": {
                kind: {
                    "accuracy": curve.accuracy,
                    "interval95": [list(interval) for interval in curve.interval()],
                    "mean": curve.area,
                }
                for kind, curve in self.curves.items()
            },
            "unavailable": dict(self.unavailable),
        }


def corruption_curves(
    model: Model,
    loader: Loader,
    kinds: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    *,
    seed: int = 0,
) -> CorruptionCurves:
    """Accuracy of a model under common corruptions (`corrupt`), for each kind and severity.

    Random numbers follow from the seed, the kind and an image's place in the loader: batches of any size see the same.

    Args:
        model: Maps images to logits (B, classes); left as it was.
        loader: Yields (images, labels) with images (B, C, H, W) in [0, 1], C 1 or 3, and true labels (B,), and perhaps
            more, which is ignored; gone through once.
        kinds: Names (`sgr_kernels.evaluation.corrupt.KINDS`); None: all that can be made here, while the others are
            named in the result.
        severities: From 1 to 5.
        seed: Of the corruptions.

    Raises:
        ModuleNotFoundError: Without the package imagecorruptions; says how to install it.
        TypeError: Images that are not floating point.
        ValueError: An unknown kind, or one asked for by name that cannot be made here; severities or a seed out of
            range; images of another shape or range, labels out of range, or an empty loader.
    """
    names, levels = check_kinds(kinds), check_severities(severities)
    check_count("seed", seed, 0)
    require_package()
    correct: dict[str, list[Tensor]] = {name: [] for name in names}
    unavailable: dict[str, str] = {}
    clean: list[Tensor] = []
    seen, padded = 0, False
    # Shuffling loaders and models with random numbers draw from the global streams.
    with random_streams(model):
        for images, truth in batches(loader, model_device(model)):
            clean.append(correct_answers(model, images, truth))
            padded = padded or min(images.shape[2:], default=SMALLEST) < SMALLEST
            for name in list(correct):
                try:
                    corrupted = [corrupt(images, name, level, seed=seed, first=seen) for level in levels]
                except CorruptionUnavailable as error:
                    if kinds is not None:
                        raise
                    unavailable[name] = str(error)
                    del correct[name]
                    continue
                correct[name].append(torch.stack([correct_answers(model, found, truth) for found in corrupted]))
            seen += len(images)
    if not correct:
        raise ValueError(f"kinds: expected one that can be made here, got none ({next(iter(unavailable.values()))})")
    whole, eps = torch.cat(clean), [float(level) for level in levels]
    curves = {name: RobustnessCurve(eps, torch.cat(rows, 1), whole, name, "true") for name, rows in correct.items()}
    return CorruptionCurves(curves, unavailable, padded)
