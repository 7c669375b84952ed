"""Cross spectra of images up to 64 x 64: transforms and their sums of products stay in registers.

A program serves a run of images and 16 row frequencies (axes 0 and 1 of the grid; axis 2: one row parity at a time,
where registers are short). Its sums stay in registers over all its images; the caller adds up the programs' results in
a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sgr_kernels.backends.triton_spectral.fused import parities, transform_columns
from sgr_kernels.backends.triton_spectral.numerics import dot, load_split


@triton.jit
def transform(
    plane,
    size,
    strides,
    to_frequency,
    a,
    gain,
    parity,
    PARITIES: tl.constexpr,
    T: tl.constexpr,
    BLOCKS: tl.constexpr,
    TERMS: tl.constexpr,
):
    """``Z`` of one channel at 16 row frequencies, (LANES, 16, 16)."""
    u, _, unit = transform_columns(plane, size, strides, to_frequency, parity, PARITIES, T, BLOCKS, TERMS)
    return dot(u, a, TERMS) * (unit * gain)


@triton.jit
def store_sums(sums, value, first, frequencies, PARITIES: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr):
    """Add up the parities of a stack (LANES, 16, STEP), or take (COLUMNS, STEP) as it is, and write it transposed."""
    rows, columns = frequencies
    if len(value.shape) == 3:
        value = tl.sum(tl.reshape(value, (2 * PARITIES, COLUMNS, STEP)), axis=0)
    k, m = first + tl.arange(0, STEP)[None, :], tl.arange(0, COLUMNS)[:, None]
    tl.store(sums + k * columns + m, value, mask=(k < rows) & (m < columns))


@triton.jit
def fused_gram_kernel(
    a,
    b,
    row_basis,
    column_basis,
    sums,
    batch,
    height,
    width,
    a_stride_b,
    a_stride_c,
    a_stride_y,
    a_stride_x,
    b_stride_b,
    b_stride_c,
    b_stride_y,
    b_stride_x,
    rows,
    columns,
    gain,
    CHANNELS: tl.constexpr,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARITIES: tl.constexpr,
    TERMS: tl.constexpr,
    IMAGES: tl.constexpr,
    SIGNED: tl.constexpr,
    SAME: tl.constexpr,
):
    """``S[c, d] = sum Z^a_c Z^b_d`` over IMAGES images: (programs along axes 0 and 2, parts, C, C, rows, columns).

    SAME says that b is a; the bases are those of `fused_kernel`.
    """
    STEP: tl.constexpr = 16
    BLOCKS: tl.constexpr = COLUMNS // 16
    LANES: tl.constexpr = 2 * PARITIES * BLOCKS
    first = tl.program_id(1) * STEP
    parity = tl.program_id(2)
    size, frequencies = (height, width), (rows, columns)
    a_strides, b_strides = (a_stride_y, a_stride_x), (b_stride_y, b_stride_x)
    lane = tl.arange(0, LANES)[:, None, None]
    t = tl.arange(0, T)
    column_offset = lane % (2 * BLOCKS) * (16 * T) + t[None, None, :] * 16 + tl.arange(0, 16)[None, :, None]
    to_frequency = load_split(column_basis, column_offset, 2 * T * COLUMNS, TERMS)
    row_parity = lane // (2 * BLOCKS) if PARITIES == 2 else parity + 0 * lane
    row_offset = row_parity * (T * ROWS) + first * T + t[None, :, None] * STEP + tl.arange(0, STEP)[None, None, :]
    to_row_frequency = load_split(row_basis, row_offset, 2 * T * ROWS, TERMS)
    PARTS: tl.constexpr = 4 if SIGNED else 1
    totals = ()
    for _ in tl.static_range(PARTS * CHANNELS * CHANNELS):
        if SIGNED:
            totals = totals + (tl.zeros((COLUMNS, STEP), tl.float32),)
        else:
            totals = totals + (tl.zeros((LANES, 16, STEP), tl.float32),)
    for i in range(IMAGES):
        image = tl.program_id(0).to(tl.int64) * IMAGES + i
        weight = tl.where(image < batch, gain, 0.0)
        image = tl.minimum(image, batch - 1)
        za = ()
        for c in tl.static_range(CHANNELS):
            plane = a + image * a_stride_b + c * a_stride_c
            z = transform(
                plane, size, a_strides, to_frequency, to_row_frequency, weight, parity, PARITIES, T, BLOCKS, TERMS
            )
            za = za + (z,)
        grown = ()
        for d in tl.static_range(CHANNELS):
            if SAME:
                zb = za[d]
            else:
                plane = b + image * b_stride_b + d * b_stride_c
                zb = transform(
                    plane, size, b_strides, to_frequency, to_row_frequency, gain, parity, PARITIES, T, BLOCKS, TERMS
                )
            for c in tl.static_range(CHANNELS):
                if SIGNED:
                    a_cc, a_cs, a_sc, a_ss = parities(za[c], COLUMNS, STEP)
                    b_cc, b_cs, b_sc, b_ss = parities(zb, COLUMNS, STEP)
                    grown = grown + (
                        totals[PARTS * (d * CHANNELS + c)]
                        + ((a_cc * b_cc + a_cs * b_cs) + (a_sc * b_sc + a_ss * b_ss)),
                        totals[PARTS * (d * CHANNELS + c) + 1]
                        + ((a_cc * b_sc + a_cs * b_ss) - (a_sc * b_cc + a_ss * b_cs)),
                        totals[PARTS * (d * CHANNELS + c) + 2]
                        + ((a_cc * b_cs + a_sc * b_ss) - (a_cs * b_cc + a_ss * b_sc)),
                        totals[PARTS * (d * CHANNELS + c) + 3]
                        + ((a_cc * b_ss + a_ss * b_cc) - (a_cs * b_sc + a_sc * b_cs)),
                    )
                elif SAME and d < c:
                    grown = grown + (totals[PARTS * (d * CHANNELS + c)],)
                else:
                    grown = grown + (totals[PARTS * (d * CHANNELS + c)] + za[c] * zb,)
        totals = grown
    block = rows * columns
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(2) + parity
    sums += program * (PARTS * CHANNELS * CHANNELS) * block
    for c in tl.static_range(CHANNELS):
        for d in tl.static_range(CHANNELS):
            for part in tl.static_range(PARTS):
                cell = sums + ((part * CHANNELS + c) * CHANNELS + d) * block
                if SAME and not SIGNED and d < c:
                    store_sums(cell, totals[c * CHANNELS + d], first, frequencies, PARITIES, COLUMNS, STEP)
                else:
                    total = totals[PARTS * (d * CHANNELS + c) + part]
                    store_sums(cell, total, first, frequencies, PARITIES, COLUMNS, STEP)
