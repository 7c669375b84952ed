"""The basis of odd frequencies (`spectrum.basis`) applied by FFT: memory and, nearly, time linear in an axis's length.

For real pixels the frequencies ``theta_k`` and ``theta_{2F-1-k} = 2 pi - theta_k`` are conjugate, so that the even k of
0..2F-1 say everything: with ``k = 2j``, ``exp(-i theta_k s) = exp(-i pi s / (2F)) exp(-2 pi i j s / F)``, a complex FFT
of length F of the pixels, twisted and folded to that period.

Conjugates are written out: an operator's kernel that a compiled graph calls loses those that PyTorch only notes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from sgr_kernels.toeplitz.constants import constant, wide_dtype


@constant
def _phase(count: int, numerator: int, step: int, period: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``exp(2 pi i (numerator + step n) / period)`` for n = 0..count-1, reduced in integers: exact to rounding."""
    n = (numerator + step * torch.arange(count, device=device)) % period
    angles = n.to(wide_dtype(device)) * (2 * math.pi / period)
    return torch.polar(torch.ones_like(angles), angles).to(dtype.to_complex())


def _twist(extent: int, frequencies: int, like: Tensor) -> Tensor:
    """``exp(i pi s / (2F))`` at the pixels."""
    return _phase(extent, 0, 1, 4 * frequencies, like.real.dtype, like.device)


def _centre(extent: int, frequencies: int, like: Tensor) -> Tensor:
    """``exp(i theta_k c)`` at the middle c of the axis."""
    return _phase(frequencies, extent - 1, 2 * (extent - 1), 8 * frequencies, like.real.dtype, like.device)


def analyze(pixels: Tensor, frequencies: int) -> Tensor:
    """``pixels @ basis(N, F)`` along the last axis: (..., N), real, to cosines and sines (..., 2F)."""
    extent = pixels.shape[-1]
    twisted = pad(pixels * _twist(extent, frequencies, pixels).conj_physical(), (0, -extent % frequencies))
    folded = twisted.unflatten(-1, (-1, frequencies)).sum(-2) if twisted.shape[-1] != frequencies else twisted
    even = torch.fft.fft(folded, norm="ortho")  # of k = 0, 2, .., 2F-2
    middle = (frequencies + 1) // 2
    odd = pad(even[..., middle:].flip(-1).conj_physical(), (0, frequencies % 2))
    z = torch.stack([even[..., :middle], odd], -1).flatten(-2)[..., :frequencies]
    z = z * _centre(extent, frequencies, pixels)
    return torch.cat([z.real, -z.imag], -1)


def synthesize(quadrants: Tensor, extent: int) -> Tensor:
    """``quadrants @ basis(N, F).mT`` along the last axis: cosines and sines (..., 2F) to pixels (..., N)."""
    frequencies = quadrants.shape[-1] // 2
    z = torch.complex(quadrants[..., :frequencies], -quadrants[..., frequencies:])
    z = z * _centre(extent, frequencies, quadrants).conj_physical()
    even = torch.cat([z[..., 0::2], z[..., 1::2].flip(-1).conj_physical()], -1)
    period = torch.fft.ifft(even, norm="ortho")
    if extent > frequencies:
        period = torch.cat([period, period], -1)
    return (period[..., :extent] * _twist(extent, frequencies, quadrants)).real
