"""Skew-circulant spectra: the bases of odd frequencies, and the maps between tables and spectra.

A symmetric Toeplitz matrix of N pixels whose entries vanish beyond a displacement R embeds in a skew-circulant one of
period 2F, for any ``2F >= N + R``. Its eigenvectors are the 2F cosines and sines of the odd frequencies
``theta_k = pi (2k + 1) / (2F)``, k = 0..F-1, and its eigenvalues ``Lambda_k = t_0 + 2 sum_d t_d cos(theta_k d)`` are
real. In two dimensions the bases are products, and in C channels every eigenvalue is a C x C block.

A signed table (Toeplitz, not symmetric) is the sum of four parts that are even or odd in dy and dx. Its *spectrum* is
their stack, (4, C, C, Fh, Fw), ordered even-even, odd-even, even-odd, odd-odd; that of an even table is the first
part alone, (C, C, Fh, Fw).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sgr_kernels.toeplitz.constants import constant, wide_dtype
from sgr_kernels.toeplitz.geometry import Size


def frequency_count(extent: int, reach: int) -> int:
    """Fewest odd frequencies that are exact for ``extent`` pixels and a table of ``reach`` displacements."""
    return max(1, (extent + reach) // 2)


def frequency_counts(size: Size, table_shape: Size) -> Size:
    """`frequency_count` along both axes, for an even table of ``table_shape`` (h, w)."""
    return frequency_count(size[0], table_shape[0]), frequency_count(size[1], table_shape[1])


def _angles(positions: int, frequencies: int, offset: float, device: torch.device) -> Tensor:
    dtype = wide_dtype(device)
    theta = torch.arange(1, 2 * frequencies, 2, device=device, dtype=dtype) * (math.pi / (2 * frequencies))
    return (torch.arange(positions, device=device, dtype=dtype) - offset)[:, None] * theta[None, :]


@constant
def basis(extent: int, frequencies: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Orthonormal basis ``F^(-1/2) [cos(s theta) | sin(s theta)]``, (extent, 2F), s measured from the centre."""
    angles = _angles(extent, frequencies, (extent - 1) / 2, device)
    return (torch.cat([angles.cos(), angles.sin()], 1) / math.sqrt(frequencies)).to(dtype)


@constant
def _table_basis(reach: int, frequencies: int, part: str, device: torch.device) -> Tensor:
    """How a table's displacements 0..reach-1 enter one part of the spectrum, (reach, F), float64.

    ``w_d cos(theta_k d)`` for the even part and ``2 sin(theta_k d)`` for the odd one; w_0 = 1, w_d = 2.
    """
    angles = _angles(reach, frequencies, 0.0, device)
    weighted = 2 * (angles.cos() if part == "even" else angles.sin())
    return torch.cat([weighted[:1] / 2, weighted[1:]])


@constant
def _signed_basis(length: int, frequencies: int, part: str, device: torch.device) -> Tensor:
    """As `_table_basis` for the displacements -reach+1..reach-1 of a signed table, (2 reach - 1, F)."""
    angles = _angles(length, frequencies, (length - 1) / 2, device)
    return angles.cos() if part == "even" else angles.sin()


_SIGNED_PARTS = (("even", "even"), ("odd", "even"), ("even", "odd"), ("odd", "odd"))


def spectrum_from_table(table: Tensor, frequencies: Size, form: str, dtype: torch.dtype) -> Tensor:
    """Spectrum of an even (C, C, h, w) or a signed (C, C, 2h-1, 2w-1) table; linear, summed in float64.

    Returns (C, C, Fh, Fw) for the even form and (4, C, C, Fh, Fw) for the signed one, in ``dtype``.
    """
    height, width = table.shape[-2:]
    wide = table.to(wide_dtype(table.device))
    if form == "even":
        rows = _table_basis(height, frequencies[0], "even", table.device)
        columns = _table_basis(width, frequencies[1], "even", table.device)
        return (rows.mT @ wide @ columns).to(dtype)
    parts = [
        _signed_basis(height, frequencies[0], p, table.device).mT
        @ wide
        @ _signed_basis(width, frequencies[1], r, table.device)
        for p, r in _SIGNED_PARTS
    ]
    return torch.stack(parts).to(dtype)


def table_from_cross_spectrum(cross_spectrum: Tensor, shape: Size, form: str) -> Tensor:
    """Adjoint of `spectrum_from_table`: sums over the pixel pairs at each displacement, in float64.

    With the cross spectrum of a and b and a table of ``shape``, entry ``[c, c', d]`` is the sum over samples and
    ordered pixel pairs (i, j) at displacement d of ``a[c, i] b[c', j]``.
    """
    device, (fh, fw) = cross_spectrum.device, cross_spectrum.shape[-2:]
    wide = cross_spectrum.to(wide_dtype(device))
    if form == "even":
        rows = _table_basis(shape[0], fh, "even", device)
        return rows @ wide @ _table_basis(shape[1], fw, "even", device).mT
    sums = [
        _signed_basis(shape[0], fh, p, device) @ part @ _signed_basis(shape[1], fw, r, device).mT
        for part, (p, r) in zip(wide, _SIGNED_PARTS)
    ]
    return torch.stack(sums).sum(0)


def transpose(spectrum: Tensor) -> Tensor:
    """Spectrum of the transposed matrix: channels change places, and displacements their sign."""
    if spectrum.dim() == 4:
        return spectrum.transpose(0, 1)
    swapped = spectrum.transpose(1, 2)
    return torch.stack([swapped[0], -swapped[1], -swapped[2], swapped[3]])


def symmetric_part(spectrum: Tensor) -> Tensor:
    """Spectrum of ``(Sigma + Sigma^T) / 2``, all that a quadratic form sees."""
    return (spectrum + transpose(spectrum)) / 2
