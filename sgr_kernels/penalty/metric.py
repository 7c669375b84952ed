"""Omega of each sample and its derivative, from the gradient of the loss in the images (Eq. 11 and 12)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sgr_kernels.covariance import Covariance


class Metric(Protocol):
    """Measures gradients; those are of the *loss*, minus those of the log-probability."""

    def omegas(self, gradient: Tensor) -> Tensor:
        """omega_b, (B,), differentiable in the gradient."""
        ...

    def direction(self, gradient: Tensor) -> Tensor:
        """v_b, the derivative of omega_b in g_b, like ``gradient``."""
        ...


@dataclass(frozen=True)
class CovarianceMetric:
    """The metric of a covariance, with or without the mean correction of Eq. 12 (whose sign is that of the loss)."""

    covariance: Covariance
    mean_correction: bool = False

    def omegas(self, gradient: Tensor) -> Tensor:
        """``1/2 g_b^T Sigma g_b``, less ``g_b . mu``: (B,), differentiable in the gradient."""
        omegas = self.covariance.quadratic_form(gradient) / 2
        mean = self._mean()
        return omegas if mean is None else omegas + (gradient * mean.to(gradient.dtype)).flatten(1).sum(1)

    def direction(self, gradient: Tensor) -> Tensor:
        """v_b, the derivative of omega_b in g_b, like ``gradient``."""
        direction = self.covariance.product(gradient)
        mean = self._mean()
        return direction if mean is None else direction + mean.to(direction.dtype)

    def _mean(self) -> Tensor | None:
        return self.covariance.scaled_mean() if self.mean_correction else None
