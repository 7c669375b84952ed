"""Building blocks of the kernels: split operands, power-of-two scaling, and pixels in mirrored pairs.

Tensor cores multiply 16-bit numbers. An operand of float32 accuracy is a sum of two float16 numbers, ``hi + lo``, and
of the four partial products the three largest are kept (TERMS = 3). float16 spans few powers of two, so data are first
brought to a common magnitude by a power of two, which is exact. With one term the accuracy is that of tf32, whose
significand is as long as float16's, or of bfloat16. Every size in capitals is known when a kernel is compiled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sgr_kernels.backends import triton_spectral

# The interpreter truncates to bfloat16, and multiplies matrices of bfloat16 as the integers that it keeps them in.
INTERPRETING = tl.constexpr(triton_spectral.interpreting())


@triton.jit
def rounded(x):
    """float32 numbers rounded to bfloat16's significand, as GPUs convert them: to nearest, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def split(x, dtype: tl.constexpr, TERMS: tl.constexpr):
    """``hi`` and ``lo`` in ``dtype``; with one term, ``hi`` alone (twice)."""
    if INTERPRETING and dtype == tl.bfloat16:
        x = rounded(x)
    hi = x.to(dtype)
    if TERMS == 1:
        return hi, hi
    else:
        return hi, (x - hi.to(tl.float32)).to(dtype)


@triton.jit
def dot(a, b, TERMS: tl.constexpr):
    """Matrix product of two split operands ``(hi, lo)`` over their last two axes, the small terms first."""
    if INTERPRETING and a[0].dtype == tl.bfloat16:
        result = tl.dot(a[0].to(tl.float32), b[0].to(tl.float32), input_precision="ieee")
    elif TERMS == 1:
        result = tl.dot(a[0], b[0], input_precision="ieee")
    else:
        result = tl.dot(a[0], b[1], input_precision="ieee")
        result = tl.dot(a[1], b[0], result, input_precision="ieee")
        result = tl.dot(a[0], b[0], result, input_precision="ieee")
    return result


@triton.jit
def transposed(a):
    """Transpose a split operand."""
    return tl.trans(a[0]), tl.trans(a[1])


@triton.jit
def power_of_two(largest):
    """Power of two that brings magnitudes up to ``largest`` (float32) below 8, and its reciprocal."""
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    scale = tl.minimum(256 - exponent, 253)
    return (scale << 23).to(tl.float32, bitcast=True), ((254 - scale) << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_split(basis, offset, term_stride, TERMS: tl.constexpr):
    """Load both terms of a basis at the same offsets."""
    hi = tl.load(basis + offset)
    if TERMS == 1:
        return hi, hi
    else:
        return hi, tl.load(basis + offset + term_stride)


@triton.jit
def outward(extent, first, T: tl.constexpr):
    """T positions from the centre of an axis up, and their mirror images; each with a mask of those that exist.

    The centre of an odd axis is its own mirror image and counts once.
    """
    t = first + tl.arange(0, T)
    up, down = extent // 2 + t, (extent - 1) // 2 - t
    return (up, up < extent), (down, (down >= 0) & (down != up))


@triton.jit
def load_pixels(plane, y, x, stride_y, stride_x):
    """Pixels of rows y and columns x (positions and masks), zero outside."""
    offset = y[0][:, None] * stride_y + x[0][None, :] * stride_x
    return tl.load(plane + offset, mask=y[1][:, None] & x[1][None, :], other=0.0)


@triton.jit
def store_pixels(plane, value, y, x, width):
    """Write pixels of a contiguous plane; inverse of `load_pixels`."""
    offset = y[0][:, None] * width + x[0][None, :]
    tl.store(plane + offset, value.to(plane.dtype.element_ty), mask=y[1][:, None] & x[1][None, :])
