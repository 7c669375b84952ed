"""Curves as JSON with their masks, and what follows from several of them: means, errors, paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np

from sgr_kernels.evaluation.curves import RobustnessCurve

Z95 = 1.96


@dataclass(frozen=True)
class Estimate:
    """A mean over networks and images.

    Attributes:
        mean: The mean.
        error: Its standard error, from the images (shared by all networks) and, with several seeds, from the seeds.
        spread: Standard deviation over the seeds; None with a single one.
        seeds: Networks.
        freedom: Degrees of freedom of the error: few where it comes from a few seeds.
    """

    mean: float
    error: float
    spread: float | None
    seeds: int
    freedom: float = math.inf

    @property
    def half(self) -> float:
        """Half of the 95 % interval."""
        return student95(self.freedom) * self.error

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.mean + self.half

    def percent(self) -> str:
        """``"96.5 ± 0.4"``, the half-width of the 95 % interval after the mean."""
        return f"{100 * self.mean:.1f} ± {100 * self.half:.1f}"

    def points(self) -> str:
        """``"+3.5 ± 0.4"``: a difference, in points."""
        return f"{100 * self.mean:+.1f} ± {100 * self.half:.1f}"


@lru_cache
def student95(freedom: float) -> float:
    """Student's 97.5 % quantile, for at least one degree of freedom."""
    if freedom > 1000:
        return Z95
    # With t = sqrt(freedom) tan(angle) the density is a power of the cosine.
    angles = np.linspace(0, math.pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    share = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(float(np.interp(0.95, share / share[-1], angles)))


def record(curve: RobustnessCurve, unit: float = 1.0) -> dict[str, Any]:
    """A curve for JSON: strengths times ``unit``, accuracies, 95 % Wilson intervals, mean over the grid, masks.

    A mask is the hexadecimal form of the bits "image classified correctly", the first image's in front.
    """
    return {
        "eps": [eps * unit for eps in curve.eps],
        "images": curve.correct.shape[1],
        "accuracy": curve.accuracy,
        "interval95": [list(interval) for interval in curve.interval()],
        "area": curve.area,
        "masks": [np.packbits(row.numpy()).tobytes().hex() for row in curve.correct],
    }


def masks(curve: dict[str, Any]) -> np.ndarray:
    """The masks of a record, (strengths, images), as numbers 0 and 1."""
    rows = [np.frombuffer(bytes.fromhex(row), np.uint8) for row in curve["masks"]]
    return np.stack([np.unpackbits(row, count=curve["images"]) for row in rows]).astype(float)


def mean(curves: Sequence[dict[str, Any]], level: int | None = None) -> Estimate:
    """Accuracy over networks that saw the same images: at one strength, or over the whole grid."""
    return estimate(np.stack([_per_image(curve, level) for curve in curves]))


def difference(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], level: int | None = None) -> Estimate:
    """Accuracy of ours minus theirs, image by image; seeds are paired as far as both have them."""
    return contrast([(1.0, ours), (-1.0, theirs)], level)


def contrast(terms: Sequence[tuple[float, Sequence[dict[str, Any]]]], level: int | None = None) -> Estimate:
    """A weighted sum of accuracies, image by image; seeds are paired as far as all terms have them."""
    seeds = min(len(curves) for _, curves in terms)
    return estimate(
        np.stack([sum(weight * _per_image(curves[k], level) for weight, curves in terms) for k in range(seeds)])
    )


def _per_image(curve: dict[str, Any], level: int | None) -> np.ndarray:
    rows = masks(curve)
    return rows.mean(0) if level is None else rows[level]


def estimate(values: np.ndarray) -> Estimate:
    """Of values (networks, images): the images are a sample shared by all networks, the networks another.

    The error from the images is at least that of one image gone the other way: no variation among a few hundred is
    no proof that there is none.
    """
    seeds, images = values.shape
    per_network = values.mean(1)
    from_images = max(float(values.mean(0).std()) / math.sqrt(max(1, images - 1)), 1 / images)
    spread = float(per_network.std(ddof=1)) if seeds > 1 else None
    from_seeds = 0.0 if spread is None else spread / math.sqrt(seeds)
    error = math.hypot(from_images, from_seeds)
    # Welch and Satterthwaite's degrees of freedom; those of the images are many.
    freedom = math.inf if from_seeds == 0 else (seeds - 1) * (error / from_seeds) ** 4
    return Estimate(float(per_network.mean()), error, spread, seeds, freedom)


def chosen(estimate: Estimate, comparisons: int) -> Estimate:
    """An estimate picked for its value among several, its interval widened to hold for all of them (Bonferroni)."""
    return replace(estimate, error=estimate.error * NormalDist().inv_cdf(1 - 0.025 / comparisons) / Z95)


def at(curve: dict[str, Any], eps: float) -> int:
    """Place of a strength in a curve's grid.

    Raises:
        ValueError: if it is not there.
    """
    for place, value in enumerate(curve["eps"]):
        if math.isclose(value, eps, rel_tol=1e-6, abs_tol=1e-9):
            return place
    raise ValueError(f"eps {eps:g} is not among {curve['eps']}")
