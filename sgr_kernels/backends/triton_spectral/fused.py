"""Images up to 64 x 64: everything between reading g and writing v stays in registers and shared memory.

A program serves one image after the other, each of its warps ("lanes") one column parity and 16 column frequencies.
For each channel ``U = B^T X^T`` (16, T) is the transform along the rows of pixels. Then, in steps of 16 row
frequencies, ``Z = U A``, ``Y = Lambda Z`` mixes the channels, and ``W += Y A^T`` is already the way back: each
product's accumulators are the left operand of the next. Last, ``V = B W`` gathers what the warps hold. Row parities go
side by side (PARITIES = 2) or, where registers are short, one after the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sgr_kernels.backends.triton_spectral.arranged import eigenvalues
from sgr_kernels.backends.triton_spectral.numerics import (
    dot,
    load_pixels,
    load_split,
    outward,
    power_of_two,
    split,
    store_pixels,
    transposed,
)


@triton.jit
def row_pairs(plane, size, strides, parity, PARITIES: tl.constexpr, T: tl.constexpr):
    """Sums and differences of mirrored pixels: (2 PARITIES, T, T), row parity outside, column parity inside."""
    up, down = outward(size[0], 0, T)
    right, left = outward(size[1], 0, T)
    up_right = load_pixels(plane, up, right, strides[0], strides[1]).to(tl.float32)
    up_left = load_pixels(plane, up, left, strides[0], strides[1]).to(tl.float32)
    down_right = load_pixels(plane, down, right, strides[0], strides[1]).to(tl.float32)
    down_left = load_pixels(plane, down, left, strides[0], strides[1]).to(tl.float32)
    if PARITIES == 2:
        even = tl.join((up_right + down_right) + (up_left + down_left), (up_right + down_right) - (up_left + down_left))
        odd = tl.join((up_right - down_right) + (up_left - down_left), (up_right - down_right) - (up_left - down_left))
        return tl.reshape(tl.permute(tl.join(even, odd), (3, 2, 0, 1)), (4, T, T))
    else:
        sign = 1.0 - 2.0 * parity
        right_sum, left_sum = up_right + sign * down_right, up_left + sign * down_left
        return tl.permute(tl.join(right_sum + left_sum, right_sum - left_sum), (2, 0, 1))


@triton.jit
def transform_columns(
    plane,
    size,
    strides,
    basis,
    parity,
    PARITIES: tl.constexpr,
    T: tl.constexpr,
    BLOCKS: tl.constexpr,
    TERMS: tl.constexpr,
):
    """``U = B^T X^T`` of one channel, split, (LANES, 16, T), its scale, and the factor that undoes it."""
    x = row_pairs(plane, size, strides, parity, PARITIES, T)
    scale, inverse = power_of_two(tl.max(tl.abs(x)))
    dtype: tl.constexpr = basis[0].dtype
    x = (x * scale)[:, None]
    x = tl.reshape(tl.broadcast_to(x, (2 * PARITIES, BLOCKS, T, T)), (2 * PARITIES * BLOCKS, T, T))
    return split(dot(basis, transposed(split(x, dtype, TERMS)), TERMS), dtype, TERMS), scale, inverse


@triton.jit
def parities(z, COLUMNS: tl.constexpr, STEP: tl.constexpr):
    """Unstack (4 BLOCKS, 16, STEP) into cos-cos, cos-sin, sin-cos, sin-sin (rows, columns), each (COLUMNS, STEP)."""
    last = tl.permute(tl.reshape(z, (2, 2, COLUMNS, STEP)), (2, 3, 0, 1))
    cosine, sine = tl.split(last)
    cc, sc = tl.split(cosine)
    cs, ss = tl.split(sine)
    return cc, cs, sc, ss


@triton.jit
def mix(
    tile,
    z,
    c: tl.constexpr,
    CHANNELS: tl.constexpr,
    PAIRS: tl.constexpr,
    PARITIES: tl.constexpr,
    BLOCKS: tl.constexpr,
    SIGNED: tl.constexpr,
):
    """``Y_c = sum_d Lambda[c, d] Z_d``, (LANES, 16, 16); in a signed spectrum the odd parts exchange parities."""
    COLUMNS: tl.constexpr = 16 * BLOCKS
    if SIGNED:
        cc = tl.zeros((COLUMNS, 16), tl.float32)
        cs, sc, ss = cc, cc, cc
        for d in tl.static_range(CHANNELS):
            z_cc, z_cs, z_sc, z_ss = parities(z[d], COLUMNS, 16)
            both = tl.reshape(eigenvalues(tile, 0, c, d, CHANNELS, PAIRS, BLOCKS), (COLUMNS, 16))
            rows = tl.reshape(eigenvalues(tile, 1, c, d, CHANNELS, PAIRS, BLOCKS), (COLUMNS, 16))
            columns = tl.reshape(eigenvalues(tile, 2, c, d, CHANNELS, PAIRS, BLOCKS), (COLUMNS, 16))
            neither = tl.reshape(eigenvalues(tile, 3, c, d, CHANNELS, PAIRS, BLOCKS), (COLUMNS, 16))
            cc += both * z_cc + rows * z_sc + columns * z_cs + neither * z_ss
            cs += both * z_cs + rows * z_ss - columns * z_cc - neither * z_sc
            sc += both * z_sc - rows * z_cc + columns * z_ss - neither * z_cs
            ss += both * z_ss - rows * z_cs - columns * z_sc + neither * z_cc
        stacked = tl.permute(tl.join(tl.join(cc, sc), tl.join(cs, ss)), (2, 3, 0, 1))
        return tl.reshape(stacked, (4 * BLOCKS, 16, 16))
    else:
        y = tl.zeros((2 * PARITIES * BLOCKS, 16, 16), tl.float32)
        for d in tl.static_range(CHANNELS):
            value = eigenvalues(tile, 0, c, d, CHANNELS, PAIRS, BLOCKS)[None]
            value = tl.broadcast_to(value, (2 * PARITIES, BLOCKS, 16, 16))
            y += tl.reshape(value, (2 * PARITIES * BLOCKS, 16, 16)) * z[d]
        return y


@triton.jit
def store_rows(plane, v, earlier, size, PARITIES: tl.constexpr, T: tl.constexpr):
    """Merge parities (2 PARITIES, T, T), columns by rows, into pixels; inverse of `row_pairs`.

    ``v`` holds all of them, or those odd along the rows' axis where ``earlier`` holds the even ones (PARITIES = 1).
    """
    up, down = outward(size[0], 0, T)
    right, left = outward(size[1], 0, T)
    if PARITIES == 2:
        even, odd = tl.split(tl.permute(tl.reshape(v, (2, 2, T, T)), (3, 2, 1, 0)))
    else:
        even, odd = tl.permute(earlier, (2, 1, 0)), tl.permute(v, (2, 1, 0))
    cosine, sine = tl.split(even + odd)
    store_pixels(plane, cosine + sine, up, right, size[1])
    store_pixels(plane, cosine - sine, up, left, size[1])
    cosine, sine = tl.split(even - odd)
    store_pixels(plane, cosine + sine, down, right, size[1])
    store_pixels(plane, cosine - sine, down, left, size[1])


@triton.jit(do_not_specialize=["zero"])
def fused_kernel(
    gradient,
    arranged,
    row_basis,
    column_basis,
    product,
    form,
    batch,
    height,
    width,
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    gain,
    zero,
    CHANNELS: tl.constexpr,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAIRS: tl.constexpr,
    PARITIES: tl.constexpr,
    TERMS: tl.constexpr,
    SIGNED: tl.constexpr,
    WITH_FORM: tl.constexpr,
    WITH_PRODUCT: tl.constexpr,
):
    """``v = Sigma g`` and ``q = g . v`` of every so many images; see the top of this file.

    The bases are `plan.split_basis`, 16 frequencies a tile; ``gain`` undoes their scale. The spectrum is in the order
    of `arranged`. ``zero`` is 0, which the compiler does not know: otherwise it would compute addresses before the loop
    over parities and hold on to them, for which there are no registers.
    """
    STEP: tl.constexpr = 16
    BLOCKS: tl.constexpr = COLUMNS // 16
    LANES: tl.constexpr = 2 * PARITIES * BLOCKS
    size, strides = (height, width), (stride_y, stride_x)
    lane = tl.arange(0, LANES)[:, None, None]
    column_parity = (lane // BLOCKS) % 2
    t, step = tl.arange(0, T), tl.arange(0, STEP)
    own = lane % (2 * BLOCKS) * (16 * T) + t[None, None, :] * 16 + tl.arange(0, 16)[None, :, None]
    every = column_parity * (T * COLUMNS) + t[None, :, None] * 16
    every += (tl.arange(0, COLUMNS) // 16 * (16 * T) + tl.arange(0, COLUMNS) % 16)[None, None, :]
    dtype: tl.constexpr = column_basis.dtype.element_ty
    scales = arranged + (ROWS // 16) * BLOCKS * (PAIRS * 256) + lane % BLOCKS
    KEPT: tl.constexpr = T == 16  # larger bases would take registers that the images need
    if KEPT:
        to_frequency = load_split(column_basis, own, 2 * T * COLUMNS, TERMS)
        to_pixels = load_split(column_basis, every, 2 * T * COLUMNS, TERMS)
    image = tl.program_id(0).to(tl.int64)
    while image < batch:
        plane, target = gradient + image * stride_b, product + image * (CHANNELS * height * width)
        total = tl.zeros((LANES, 1, 1), tl.float32)
        earlier, v = (), ()
        if WITH_PRODUCT:
            for _ in tl.static_range(CHANNELS):
                v = v + (tl.zeros((2 * PARITIES, T, T), tl.float32),)
            earlier = v
        for parity in tl.range(0, 2 // PARITIES, disable_licm=True):
            nothing = parity * zero
            size, strides = (height + nothing, width + nothing), (stride_y + nothing, stride_x + nothing)
            if not KEPT:
                to_frequency = load_split(column_basis + nothing, own, 2 * T * COLUMNS, TERMS)
            # All channels of Z have one scale, so that they can be mixed: at most 512 where pixels are below 8.
            u, scale, w = (), (), ()
            common, unit = tl.full((), 2.0**127, tl.float32), tl.zeros((), tl.float32)
            for c in tl.static_range(CHANNELS):
                channel, own_scale, inverse = transform_columns(
                    plane + c * stride_c + nothing, size, strides, to_frequency, parity, PARITIES, T, BLOCKS, TERMS
                )
                common, unit = tl.minimum(common, own_scale), tl.maximum(unit, inverse)
                u, scale, w = u + (channel,), scale + (inverse,), w + (tl.zeros((LANES, 16, T), tl.float32),)
            q = tl.zeros((LANES, 1, 1), tl.float32)
            row_parity = lane // (2 * BLOCKS) if PARITIES == 2 else parity + 0 * lane
            for first in tl.range(0, ROWS, STEP, disable_licm=True):
                offset = row_parity * (T * ROWS) + first * T + t[None, :, None] * STEP + step[None, None, :]
                a = load_split(row_basis + nothing, offset, 2 * T * ROWS, TERMS)
                tile = arranged + first * (BLOCKS * PAIRS * 16)
                restore = tl.load(scales + first // STEP * BLOCKS)
                z = ()
                for c in tl.static_range(CHANNELS):
                    z = z + (dot(u[c], a, TERMS) * (scale[c] * common * gain),)
                energy, sums = tl.zeros((LANES, 16, STEP), tl.float32), ()
                for c in tl.static_range(CHANNELS):
                    y = mix(tile, z, c, CHANNELS, PAIRS, PARITIES, BLOCKS, SIGNED)
                    if WITH_FORM:
                        energy += y * z[c]
                    if WITH_PRODUCT:
                        sums = sums + (w[c] + dot(split(y, dtype, TERMS), transposed(a), TERMS) * restore,)
                if WITH_FORM:
                    q += tl.sum(tl.sum(energy, axis=2, keep_dims=True), axis=1, keep_dims=True) * restore
                if WITH_PRODUCT:
                    w = sums
            if WITH_PRODUCT:
                if not KEPT:
                    to_pixels = load_split(column_basis + nothing, every, 2 * T * COLUMNS, TERMS)
                pixels = ()
                for c in tl.static_range(CHANNELS):
                    tl.debug_barrier()
                    own_scale, inverse = power_of_two(tl.max(tl.abs(w[c])))
                    gathered = tl.reshape(w[c] * own_scale, (2 * PARITIES, COLUMNS, BLOCKS, T // BLOCKS))
                    gathered = tl.reshape(tl.permute(gathered, (0, 2, 1, 3)), (LANES, COLUMNS, T // BLOCKS))
                    half = dot(to_pixels, split(gathered, dtype, TERMS), TERMS) * (inverse * unit * gain)
                    half = tl.reshape(half, (2 * PARITIES, BLOCKS, T, T // BLOCKS))
                    pixels = pixels + (tl.reshape(tl.permute(half, (0, 2, 1, 3)), (2 * PARITIES, T, T)),)
                earlier, v = v, pixels
            total += q * unit * unit
        if WITH_PRODUCT:
            for c in tl.static_range(CHANNELS):
                store_rows(target + c * height * width, v[c], earlier[c], size, PARITIES, T)
        if WITH_FORM:
            tl.store(form + image, tl.sum(total))
        image += tl.num_programs(0)
