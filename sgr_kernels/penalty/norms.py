"""Norms of the input gradient as penalties: the first-order growth of the loss under bounded perturbations."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor, nn

from sgr_kernels import checks
from sgr_kernels.backends.torch_spectral import compute_dtype

NORMS: Final = (1, 2)


class NormPenalty(nn.Module):
    """``Omega = mean_b ||g_b||_p``, in the place of a covariance in `SGRLoss`.

    Perturbations bounded by eps in the norm dual to p raise the loss by ``eps ||g_b||_p`` to first order: p = 1 is for
    perturbations bounded in each pixel (L-infinity), p = 2 for those bounded in their Euclidean norm. So the strength
    of the criterion reads as eps. Gradient norms of natural images alone come close to adversarial training on networks
    with smooth activations (Rodriguez-Munoz, Wang, Torralba 2024), not on ReLU networks.

    Args:
        p: 1 or 2.
        smoothing: s >= 0, in the gradient's units. Each absolute value, and the Euclidean norm, is
            ``sqrt(a^2 + s^2) - s``: below s its slope falls to zero, so that gradients about zero do not flip
            signs. With 0 the slope at zero is zero, and one everywhere else.

    Raises:
        ValueError: If p or the smoothing is out of range.
    """

    frozen: Final = True

    def __init__(self, p: int = 1, *, smoothing: float = 1e-6) -> None:
        super().__init__()
        if isinstance(p, bool) or p not in NORMS:
            raise ValueError(f"p: expected 1 or 2, got {p!r}")
        self.p = int(p)
        self.smoothing = checks.number("smoothing", smoothing, "a finite number >= 0", lambda x: 0 <= x < math.inf)

    def omegas(self, gradient: Tensor) -> Tensor:
        """``||g_b||_p``, (B,), float32 or better, differentiable in the gradient (B, ...)."""
        checks.check_floating_point("gradient", gradient)
        values = gradient.flatten(1).to(compute_dtype(gradient.dtype))
        if self._exact(values):
            return torch.linalg.vector_norm(values, self.p, dim=1)
        s = self.smoothing
        if self.p == 1:
            return ((values.square() + s * s).sqrt() - s).sum(1)
        return (values.square().sum(1) + s * s).sqrt() - s

    def direction(self, gradient: Tensor) -> Tensor:
        """The derivative of ``||g_b||_p`` in g_b, like ``gradient``."""
        values = gradient.to(compute_dtype(gradient.dtype))
        if self.p == 1 and self._exact(values):
            return values.sign().to(gradient.dtype)
        squares = values.square()
        if self.p == 2:
            squares = squares.flatten(1).sum(1).view(-1, *(1,) * (values.dim() - 1))
        sizes = (squares + self.smoothing**2).sqrt()
        return torch.where(sizes > 0, values / torch.where(sizes > 0, sizes, 1), 0).to(gradient.dtype)

    def _exact(self, values: Tensor) -> bool:
        """Whether the smoothing is none, or one whose square the values' type cannot hold: roots have no slope at 0."""
        return self.smoothing**2 < torch.finfo(values.dtype).tiny

    def scaled_mean(self) -> None:
        """There is no mean perturbation."""

    def warn_if_skipped(self) -> None:
        """There is nothing to learn, so nothing is skipped."""

    def extra_repr(self) -> str:
        """Settings."""
        return f"p={self.p}, smoothing={self.smoothing}"
