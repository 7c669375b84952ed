"""Where a covariance learns from: the sources of adversarial perturbations that `SGRLoss` knows by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Perturbation = Callable[[nn.Module, Tensor, Tensor], Tensor]

# Strength and steps of the attacks; the scale of the estimate is set by the covariance's target variance.
EPS = 8 / 255
PGD_STEPS = 7

FREE = ("gradient", "sign")
"""Sources that cost nothing: functions of the loss gradient, which the penalty needs anyway."""


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
