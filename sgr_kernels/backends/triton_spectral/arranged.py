"""The spectrum in the order in which the kernels read it, written once for all images.

Tiles of 16 row frequencies by 16 column frequencies, all pairs of channels of a tile together: (row tiles, column
tiles, pairs, 16 columns, 16 rows). A tile is scaled by a power of two to magnitudes below 8, so that what it multiplies
stays within float16's range, and zero beyond the spectrum. Behind all tiles follows, for each, what undoes its scale.
Pairs are (part, c, d), or c <= d alone where a spectrum of one part is that of a symmetric matrix.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sgr_kernels.backends.triton_spectral.numerics import power_of_two


@triton.jit
def eigenvalues(
    tile,
    part: tl.constexpr,
    c: tl.constexpr,
    d: tl.constexpr,
    CHANNELS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """``Lambda[part, c, d]`` of BLOCKS tiles of neighbouring columns, (BLOCKS, 16, 16), columns by rows."""
    block, column = tl.arange(0, BLOCKS)[:, None, None], tl.arange(0, 16)[None, :, None]
    own = block * (PAIRS * 256) + column * 16 + tl.arange(0, 16)[None, None, :]
    # (c, d), or of a packed spectrum the lower first
    low: tl.constexpr = c if c < d else d
    pair: tl.constexpr = (
        low * CHANNELS - low * (low - 1) // 2 + c + d - 2 * low
        if PAIRS < CHANNELS * CHANNELS
        else (part * CHANNELS + c) * CHANNELS + d
    )
    return tl.load(tile + pair * 256 + own)


@triton.jit
def arrange_kernel(
    spectrum,
    arranged,
    rows,
    columns,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
    PAIRS: tl.constexpr,
    PADDED: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):
    """A program a tile. SYMMETRIC asks for the symmetric part of Sigma: of one part, packed.

    Its transpose changes the sign of the parts that are odd in one axis.
    """
    p = tl.arange(0, PADDED)[:, None, None]
    part, c, d = p // (CHANNELS * CHANNELS), p // CHANNELS % CHANNELS, p % CHANNELS
    column, row = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    k, m = tl.program_id(0) * 16 + row, tl.program_id(1) * 16 + column
    inside = (p < PARTS * CHANNELS * CHANNELS) & ((k < rows) & (m < columns))
    cell = spectrum + k * columns + m
    value = tl.load(cell + p * (rows * columns), mask=inside, other=0.0)
    if SYMMETRIC:
        other = tl.load(cell + ((part * CHANNELS + d) * CHANNELS + c) * (rows * columns), mask=inside, other=0.0)
        value = 0.5 * (value + tl.where((part == 1) | (part == 2), -other, other))
    scale, inverse = power_of_two(tl.max(tl.abs(value)))
    PACKED: tl.constexpr = PAIRS < CHANNELS * CHANNELS
    kept = p < PARTS * CHANNELS * CHANNELS
    pair = p
    if PACKED:
        kept = kept & (c <= d)
        pair = c * CHANNELS - c * (c - 1) // 2 + d - c
    tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    place = (tile * PAIRS + pair) * 256 + column * 16 + row
    tl.store(arranged + place, value * scale, mask=kept)
    tl.store(arranged + tl.num_programs(0) * tl.num_programs(1) * (PAIRS * 256) + tile, inverse)
