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
from sgr_kernels.toeplitz.cosines import odd_displacements, odd_frequencies, plane_by_plane
from sgr_kernels.toeplitz.geometry import Size


def frequency_count(extent: int, reach: int) -> int:
    """Fewest odd frequencies that are exact for ``extent`` pixels and a table of ``reach`` displacements."""
    return max(1, (extent + reach) // 2)


def frequency_counts(size: Size, table_shape: Size) -> Size:
    """`frequency_count` along both axes, for an even table of ``table_shape`` (h, w)."""
    return frequency_count(size[0], table_shape[0]), frequency_count(size[1], table_shape[1])


@constant
def basis(extent: int, frequencies: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Orthonormal basis ``F^(-1/2) [cos(s theta) | sin(s theta)]``, (extent, 2F), s measured from the centre."""
    twice_s = 2 * torch.arange(extent, device=device) - (extent - 1)
    k = torch.arange(1, 2 * frequencies, 2, device=device)
    # Reduced in integers, so that the angles are exact to rounding.
    angles = (twice_s[:, None] * k % (8 * frequencies)).to(wide_dtype(device)) * (math.pi / (4 * frequencies))
    return (torch.cat([angles.cos(), angles.sin()], 1) / math.sqrt(frequencies)).to(dtype)


_SIGNED_PARTS = (("even", "even"), ("odd", "even"), ("even", "odd"), ("odd", "odd"))


def _fold(table: Tensor, parts: tuple[str, str]) -> Tensor:
    """Sums (even) or differences (odd) of a signed table's opposite displacements along both axes: (..., h, w)."""
    for dim, part in zip((-2, -1), parts):
        reach = (table.shape[dim] + 1) // 2
        ahead, behind = table.narrow(dim, reach - 1, reach), table.narrow(dim, 0, reach).flip(dim)
        # The transforms weight every displacement but zero twice.
        table = (ahead + behind) / 2 if part == "even" else (ahead - behind) / 2
    return table


def _unfold(table: Tensor, parts: tuple[str, str]) -> Tensor:
    """The adjoint of `_fold`."""
    for dim, part in zip((-2, -1), parts):
        zero, ahead = table.narrow(dim, 0, 1), table.narrow(dim, 1, table.shape[dim] - 1) / 2
        behind = ahead.flip(dim)
        if part == "odd":
            zero, behind = torch.zeros_like(zero), -behind
        table = torch.cat([behind, zero, ahead], dim)
    return table


def spectrum_from_table(table: Tensor, frequencies: Size, form: str, dtype: torch.dtype) -> Tensor:
    """Spectrum of an even (..., h, w) or a signed (..., 2h-1, 2w-1) table; linear, summed in float64.

    Returns (..., Fh, Fw) for the even form and (4, ..., Fh, Fw) for the signed one, in ``dtype``.
    """
    wide = table.to(wide_dtype(table.device))

    def transform(x: Tensor, parts: tuple[str, str]) -> Tensor:
        return odd_frequencies(odd_frequencies(x, frequencies[1], parts[1], -1), frequencies[0], parts[0], -2)

    if form == "even":
        return plane_by_plane(lambda x: transform(x, ("even", "even")).to(dtype), wide)
    return torch.stack([transform(_fold(wide, parts), parts) for parts in _SIGNED_PARTS]).to(dtype)


def table_from_cross_spectrum(cross_spectrum: Tensor, shape: Size, form: str) -> Tensor:
    """Adjoint of `spectrum_from_table`: sums over the pixel pairs at each displacement, in float64.

    With the cross spectrum of a and b and a table of ``shape``, entry ``[c, c', d]`` is the sum over samples and
    ordered pixel pairs (i, j) at displacement d of ``a[c, i] b[c', j]``.
    """
    wide = cross_spectrum.to(wide_dtype(cross_spectrum.device))
    reach = shape if form == "even" else ((shape[0] + 1) // 2, (shape[1] + 1) // 2)

    def transform(y: Tensor, parts: tuple[str, str]) -> Tensor:
        return odd_displacements(odd_displacements(y, reach[1], parts[1], -1), reach[0], parts[0], -2)

    if form == "even":
        return plane_by_plane(lambda y: transform(y, ("even", "even")), wide)
    return torch.stack([_unfold(transform(part, p), p) for part, p in zip(wide, _SIGNED_PARTS)]).sum(0)


def transpose(spectrum: Tensor) -> Tensor:
    """Spectrum of the transposed matrix: channels change places, and displacements their sign."""
    if spectrum.dim() == 4:
        return spectrum.transpose(0, 1)
    swapped = spectrum.transpose(1, 2)
    return torch.stack([swapped[0], -swapped[1], -swapped[2], swapped[3]])


def symmetric_part(spectrum: Tensor) -> Tensor:
    """Spectrum of ``(Sigma + Sigma^T) / 2``, all that a quadratic form sees."""
    return (spectrum + transpose(spectrum)) / 2
