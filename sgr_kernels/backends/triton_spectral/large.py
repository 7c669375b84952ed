"""The columns of large images: everything between the transforms of their rows, in one pass over memory.

A program takes an image, one column parity and 16 column frequencies of all channels. Its lanes, a warp each, are runs
of BLOCK_T pixels from the centre of the columns out: of both row parities side by side (PARITIES = 2) or, where
registers are short, of one after the other, which memory holds meanwhile. In steps of 16 row frequencies, ``Z = U A``
is summed over the runs, ``Y = Lambda Z`` mixes the channels, and ``W += Y A^T`` is each lane's own again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sgr_kernels.backends.triton_spectral.arranged import eigenvalues
from sgr_kernels.backends.triton_spectral.numerics import dot, load_split, power_of_two, split, transposed


@triton.jit
def places(m, height, columns, LANES: tl.constexpr, RUNS: tl.constexpr, BLOCK_T: tl.constexpr):
    """Offsets of pixels from the centre up and of their mirror images, (LANES, 16, BLOCK_T), and whether they exist."""
    t = tl.arange(0, LANES)[:, None, None] % RUNS * BLOCK_T + tl.arange(0, BLOCK_T)[None, None, :]
    up, down = height // 2 + t, (height - 1) // 2 - t  # of odd heights the centre is its own image and counts once
    inside = m < columns
    return m * height + up, m * height + down, inside & (up < height), inside & ((down >= 0) & (down != up))


@triton.jit
def spread(y, PARITIES: tl.constexpr, RUNS: tl.constexpr):
    """A matrix for each parity, (PARITIES, 16, 16), to all runs: (PARITIES RUNS, 16, 16)."""
    return tl.reshape(tl.broadcast_to(y[:, None], (PARITIES, RUNS, 16, 16)), (PARITIES * RUNS, 16, 16))


@triton.jit(do_not_specialize=["zero"])
def columns_kernel(
    half,
    arranged,
    row_basis,
    form,
    height,
    columns,
    gain,
    zero,
    CHANNELS: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    PARITIES: tl.constexpr,
    RUNS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TERMS: tl.constexpr,
    WITH_FORM: tl.constexpr,
    WITH_PRODUCT: tl.constexpr,
):
    """Transform, multiply by Lambda and transform back, in place: the columns of ``half``.

    It is (images, C, 2, columns, height). ``form`` receives a part of q for each program. The grid is (images, tiles of
    16 column frequencies, 2). The basis is `plan.split_basis`, 16 frequencies a tile; ``gain`` undoes its scale. The
    spectrum is in the order of `arranged`. ``zero`` is 0, which the compiler does not know: it computes addresses anew
    instead of holding on to them.
    """
    T: tl.constexpr = RUNS * BLOCK_T
    LANES: tl.constexpr = PARITIES * RUNS
    image, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half += (image * (2 * CHANNELS) + tl.program_id(2)) * columns * height
    channel_stride = 2 * columns.to(tl.int64) * height
    lane, m = tl.arange(0, LANES)[:, None, None], block * 16 + tl.arange(0, 16)[None, :, None]
    step = lane % RUNS * BLOCK_T + tl.arange(0, BLOCK_T)[None, :, None]
    step = step * 16 + tl.arange(0, 16)[None, None, :]
    dtype: tl.constexpr = row_basis.dtype.element_ty
    tiles = tl.num_programs(1)
    restores = arranged + ROWS // 16 * tiles * (PAIRS * 256) + block
    total = tl.zeros((PARITIES, 16, 16), tl.float32)
    for parity in tl.static_range(0, 2, PARITIES):
        row_parity = lane // RUNS + parity
        above, below, has_above, has_below = places(m + 2 * parity * zero, height, columns, LANES, RUNS, BLOCK_T)
        u, scale, w = (), (), ()
        common, unit = tl.full((), 2.0**127, tl.float32), tl.zeros((), tl.float32)
        for c in tl.static_range(CHANNELS):
            plane = half + c * channel_stride
            x = tl.load(plane + below, mask=has_below, other=0.0)
            if parity == 0:  # otherwise these are already the differences
                higher = tl.load(plane + above, mask=has_above, other=0.0)
                if PARITIES == 1:
                    tl.store(plane + below, higher - x, mask=has_below)
                x = higher + (1.0 - 2.0 * row_parity) * x
            own_scale, inverse = power_of_two(tl.max(tl.abs(x)))
            common, unit = tl.minimum(common, own_scale), tl.maximum(unit, inverse)
            u, scale = u + (split(x * own_scale, dtype, TERMS),), scale + (inverse,)
            w = w + (tl.zeros((LANES, 16, BLOCK_T), tl.float32),)
        q = tl.zeros((PARITIES, 16, 16), tl.float32)
        for k in tl.range(0, ROWS // 16):
            a = load_split(row_basis, row_parity * (T * ROWS) + k * (16 * T) + step, 2 * T * ROWS, TERMS)
            z = ()
            for c in tl.static_range(CHANNELS):
                runs = tl.reshape(dot(u[c], a, TERMS), (PARITIES, RUNS, 16, 16))
                z = z + (tl.sum(runs, axis=1) * (scale[c] * common * gain),)
            tile = arranged + (k * tiles + block) * (PAIRS * 256)
            restore = tl.load(restores + k * tiles)
            energy, sums = tl.zeros((PARITIES, 16, 16), tl.float32), ()
            for c in tl.static_range(CHANNELS):
                y = tl.zeros((PARITIES, 16, 16), tl.float32)
                for d in tl.static_range(CHANNELS):
                    y += eigenvalues(tile, 0, c, d, CHANNELS, PAIRS, 1) * z[d]
                if WITH_FORM:
                    energy += y * z[c]
                if WITH_PRODUCT:
                    hi, lo = split(y, dtype, TERMS)
                    every = (spread(hi, PARITIES, RUNS), spread(lo, PARITIES, RUNS))
                    sums = sums + (w[c] + dot(every, transposed(a), TERMS) * restore,)
            q += energy * restore
            if WITH_PRODUCT:
                w = sums
        total += q * unit * unit
        tl.debug_barrier()  # what one thread has written another may read
        if WITH_PRODUCT:
            again = m + (2 * parity + 1) * zero
            above, below, has_above, has_below = places(again, height, columns, RUNS, RUNS, BLOCK_T)
            for c in tl.static_range(CHANNELS):
                plane, values = half + c * channel_stride, w[c] * (unit * gain)
                if PARITIES == 2:
                    even, odd = tl.split(tl.permute(tl.reshape(values, (2, RUNS, 16, BLOCK_T)), (1, 2, 3, 0)))
                    tl.store(plane + above, even + odd, mask=has_above)
                    tl.store(plane + below, even - odd, mask=has_below)
                elif parity == 0:
                    tl.store(plane + above, values, mask=has_above)
                else:
                    even = tl.load(plane + above, mask=has_above, other=0.0)
                    tl.store(plane + above, even + values, mask=has_above)
                    tl.store(plane + below, even - values, mask=has_below)
    if WITH_FORM:
        tl.store(form + (image * tiles + block) * 2 + tl.program_id(2), tl.sum(total))
