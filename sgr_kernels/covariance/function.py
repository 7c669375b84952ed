"""The covariance as a function of displacement: the paper's representation for images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgr_kernels import checks, functional
from sgr_kernels.backends import choose, reference
from sgr_kernels.backends.torch_spectral import compute_dtype
from sgr_kernels.covariance.base import Estimate
from sgr_kernels.covariance.dense import dense_root, draw_dense
from sgr_kernels.covariance.derived import Derived
from sgr_kernels.toeplitz import embedding
from sgr_kernels.toeplitz.constants import wide_dtype
from sgr_kernels.toeplitz.geometry import Size, bin_count, dense_matrix, even_from_radial, reach_of_bins
from sgr_kernels.toeplitz.lanczos import smallest_eigenvalue
from sgr_kernels.toeplitz.spectrum import frequency_counts, spectrum_from_table

FORM_OF_BINNING = {"rounded": "radial", "linear": "radial", "even": "even", "offset": "signed"}


def _perturbation_shape(channels: int, size: int | tuple[int, ...]) -> tuple[int, ...]:
    """(C, H, W), or (C, L) for a one-dimensional size; an int means a square."""
    if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
        raise ValueError(f"channels: expected a positive int, got {channels!r}")
    extents = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(extents) not in (1, 2) or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in extents):
        raise ValueError(f"size: expected (H, W), (L,) or an int, all positive, got {size!r}")
    return (channels, *extents)


def _form_of(binning: str) -> str:
    if binning not in FORM_OF_BINNING:
        raise ValueError(f"binning: expected one of {', '.join(map(repr, FORM_OF_BINNING))}, got {binning!r}")
    return FORM_OF_BINNING[binning]


def _common_window(a: Tensor, b: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """Views of the displacements that two sets of values share: their leading or, centred, their middle parts."""

    def window(tensor: Tensor) -> Tensor:
        for axis in range(2, tensor.dim()):
            length = min(a.shape[axis], b.shape[axis])
            tensor = tensor.narrow(axis, (tensor.shape[axis] - length) // 2 if centred else 0, length)
        return tensor

    return window(a), window(b)


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

    table: Tensor
    spectrum: Tensor

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
        shape = _perturbation_shape(channels, size)
        checks.check_max_displacement(max_displacement)
        form = _form_of(binning)
        if psd not in ("clip", "none"):
            raise ValueError(f"psd: expected 'clip' or 'none', got {psd!r}")
        image_size: Size = (1, shape[1]) if len(shape) == 2 else (shape[1], shape[2])
        full = bin_count(image_size, binning) if form == "radial" else max(image_size)
        bins = full if max_displacement is None else min(full, max_displacement + 1)
        reach = reach_of_bins(bins, image_size)
        extent = {"radial": (bins,), "even": reach, "signed": (2 * reach[0] - 1, 2 * reach[1] - 1)}[form]
        super().__init__(torch.zeros(channels, channels, *extent), shape, decay, target_variance, process_group)
        self.image_size, self.binning, self.psd, self.max_displacement = image_size, binning, psd, max_displacement
        # The projection fills the whole range, so a clipped table is as large as the image.
        reach = image_size if psd == "clip" else reach
        table = (2 * reach[0] - 1, 2 * reach[1] - 1) if form == "signed" else reach
        frequencies = frequency_counts(image_size, reach)
        parts = (4,) if form == "signed" else ()
        self.register_buffer("table", self.values.new_zeros(channels, channels, *table), persistent=False)
        spectrum = self.values.new_zeros(*parts, channels, channels, *frequencies)
        self.register_buffer("spectrum", spectrum, persistent=False)
        self._root = Derived()

    @property
    def form(self) -> str:
        """Form of the table that the kernels use: ``"even"`` or ``"signed"``."""
        return "signed" if self.binning == "offset" else "even"

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
            ValueError: If they are not finite, not symmetric, or of a shape that does not fit.
        """
        options.setdefault("binning", "rounded" if isinstance(values, Tensor) and values.dim() == 3 else "even")
        form = _form_of(options["binning"])
        checks.covariance_form(values, form, "values")
        values = values.detach()
        shape = _perturbation_shape(values.shape[0], size)
        image_size: Size = (1, shape[1]) if len(shape) == 2 else (shape[1], shape[2])
        if options["binning"] != "linear" or values.shape[2] > bin_count(image_size, "linear"):
            checks.check_table("values", values, values.shape[0], image_size, form)
        reach = values.shape[2:] if form != "signed" else [(n + 1) // 2 for n in values.shape[2:]]
        options.setdefault("max_displacement", max(reach) - 1)
        covariance = cls(values.shape[0], size, **options)
        covariance.check_values(values)
        covariance.to(values.device, torch.promote_types(values.dtype, torch.float32))
        its, mine = _common_window(values, covariance.values, centred=form == "signed")
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
        if not decay_length > 0:
            raise ValueError(f"decay_length: expected a positive number of pixels, got {decay_length!r}")
        if not -1 <= cross_channel <= 1:
            raise ValueError(f"cross_channel: expected a number in [-1, 1], got {cross_channel!r}")
        shape = _perturbation_shape(channels, size)
        height, width = (1, shape[1]) if len(shape) == 2 else shape[1:]
        binning = options.setdefault("binning", "rounded" if rounded else "even")
        if _form_of(binning) == "radial":
            distance = torch.arange(bin_count((height, width), binning), dtype=torch.float64)
        else:
            first = (1 - height, 1 - width) if binning == "offset" else (0, 0)
            y, x = (torch.arange(a, b, dtype=torch.float64) for a, b in zip(first, (height, width)))
            distance = torch.hypot(y[:, None], x[None, :])
            distance = distance.round() if rounded else distance
        mixing = torch.full((channels, channels), float(cross_channel), dtype=torch.float64).fill_diagonal_(1.0)
        values = torch.einsum("cd,...->cd...", mixing, torch.exp(-distance / decay_length))
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
            ValueError: If there are no images, or a value is not finite.
        """
        if images.dtype != torch.uint8:
            checks.check_images("images", images)
        if images.shape[0] == 0:
            raise ValueError("images: expected at least one image, got none")
        images = images.detach()

        def pixels(part: Tensor) -> Tensor:
            return part.to(torch.float32) / 255 if part.dtype == torch.uint8 else part

        covariance = cls(images.shape[1], tuple(images.shape[2:]), **options).to(images.device)
        if images.is_floating_point():
            covariance.to(torch.promote_types(images.dtype, torch.float32))
        wide = wide_dtype(images.device)
        mean = torch.zeros(images.shape[1:], dtype=wide, device=images.device)
        for part in images.split(chunk):
            mean += pixels(part).to(wide).sum(0) / images.shape[0]
        total = torch.zeros_like(covariance.values, dtype=wide)
        for part in images.split(chunk):
            centred = pixels(part) - mean.to(covariance.values.dtype) if center else pixels(part)
            total += covariance._second_moment(centred).to(wide) * part.shape[0]
        values = (total / images.shape[0]).to(covariance.values.dtype)
        covariance.check_values(values)
        covariance.values.copy_(values)
        if not center:
            covariance.mean.copy_(mean)
        return covariance.freeze()

    def freeze(self) -> CovarianceFunction:
        """Take no more updates; returns the covariance itself."""
        self.frozen = True
        with torch.no_grad():
            self._refresh()
        return self

    def _second_moment(self, perturbation: Tensor) -> Tensor:
        form = FORM_OF_BINNING[self.binning]
        return functional.binned_covariance(perturbation, form, self.binning, self.max_displacement)

    def _average_variance(self) -> Tensor:
        at_zero = self.values[..., 0] if self.values.dim() == 3 else self.values[..., 0, 0]
        if self.binning == "offset":
            at_zero = self.values[..., self.values.shape[2] // 2, self.values.shape[3] // 2]
        return at_zero.diagonal().mean()

    def _transposed(self, values: Tensor) -> Tensor:
        swapped = values.transpose(0, 1)
        return swapped.flip(-2, -1) if self.binning == "offset" else swapped

    def _refresh(self) -> None:
        super()._refresh()
        values = self.values.to(wide_dtype(self.values.device))
        if values.dim() == 3:
            values = even_from_radial(values, self.image_size, self.binning)
        table = values * self.scale
        if self.psd == "clip":
            table = embedding.clip(table, self.image_size, self.form)
            if self.target_variance is not None:
                row, column = (n // 2 if self.form == "signed" else 0 for n in table.shape[-2:])
                variance = table[..., row, column].diagonal().mean()
                table = table * (self.target_variance / torch.where(variance > 0, variance, 1.0))
        self.table.copy_(table)
        frequencies = (self.spectrum.shape[-2], self.spectrum.shape[-1])
        self.spectrum.copy_(spectrum_from_table(table, frequencies, self.form, self.spectrum.dtype))

    def _images(self, gradient: Tensor) -> Tensor:
        self._check("gradient", gradient)
        return checks.as_images(gradient)

    def _spectrum_for(self, images: Tensor) -> Tensor:
        # A copy, because autograd may keep it while the next update rewrites the buffer.
        return self.spectrum.to(compute_dtype(images.dtype), copy=torch.is_grad_enabled() and not self.frozen)

    def _backend(self, operator: str, images: Tensor) -> str:
        return choose("auto", functional.request(operator, images, self.form))

    def product(self, gradient: Tensor) -> Tensor:
        """``v = Sigma g``, like ``gradient`` (B, C, H, W); differentiable in the gradient."""
        images = self._images(gradient)
        backend = self._backend("product", images)
        if backend == "reference":
            return reference.product(images, self.table, self.form).view(gradient.shape)
        return functional.product_from_spectrum(images, self._spectrum_for(images), backend).view(gradient.shape)

    def quadratic_form(self, gradient: Tensor) -> Tensor:
        """``q_b = g_b^T Sigma g_b``, (B,); differentiable in the gradient."""
        images = self._images(gradient)
        backend = self._backend("quadratic_form", images)
        if backend == "reference":
            q = reference.quadratic_form(images, self.table, self.form)
            return q.to(compute_dtype(gradient.dtype))
        return functional.quadratic_form_from_spectrum(images, self._spectrum_for(images), backend)

    def dense(self) -> Tensor:
        """The matrix that `product` applies, (C*H*W, C*H*W), formed: for small images."""
        return dense_matrix(self.table, self.image_size, self.form)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` zero-mean Gaussian perturbations with the covariance `dense`, (n, C, H, W).

        Raises:
            ValueError: If Sigma is indefinite, which ``psd="clip"`` prevents.
        """
        filtering, root = self._root((self.table,), self._square_root)
        if filtering:
            fields = embedding.draw(root, n, self.image_size, self.table.dtype, generator)
        else:
            fields = draw_dense(root, n, generator)
        return fields.reshape(n, *self.shape)

    def _square_root(self) -> tuple[bool, Tensor]:
        """The filter that draws samples, and True; where the embedding is indefinite, a root of Sigma, and False."""
        response = embedding.square_root(self.table, self.image_size, self.form)
        return (True, response) if response is not None else (False, dense_root(self.dense()))

    @torch.no_grad()
    def min_eigenvalue(self) -> float:
        """Smallest eigenvalue of Sigma (Lanczos, in float64); below zero where Sigma is indefinite."""
        shape = (1, self.shape[0], *self.image_size)
        wide = wide_dtype(self.table.device)
        table = self.table.to(wide)

        def product(vector: Tensor) -> Tensor:
            v = functional.covariance_product(vector.view(shape).to(wide), table, form=self.form)
            return v.flatten().to(vector.dtype)

        return smallest_eigenvalue(product, self.shape[0] * self.image_size[0] * self.image_size[1], table.device)

    def profile(self) -> Tensor:
        """Raw covariance against displacement in whole pixels, (C, C, K); tables are read along their axes."""
        if self.values.dim() == 3:
            return self.values
        table = self.values
        if self.binning == "offset":
            row, column = table.shape[2] // 2, table.shape[3] // 2
            opposite = table.flip(-2, -1)
            table = ((table + opposite) / 2)[..., row:, column:]
        down, across = table[..., :, 0], table[..., 0, :]
        if 1 in self.image_size:
            return down if self.image_size[1] == 1 else across
        length = min(down.shape[-1], across.shape[-1])
        longer = down if down.shape[-1] > length else across
        return torch.cat([(down[..., :length] + across[..., :length]) / 2, longer[..., length:]], -1)

    def decay_length(self) -> Tensor:
        """First displacement, interpolated, at which the covariance falls to 1/e of its value at zero, (C, C).

        In pixels; infinity where it never falls so far, NaN where it is zero at zero displacement.
        """
        profile = self.profile()
        full = bin_count(self.image_size, self.binning) if self.values.dim() == 3 else max(self.image_size)
        relative = torch.cat([profile / profile[..., :1], torch.zeros_like(profile[..., :1])], -1)
        level = 1 / torch.e
        first = (relative <= level).to(torch.int8).argmax(-1, keepdim=True)
        below, above = relative.gather(-1, first), relative.gather(-1, (first - 1).clamp(min=0))
        length = first - 1 + (above - level) / (above - below)
        # A covariance that ends before the image does is zero from there on; of another the rest is not known.
        length = torch.where(first == full, torch.inf, length)
        return torch.where(profile[..., :1] == 0, torch.nan, length).squeeze(-1)

    def resize(self, size: int | tuple[int, ...]) -> CovarianceFunction:
        """The same covariance function for images of another size: f depends on displacement alone.

        A smaller image needs fewer displacements. For a larger one, displacements beyond the present range have zero
        covariance until updates reach them. The running mean, which has the size of an image, starts from zero.
        """
        shape = _perturbation_shape(self.shape[0], size)
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
        mine, its = _common_window(self.values, other.values, centred=self.binning == "offset")
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
