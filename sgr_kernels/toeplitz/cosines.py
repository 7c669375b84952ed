"""Cosine and sine transforms of displacements: by matrices where axes are short, by FFT where that is faster.

Two families of frequencies occur: the odd ones of a skew-circulant, ``theta_k = pi (2k + 1) / (2F)``, and those of a
circulant of odd period, ``2 pi k / (2N - 1)``. All transforms act on one axis of float64 tensors (..., h, w), ``dim``
-1 or -2; their matrices grow with the square of its length, their Fourier transforms do not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from sgr_kernels.toeplitz.constants import constant, tracing, wide_dtype

# Measured on a CPU: from here on Fourier transforms of lengths with small factors are faster than float64's matrices,
# and of any length. On GPUs, unmeasured: from where some ten passes over memory cost less than float64's operations. In
# what a compiler traces only matrices that would be huge are avoided.
_FFT_FROM, _FFT_ALWAYS_FROM, _FFT_ON_GPUS_FROM, _HUGE = 96, 768, 512, 2048
_LARGE_PLANE = 1 << 14


@functools.cache
def _largest_factor(n: int) -> int:
    for p in range(2, math.isqrt(n) + 1):
        if n % p == 0:
            return max(p, _largest_factor(n // p))
    return n


def by_fft(length: int, device: torch.device, start: int | None = None) -> bool:
    """Whether transforms of a length go through FFT, on CPUs from ``start`` on if the length has small factors."""
    if device.type not in ("cpu", "cuda"):
        return False
    if tracing():
        return length >= _HUGE
    if device.type == "cuda":
        return length >= _FFT_ON_GPUS_FROM
    start = _FFT_FROM if start is None else start
    return length >= _FFT_ALWAYS_FROM or (length >= start and _largest_factor(length) <= 13)


def _angles(positions: int, frequencies: int, device: torch.device) -> Tensor:
    """``d theta_k``, (positions, frequencies), reduced in integers first so that they are exact to rounding."""
    d = torch.arange(positions, device=device)[:, None]
    k = torch.arange(1, 2 * frequencies, 2, device=device)[None, :]
    return (d * k % (4 * frequencies)).to(wide_dtype(device)) * (math.pi / (2 * frequencies))


@constant
def _odd_matrix(reach: int, frequencies: int, part: str, device: torch.device) -> Tensor:
    angles = _angles(reach, frequencies, device)
    weighted = 2 * (angles.cos() if part == "even" else angles.sin())
    return torch.cat([weighted[:1] / 2, weighted[1:]])


@constant
def _periodic_matrix(reach: int, extent: int, device: torch.device) -> Tensor:
    period = 2 * extent - 1
    d, k = torch.arange(reach, device=device)[:, None], torch.arange(extent, device=device)[None, :]
    weighted = 2 * ((d * k % period).to(wide_dtype(device)) * (2 * math.pi / period)).cos()
    return torch.cat([weighted[:1] / 2, weighted[1:]])


@constant
def _twist(frequencies: int, device: torch.device) -> Tensor:
    """``exp(i pi d / (2F))`` for d = 0..F/2."""
    angles = torch.arange(frequencies // 2 + 1, device=device, dtype=wide_dtype(device))
    return torch.polar(torch.ones_like(angles), angles * (math.pi / (2 * frequencies)))


def _times(matrix: Tensor, x: Tensor, dim: int) -> Tensor:
    return x @ matrix if dim == -1 else matrix.mT @ x


def odd_frequencies(x: Tensor, frequencies: int, part: str, dim: int) -> Tensor:
    """Displacements 0..reach-1 to ``x_0 + 2 sum_d x_d cos(theta_k d)``, or to ``2 sum_d x_d sin(theta_k d)``.

    Args:
        x: (..., h, w), at most ``frequencies`` displacements.
        frequencies: F, the length of the result.
        part: ``"even"`` for cosines, ``"odd"`` for sines.
        dim: -1 or -2.
    """
    if not by_fft(frequencies, x.device):
        return _times(_odd_matrix(x.shape[dim], frequencies, part, x.device), x, dim)
    x = pad(x.movedim(dim, -1).contiguous(), (0, frequencies + 1 - x.shape[dim]))
    if part == "odd":  # sin(theta_k d) = (-1)^k cos(theta_k (F - d))
        x = pad(x[..., 1:].flip(-1), (0, 1))
    half = frequencies // 2 + 1
    folded = torch.complex(x[..., :half], -x.flip(-1)[..., :half]) * _twist(frequencies, x.device)
    v = torch.fft.irfft(folded, n=frequencies, norm="forward")
    middle = (frequencies + 1) // 2
    evens, odds = v[..., :middle], pad(v[..., middle:].flip(-1), (0, frequencies % 2))
    if part == "odd":
        odds = -odds
    return torch.stack([evens, odds], -1).flatten(-2)[..., :frequencies].movedim(-1, dim)


def odd_displacements(y: Tensor, reach: int, part: str, dim: int) -> Tensor:
    """The adjoint of `odd_frequencies`: frequencies along ``dim`` to displacements 0..reach-1."""
    frequencies = y.shape[dim]
    if not by_fft(frequencies, y.device):
        return _times(_odd_matrix(reach, frequencies, part, y.device).mT, y, dim)
    y = y.movedim(dim, -1).contiguous()
    evens, odds = y[..., 0::2], y[..., 1::2]
    v = torch.cat([evens, (-odds if part == "odd" else odds).flip(-1)], -1)
    u = torch.fft.rfft(v) * _twist(frequencies, y.device).conj_physical()
    rest = frequencies - u.shape[-1]
    x = torch.cat([u.real, -u.imag[..., 1 : rest + 1].flip(-1)], -1)
    first = x[..., :1]
    x = 2 * (pad(x[..., 1:].flip(-1), (1, 0)) if part == "odd" else torch.cat([first / 2, x[..., 1:]], -1))
    return x[..., :reach].movedim(-1, dim)


def periodic_frequencies(x: Tensor, extent: int, dim: int) -> Tensor:
    """Displacements 0..reach-1 to ``x_0 + 2 sum_d x_d cos(2 pi k d / (2N - 1))``, k = 0..N-1, N = ``extent``.

    Of the whole range, N displacements, it is its own inverse up to a factor: twice, it multiplies by ``2N - 1``.
    """
    if not by_fft(extent, x.device, _FFT_ALWAYS_FROM):
        return _times(_periodic_matrix(x.shape[dim], extent, x.device), x, dim)
    x = pad(x.movedim(dim, -1), (0, extent - x.shape[dim]))
    return torch.fft.rfft(torch.cat([x, x[..., 1:].flip(-1)], -1)).real.movedim(-1, dim)


def plane_by_plane(transform: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``transform(x)``, where planes (h, w) are large on a CPU one after the other, so that each stays in cache."""
    if not x.is_cpu or x.dim() < 3 or x.shape[-1] * x.shape[-2] < _LARGE_PLANE or x.shape[:-2].numel() <= 1:
        return transform(x)
    return torch.stack([transform(plane) for plane in x.flatten(0, -3)]).unflatten(0, x.shape[:-2])
