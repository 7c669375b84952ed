"""A covariance matrix that is known by its displacements: what can be asked of it, whatever it was made from."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sgr_kernels.backends import choose, reference
from sgr_kernels.backends.torch_spectral import compute_dtype
from sgr_kernels.covariance.dense import dense_root, draw_dense
from sgr_kernels.covariance.derived import Derived
from sgr_kernels.covariance.on_device import Arranged
from sgr_kernels.functional import operators
from sgr_kernels.functional.solve import System, apply
from sgr_kernels.toeplitz import embedding
from sgr_kernels.toeplitz.constants import wide_dtype
from sgr_kernels.toeplitz.geometry import Size, dense_matrix
from sgr_kernels.toeplitz.lanczos import log_quadrature, smallest_eigenvalue
from sgr_kernels.toeplitz.spectrum import spectrum_from_table


class StructuredMatrix(nn.Module):
    """A symmetric block-Toeplitz matrix Sigma, its spectrum kept beside its table.

    Both are buffers that `assign` rewrites in place, so that a captured CUDA graph sees the present matrix.

    Args:
        table: Zeros in the shape of the table, (C, C, h, w) or (C, C, 2h-1, 2w-1).
        image_size: Size (H, W).
        form: ``"even"`` or ``"signed"``.
    """

    table: Tensor
    spectrum: Tensor

    def __init__(self, table: Tensor, image_size: Size, form: str) -> None:
        super().__init__()
        self.image_size, self.form = image_size, form
        parts = (4,) if form == "signed" else ()
        self.register_buffer("table", table, persistent=False)
        spectrum = table.new_zeros(*parts, *table.shape[:2], *self._frequencies())
        self.register_buffer("spectrum", spectrum, persistent=False)
        self._root, self._system = Derived(), Derived()
        self._arranged = Arranged()

    def assign(self, table: Tensor) -> None:
        """Become the matrix of another table of the same shape, in any precision."""
        self.table.copy_(table)
        frequencies = self._frequencies()
        if self.spectrum.shape[-2:] != frequencies:  # as another device had them
            self.spectrum = self.spectrum.new_empty(*self.spectrum.shape[:-2], *frequencies)
        self.spectrum.copy_(spectrum_from_table(table, frequencies, self.form, self.spectrum.dtype))
        self._arranged.renew(self.spectrum, self.image_size)

    def _frequencies(self) -> Size:
        return operators.spectrum_sizes(self.table, self.image_size, self.form, self.table.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self.spectrum.shape[-2:] != self._frequencies():
            with torch.no_grad():
                self.assign(self.table)
        return self

    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        """Table, spectrum, and the arranged spectrum or nothing (0,): for what rewrites all of them in place."""
        tiles = self._arranged.beside(self.spectrum, "native")
        return self.table, self.spectrum, self.spectrum.new_empty(0) if tiles is None else tiles

    def rewritten(self) -> None:
        """All of the `state` has been."""
        self._arranged.accept(self.spectrum, "native")

    def _spectrum_for(self, images: Tensor, constant: bool) -> Tensor:
        # A copy, because autograd may keep it while the next assignment rewrites the buffer.
        return self.spectrum.to(compute_dtype(images.dtype), copy=torch.is_grad_enabled() and not constant)

    def product(self, images: Tensor, constant: bool = False) -> Tensor:
        """``v = Sigma g`` for images (B, C, H, W); ``constant`` promises that nothing is assigned any more."""
        backend = choose("auto", operators.request("product", images, self.form))
        if backend == "reference":
            return reference.product(images, self.table, self.form)
        if not (torch.is_grad_enabled() and images.requires_grad):
            arranged = self._arranged.of(self.spectrum, images, self.form, backend)
            if arranged is not None:
                return operators.quadratic_form_of_arranged(images, self.spectrum, arranged, True, backend)[1]
        return operators.product_from_spectrum(images, self._spectrum_for(images, constant), backend)

    def quadratic_form(self, images: Tensor, constant: bool = False) -> Tensor:
        """``q_b = g_b^T Sigma g_b``, (B,), float32 or better."""
        backend = choose("auto", operators.request("quadratic_form", images, self.form))
        if backend == "reference":
            return reference.quadratic_form(images, self.table, self.form).to(compute_dtype(images.dtype))
        spectrum = self._spectrum_for(images, constant)
        arranged = self._arranged.of(self.spectrum, images, self.form, backend)
        if arranged is None:
            return operators.quadratic_form_from_spectrum(images, spectrum, backend)
        with_product = torch.is_grad_enabled() and images.requires_grad
        return operators.quadratic_form_of_arranged(images, spectrum, arranged, with_product, backend)[0]

    def dense(self) -> Tensor:
        """The matrix, formed, (C*H*W, C*H*W)."""
        return dense_matrix(self.table, self.image_size, self.form)

    def sample(self, n: int, generator: torch.Generator | None) -> Tensor:
        """Draw ``n`` fields from N(0, Sigma), (n, C, H, W).

        Raises:
            ValueError: If Sigma is indefinite.
        """
        filtering, root = self._root((self.table,), self._square_root)
        if filtering:
            return embedding.draw(root, n, self.image_size, self.table.dtype, generator)
        return draw_dense(root, n, generator).view(n, self.table.shape[0], *self.image_size)

    def _square_root(self) -> tuple[bool, Tensor]:
        """The filter that draws samples, and True; where the embedding is indefinite, a root of Sigma, and False."""
        response = embedding.square_root(self.table, self.image_size, self.form)
        return (True, response) if response is not None else (False, dense_root(self.dense()))

    def solve(self, images: Tensor, tolerance: float, max_iterations: int | None) -> Tensor:
        """``y = Sigma^-1 x``, like ``images`` (B, C, H, W), differentiable in them.

        Raises:
            ValueError: If Sigma is not positive definite, or the tolerance is not reached.
        """
        system = self._prepared()
        y = apply(images.to(compute_dtype(images.dtype)), system, tolerance, max_iterations)
        return y.to(images.dtype)

    def log_determinant(self, probes: int, generator: torch.Generator | None) -> Tensor:
        """Independent estimates of ``log det Sigma``, (probes,), by Lanczos quadrature beside the preconditioner's own.

        Raises:
            ValueError: If Sigma is not positive definite.
        """
        system = self._prepared()
        near, shape = system.preconditioner, (probes, system.table.shape[0], *self.image_size)
        device = self.table.device if generator is None else generator.device
        signs = 2 * torch.randint(2, shape, generator=generator, device=device).to(system.table) - 1
        try:
            rest = log_quadrature(lambda z: near.whiten(system.product(near.spread(z))), signs)
        except ValueError as error:
            raise ValueError(f"covariance: {error}") from error
        return near.log_determinant + system.dimension * math.log(system.scale) + rest

    def _prepared(self) -> System:
        system: System = self._system((self.table,), lambda: System(self.table, self.image_size, self.form))
        return system

    def min_eigenvalue(self) -> float:
        """Smallest eigenvalue of Sigma (Lanczos, in float64)."""
        shape = (1, self.table.shape[0], *self.image_size)
        table = self.table.to(wide_dtype(self.table.device))

        def product(vector: Tensor) -> Tensor:
            v = operators.covariance_product(vector.view(shape).to(table.dtype), table, form=self.form)
            return v.flatten().to(vector.dtype)

        return smallest_eigenvalue(product, shape[1] * shape[2] * shape[3], table.device)

    def extra_repr(self) -> str:
        """Shape and form of the table."""
        return f"table={tuple(self.table.shape)}, form={self.form!r}"
