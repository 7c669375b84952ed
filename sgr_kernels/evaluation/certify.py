"""Certified robustness under structured noise: randomized smoothing with a covariance's own metric.

The smoothed classifier answers the class that f gives most often to ``x + sigma e``, ``e ~ N(0, Sigma)``. Where that
class has a probability of at least p > 1/2, the answer is the same for every ``x + delta`` with
``sqrt(delta^T Sigma^-1 delta) < sigma Phi^-1(p)``: Cohen, Rosenfeld and Kolter (2019) after the change of variables
``x = Sigma^(1/2) u``, in which the noise is white.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from sgr_kernels.attacks.guard import Model, model_device, plain
from sgr_kernels.attacks.inputs import check_images, private_generator
from sgr_kernels.attacks.levels import Bounds
from sgr_kernels.checks import check_number, describe, number
from sgr_kernels.covariance import Covariance
from sgr_kernels.evaluation.curves import wilson_interval
from sgr_kernels.evaluation.smoothing import Row, Settings, count_answers

ABSTAINS = -1


@dataclass(frozen=True)
class Certification:
    """What the smoothed classifier answers, and how far around each image it certainly does.

    Attributes:
        predictions: (n,) int64, classes; -1 abstains.
        radii: (n,) float64, ``sigma Phi^-1(p)``: the answer stays for all delta with
            ``sqrt(delta^T Sigma^-1 delta)`` below it, but for a probability of ``alpha``, image by image; 0 where it
            abstains.
        selected: (n,) int64, the class most frequent among the selecting draws.
        counts: (n, classes) int64, how often each class came in the certifying draws.
        labels: (n,) int64 true labels, or None.
        draws: certifying draws an image.
        selection: selecting draws an image.
        alpha: probability that an image's certificate is wrong.
        sigma: scale of the noise.
        covariance: Sigma, as it was then.
        shape: of an image, (C, H, W).
    """

    predictions: Tensor
    radii: Tensor
    selected: Tensor
    counts: Tensor
    labels: Tensor | None
    draws: int
    selection: int
    alpha: float
    sigma: float
    covariance: Covariance
    shape: tuple[int, ...]

    @property
    def abstained(self) -> float:
        """Share of the images without an answer."""
        return float((self.predictions == ABSTAINS).double().mean())

    @property
    def largest_radius(self) -> float:
        """What so many draws can certify, where all agree."""
        return _radius(self.draws, self.draws, self.alpha, self.sigma)

    @property
    def mean_radius(self) -> float:
        """Mean certified radius, zero where the answer is wrong or missing."""
        return float((self.radii * self._right()).mean())

    def certified_accuracy(self, radii: Sequence[float]) -> list[float]:
        """Share of the images answered rightly, certainly up to each radius (the ball without its boundary).

        Raises:
            ValueError: no labels, or radii that are not numbers >= 0.
        """
        return [count / len(self.radii) for count in self._certified(radii)]

    def interval(self, radii: Sequence[float], confidence: float = 0.95) -> list[tuple[float, float]]:
        """Wilson interval of the certified accuracy at each radius: of the images' choice, not of the draws'.

        Raises:
            ValueError: as ``certified_accuracy``.
        """
        return [wilson_interval(count, len(self.radii), confidence) for count in self._certified(radii)]

    def largest_displacement(self, delta: Tensor) -> Tensor:
        """How many times delta may be added to, or taken from, each image, (n,) float64.

        Args:
            delta: (C, H, W), a direction and its unit.

        Raises:
            ValueError: a delta that is zero or of another shape, or a covariance that cannot be solved.
        """
        length = float(self.covariance.mahalanobis(plain(delta)[None]))
        if not 0 < length < math.inf:
            raise ValueError(f"delta: expected a direction, got a length of {length:g}")
        return self.radii / length

    def largest_shift(self) -> Tensor:
        """The largest change of all pixels at once that each image stands, in pixel units, (n,) float64.

        Raises:
            ValueError: a covariance that cannot be solved.
        """
        return self.radii * unit_shift(self.covariance, self.shape)

    def volume_radius(self) -> Tensor:
        """Radius in L2 of the ball with the certified ellipsoid's volume, in pixel units, (n,) float64.

        Raises:
            ValueError: a covariance without a determinant.
        """
        return self.radii * unit_volume(self.covariance, self.shape)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the covariance, ready for JSON."""
        return {
            "sigma": self.sigma,
            "alpha": self.alpha,
            "draws": self.draws,
            "selection": self.selection,
            "images": len(self.radii),
            "abstained": self.abstained,
            "mean_radius": None if self.labels is None else self.mean_radius,
            "labels": None if self.labels is None else self.labels.tolist(),
            "predictions": self.predictions.tolist(),
            "radii": self.radii.tolist(),
            "selected": self.selected.tolist(),
            "counts": self.counts.tolist(),
        }

    def _right(self) -> Tensor:
        if self.labels is None:
            raise ValueError("labels: expected the images' labels when they were certified, got None")
        return self.predictions == self.labels

    def _certified(self, radii: Sequence[float]) -> list[int]:
        right = self._right()
        return [int((right & (self.radii > check_number("radii", radius))).sum()) for radius in radii]


def certify(
    model: Model,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    covariance: Covariance,
    sigma: float,
    draws: int = 10_000,
    selection: int = 100,
    alpha: float = 1e-3,
    chunk_size: int = 1000,
    bounds: Bounds = (0.0, 1.0),
    generator: torch.Generator | None = None,
    on_image: Callable[[int], None] = lambda index: None,
) -> Certification:
    """Certify images by randomized smoothing with noise of a covariance.

    Of each image, ``selection`` draws choose a class, and ``draws`` fresh ones bound its probability from below
    (Clopper and Pearson, level ``1 - alpha``). Where the bound is no more than 1/2 the smoothed classifier abstains.

    Args:
        model: maps images to logits (B, classes), the same for the same images; runs in evaluation mode and is left as
            it was.
        images: (n, C, H, W), floating point, inside ``bounds``. The noise is not clipped: the theory has it whole.
        labels: (n,) true labels, which accuracies need.
        covariance: Sigma, in the square of pixel units where ``sigma`` is a plain number.
        sigma: scale of the noise, > 0.
        draws: certifying draws an image; a certificate of level ``alpha`` takes at least ``log2(1 / alpha)``.
        selection: selecting draws an image.
        alpha: probability with which an image's certificate may be wrong.
        chunk_size: noisy images a forward pass; the draws do not depend on it.
        bounds: range of the pixels, or None.
        generator: source of the noise, advanced by one number an image; None means a private one with a fixed seed.
        on_image: called with each image's number when it is done.

    Raises:
        TypeError: images that are not floating point, labels that are not integers, or a covariance that is none.
        ValueError: images, labels or numbers out of range; a covariance of another size, without variance, or that
            cannot be sampled; a model without finite logits, or one that answers the same images differently, by
            random numbers or by what else is in the batch.
    """
    images = check_images(images, bounds)
    if not isinstance(covariance, Covariance):
        raise TypeError(f"covariance: expected a Covariance, such as CovarianceFunction, got {describe(covariance)}")
    settings = Settings(sigma, draws, selection, alpha, chunk_size)
    rows: list[Row] = []

    def keep(index: int, row: Row) -> None:
        rows.append(row)
        on_image(index)

    covariance = _as_it_is(covariance)
    count_answers(model, images, labels, covariance, settings, private_generator(generator), keep)
    return certification(rows, labels, covariance, tuple(images.shape[1:]), settings)


def certification(
    rows: Sequence[Row], labels: Tensor | None, covariance: Covariance, shape: tuple[int, ...], settings: Settings
) -> Certification:
    """Predictions and radii from what was counted, as `certify` returns them."""
    selected = torch.tensor([row[0] for row in rows])
    counts = torch.tensor([row[1] for row in rows])
    agreeing = counts.gather(1, selected[:, None]).squeeze(1).tolist()
    known: dict[int, float] = {}
    radii = []
    for count in agreeing:
        if count not in known:
            known[count] = _radius(count, settings.draws, settings.alpha, settings.sigma)
        radii.append(known[count])
    certain = torch.tensor(radii, dtype=torch.float64)
    predictions = torch.where(certain > 0, selected, ABSTAINS)
    truth = None if labels is None else plain(labels).cpu().long()
    return Certification(
        predictions,
        certain,
        selected,
        counts,
        truth,
        settings.draws,
        settings.selection,
        settings.alpha,
        settings.sigma,
        covariance,
        shape,
    )


def _as_it_is(covariance: Covariance) -> Covariance:
    """One that later updates do not change: they would change what a radius means."""
    if covariance.frozen:
        return covariance
    group = getattr(covariance, "process_group", None)  # of processes, which cannot be copied
    return copy.deepcopy(covariance, {id(group): group})


def _radius(agreeing: int, draws: int, alpha: float, sigma: float) -> float:
    p = clopper_pearson_lower(agreeing, draws, alpha)
    return sigma * NormalDist().inv_cdf(p) if p > 0.5 else 0.0


def clopper_pearson_lower(successes: int, trials: int, alpha: float) -> float:
    """Exact lower confidence bound, of level ``1 - alpha``, on a binomial probability.

    The p at which as many successes or more have probability alpha, from below; found by bisection in float64.

    Raises:
        ValueError: counts or alpha out of range.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"successes: expected 0 to trials, trials at least one, got {successes} of {trials}")
    number("alpha", alpha, "a number inside (0, 1)", lambda x: 0 < x < 1)
    if successes == 0:
        return 0.0
    hits = torch.arange(successes, trials + 1, dtype=torch.float64)
    misses = trials - hits
    ways = math.lgamma(trials + 1) - torch.lgamma(hits + 1) - torch.lgamma(misses + 1)
    low, high, target = 0.0, 1.0, math.log(alpha)
    while low < (middle := (low + high) / 2) < high:
        tail = torch.logsumexp(ways + hits * math.log(middle) + misses * math.log1p(-middle), 0)
        low, high = (middle, high) if float(tail) <= target else (low, middle)
    return low


def unit_shift(covariance: Covariance, shape: Sequence[int]) -> float:
    """The change of all pixels at once, in pixel units, that lies at radius one."""
    return 1 / float(covariance.mahalanobis(torch.ones(1, *shape, device=model_device(covariance))))


def unit_volume(covariance: Covariance, shape: Sequence[int]) -> float:
    """The radius in L2 of the ball with the volume of the ellipsoid of radius one, in pixel units."""
    return math.exp(covariance.log_determinant().value / (2 * math.prod(shape)))
