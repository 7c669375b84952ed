"""Covariances that need no structure: the full matrix of low-dimensional data, and a multiple of the identity."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sgr_kernels import checks
from sgr_kernels.backends.torch_spectral import compute_dtype
from sgr_kernels.covariance.base import Covariance, Estimate, LogDeterminant
from sgr_kernels.covariance.derived import Derived
from sgr_kernels.functional.solve import check_solver
from sgr_kernels.toeplitz.constants import wide_dtype


def dense_root(sigma: Tensor) -> Tensor:
    """A square root R of a matrix (D, D), ``R R^T = sigma``, in its dtype; found in float64.

    Raises:
        ValueError: If the matrix is indefinite.
    """
    wide = sigma.to(wide_dtype(sigma.device))
    eigenvalues, vectors = torch.linalg.eigh((wide + wide.mT) / 2)
    smallest, largest = float(eigenvalues[0]), float(eigenvalues.abs().max())
    if smallest < -1e-6 * largest:
        raise ValueError(
            f"covariance: cannot draw samples, it is indefinite (eigenvalues {smallest:.3g} to {largest:.3g}); "
            'use psd="clip"'
        )
    return (vectors * eigenvalues.clamp(min=0).sqrt()).to(sigma.dtype)


def draw_dense(root: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """Draw from N(0, R R^T) for a root (D, D): (n, D)."""
    return torch.randn(n, root.shape[0], generator=generator, device=root.device, dtype=root.dtype) @ root.mT


class FullCovariance(Estimate):
    """The full matrix of second moments (Eq. 15), as a running estimate (Eq. 14). For low-dimensional data.

    Args:
        channels: Number of channels C.
        size: Image size (H, W), or any other shape of a channel; () for vectors, with ``channels`` their length.
        decay: Weight beta of the current batch, in [0, 1].
        target_variance: The mean diagonal entry is brought to this value when it is read; None leaves it.
        process_group: As for `CovarianceFunction`.

    Perturbations and gradients are ``(B, C, *size)``, or flattened, (B, D).

    Attributes:
        values: The raw running estimate, (D, D).
        mean: The running mean perturbation.
        updates: Number of batches in the estimate, int64.
        skipped: Number of batches that were not finite and did not enter, int64.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        channels: int,
        size: int | tuple[int, ...],
        *,
        decay: float = 0.1,
        target_variance: float | None = None,
        process_group: Any = "auto",
    ) -> None:
        shape = (channels, *(tuple(size) if isinstance(size, Iterable) else (size, size)))
        if not all(map(checks.is_whole, shape)):
            raise ValueError(f"channels, size: expected whole numbers >= 1, got {channels!r}, {size!r}")
        shape = tuple(map(int, shape))
        dimension = math.prod(shape)
        super().__init__(torch.zeros(dimension, dimension), shape, decay, target_variance, process_group)
        self._root, self._factor = Derived(), Derived()

    def _check(self, name: str, value: Tensor) -> None:
        if isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == self.values.shape[0]:
            value = value.view(-1, *self.shape)
        super()._check(name, value)

    def _second_moment(self, perturbation: Tensor) -> Tensor:
        flat = perturbation.flatten(1)
        return flat.mT @ flat / flat.shape[0]

    def _average_variance(self, values: Tensor) -> Tensor:
        return values.diagonal().mean()

    def product(self, gradient: Tensor) -> Tensor:
        """``v = Sigma g``, like ``gradient``; differentiable in the gradient."""
        self._check("gradient", gradient)
        dtype = compute_dtype(gradient.dtype)
        with torch.autocast(gradient.device.type, enabled=False):
            v = gradient.flatten(1).to(dtype) @ self.dense().to(dtype)
        return v.view(gradient.shape).to(gradient.dtype)

    def quadratic_form(self, gradient: Tensor) -> Tensor:
        """``q_b = g_b^T Sigma g_b``, (B,); differentiable in the gradient."""
        self._check("gradient", gradient)
        flat = gradient.flatten(1).to(compute_dtype(gradient.dtype))
        return (self.product(flat) * flat).sum(1)

    def dense(self) -> Tensor:
        """The matrix that `product` applies, (D, D)."""
        return self.values * self.scale

    def solve(self, x: Tensor, *, tolerance: float = 1e-6, max_iterations: int | None = None) -> Tensor:
        """``y = Sigma^-1 x``, like ``x``, by the Cholesky factor of `dense`, which is kept; differentiable in x."""
        return super().solve(x, tolerance=tolerance, max_iterations=max_iterations)

    def _cholesky(self) -> Tensor:
        factor: Tensor = self._factor((self.values, self.scale), super()._cholesky)
        return factor

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` zero-mean Gaussian perturbations with the covariance `dense`, ``(n, C, *size)``."""
        root = self._root((self.values, self.scale), lambda: dense_root(self.dense()))
        return draw_dense(root, n, generator).view(n, *self.shape)


class IdentityCovariance(Covariance):
    """``Sigma = variance * I``: SGR with it is the gradient-norm penalty, GN.

    Args:
        variance: The diagonal entry, not negative.
        shape: Shape (C, H, W) of one perturbation; only `dense` and `sample` need it.

    Raises:
        ValueError: If the variance is negative or not finite.
    """

    def __init__(self, variance: float = 1.0, shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.variance = checks.number("variance", variance, "a finite number >= 0", lambda x: 0 <= x < math.inf)
        self.shape = None if shape is None else tuple(shape)
        self.frozen = True

    def _known_shape(self) -> tuple[int, ...]:
        if self.shape is None:
            raise ValueError("shape: the identity's size is unknown; construct it with shape=(C, H, W)")
        return self.shape

    def product(self, gradient: Tensor) -> Tensor:
        """``v = variance * g``, like ``gradient``."""
        self._check("gradient", gradient)
        return gradient * self.variance

    def quadratic_form(self, gradient: Tensor) -> Tensor:
        """``q_b = variance * |g_b|^2``, (B,), float32 or better."""
        self._check("gradient", gradient)
        return gradient.flatten(1).to(compute_dtype(gradient.dtype)).square().sum(1) * self.variance

    def solve(self, x: Tensor, *, tolerance: float = 1e-6, max_iterations: int | None = None) -> Tensor:
        """``y = x / variance``, like ``x``; exact, so that the other arguments make no difference."""
        check_solver(tolerance, max_iterations)
        self._check("x", x)
        return x / self._positive_variance()

    def log_determinant(self) -> LogDeterminant:
        """``D log variance``, exact; needs the shape."""
        return LogDeterminant(math.prod(self._known_shape()) * math.log(self._positive_variance()), 0.0)

    def _positive_variance(self) -> float:
        if self.variance == 0:
            raise ValueError("covariance: expected a positive definite matrix, got variance 0")
        return self.variance

    def _check(self, name: str, value: Tensor) -> None:
        super()._check(name, value)
        if value.dim() < 2 or (self.shape is not None and tuple(value.shape[1:]) != self.shape):
            raise ValueError(f"{name}: expected (B, C, H, W), got {tuple(value.shape)}")

    def dense(self) -> Tensor:
        """The matrix that `product` applies, (D, D)."""
        return torch.eye(math.prod(self._known_shape())) * self.variance

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` samples of white noise, (n, C, H, W)."""
        device = "cpu" if generator is None else generator.device
        return torch.randn(n, *self._known_shape(), generator=generator, device=device) * math.sqrt(self.variance)

    def extra_repr(self) -> str:
        """The variance."""
        return f"variance={self.variance}"
