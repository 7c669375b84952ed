"""Does the quadratic approximation behind SGR hold for this model, these data and this covariance?

And has the model an input gradient that varies continuously, as a penalty on it presumes?
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sgr_kernels.attacks.guard import Model, model_device, preserve
from sgr_kernels.attacks.inputs import check_images, check_labels, child_generator, private_generator
from sgr_kernels.attacks.objective import differentiable, input_gradient, inspect_logits, logits_of
from sgr_kernels.checks import check_count, check_number, describe
from sgr_kernels.evaluation.loaders import Loader, batches
from sgr_kernels.penalty.per_sample import cross_entropy_per_sample
from sgr_kernels.penalty.proof import agreement
from sgr_kernels.penalty.trial import Trial

_LOOKED_AT = 64  # images for the kinks
_SMOOTH = 0.999  # a cosine that ReLU networks stay below; those without kinks miss one by rounding alone
_SERVES = 0.9  # one from which finite differences are allowed, too

STRENGTHS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


class SampledCovariance(Protocol):
    """What ``diagnose`` needs of a covariance."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Zero-mean Gaussian draws, (n, C, H, W)."""

    def quadratic_form(self, gradient: Tensor) -> Tensor:
        """``g^T Sigma g`` for each sample, (B,)."""


@dataclass(frozen=True)
class StrengthRow:
    """One strength lambda, that is, noise of covariance lambda Sigma.

    Attributes:
        strength: lambda.
        monte_carlo: mean over images and noise of ``l(x + xi) - l(x)``.
        standard_error: of ``monte_carlo - predicted``, both being means over the same images.
        predicted: ``lambda Omega``, the quadratic prediction (paper, Eq. 11).
        holds: the two agree within the tolerance, two standard errors included.
        differs: they do not, two standard errors granted. If neither, there are too few images or draws to tell.
    """

    strength: float
    monte_carlo: float
    standard_error: float
    predicted: float
    holds: bool
    differs: bool

    @property
    def ratio(self) -> float:
        """Measured over predicted excess loss; NaN if nothing is predicted."""
        return self.monte_carlo / self.predicted if self.predicted else math.nan


@dataclass(frozen=True)
class Diagnosis:
    """What ``diagnose`` found.

    Attributes:
        images: how many images were used.
        cross_entropy: mean loss without noise.
        penalty: ``Omega = 1/2 mean g^T Sigma g`` at strength one.
        rows: one for each strength, ascending.
        suggested_strength: the largest strength up to which the prediction holds without a gap; None if it does not,
            or cannot be said to, already at the smallest.
        gradient_cosine: Cosine between the gradients of ``mean |g|^2`` in the parameters by a finite difference and
            exact, on the first images: 1 within a thousandth on smooth networks, less with ReLU and max-pooling, down
            to 0 where their kinks lie closer together than float32 can tell, and less in low precision. None if it
            cannot be had (no parameters, no second derivative).
    """

    images: int
    cross_entropy: float
    penalty: float
    rows: list[StrengthRow]
    suggested_strength: float | None
    gradient_cosine: float | None = None

    @property
    def balanced_strength(self) -> float:
        """The strength at which penalty and cross-entropy weigh the same; infinite for a zero penalty."""
        return self.cross_entropy / self.penalty if self.penalty > 0 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**asdict(self), "balanced_strength": self.balanced_strength}

    def __str__(self) -> str:
        """A table, and what it means."""
        lines = [
            f"{self.images} images: cross-entropy {self.cross_entropy:.4g}, penalty {self.penalty:.4g} per unit of "
            f"strength; equal at strength {self.balanced_strength:.3g}",
            f"{'strength':>10}{'measured':>14}{'+-':>11}{'predicted':>12}{'ratio':>8}",
        ]
        lines += [
            f"{r.strength:>10.4g}{r.monte_carlo:>14.4g}{r.standard_error:>11.2g}{r.predicted:>12.4g}{r.ratio:>8.3g}"
            + ("" if r.holds else "  differs" if r.differs else "  uncertain")
            for r in self.rows
        ]
        clear = next((r for r in self.rows if r.holds or r.differs), None)
        if self.suggested_strength is not None:
            lines.append(f"The quadratic prediction holds up to strength {self.suggested_strength:g}.")
        elif clear is not None and clear.differs:
            lines.append(
                f"The quadratic prediction fails at strength {clear.strength:g}: the model is not near a Bayes "
                "classifier of these data (trained too briefly, or on too few), or its curvature is large (train with "
                "the penalty, or longer with it). Until then a strength is a matter of search, not of theory."
            )
        else:
            lines.append("Too uncertain to tell whether the quadratic prediction holds: take more images or draws.")
        lines += self._about_kinks()
        return "\n".join(lines)

    def _about_kinks(self) -> list[str]:
        if self.gradient_cosine is None:
            return []
        cosine = self.gradient_cosine
        found = f"Between a finite difference and the exact gradient of the penalty the cosine is {cosine:.4f}"
        if cosine >= _SMOOTH:
            return [f"{found}: on these images no kinks were met; every method serves."]
        method = "Take an exact method"
        if cosine >= _SERVES:
            method += ": finite differences serve so far, and may not once a penalty has trained the network"
        return [
            f"{found}: the network has kinks (ReLU, max-pooling), unless it computes in low precision. {method}. What "
            "the penalty flattens are the pieces between kinks; a network with smooth activations and average pooling "
            "(sgr.models.smooth, trained from scratch) gains more from it."
        ]


def diagnose(
    model: Model,
    loader: Loader,
    covariance: SampledCovariance,
    *,
    strengths: Sequence[float] = STRENGTHS,
    draws: int = 32,
    tolerance: float = 0.25,
    generator: torch.Generator | None = None,
) -> Diagnosis:
    """Compares the loss under sampled noise with the quadratic prediction, over a range of strengths.

    SGR rests on ``E[l(x + xi)] - l(x) ~ 1/2 g^T Sigma g`` (paper, Eqs. 4 to 10) for small noise and a classifier near
    Bayes optimality. At small strengths the ratio of measured to predicted shows the latter, its drift towards larger
    strengths the former. The noise is not clipped to the pixels' range, as the theory has it, and comes in pairs
    ``+xi, -xi``, so that the term linear in it cancels exactly.

    Args:
        model: maps images to logits (B, classes); runs in evaluation mode and is left as it was.
        loader: yields (images, labels); batches are moved to the model's device.
        covariance: the one to be trained with: anything with ``sample(n, generator)`` and ``quadratic_form(g)``.
        strengths: the values of lambda to try, each > 0.
        draws: noise samples per image, in pairs: rounded up to an even number.
        tolerance: relative difference up to which the prediction counts as holding. To show that it holds within 25 %
            can take thousands of images.
        generator: source of the noise; None means a private one with a fixed seed.

    Raises:
        TypeError: images that are not floating point, labels that are not integers, or a covariance that cannot be
            sampled or measured with.
        ValueError: strengths that are not positive, an empty loader, labels out of range, or a model without finite
            logits and input gradients.
    """
    grid = sorted(check_number("strengths", strength, above=True) for strength in strengths)
    if not grid:
        raise ValueError("strengths: expected at least one, got an empty list")
    if not all(callable(getattr(covariance, name, None)) for name in ("sample", "quadratic_form")):
        raise TypeError(f"covariance: expected sample(n, generator) and quadratic_form(g), got {describe(covariance)}")
    tolerance = check_number("tolerance", tolerance, above=True)
    check_count("draws", draws)
    generator = private_generator(generator)
    losses: list[Tensor] = []
    penalties: list[Tensor] = []
    excess: list[Tensor] = []
    cosine: float | None = None
    device = model_device(model)
    with preserve(model):
        for images, labels in batches(loader, device):
            check_images(images, None)
            leaf = differentiable(images)
            logits = logits_of(model, leaf)
            inspect_logits(logits)
            check_labels(labels, *logits.shape)
            if not losses:
                cosine = _gradient_cosine(model, images, labels)
            loss = _loss(logits, labels)
            gradient = input_gradient(loss, leaf)
            losses.append(loss.detach())
            penalties.append(covariance.quadratic_form(gradient).double() / 2)
            stream = child_generator(generator, model_device(covariance) or images.device)
            pairs = [covariance.sample(len(images), generator=stream).to(images) for _ in range((draws + 1) // 2)]
            excess.append(torch.stack([_excess(model, images, labels, losses[-1], pairs, s) for s in grid], dim=1))
    measured = torch.cat(excess)
    penalty = torch.cat(penalties)
    rows = [_row(strength, measured[:, k], strength * penalty, tolerance) for k, strength in enumerate(grid)]
    suggested = None
    for row in rows:
        if not row.holds:
            break
        suggested = row.strength
    means = float(torch.cat(losses).mean()), float(penalty.mean())
    return Diagnosis(len(penalty), *means, rows, suggested, cosine)


def _gradient_cosine(model: Model, images: Tensor, labels: Tensor) -> float | None:
    if not isinstance(model, nn.Module) or not any(p.requires_grad for p in model.parameters()):
        return None
    try:
        return agreement(Trial(model, cross_entropy_per_sample, images[:_LOOKED_AT], labels[:_LOOKED_AT]))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # without first or second derivatives there is nothing to compare
        return None


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits.double(), labels, reduction="none")


@torch.no_grad()
def _excess(
    model: Model, images: Tensor, labels: Tensor, clean: Tensor, pairs: list[Tensor], strength: float
) -> Tensor:
    """Mean over the draws of ``l(x + sqrt(lambda) xi) - l(x)`` for each image, (B,) in float64."""
    total = torch.zeros_like(clean)
    for noise in pairs:
        for sign in (1, -1):
            total += _loss(logits_of(model, images + sign * math.sqrt(strength) * noise), labels) - clean
    return total / (2 * len(pairs))


def _row(strength: float, excess: Tensor, predicted: Tensor, tolerance: float) -> StrengthRow:
    difference = excess - predicted
    error = float(difference.std(correction=0)) / math.sqrt(max(1, len(difference) - 1))
    gap, allowed = abs(float(difference.mean())), tolerance * abs(float(predicted.mean()))
    holds, differs = gap + 2 * error <= allowed, gap - 2 * error > allowed
    return StrengthRow(strength, float(excess.mean()), error, float(predicted.mean()), holds, differs)
