"""Where a covariance learns from: the sources of perturbations that `SGRLoss` knows by name, and others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sgr_kernels.checks import describe
from sgr_kernels.toeplitz.constants import recording

__all__ = ["from_transform"]

Perturbation = Callable[[nn.Module, Tensor, Tensor], Tensor]

# Strength and steps of the attacks; the scale of the estimate is set by the covariance's target variance.
EPS = 8 / 255
PGD_STEPS = 7

FREE = ("gradient", "sign")
"""Sources that cost nothing: functions of the loss gradient, which the penalty needs anyway."""


def from_transform(fn: Callable[[Tensor], Tensor]) -> Perturbation:
    """A source of perturbations for `SGRLoss`, ``xi = fn(x) - x``: its covariance is that of a corruption.

    Where the corruption moves images one way, as more light does, ``mean_correction=True`` takes its mean into account
    (Eq. 12).

    Args:
        fn: Images (B, C, H, W), as the loss was given them, to corrupted ones of the same shape, floating point. It may
            draw random numbers, from PyTorch's streams for a training that can be resumed; it gets a copy, outside any
            graph.

    Returns:
        The source, to be given as ``SGRLoss(..., perturbation=...)``. Called, it raises TypeError where ``fn`` returns
        no floating-point tensor, and ValueError where what it returns has another shape or device, or is not finite for
        images that are; of which a GPU is asked at each update.

    Raises:
        TypeError: If ``fn`` cannot be called.
    """
    if not callable(fn):
        raise TypeError(f"fn: expected a callable, images to corrupted images, got {describe(fn)}")

    def source(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        clean = images.detach()
        with torch.no_grad():
            found = fn(clean.clone())
            _check_transformed(found, clean)
            return found.detach() - clean

    return source


def _check_transformed(found: Any, images: Tensor) -> None:
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise TypeError(f"fn: expected floating-point images, got {describe(found)}")
    if found.shape != images.shape or found.device != images.device:
        raise ValueError(
            f"fn: expected images {tuple(images.shape)} on {images.device}, as it was given, "
            f"got {tuple(found.shape)} on {found.device}"
        )
    # Images that are not finite themselves are left out by the loss.
    if not recording() and bool((images.isfinite() & ~found.isfinite()).any()):
        raise ValueError("fn: expected finite images, got NaN or infinity")


def from_gradient(name: str, gradient: Tensor) -> Tensor:
    """Perturbations of a `FREE` source, from the loss gradient with the true labels."""
    gradient = gradient.detach()
    return gradient.sign() if name == "sign" else gradient


def only_where_finite(perturbation: Tensor, losses: Tensor, gradient: Tensor | None) -> Tensor:
    """NaN for samples whose loss or gradient is not finite: signs and attacks make numbers of them that look sound."""
    if perturbation.shape[:1] != losses.shape:
        return perturbation  # a source of its own, which has no sample for each loss
    finite = losses.isfinite()
    if gradient is not None:
        # Zero times anything finite is zero; half the passes over memory of isfinite.
        finite = finite & ((gradient.detach() * 0).flatten(1).sum(1) == 0)
    return torch.where(finite.view(-1, *(1,) * (perturbation.dim() - 1)), perturbation, torch.nan)


def _by_attack(name: str, **options: Any) -> Perturbation:
    """Perturbations by an attack on the model's own predictions. Pixels are not clipped: inputs may be standardized."""

    def source(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        from sgr_kernels import attacks  # most trainings do without

        return getattr(attacks, name)(model, images, bounds=None, **options) - images

    return source


ATTACKS: dict[str, Perturbation] = {
    "fgsm": _by_attack("fgsm", eps=EPS),
    "pgd": _by_attack("pgd", eps=EPS, steps=PGD_STEPS),
    "deepfool": _by_attack("deepfool"),
}


def check_perturbation(value: str | Perturbation | None) -> None:
    """Expect the name of a source, a callable, or None.

    Raises:
        ValueError: If it is none of these.
    """
    names = (*FREE, *ATTACKS)
    if value is not None and not callable(value) and value not in names:
        raise ValueError(
            f"perturbation: expected one of {', '.join(map(repr, names))}, a callable "
            f"(model, images, labels) -> xi, or None, got {value!r}"
        )
