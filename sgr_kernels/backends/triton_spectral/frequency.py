"""Frequency by frequency, on transforms that the passes have written out: mix channels, or sum their products.

A transform is (images, C, 2, 2, rows, columns), column parity outside. Both kernels take a tile of frequencies and all
four parities at once, which is what a signed spectrum needs: its odd parts turn cosines into sines.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_parities(z, offset, count, mask):
    """Coefficients cos-cos, cos-sin, sin-cos, sin-sin (rows, columns) at the same frequencies."""
    cc = tl.load(z + offset, mask=mask, other=0.0)
    sc = tl.load(z + offset + count, mask=mask, other=0.0)
    cs = tl.load(z + offset + 2 * count, mask=mask, other=0.0)
    ss = tl.load(z + offset + 3 * count, mask=mask, other=0.0)
    return cc, cs, sc, ss


@triton.jit
def load_spectrum(spectrum, part, c, d, f, count, mask, CHANNELS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """``Lambda[part, c, d]`` (BLOCK_C, BLOCK_F) for channels c, or that of the symmetric part of Sigma."""
    value = tl.load(spectrum + ((part * CHANNELS + c) * CHANNELS + d) * count + f, mask=mask, other=0.0)
    if SYMMETRIC:
        other = tl.load(spectrum + ((part * CHANNELS + d) * CHANNELS + c) * count + f, mask=mask, other=0.0)
        sign: tl.constexpr = -1 if part == 1 or part == 2 else 1
        value = (value + sign * other) * 0.5
    return value


@triton.jit
def mix_kernel(
    z,
    spectrum,
    y,
    form,
    count,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
    SIGNED: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    WITH_FORM: tl.constexpr,
    WITH_PRODUCT: tl.constexpr,
):
    """``Y_c = sum_d Lambda[c, d] Z_d`` and, a part of it for each program, ``q = sum Z . Y``.

    The grid is (tiles of ``count`` frequencies, blocks of channels, images).
    """
    image = tl.program_id(2).to(tl.int64)
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    own = (image * CHANNELS + c) * (4 * count) + f
    mask = (c < CHANNELS) & (f < count)
    c = c.to(tl.int64)
    dtype: tl.constexpr = z.dtype.element_ty
    cc = tl.zeros((BLOCK_C, BLOCK_F), dtype)
    cs, sc, ss = cc, cc, cc
    for d in range(CHANNELS):
        z_cc, z_cs, z_sc, z_ss = load_parities(z, (image * CHANNELS + d) * (4 * count) + f, count, f < count)
        both = load_spectrum(spectrum, 0, c, d, f, count, mask, CHANNELS, SYMMETRIC)
        cc += both * z_cc
        cs += both * z_cs
        sc += both * z_sc
        ss += both * z_ss
        if SIGNED:
            odd_rows = load_spectrum(spectrum, 1, c, d, f, count, mask, CHANNELS, SYMMETRIC)
            odd_columns = load_spectrum(spectrum, 2, c, d, f, count, mask, CHANNELS, SYMMETRIC)
            odd = load_spectrum(spectrum, 3, c, d, f, count, mask, CHANNELS, SYMMETRIC)
            cc += odd_rows * z_sc + odd_columns * z_cs + odd * z_ss
            cs += odd_rows * z_ss - odd_columns * z_cc - odd * z_sc
            sc += odd_columns * z_ss - odd_rows * z_cc - odd * z_cs
            ss += odd * z_cc - odd_rows * z_cs - odd_columns * z_sc
    if WITH_FORM:
        z_cc, z_cs, z_sc, z_ss = load_parities(z, own, count, mask)
        part = (image * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
        tl.store(form + part, tl.sum((cc * z_cc + cs * z_cs) + (sc * z_sc + ss * z_ss)))
    if WITH_PRODUCT:
        tl.store(y + own, cc, mask=mask)
        tl.store(y + own + count, sc, mask=mask)
        tl.store(y + own + 2 * count, cs, mask=mask)
        tl.store(y + own + 3 * count, ss, mask=mask)


@triton.jit
def gram_kernel(
    a,
    b,
    sums,
    images,
    count,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
    IMAGES: tl.constexpr,
    SIGNED: tl.constexpr,
):
    """Sums of ``Z^a_c Z^b_d`` over parities and IMAGES images: (programs along axis 2, parts, C, C, frequencies)."""
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    blocks: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    c = (tl.program_id(1) // blocks).to(tl.int64)
    d = tl.program_id(1) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    split = tl.program_id(2).to(tl.int64)
    mask = (d < CHANNELS) & (f < count)
    dtype: tl.constexpr = a.dtype.element_ty
    both = tl.zeros((BLOCK_C, BLOCK_F), dtype)
    odd_rows, odd_columns, odd = both, both, both
    for i in range(IMAGES):
        image = split * IMAGES + i
        # Compared, for a scalar spread by "&" is an integer to Triton's interpreter, and from 3.9 on no mask.
        inside = f < tl.where(image < images, count, 0)
        a_cc, a_cs, a_sc, a_ss = load_parities(a, (image * CHANNELS + c) * (4 * count) + f, count, inside)
        inside = (d < CHANNELS) & inside
        b_cc, b_cs, b_sc, b_ss = load_parities(b, (image * CHANNELS + d) * (4 * count) + f, count, inside)
        both += (a_cc * b_cc + a_cs * b_cs) + (a_sc * b_sc + a_ss * b_ss)
        if SIGNED:
            odd_rows += (a_cc * b_sc + a_cs * b_ss) - (a_sc * b_cc + a_ss * b_cs)
            odd_columns += (a_cc * b_cs + a_sc * b_ss) - (a_cs * b_cc + a_ss * b_sc)
            odd += (a_cc * b_ss + a_ss * b_cc) - (a_cs * b_sc + a_sc * b_cs)
    parts: tl.constexpr = 4 if SIGNED else 1
    cell = sums + ((split * parts * CHANNELS + c) * CHANNELS + d) * count + f
    tl.store(cell, both, mask=mask)
    if SIGNED:
        stride = tl.full((), CHANNELS * CHANNELS, tl.int64) * count
        tl.store(cell + stride, odd_rows, mask=mask)
        tl.store(cell + 2 * stride, odd_columns, mask=mask)
        tl.store(cell + 3 * stride, odd, mask=mask)
