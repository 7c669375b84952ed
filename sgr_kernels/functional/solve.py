"""``y = Sigma^-1 x`` by preconditioned conjugate gradients, and its derivatives."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from sgr_kernels import checks
from sgr_kernels.backends import choose, reference
from sgr_kernels.backends.torch_spectral import compute_dtype
from sgr_kernels.functional.operators import (
    Operands,
    correlate,
    covariance_product,
    product_from_spectrum,
    request,
    spectrum_sizes,
)
from sgr_kernels.toeplitz import conjugate_gradients
from sgr_kernels.toeplitz.constants import wide_dtype
from sgr_kernels.toeplitz.geometry import Size, dense_matrix
from sgr_kernels.toeplitz.preconditioner import Preconditioner
from sgr_kernels.toeplitz.spectrum import spectrum_from_table

LIMIT = 1000
"""Iterations by default, but never many more than there are unknowns."""
_ROUNDING = 100
"""Times the tolerance that rounding may add to the residual of a float32 solution."""


class System:
    """A symmetric Sigma, prepared for solves: its spectrum and its preconditioner, made when first needed.

    Args:
        table: Even or signed, of a symmetric matrix.
        size: Image size (H, W).
        form: ``"even"`` or ``"signed"``.
        backend: ``"auto"`` or the name of a backend.

    Attributes:
        scale: Power of two that brings Sigma's variances to about one; what is kept, multiplied and factorized is
            Sigma over it.

    Raises:
        ValueError: If the table is not finite, or a variance not positive.
    """

    def __init__(self, table: Tensor, size: Size, form: str, backend: str = "auto") -> None:
        if not bool(table.isfinite().all()):
            raise ValueError("covariance: expected finite numbers, got NaN or infinity")
        zero = (table.shape[-2] // 2, table.shape[-1] // 2) if form == "signed" else (0, 0)
        variances = table.detach()[(..., *zero)].diagonal()
        if not bool((variances > 0).all()):
            raise ValueError(_not_definite(f"a channel has the variance {float(variances.min()):.3g}"))
        self.scale = 2.0 ** math.frexp(float(variances.max()))[1]
        self.table = table.detach().to(wide_dtype(table.device)) / self.scale  # a copy, as it is now
        self.size, self.form, self.backend = size, form, backend

    @property
    def dimension(self) -> int:
        """Rows of Sigma."""
        return self.table.shape[0] * self.size[0] * self.size[1]

    @functools.cached_property
    def preconditioner(self) -> Preconditioner:
        """Applied in single precision: it need not be exact."""
        return Preconditioner(self.table, self.size, self.form, torch.float32)

    @functools.cached_property
    def _spectrum(self) -> Tensor:
        sizes = spectrum_sizes(self.table, self.size, self.form, self.table.dtype)
        return spectrum_from_table(self.table, sizes, self.form, self.table.dtype)

    @functools.cached_property
    def _narrow_spectrum(self) -> Tensor:
        sizes = spectrum_sizes(self.table, self.size, self.form, torch.float32)
        if sizes == tuple(self._spectrum.shape[-2:]):
            return self._spectrum.to(torch.float32)
        return spectrum_from_table(self.table, sizes, self.form, torch.float32)

    @functools.cached_property
    def factor(self) -> Tensor:
        """Cholesky factor of Sigma over its scale, formed.

        Raises:
            ValueError: If Sigma is not positive definite.
        """
        return definite_factor(dense_matrix(self.table, self.size, self.form))

    def product(self, images: Tensor) -> Tensor:
        """``Sigma p`` over Sigma's scale, for images (B, C, H, W) in float32 or the widest type."""
        name = choose(self.backend, request("product", images, self.form))
        if name == "reference":
            return reference.product(images, self.table, self.form)
        spectrum = self._spectrum if images.dtype == self.table.dtype else self._narrow_spectrum
        return product_from_spectrum(images, spectrum, name)

    @torch.no_grad()
    def solve(self, images: Tensor, tolerance: float, limit: int | None) -> Tensor:
        """``Sigma^-1 x`` for images (B, C, H, W) in float32 or the widest type.

        Raises:
            ValueError: If Sigma is not positive definite, or the tolerance was not reached.
        """
        # Whatever their scale, squares of what is solved for can be summed.
        peak = images.flatten(1).abs().amax(1) if images.numel() else images.new_ones(len(images))
        peak = torch.where(peak == 0, 1, peak)[:, None, None, None]
        y = self._solve_scaled(images / peak, tolerance, limit)
        factor = peak.to(self.table.dtype) / self.scale
        return (y.to(factor.dtype) * factor).to(images.dtype)

    def _solve_scaled(self, images: Tensor, tolerance: float, limit: int | None) -> Tensor:
        """The solution over the scale, of images with a peak of one."""
        wide = images.to(self.table.dtype)
        if choose(self.backend, request("product", images, self.form)) == "reference":
            return torch.cholesky_solve(wide.flatten(1).mT, self.factor).mT.reshape(images.shape).to(images.dtype)
        limit = min(LIMIT, 2 * self.dimension + 10) if limit is None else limit
        with torch.autocast(images.device.type, enabled=False):
            size = torch.linalg.vector_norm(wide.flatten(1), dim=1)
            if images.dtype == wide.dtype:
                return self._iterate(wide, size, tolerance, limit)
            y = conjugate_gradients.solve(self.product, self.preconditioner.inverse, images, tolerance, limit).y
            rest = wide - self.product(y.to(wide.dtype))
            off = torch.linalg.vector_norm(rest.flatten(1), dim=1)
            # Also of those that did not converge.
            again = (~(off <= _ROUNDING * tolerance * size) & size.isfinite()).nonzero().squeeze(1)
            if len(again):
                near = (off < size)[again, None, None, None]
                begun = torch.where(near, y[again].to(wide.dtype), 0)
                rest = torch.where(near, rest[again], wide[again])
                y[again] = (begun + self._iterate(rest, size[again], tolerance, limit)).to(images.dtype)
            return y

    def _iterate(self, images: Tensor, size: Tensor, tolerance: float, limit: int) -> Tensor:
        """``Sigma^-1 x`` up to residuals of so much of ``size``."""
        own = torch.linalg.vector_norm(images.flatten(1), dim=1)
        share = torch.where(own > 0, own / torch.where(size > 0, size, 1), 1)
        wanted = tolerance / share
        found = conjugate_gradients.solve(self.product, self.preconditioner.inverse, images, wanted, limit)
        missed = torch.where(size.isfinite(), (found.residual * share).nan_to_num(torch.inf), 0)
        worst = float(missed.max()) if len(images) else 0.0
        if found.indefinite:
            how = f"conjugate gradients, at a relative residual of {worst:.2g}, met a direction p with p^T Sigma p <= 0"
            raise ValueError(_not_definite(how))
        # A residual that is NaN where the image is not: a breakdown is no convergence.
        if bool((~(found.residual <= wanted) & size.isfinite()).any()):
            steps = int(found.iterations.max())
            raise ValueError(
                f"covariance: conjugate gradients reached a relative residual of {worst:.2g} in {steps} iterations, "
                f"expected {tolerance:g}: the covariance is singular, or nearly so; add a jitter, a small variance "
                "of each pixel (CovarianceFunction.with_jitter), or allow a larger tolerance or max_iterations"
            )
        return found.y


def definite_factor(sigma: Tensor) -> Tensor:
    """Cholesky factor (D, D) of a matrix.

    Raises:
        ValueError: If the matrix is not positive definite.
    """
    factor, failed = torch.linalg.cholesky_ex(sigma)
    if bool(failed):
        raise ValueError(_not_definite(f"the Cholesky factorization fails at row {int(failed)}"))
    return factor


def _not_definite(how: str) -> str:
    """The message of an error, and what helps."""
    return (
        f'covariance: expected a positive definite matrix: {how}; psd="clip" makes a covariance semidefinite, and a '
        "jitter, a small variance of each pixel (CovarianceFunction.with_jitter), makes that definite"
    )


class Solve(torch.autograd.Function):
    """(images (B, C, H, W), table of a symmetric matrix, its `System`, tolerance, limit) -> like images."""

    @staticmethod
    def forward(images: Tensor, table: Tensor, system: System, tolerance: float, limit: int | None) -> Tensor:
        """Solve."""
        return system.solve(images, tolerance, limit)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the derivatives need."""
        _, table, *ctx.options = inputs
        ctx.save_for_backward(table, output)
        ctx.save_for_forward(table, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """``w = Sigma^-1 grad``; in the covariance, minus the correlation of w and y."""
        table, y = ctx.saved_tensors
        system = ctx.options[0]
        w = Solve.apply(grad, table, *ctx.options)
        by_table = None
        if ctx.needs_input_grad[1]:
            shape = (table.shape[-2], table.shape[-1])
            by_table = -correlate(w, y, shape, system.form, system.backend).to(table.dtype)
        return w, by_table, None, None, None

    @staticmethod
    def jvp(ctx: Any, images_t: Tensor | None, table_t: Tensor | None, *_: None) -> Tensor | None:
        """``Sigma^-1 (x' - Sigma' y)``."""
        table, y = ctx.saved_tensors
        system = ctx.options[0]
        right = images_t
        if table_t is not None:
            moved = covariance_product(y, table_t, form=system.form, backend=system.backend)
            right = -moved if right is None else right - moved
        return None if right is None else Solve.apply(right, table, *ctx.options)


def apply(images: Tensor, system: System, tolerance: float, limit: int | None, table: Tensor | None = None) -> Tensor:
    """``Sigma^-1 x`` with derivatives, of images in float32 or the widest type; in the table too if it is given."""
    y: Tensor = Solve.apply(images, system.table if table is None else table, system, tolerance, limit)
    return y


def check_solver(tolerance: float, max_iterations: int | None) -> float:
    """The tolerance, a number in (0, 1); and a number of iterations, or None.

    Raises:
        ValueError: If one is out of range.
    """
    if max_iterations is not None and not checks.is_whole(max_iterations):
        raise ValueError(f"max_iterations: expected a whole number >= 1 or None, got {max_iterations!r}")
    return checks.number("tolerance", tolerance, "a number in (0, 1)", lambda x: 0 < x < 1 and math.isfinite(x))


def covariance_solve(
    x: Tensor,
    covariance: Tensor,
    *,
    form: str | None = None,
    tolerance: float = 1e-6,
    max_iterations: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Solve ``Sigma y = x`` for a displacement-indexed covariance: ``y = Sigma^-1 x``, Sigma never formed.

    Conjugate gradients, each sample until its own ``|x - Sigma y| <= tolerance |x|``, preconditioned by the diagonal
    (blocks of C x C) of Sigma in a basis of its own (`toeplitz.preconditioner`). Of the covariance the symmetric part
    counts, which must be positive definite. Differentiable to any order in both arguments, each derivative by further
    solves to the same tolerance; not under ``torch.func.vmap``.

    In float32, and for lower precision, the residual is the recurrence's: rounding adds to it, and where it is found
    to have added more than 100 times the tolerance, the sample is solved for in float64, and rounded.

    Args:
        x: (B, C, H, W), or (B, C, L) for signals; any floating-point dtype, any strides.
        covariance: As for `covariance_product`.
        form: As for `covariance_product`.
        tolerance: Relative residual to reach.
        max_iterations: Of conjugate gradients; None: as many as there are unknowns twice over, 1000 at the most.
        backend: ``"auto"`` or the name of a backend; ``"reference"`` forms Sigma and factorizes it.

    Returns:
        The solution, like ``x``; NaN for samples that are not finite.

    Raises:
        TypeError: If an argument is not a real floating-point tensor.
        ValueError: If shapes, form, devices, tolerance or the backend's name do not fit; if the covariance is not
            finite, or turns out not to be positive definite, or the tolerance is not reached: the message says the
            residual, and what helps.
        RuntimeError: If the named backend cannot run.
    """
    tolerance = check_solver(tolerance, max_iterations)
    operands = Operands(x, covariance, form, "x")
    images, table = operands.images, operands.table().to(wide_dtype(x.device))
    transposed = table.transpose(0, 1)
    table = (table + (transposed.flip(-2, -1) if operands.form == "signed" else transposed)) / 2
    system = System(table, (images.shape[2], images.shape[3]), operands.form, backend)
    y = apply(images.to(compute_dtype(x.dtype)), system, tolerance, max_iterations, table)
    return y.to(x.dtype).view(x.shape)
