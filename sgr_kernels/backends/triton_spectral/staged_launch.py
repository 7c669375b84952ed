"""Launches of the passes over large images, in chunks of the batch that bound the scratch memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import wrap_triton

from sgr_kernels.backends.triton_spectral.frequency import gram_kernel, mix_kernel
from sgr_kernels.backends.triton_spectral.large import columns_kernel
from sgr_kernels.backends.triton_spectral.plan import (
    Arrangement,
    Columns,
    Operands,
    exponent,
    padded,
    power_of_two,
    split_basis,
)
from sgr_kernels.backends.triton_spectral.staged import forward_kernel, inverse_kernel
from sgr_kernels.toeplitz.geometry import Size

_SCRATCH_BYTES = 256 << 20
_LARGEST_GRID = 65535  # programs along all axes but the first
_GRAM_IMAGES = 16  # images whose products one program adds up
_FREQUENCIES = 128  # a tile of the kernels that work frequency by frequency


class _Axis:
    """One axis of the transform: its basis and the tiles of its passes."""

    def __init__(self, extent: int, frequencies: int, operands: Operands, device: torch.device) -> None:
        small = 32 if operands.dtype == torch.float64 else 64
        self.extent, self.frequencies, self.terms = extent, frequencies, operands.terms
        self.block_f = min(small, max(16, power_of_two(frequencies)))
        half = (extent + 1) // 2
        self.block_t = min(32, max(16, power_of_two(half)))
        self.block_j = small
        self.shape = (padded(half, self.block_t), padded(frequencies, self.block_f))
        self.basis = split_basis(extent, frequencies, self.shape, self.block_f, operands, device)
        self.gain = 2.0 ** -exponent(frequencies, operands)

    def _options(self, warps: int) -> dict[str, int]:
        return {
            "PADDED_EXTENT": self.shape[0],
            "PADDED_FREQUENCIES": self.shape[1],
            "BLOCK_F": self.block_f,
            "BLOCK_J": self.block_j,
            "BLOCK_T": self.block_t,
            "TERMS": self.terms,
            "num_warps": warps,
            "num_stages": 1,
        }

    def forward(self, source: Tensor, target: Tensor, strides: tuple[int, ...], planes: Size, others: int) -> None:
        """Planes (i, j) of ``source``, by strides of (batch, channel, i, j), to (planes, 2, frequencies, j)."""
        grid = (*planes, self.shape[1] // self.block_f * -(-others // self.block_j))
        wrap_triton(forward_kernel)[grid](
            source,
            self.basis,
            target,
            *strides,
            self.extent,
            others,
            self.frequencies,
            self.gain,
            **self._options(4),
        )

    def inverse(self, source: Tensor, target: Tensor, strides: tuple[int, int, int], others: int) -> None:
        """Back to planes (i, j) of ``target``, by strides of (plane, i, j)."""
        planes = source.numel() // (2 * self.frequencies * others)
        # Where lines begin anywhere, addresses need as many registers as twice the warps bring.
        warps = 4 if others % 16 == 0 else 8
        grid = (planes, self.shape[0] // self.block_t, -(-others // self.block_j))
        wrap_triton(inverse_kernel)[grid](
            source,
            self.basis,
            target,
            *strides,
            self.extent,
            others,
            self.frequencies,
            self.gain,
            **self._options(warps),
        )


class _Transform:
    """Both axes, for images of one size."""

    def __init__(self, images: Tensor, frequencies: Size, operands: Operands) -> None:
        _, self.channels, self.height, self.width = images.shape
        self.rows, self.columns = frequencies
        self.total = operands.total
        self.row_axis = _Axis(self.height, self.rows, operands, images.device)
        self.column_axis = _Axis(self.width, self.columns, operands, images.device)
        per_image = 4 * self.channels * self.total.itemsize * self.columns * (2 * self.rows + self.height)
        self.chunk = min(max(1, _SCRATCH_BYTES // per_image), _LARGEST_GRID)

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, C, H, W) to (n, C, 2, 2, rows, columns), column parity outside."""
        n, channels, height, _ = images.shape
        half = images.new_empty((n, channels, 2, self.columns, height), dtype=self.total)
        b, c, y, x = images.stride()
        self.column_axis.forward(images, half, (b, c, x, y), (n, channels), height)
        whole = images.new_empty((n, channels, 2, 2, self.rows, self.columns), dtype=self.total)
        plane = self.columns * height
        strides = (2 * channels * plane, plane, 1, height)
        self.row_axis.forward(half, whole, strides, (n, 2 * channels), self.columns)
        return whole

    def inverse(self, whole: Tensor, images: Tensor) -> None:
        """(n, C, 2, 2, rows, columns) to contiguous images (n, C, H, W)."""
        n = whole.shape[0]
        half = whole.new_empty((n, self.channels, 2, self.columns, self.height))
        self.row_axis.inverse(whole, half, (self.columns * self.height, 1, self.height), self.columns)
        self.column_axis.inverse(half, images, (self.height * self.width, 1, self.width), self.height)


def apply(
    gradient: Tensor,
    spectrum: Tensor,
    operands: Operands,
    form: Tensor,
    product: Tensor,
    with_form: bool,
    with_product: bool,
) -> tuple[Tensor, Tensor]:
    """Fill ``form`` and ``product`` with q and v, as far as they are asked for."""
    batch, channels = gradient.shape[:2]
    signed = spectrum.dim() == 5
    rows, columns = spectrum.shape[-2:]
    transform = _Transform(gradient, (rows, columns), operands)
    block_c = min(4, power_of_two(channels))
    tiles = (-(-rows * columns // _FREQUENCIES), -(-channels // block_c))
    for start in range(0, batch, transform.chunk):
        stop = min(batch, start + transform.chunk)
        z = transform.forward(gradient[start:stop])
        y = torch.empty_like(z) if with_product else z
        parts = form.new_empty((stop - start, *tiles) if with_form else 0)
        wrap_triton(mix_kernel)[(*tiles, stop - start)](
            z,
            spectrum,
            y,
            parts,
            rows * columns,
            CHANNELS=channels,
            BLOCK_C=block_c,
            BLOCK_F=_FREQUENCIES,
            SIGNED=signed,
            SYMMETRIC=with_form and (signed or channels > 1),
            WITH_FORM=with_form,
            WITH_PRODUCT=with_product,
            num_warps=4,
        )
        if with_form:
            form[start:stop] = parts.sum((1, 2))
        if with_product:
            transform.inverse(y, product[start:stop])
    return form, product


def apply_arranged(
    gradient: Tensor,
    arranged: Tensor,
    order: Arrangement,
    frequencies: Size,
    operands: Operands,
    form: Tensor,
    product: Tensor,
    with_form: bool,
    with_product: bool,
) -> tuple[Tensor, Tensor]:
    """As `apply`, in three passes: rows to column frequencies, everything on those (`large`), and rows back."""
    batch, channels, height, width = gradient.shape
    tile = Columns.fitting((height, width), frequencies, channels, signed=False)
    assert tile is not None
    rows, columns = frequencies
    axis = _Axis(width, columns, operands, gradient.device)
    row_basis = split_basis(height, rows, (tile.t, padded(rows, 16)), 16, operands, gradient.device)
    plane = columns * height
    chunk = max(1, _SCRATCH_BYTES // (2 * channels * plane * operands.total.itemsize))
    half = gradient.new_empty((min(batch, chunk), channels, 2, columns, height), dtype=operands.total)
    parts = form.new_empty((batch if with_form else 0, order.tiles[1], 2))
    b, c, y, x = gradient.stride()
    for start in range(0, batch, chunk):
        stop = min(batch, start + chunk)
        axis.forward(gradient[start:stop], half, (b, c, x, y), (stop - start, channels), height)
        wrap_triton(columns_kernel)[(stop - start, order.tiles[1], 2)](
            half,
            arranged,
            row_basis,
            parts[start:stop],
            height,
            columns,
            2.0 ** -exponent(rows, operands),
            0,
            CHANNELS=channels,
            PAIRS=order.pairs,
            ROWS=padded(rows, 16),
            PARITIES=tile.parities,
            RUNS=tile.runs,
            BLOCK_T=tile.block,
            TERMS=operands.terms,
            WITH_FORM=with_form,
            WITH_PRODUCT=with_product,
            num_warps=tile.parities * tile.runs,
            num_stages=1,
        )
        if with_product:
            axis.inverse(half[: stop - start], product[start:stop], (height * width, 1, width), height)
    if with_form:
        torch.sum(parts, (1, 2), out=form)
    return form, product


def cross_spectrum(a: Tensor, b: Tensor, frequencies: Size, signed: bool, operands: Operands) -> Tensor:
    """Sums over samples and parities, (parts, C, C, rows, columns)."""
    batch, channels = a.shape[:2]
    transform = _Transform(a, frequencies, operands)
    block_c = min(4, power_of_two(channels))
    shape = (4 if signed else 1, channels, channels, *frequencies)
    total = a.new_zeros(shape, dtype=operands.total)
    grid = (-(-frequencies[0] * frequencies[1] // _FREQUENCIES), channels * -(-channels // block_c))
    for start in range(0, batch, transform.chunk):
        stop = min(batch, start + transform.chunk)
        za = transform.forward(a[start:stop])
        zb = za if a is b else transform.forward(b[start:stop])
        splits = -(-(stop - start) // _GRAM_IMAGES)
        sums = a.new_empty((splits, *shape), dtype=operands.total)
        wrap_triton(gram_kernel)[(*grid, splits)](
            za,
            zb,
            sums,
            stop - start,
            frequencies[0] * frequencies[1],
            CHANNELS=channels,
            BLOCK_C=block_c,
            BLOCK_F=_FREQUENCIES,
            IMAGES=_GRAM_IMAGES,
            SIGNED=signed,
            num_warps=4,
        )
        total += sums.sum(0)
    return total
