"""The covariance as a function of displacement: the paper's representation for images."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sgr_kernels import checks
from sgr_kernels.backends.torch_spectral import compute_dtype
from sgr_kernels.covariance import construction, on_device, readings
from sgr_kernels.covariance.base import Estimate, LogDeterminant
from sgr_kernels.covariance.layout import Layout, at_zero, layout_of_values, perturbation_shape
from sgr_kernels.covariance.structured import StructuredMatrix
from sgr_kernels.functional.solve import check_solver
from sgr_kernels.toeplitz import embedding
from sgr_kernels.toeplitz.constants import wide_dtype
from sgr_kernels.toeplitz.geometry import Size, even_from_radial

_DENSE_UP_TO = 4096
"""Rows of the largest Sigma that is formed for its determinant: 134 MB."""


class CovarianceFunction(Estimate):
    """Covariance as a function of the displacement between pixels (Eq. 16), as a running estimate (Eq. 14).

    Args:
        channels: Number of channels C.
        size: Image size (H, W); (L,) for signals (B, C, L); an int for squares.
        decay: Weight beta of the current batch, in [0, 1].
        max_displacement: Zero beyond this displacement; None reaches across the image.
        binning: ``"rounded"``, the paper's: one value for each distance rounded to an integer. ``"linear"``:
            interpolated between neighbouring integers, positive definite for exponentials where rounding is not.
            ``"even"``: one value for each (abs dy, abs dx). ``"offset"``: one for each (dy, dx).
        target_variance: The mean diagonal entry of Sigma is brought to this value when it is read, so that the
            strength of the penalty reads as a noise-to-signal ratio (section 3.3); None leaves it as estimated.
        psd: ``"clip"`` projects Sigma onto the positive semidefinite cone after every update; ``"none"`` leaves it as
            estimated, as the paper does: it can then be indefinite, and the penalty negative.
        process_group: Processes whose batches enter the estimate together, weighted by their samples, so that all
            hold the same one: ``"auto"`` all where ``torch.distributed`` is initialized, None this one alone.

    Attributes:
        values: The raw running estimate, by binning (C, C, K), (C, C, h, w) or (C, C, 2h-1, 2w-1).
        mean: The running mean perturbation, (C, H, W).
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
        max_displacement: int | None = None,
        binning: str = "rounded",
        target_variance: float | None = None,
        psd: str = "clip",
        process_group: Any = "auto",
    ) -> None:
        layout = Layout(perturbation_shape(channels, size), binning, max_displacement)
        if psd not in ("clip", "none"):
            raise ValueError(f"psd: expected 'clip' or 'none', got {psd!r}")
        super().__init__(torch.zeros(layout.values_shape), layout.shape, decay, target_variance, process_group)
        self.layout, self.psd = layout, psd
        table = layout.table(whole=psd == "clip")  # the projection fills the whole range
        self._counters_on_device = on_device.counters(self.values.device)
        self.matrix = StructuredMatrix(self.values.new_zeros(table.values_shape), layout.image_size, table.form)

    @property
    def image_size(self) -> Size:
        """Size (H, W); (1, L) for signals."""
        return self.layout.image_size

    @property
    def binning(self) -> str:
        """As constructed."""
        return self.layout.binning

    @property
    def max_displacement(self) -> int | None:
        """As constructed."""
        return self.layout.max_displacement

    @property
    def form(self) -> str:
        """Form of the table that the kernels use, ``"even"`` or ``"signed"``."""
        return self.matrix.form

    @property
    def table(self) -> Tensor:
        """Sigma by displacement, which is the values scaled and clipped."""
        return self.matrix.table

    @property
    def spectrum(self) -> Tensor:
        """The table's spectrum."""
        return self.matrix.spectrum

    @classmethod
    def from_values(cls, values: Tensor, size: int | tuple[int, ...], **options: Any) -> CovarianceFunction:
        """A frozen covariance with given values.

        Args:
            values: (C, C, K) for ``binning="rounded"`` (the default for rank 3) or ``"linear"``; (C, C, h, w) for
                ``"even"`` (the default for rank 4); (C, C, 2h-1, 2w-1) for ``"offset"``. Shorter than the image
                means zero beyond.
            size: Image size.
            **options: Other arguments of `CovarianceFunction`.

        Raises:
            TypeError: If the values are not a real floating-point tensor.
            ValueError: If they are not finite, not symmetric, of a shape that does not fit, or without a positive
                variance to bring to a target.
        """
        binning = options.setdefault(
            "binning", "rounded" if isinstance(values, Tensor) and values.dim() == 3 else "even"
        )
        layout = layout_of_values(values, size, binning, options.get("max_displacement"))
        values = values.detach()
        options["max_displacement"] = layout.max_displacement
        covariance = cls(layout.channels, size, **options)
        covariance.check_values(values)
        covariance.to(values.device, torch.promote_types(values.dtype, torch.float32))
        its, mine = layout.common_window(values, covariance.values)
        mine.copy_(its)
        return covariance.freeze()

    @classmethod
    def exponential(
        cls,
        channels: int,
        size: int | tuple[int, ...],
        decay_length: float,
        *,
        cross_channel: float = 0.5,
        rounded: bool = False,
        **options: Any,
    ) -> CovarianceFunction:
        """A frozen exponential, ``f(r) = exp(-r / decay_length)`` (section 4.3).

        Args:
            channels: Number of channels.
            size: Image size.
            decay_length: Displacement in pixels over which the covariance falls to 1/e.
            cross_channel: Covariance between channels, as a fraction of that within one.
            rounded: Round the displacement r to an integer, as the paper's estimate does; the matrix is then
                indefinite before it is clipped.
            **options: Other arguments of `CovarianceFunction`. With a radial ``binning`` the function is known at
                integers alone.

        Raises:
            ValueError: If an argument is out of range.
        """
        binning = options.setdefault("binning", "rounded" if rounded else "even")
        layout = Layout(perturbation_shape(channels, size), binning)
        values = construction.exponential(layout, decay_length, cross_channel, rounded)
        return cls.from_values(values.to(compute_dtype(torch.get_default_dtype())), size, **options)

    @classmethod
    def from_images(
        cls, images: Tensor, *, center: bool = True, chunk: int = 1024, **options: Any
    ) -> CovarianceFunction:
        """A frozen covariance of a data set.

        Args:
            images: (n, C, H, W) or (n, C, L), floating point in [0, 1], or uint8, which is divided by 255.
            center: Subtract the mean image.
            chunk: Images taken at a time.
            **options: Other arguments of `CovarianceFunction`.

        Raises:
            TypeError: If the images are neither floating point nor uint8.
            ValueError: If there are no images, or a value is not finite, or all are the same and a target variance is
                asked for.
        """
        construction.check_data_set(images, chunk)
        return cls._of_data(images, None, center, chunk, options)

    @classmethod
    def from_pairs(
        cls, clean: Tensor, corrupted: Tensor, *, center: bool = False, chunk: int = 1024, **options: Any
    ) -> CovarianceFunction:
        """A frozen covariance of a corruption: the second moment of ``xi = corrupted - clean``.

        By default the raw one, ``E[xi xi^T]``, as the penalty asks for (Eq. 15), where `from_images` describes images
        and centres them. The mean of xi then is kept, for ``SGRLoss(..., mean_correction=True)`` (Eq. 12).

        Args:
            clean: (n, C, H, W) or (n, C, L), floating point in [0, 1], or uint8, which is divided by 255.
            corrupted: The same images, corrupted.
            center: Subtract the mean of xi: what a constant shift does is then not in the covariance.
            chunk: Pairs taken at a time.
            **options: Other arguments of `CovarianceFunction`.

        Raises:
            TypeError: If the images are neither floating point nor uint8.
            ValueError: If the two differ in shape or device, there are none, a value is not finite, or nothing was
                corrupted and a target variance is asked for.
        """
        construction.check_pairs(clean, corrupted, chunk)
        return cls._of_data(corrupted, clean.detach(), center, chunk, options)

    @classmethod
    def _of_data(
        cls, images: Tensor, minus: Tensor | None, center: bool, chunk: int, options: dict[str, Any]
    ) -> CovarianceFunction:
        covariance = cls(images.shape[1], tuple(images.shape[2:]), **options)
        values, mean = construction.moments_of_images(images.detach(), covariance.layout, center, chunk, minus)
        covariance.to(values.device, values.dtype)
        covariance.check_values(values)
        covariance.values.copy_(values)
        if not center:
            covariance.mean.copy_(mean)
        return covariance.freeze()

    def freeze(self) -> CovarianceFunction:
        """Take no more updates; returns the covariance itself.

        Raises:
            ValueError: If no variance is there to be brought to a target: the penalty would be zero for ever.
        """
        self.check_variance(self.values)
        self.frozen = True
        with torch.no_grad():
            self._refresh()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self._counters_on_device.device != self.values.device:  # now, for a CUDA graph that records has no zeros yet
            self._counters_on_device = on_device.counters(self.values.device)
        return self

    def _update_on_device(self, perturbation: Tensor) -> bool:
        images = checks.as_images(perturbation)
        if not on_device.serves_update(images, self.values, self.layout):
            return False
        if self._counters_on_device.device != images.device:
            self._counters_on_device = on_device.counters(images.device)
        mean, (table, spectrum, arranged) = self.mean.view(images.shape[1:]), self.matrix.state()
        state = (self.values, mean, self.scale, table, spectrum, self.updates, self.skipped, self._counters_on_device)
        settings = (self.decay, self.target_variance, self.psd == "clip")
        on_device.update(images, (*state, arranged), self.layout, *settings)
        self.matrix.rewritten()
        return True

    def _second_moment(self, perturbation: Tensor) -> Tensor:
        return construction.second_moment(perturbation, self.layout)

    def _average_variance(self, values: Tensor) -> Tensor:
        return at_zero(values, self.layout.form).diagonal().mean()

    def _transposed(self, values: Tensor) -> Tensor:
        return self.layout.transposed(values)

    def _refresh(self) -> None:
        super()._refresh()
        values = self.values.to(wide_dtype(self.values.device))
        if self.layout.form == "radial":
            values = even_from_radial(values, self.image_size, self.binning)
        table = values * self.scale
        if self.psd == "clip":
            table = embedding.clip(table, self.image_size, self.form)
            if self.target_variance is not None:
                variance = at_zero(table, self.form).diagonal().mean()
                table = table * (self.target_variance / torch.where(variance > 0, variance, 1.0))
        self.matrix.assign(table)

    def _images(self, gradient: Tensor) -> Tensor:
        self._check("gradient", gradient)
        return checks.as_images(gradient)

    def product(self, gradient: Tensor) -> Tensor:
        """``v = Sigma g``, like ``gradient`` (B, C, H, W); differentiable in the gradient."""
        return self.matrix.product(self._images(gradient), constant=self.frozen).view(gradient.shape)

    def quadratic_form(self, gradient: Tensor) -> Tensor:
        """``q_b = g_b^T Sigma g_b``, (B,); differentiable in the gradient."""
        return self.matrix.quadratic_form(self._images(gradient), constant=self.frozen)

    def dense(self) -> Tensor:
        """The matrix that `product` applies, (C*H*W, C*H*W), formed: for small images."""
        return self.matrix.dense()

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` zero-mean Gaussian perturbations with the covariance `dense`, (n, C, H, W).

        Raises:
            ValueError: If Sigma is indefinite, which ``psd="clip"`` prevents.
        """
        return self.matrix.sample(n, generator).reshape(n, *self.shape)

    def solve(self, x: Tensor, *, tolerance: float = 1e-6, max_iterations: int | None = None) -> Tensor:
        """``y = Sigma^-1 x``, like ``x`` (B, C, H, W); differentiable in x. As `sgr.functional.covariance_solve`.

        Raises:
            ValueError: If Sigma turns out not to be positive definite, as after clipping it often is not, or the
                tolerance is not reached; `with_jitter` helps.
        """
        tolerance = check_solver(tolerance, max_iterations)
        self._check("x", x)
        return self.matrix.solve(checks.as_images(x), tolerance, max_iterations).view(x.shape)

    @torch.no_grad()
    def log_determinant(self, *, probes: int = 32, generator: torch.Generator | None = None) -> LogDeterminant:
        """``log det Sigma``: exact up to 4096 rows, else by stochastic Lanczos quadrature, with its standard error.

        Args:
            probes: Random vectors of the estimate, at least two.
            generator: Their source; None means a private one with a fixed seed.

        Raises:
            ValueError: If Sigma is not positive definite, or there are too few probes.
        """
        checks.check_count("probes", probes, 2)
        if math.prod(self.shape) <= _DENSE_UP_TO:
            return super().log_determinant()
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        estimates = self.matrix.log_determinant(probes, generator)
        return LogDeterminant(float(estimates.mean()), float(estimates.std()) / math.sqrt(probes))

    def with_jitter(self, share: float) -> CovarianceFunction:
        """A frozen copy of Sigma plus white noise of ``share`` times its mean variance, which makes it definite.

        Raises:
            ValueError: If the share is not a positive number, or there is no variance to take it of.
        """
        share = checks.number("share", share, "a positive number", lambda x: 0 < x < math.inf)
        table = self.table.clone()
        variances = at_zero(table, self.form).diagonal()
        if not float(variances.mean()) > 0:
            raise ValueError(f"covariance: expected a positive mean variance, got {float(variances.mean()):g}")
        variances += share * variances.mean()
        binning = "offset" if self.form == "signed" else "even"
        return type(self).from_values(table, self.shape[1:], binning=binning, psd="none")

    @torch.no_grad()
    def min_eigenvalue(self) -> float:
        """Smallest eigenvalue of Sigma (Lanczos, in float64); below zero where Sigma is indefinite."""
        return self.matrix.min_eigenvalue()

    def profile(self) -> Tensor:
        """Raw covariance against displacement in whole pixels, (C, C, K); tables are read along their axes."""
        return readings.profile(self.values, self.layout)

    def decay_length(self) -> Tensor:
        """First displacement, interpolated, at which the covariance falls to 1/e of its value at zero, (C, C).

        In pixels; infinity where it never falls so far, NaN where it is zero at zero displacement.
        """
        return readings.decay_length(self.values, self.layout)

    def resize(self, size: int | tuple[int, ...]) -> CovarianceFunction:
        """The same covariance function for images of another size: f depends on displacement alone.

        A smaller image needs fewer displacements. For a larger one, displacements beyond the present range have zero
        covariance until updates reach them. The running mean, which has the size of an image, starts from zero.
        """
        shape = perturbation_shape(self.shape[0], size)
        other = type(self)(
            self.shape[0],
            shape[1:],
            decay=self.decay,
            max_displacement=self.max_displacement,
            binning=self.binning,
            target_variance=self.target_variance,
            psd=self.psd,
            process_group=self.process_group,
        ).to(self.values.device, self.values.dtype)
        mine, its = self.layout.common_window(self.values, other.values)
        its.copy_(mine)
        other.updates.copy_(self.updates)
        other.skipped.copy_(self.skipped)
        other.frozen = self.frozen
        with torch.no_grad():
            other._refresh()
        return other

    def extra_repr(self) -> str:
        """Shape and settings."""
        return f"{super().extra_repr()}, binning={self.binning!r}, psd={self.psd!r}"
