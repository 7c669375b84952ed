"""Images of any size and any number of channels, in passes: one axis forward at a time, mix, and back.

A pass over an axis treats an array as planes of (axis, other), every parity alike: ``Z[p] = A_p^T (x up +- x down)``.
Intermediate results are (planes, 2, frequencies, other): the second pass takes each of the first one's parities as a
plane, and its frequencies as the "other" axis. Also the only path for float64, where operands need no splitting.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sgr_kernels.backends.triton_spectral.numerics import dot, load_split, outward, power_of_two, split


@triton.jit
def scaled_dots(cosines, sines, even, odd, gain, TERMS: tl.constexpr):
    """``gain cosines @ even`` and ``gain sines @ odd`` for split constants and data, brought to one magnitude."""
    dtype: tl.constexpr = cosines[0].dtype
    if dtype == tl.float64:
        even = tl.dot(cosines[0], even, input_precision="ieee") * gain
        odd = tl.dot(sines[0], odd, input_precision="ieee") * gain
    else:
        scale, inverse = power_of_two(tl.max(tl.maximum(tl.abs(even), tl.abs(odd))))
        even = dot(cosines, split(even * scale, dtype, TERMS), TERMS) * (inverse * gain)
        odd = dot(sines, split(odd * scale, dtype, TERMS), TERMS) * (inverse * gain)
    return even, odd


@triton.jit
def forward_kernel(
    source,
    basis,
    target,
    stride_b,
    stride_c,
    stride_i,
    stride_j,
    extent,
    others,
    frequencies,
    gain,
    PADDED_EXTENT: tl.constexpr,
    PADDED_FREQUENCIES: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Transform one axis: planes (i, j) of ``source`` to ``target`` (planes, 2, frequencies, j).

    The grid is (images, channels, tiles), a plane for each of the first two.
    """
    image, channel = tl.program_id(0).to(tl.int64), tl.program_id(1)
    source += image * stride_b + channel * stride_c
    target += (image * tl.num_programs(1) + channel) * (2 * frequencies * others)
    block = tl.program_id(2) % (PADDED_FREQUENCIES // BLOCK_F)
    f = block * BLOCK_F + tl.arange(0, BLOCK_F)
    j = tl.program_id(2) // (PADDED_FREQUENCIES // BLOCK_F) * BLOCK_J + tl.arange(0, BLOCK_J)
    dtype: tl.constexpr = target.dtype.element_ty
    term_stride = 2 * PADDED_EXTENT * PADDED_FREQUENCIES
    even = tl.zeros((BLOCK_F, BLOCK_J), dtype)
    odd = tl.zeros((BLOCK_F, BLOCK_J), dtype)
    inside = (j < others)[None, :]
    column = source + j.to(tl.int64)[None, :] * stride_j
    for first in range(0, PADDED_EXTENT, BLOCK_T):
        up, down = outward(extent, first, BLOCK_T)
        above = tl.load(column + up[0].to(tl.int64)[:, None] * stride_i, mask=up[1][:, None] & inside, other=0.0)
        below = tl.load(column + down[0].to(tl.int64)[:, None] * stride_i, mask=down[1][:, None] & inside, other=0.0)
        above, below = above.to(dtype), below.to(dtype)
        offset = (block * PADDED_EXTENT + first + tl.arange(0, BLOCK_T))[None, :] * BLOCK_F
        offset += tl.arange(0, BLOCK_F)[:, None]
        cosines = load_split(basis, offset, term_stride, TERMS)
        sines = load_split(basis + PADDED_EXTENT * PADDED_FREQUENCIES, offset, term_stride, TERMS)
        parts = scaled_dots(cosines, sines, above + below, above - below, gain, TERMS)
        even, odd = even + parts[0], odd + parts[1]
    mask = (f < frequencies)[:, None] & inside
    f = f.to(tl.int64)[:, None]
    tl.store(target + f * others + j[None, :], even, mask=mask)
    tl.store(target + (f + frequencies) * others + j[None, :], odd, mask=mask)


@triton.jit
def inverse_kernel(
    source,
    basis,
    target,
    stride_plane,
    stride_i,
    stride_j,
    extent,
    others,
    frequencies,
    gain,
    PADDED_EXTENT: tl.constexpr,
    PADDED_FREQUENCIES: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Transform one axis back: ``source`` (planes, 2, frequencies, j) to planes (i, j) of ``target``."""
    plane = tl.program_id(0).to(tl.int64)
    source += plane * (2 * frequencies * others)
    target += plane * stride_plane
    first = tl.program_id(1) * BLOCK_T
    j = tl.program_id(2) * BLOCK_J + tl.arange(0, BLOCK_J)
    dtype: tl.constexpr = source.dtype.element_ty
    term_stride = 2 * PADDED_EXTENT * PADDED_FREQUENCIES
    even = tl.zeros((BLOCK_T, BLOCK_J), dtype)
    odd = tl.zeros((BLOCK_T, BLOCK_J), dtype)
    inside = (j < others)[None, :]
    t = first + tl.arange(0, BLOCK_T)
    for start in range(0, PADDED_FREQUENCIES, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        offset = start * PADDED_EXTENT + t[:, None] * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
        cosines = load_split(basis, offset, term_stride, TERMS)
        sines = load_split(basis + PADDED_EXTENT * PADDED_FREQUENCIES, offset, term_stride, TERMS)
        mask = (f < frequencies)[:, None] & inside
        f = f.to(tl.int64)[:, None]
        even_part = tl.load(source + f * others + j[None, :], mask=mask, other=0.0)
        odd_part = tl.load(source + (f + frequencies) * others + j[None, :], mask=mask, other=0.0)
        parts = scaled_dots(cosines, sines, even_part, odd_part, gain, TERMS)
        even, odd = even + parts[0], odd + parts[1]
    up, down = outward(extent, first, BLOCK_T)
    column = target + j.to(tl.int64)[None, :] * stride_j
    above, below = (even + odd).to(target.dtype.element_ty), (even - odd).to(target.dtype.element_ty)
    tl.store(column + up[0].to(tl.int64)[:, None] * stride_i, above, mask=up[1][:, None] & inside)
    tl.store(column + down[0].to(tl.int64)[:, None] * stride_i, below, mask=down[1][:, None] & inside)
