"""Products, quadratic forms and second moments: each linear or quadratic in each argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sgr_kernels import checks
from sgr_kernels.backends import Request, choose, reference
from sgr_kernels.backends.native import frequencies
from sgr_kernels.backends.torch_spectral import compute_dtype
from sgr_kernels.ops import call
from sgr_kernels.toeplitz.constants import plainly, tracing, wide_dtype
from sgr_kernels.toeplitz.geometry import (
    Size,
    bin_count,
    even_from_radial,
    pair_counts,
    radial_from_even,
    reach_of_bins,
)
from sgr_kernels.toeplitz.spectrum import frequency_counts, spectrum_from_table, table_from_cross_spectrum

# In float32 a displacement's sum is off by about 1e-7 sqrt(H W) f(0), however few pairs it has. In images of more than
# _LARGE pixels, displacements within _CORNER of the longest are summed in float64.
_LARGE = 1 << 16
_CORNER = 8


def request(operator: str, images: Tensor, form: str) -> Request:
    """What a backend needs to know of a call."""
    batch, channels = images.shape[:2]
    size = (images.shape[2], images.shape[3])
    return Request(operator, images.device, images.dtype, batch, channels, size, form)


def precision(device: torch.device) -> str:
    """The precision of the kernels' products: the user's choice for matrix products, in torch's words."""
    return "highest" if device.type == "cpu" else torch.get_float32_matmul_precision()


def spectrum_sizes(table: Tensor, size: Size, form: str, dtype: torch.dtype) -> Size:
    """Numbers of frequencies (Fh, Fw) to take for a table and images of a size in ``dtype``, on the table's device."""
    wanted = Request("product", table.device, dtype, 1, table.shape[0], size, form)
    return frequencies(wanted, reach(table, form))


def reach(table: Tensor, form: str) -> Size:
    """Number of displacements (h, w), zero included, that an even or signed table holds along each axis."""
    height, width = table.shape[-2:]
    return (height, width) if form == "even" else ((height + 1) // 2, (width + 1) // 2)


class Operands:
    """The checked arguments of an operator, images and a covariance, and what the kernels want of them."""

    def __init__(self, gradient: Tensor, covariance: Tensor, form: str | None, name: str = "gradient") -> None:
        checks.check_images(name, gradient)
        self._given_form = checks.covariance_form(covariance, form)
        checks.check_same_device("covariance", covariance, name, gradient)
        self._size = checks.image_size(gradient)
        checks.check_table("covariance", covariance, gradient.shape[1], self._size, self._given_form)
        self.images, self._covariance = checks.as_images(gradient), covariance
        self.form = "even" if self._given_form == "radial" else self._given_form

    def table(self) -> Tensor:
        """An even or signed table."""
        if self._given_form != "radial":
            return self._covariance
        # Widened first: in the backward every bin sums many displacements, and only the sum is rounded.
        return even_from_radial(self._covariance.to(wide_dtype(self._covariance.device)), self._size)

    def spectrum(self) -> Tensor:
        """The table's spectrum, in the type that the kernels compute in."""
        dtype = compute_dtype(self.images.dtype)

        def derive() -> Tensor:
            table = self.table()
            sizes = spectrum_sizes(table, self._size, self.form, self.images.dtype)
            return spectrum_from_table(table, sizes, self.form, dtype)

        return _recent(self._covariance, (self._given_form, self._size, dtype), derive)


class _Recent:
    """What was derived from the tensors last given, found again by their values; on CPUs, where looking is cheap."""

    _COUNT, _LARGEST = 4, 1 << 20

    def __init__(self) -> None:
        self._entries: list[tuple[tuple[Any, ...], Tensor, Tensor]] = []

    def __call__(self, source: Tensor, options: tuple[Any, ...], derive: Callable[[], Tensor]) -> Tensor:
        if not source.is_cpu or source.requires_grad or source.numel() > self._LARGEST or not _plain(source):
            return derive()
        key = (*options, source.dtype, source.shape)
        for known, values, derived in self._entries:
            if known == key and torch.equal(values, source):
                return derived
        with plainly():
            values, derived = source.clone(), derive()
        self._entries = [(key, values, derived), *self._entries[: self._COUNT - 1]]
        return derived


_recent = _Recent()


def _plain(tensor: Tensor) -> bool:
    """Whether a tensor's values are all there is to it: no tracing, transform, tangent or subclass."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def product_from_spectrum(images: Tensor, spectrum: Tensor, backend: str) -> Tensor:
    """``v = Sigma g`` for images (B, C, H, W) and a spectrum in the compute dtype; a spectral backend by name."""
    return call("product", backend, images, spectrum, precision(images.device))


def quadratic_form_from_spectrum(images: Tensor, spectrum: Tensor, backend: str) -> Tensor:
    """``q_b = g_b^T Sigma g_b`` for images (B, C, H, W) and a spectrum in the compute dtype."""
    # Half of the backward is already there if the product is computed with the value.
    with_product = torch.is_grad_enabled() and images.requires_grad
    q, _ = call("quadratic_form", backend, images, spectrum, with_product, precision(images.device))
    return q


def quadratic_form_of_arranged(
    images: Tensor, spectrum: Tensor, arranged: Tensor, with_product: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Q and, if asked for, v by a backend's kernels, of a symmetric spectrum that also lies as they read it."""
    settings = (with_product, precision(images.device))
    return call("arranged_quadratic_form", backend, images, spectrum, arranged, *settings)


def covariance_product(
    gradient: Tensor, covariance: Tensor, *, form: str | None = None, backend: str = "auto"
) -> Tensor:
    """Multiply gradients by a displacement-indexed covariance, ``v = Sigma g``.

    ``Sigma[(c, i), (c', j)] = f[c, c', displacement from pixel i to pixel j]`` (paper, Eq. 16) is never formed. Its
    adjoint uses f transposed in its channels.

    Args:
        gradient: (B, C, H, W), or (B, C, L) for signals; any floating-point dtype, any strides.
        covariance: By form: ``"radial"`` (C, C, K), K up to round(hypot(H-1, W-1)) + 1 bins of rounded distance;
            ``"even"`` (C, C, h, w), indexed by (abs dy, abs dx); ``"signed"`` (C, C, 2h-1, 2w-1), indexed by
            (h-1+dy, w-1+dx). Shorter than the image means zero beyond. Any floating-point dtype.
        form: Name of the form; None takes rank 3 as radial and rank 4 as even.
        backend: ``"auto"`` or the name of a backend.

    Returns:
        The product, like ``gradient``.

    Raises:
        TypeError: If an argument is not a real floating-point tensor.
        ValueError: If shapes, form, devices or the backend's name do not fit.
        RuntimeError: If the named backend cannot run.
    """
    operands = Operands(gradient, covariance, form)
    images = operands.images
    name = choose(backend, request("product", images, operands.form))
    if name == "reference":
        return reference.product(images, operands.table(), operands.form).view(gradient.shape)
    return product_from_spectrum(images, operands.spectrum(), name).view(gradient.shape)


def covariance_quadratic_form(
    gradient: Tensor, covariance: Tensor, *, form: str | None = None, backend: str = "auto"
) -> Tensor:
    """Quadratic form of each gradient in the metric of a covariance: ``q_b = g_b^T Sigma g_b`` (paper, Eq. 11).

    It depends on the symmetric part of Sigma alone, and its derivative in the covariance is symmetric. Where the
    gradient requires grad, ``Sigma g`` is computed in the same pass and kept for the backward.

    Args:
        gradient: (B, C, H, W), or (B, C, L) for signals; any floating-point dtype, any strides.
        covariance: As for `covariance_product`.
        form: As for `covariance_product`.
        backend: ``"auto"`` or the name of a backend.

    Returns:
        (B,), float64 for float64 gradients, else float32.

    Raises:
        TypeError: If an argument is not a real floating-point tensor.
        ValueError: If shapes, form, devices or the backend's name do not fit.
        RuntimeError: If the named backend cannot run.
    """
    operands = Operands(gradient, covariance, form)
    images = operands.images
    name = choose(backend, request("quadratic_form", images, operands.form))
    if name == "reference":
        q = reference.quadratic_form(images, operands.table(), operands.form)
        return q.to(compute_dtype(gradient.dtype))
    return quadratic_form_from_spectrum(images, operands.spectrum(), name)


def correlate(a: Tensor, b: Tensor, shape: Size, form: str, backend: str = "auto") -> Tensor:
    """Sums over samples and ordered pixel pairs of ``a[c, i] b[c', j]`` at each displacement; float64.

    The adjoint of `covariance_product`: ``<a, product(b, f)> = <f, correlate(a, b)>``.

    Args:
        a: (B, C, H, W).
        b: (B, C, H, W), same dtype and device.
        shape: Last two dimensions of the table to return, (h, w) or (2h-1, 2w-1).
        form: ``"even"`` or ``"signed"``.
        backend: ``"auto"`` or the name of a backend.
    """
    name = choose(backend, request("cross_spectrum", a, form))
    if name == "reference":
        return reference.correlate(a, b, shape, form)
    signed = form == "signed"
    displacements = ((shape[0] + 1) // 2, (shape[1] + 1) // 2) if signed else shape
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        rows, columns = frequencies(request("product", a, form), displacements)  # of the derivatives
    else:
        rows, columns = frequency_counts((a.shape[2], a.shape[3]), displacements)
    spectrum = call("cross_spectrum", name, a, b, rows, columns, signed, precision(a.device))
    table = table_from_cross_spectrum(spectrum, shape, form)
    height, width = a.shape[2:]
    corner = min(_CORNER, height - 1, width - 1)
    full = displacements == (height, width)
    if full and corner > 0 and height * width > _LARGE and a.dtype != wide_dtype(a.device):
        _correlate_corners(table, a, b, corner, form)
    return table


def _correlate_corners(table: Tensor, a: Tensor, b: Tensor, corner: int, form: str) -> None:
    """Rewrite the ``corner`` x ``corner`` longest displacements of a full table, from corners of a and b in float64."""
    wide = wide_dtype(a.device)
    window = (2 * corner - 1, 2 * corner - 1)
    first, last = slice(None, corner), slice(-corner, None)
    far = table[..., last, last]
    if form == "even":
        far.zero_()
    for down in (True, False):
        for right in (True, False):
            a_rows, b_rows = (first, last) if down else (last, first)
            a_columns, b_columns = (first, last) if right else (last, first)
            a_corner, b_corner = a[..., a_rows, a_columns].to(wide), b[..., b_rows, b_columns].to(wide)
            sums = correlate(a_corner, b_corner, window, "signed", "torch")[..., b_rows, b_columns]
            if form == "signed":
                table[..., b_rows, b_columns] = sums
            else:
                far += sums.flip([axis for axis, forward in ((2, down), (3, right)) if not forward])


def displacement_covariance(
    perturbation: Tensor, *, form: str = "radial", max_displacement: int | None = None, backend: str = "auto"
) -> Tensor:
    """Second moment of perturbations as a function of displacement (paper, Eq. 15 and 16).

    The mean over samples and over all ordered pixel pairs at a displacement of ``xi[c, i] xi[c', j]``; not centred.
    An empty batch gives zeros.

    Args:
        perturbation: (B, C, H, W), or (B, C, L) for signals; any floating-point dtype, any strides.
        form: ``"radial"`` bins the rounded Euclidean displacement; ``"even"`` tells apart (abs dy, abs dx),
            ``"signed"`` (dy, dx).
        max_displacement: R keeps the bins 0..R, or the displacements up to R along each axis of a table.
        backend: ``"auto"`` or the name of a backend.

    Returns:
        (C, C, K), (C, C, h, w) or (C, C, 2h-1, 2w-1); float64 for float64 perturbations, else float32.

    Raises:
        TypeError: If the perturbation is not a real floating-point tensor.
        ValueError: If shape, form, max_displacement or the backend's name do not fit.
        RuntimeError: If the named backend cannot run.
    """
    return binned_covariance(perturbation, form, "rounded", max_displacement, backend)


def binned_covariance(
    perturbation: Tensor, form: str, binning: str, max_displacement: int | None = None, backend: str = "auto"
) -> Tensor:
    """`displacement_covariance` with the binning of the radial form as a choice."""
    checks.check_images("perturbation", perturbation)
    checks.check_form(form)
    checks.check_max_displacement(max_displacement)
    images, size = checks.as_images(perturbation), checks.image_size(perturbation)
    dtype = compute_dtype(perturbation.dtype)
    samples = max(1, perturbation.shape[0])
    full = bin_count(size, binning) if form == "radial" else max(size)
    bins = full if max_displacement is None else min(full, max_displacement + 1)
    shape = reach_of_bins(bins, size)
    if form == "radial":
        sums = correlate(images, images, shape, "even", backend)
        return (radial_from_even(sums, size, bins, binning) / samples).to(dtype)
    if form == "even":
        counts = pair_counts(size, shape, images.device)
        return (correlate(images, images, shape, "even", backend) / (samples * counts)).to(dtype)
    window = (2 * shape[0] - 1, 2 * shape[1] - 1)
    overlaps = [
        extent - torch.arange(1 - length, length, device=images.device).abs() for extent, length in zip(size, shape)
    ]
    counts = overlaps[0][:, None] * overlaps[1][None, :]
    return (correlate(images, images, window, "signed", backend) / (samples * counts)).to(dtype)
