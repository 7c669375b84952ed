"""The operators: check what memory safety needs, choose tiles, launch. Schemas as in `sgr_kernels.ops`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import wrap_triton

from sgr_kernels.backends.triton_spectral import staged_launch
from sgr_kernels.backends.triton_spectral.arranged import arrange_kernel
from sgr_kernels.backends.triton_spectral.fused import fused_kernel
from sgr_kernels.backends.triton_spectral.fused_gram import fused_gram_kernel
from sgr_kernels.backends.triton_spectral.plan import Arrangement, Operands, Tile, gain, power_of_two, split_basis
from sgr_kernels.checks import check_same_device, describe
from sgr_kernels.toeplitz.geometry import Size

_PROGRAMS = 256  # cross spectra: programs that share a batch; fixed, so that sums do not depend on the GPU


def _check_images(name: str, images: Tensor) -> None:
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point tensor (B, C, H, W), got {describe(images)}")


def _check_spectrum(gradient: Tensor, spectrum: Tensor) -> None:
    _check_images("gradient", gradient)
    channels = gradient.shape[1]
    parts = tuple(spectrum.shape[:-4])
    if spectrum.dim() not in (4, 5) or parts not in ((), (4,)) or tuple(spectrum.shape[-4:-2]) != (channels, channels):
        expected = f"({channels}, {channels}, Fh, Fw) or (4, {channels}, {channels}, Fh, Fw)"
        raise ValueError(f"spectrum: expected {expected}, got {describe(spectrum)}")
    check_same_device("spectrum", spectrum, "gradient", gradient)


def _addressable(images: Tensor) -> Tensor:
    """The same images, with offsets within an image below 2^31, as the fused kernels need."""
    farthest = sum((images.shape[axis] - 1) * images.stride(axis) for axis in (1, 2, 3))
    return images if farthest < 2**31 else images.contiguous()


def _bases(
    size: Size, frequencies: Size, tile: Tile, operands: Operands, device: torch.device
) -> tuple[Tensor, Tensor]:
    rows = split_basis(size[0], frequencies[0], (tile.t, tile.rows), 16, operands, device)
    columns = split_basis(size[1], frequencies[1], (tile.t, tile.columns), 16, operands, device)
    return rows, columns


def arrange(spectrum: Tensor, arranged: Tensor, height: int, width: int) -> None:
    """Write the spectrum (C, C, Fh, Fw) of a symmetric matrix of images (H, W) as their kernels read it."""
    order = Arrangement.fitting((height, width), _frequencies(spectrum), len(spectrum), signed=False, symmetric=True)
    if order is None or arranged.shape != (order.words,) or spectrum.dtype != arranged.dtype:
        raise ValueError(f"arranged: expected room for {describe(spectrum)}, got {describe(arranged)}")
    _arrange(spectrum, order, arranged)


def _frequencies(spectrum: Tensor) -> Size:
    return spectrum.shape[-2], spectrum.shape[-1]


def _arrange(spectrum: Tensor, order: Arrangement, arranged: Tensor) -> None:
    rows, columns = spectrum.shape[-2:]
    wrap_triton(arrange_kernel)[order.tiles](
        spectrum.contiguous(),
        arranged,
        rows,
        columns,
        CHANNELS=order.channels,
        PARTS=order.parts,
        PAIRS=order.pairs,
        PADDED=power_of_two(order.parts * order.channels**2),
        SYMMETRIC=order.symmetric,
        num_warps=4,
    )


def _apply(
    gradient: Tensor,
    spectrum: Tensor,
    precision: str,
    with_form: bool,
    with_product: bool,
    arranged: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``q`` and ``v``, of the symmetric part of Sigma where q is asked for; an empty tensor for what is not."""
    _check_spectrum(gradient, spectrum)
    operands = Operands.of(gradient.dtype, precision)
    batch, channels, height, width = gradient.shape
    size, frequencies = (height, width), _frequencies(spectrum)
    form = gradient.new_empty(batch if with_form else 0, dtype=operands.total)
    product = gradient.new_empty(gradient.shape if with_product else 0)
    if batch == 0:
        return form, product
    spectrum = spectrum.to(operands.total)
    signed = spectrum.dim() == 5
    order = None
    if operands.dtype != torch.float64:
        order = Arrangement.fitting(size, frequencies, channels, signed, symmetric=with_form)
    if order is None:
        return staged_launch.apply(gradient, spectrum.contiguous(), operands, form, product, with_form, with_product)
    if arranged is None:
        arranged = spectrum.new_empty(order.words)
        _arrange(spectrum, order, arranged)
    elif arranged.shape != (order.words,) or arranged.dtype != torch.float32:
        raise ValueError(f"arranged: expected {order.words} numbers in float32, got {describe(arranged)}")
    tile = Tile.fitting(size, frequencies, channels, signed)
    if tile is None:
        passes = staged_launch.apply_arranged
        return passes(gradient, arranged, order, frequencies, operands, form, product, with_form, with_product)
    gradient = _addressable(gradient)
    rows, columns = _bases(size, frequencies, tile, operands, gradient.device)
    wrap_triton(fused_kernel)[(tile.programs(batch, gradient.device),)](
        gradient,
        arranged,
        rows,
        columns,
        product,
        form,
        batch,
        height,
        width,
        *gradient.stride(),
        gain(frequencies, operands),
        0,
        CHANNELS=channels,
        T=tile.t,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        PAIRS=order.pairs,
        PARITIES=tile.parities,
        TERMS=operands.terms,
        SIGNED=signed,
        WITH_FORM=with_form,
        WITH_PRODUCT=with_product,
        num_warps=tile.warps,
        num_stages=1,
    )
    return form, product


def product(gradient: Tensor, spectrum: Tensor, precision: str) -> Tensor:
    """``v = Sigma g``."""
    return _apply(gradient, spectrum, precision, with_form=False, with_product=True)[1]


def quadratic_form(gradient: Tensor, spectrum: Tensor, with_product: bool, precision: str) -> tuple[Tensor, Tensor]:
    """``q_b = g_b^T Sigma g_b`` and, if asked for, ``v = Sigma g``; both of the symmetric part of Sigma."""
    return _apply(gradient, spectrum, precision, with_form=True, with_product=with_product)


def arranged_quadratic_form(
    gradient: Tensor, spectrum: Tensor, arranged: Tensor, with_product: bool, precision: str
) -> tuple[Tensor, Tensor]:
    """As `quadratic_form`, of a symmetric matrix whose spectrum also lies as `arrange` leaves it."""
    return _apply(gradient, spectrum, precision, with_form=True, with_product=with_product, arranged=arranged)


def cross_spectrum(a: Tensor, b: Tensor, rows: int, columns: int, signed: bool, precision: str) -> Tensor:
    """``S[c, c', k, l] = sum Z^a_c Z^b_c'`` over samples and parities; its four parts for a signed table."""
    _check_images("a", a)
    if b.shape != a.shape or b.dtype != a.dtype:
        raise ValueError(f"b: expected {describe(a)} like a, got {describe(b)}")
    check_same_device("b", b, "a", a)
    operands = Operands.of(a.dtype, precision)
    batch, channels, height, width = a.shape
    size, frequencies, parts = (height, width), (rows, columns), 4 if signed else 1
    if batch == 0:
        total = a.new_zeros((parts, channels, channels, rows, columns), dtype=operands.total)
        return total if signed else total[0]
    tile = None if operands.dtype == torch.float64 else Tile.fitting(size, frequencies, channels, signed)
    if tile is None:
        total = staged_launch.cross_spectrum(a, b, frequencies, signed, operands)
        return total if signed else total[0]
    same = a is b
    a, b = _addressable(a), _addressable(b)
    passes, steps = 2 // tile.parities, tile.rows // 16
    images = power_of_two(-(-batch * passes * steps // _PROGRAMS))
    runs = -(-batch // images)
    sums = a.new_empty((runs * passes, parts, channels, channels, rows, columns), dtype=operands.total)
    row_basis, column_basis = _bases(size, frequencies, tile, operands, a.device)
    wrap_triton(fused_gram_kernel)[(runs, steps, passes)](
        a,
        b,
        row_basis,
        column_basis,
        sums,
        batch,
        height,
        width,
        *a.stride(),
        *b.stride(),
        *frequencies,
        gain(frequencies, operands),
        CHANNELS=channels,
        T=tile.t,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        PARITIES=tile.parities,
        TERMS=operands.terms,
        IMAGES=images,
        SIGNED=signed,
        SAME=same,
        num_warps=tile.warps,
        num_stages=1,
    )
    total = sums.sum(0)
    return total if signed else total[0]
