"""Displacements between pixels: bins, pair counts, and the forms of a covariance argument.

The *even table* is the native form: ``table[c, c', |dy|, |dx|]`` is the covariance of channel ``c`` at a pixel i and
channel ``c'`` at the pixel ``j = i + (dy, dx)``. It may be shorter than the image along either axis; it then means
zero beyond. A *radial* function ``f[c, c', k]`` (paper, Eq. 16) expands to it by a gather, whose adjoint is a sum over
bins. A *signed* table ``t[c, c', h-1+dy, w-1+dx]`` tells opposite displacements apart.

A signal of length L is an image of size ``(1, L)``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sgr_kernels.toeplitz.constants import constant, tracing, wide_dtype

Size = tuple[int, int]

FORMS = ("radial", "even", "signed")
BINNINGS = ("rounded", "linear")


def bin_count(size: Size, binning: str = "rounded") -> int:
    """Number of radial bins that reach across an image of ``size`` (H, W)."""
    longest_squared = (size[0] - 1) ** 2 + (size[1] - 1) ** 2
    if binning == "linear":
        return math.ceil(math.sqrt(longest_squared)) + 1
    return int(math.sqrt(longest_squared) + 0.5) + 1  # roots of integers never tie; exact far beyond any image


def reach_of_bins(bins: int, size: Size) -> Size:
    """Shape (h, w) of the smallest even table that holds ``bins`` radial bins within an image of ``size``."""
    return min(size[0], bins), min(size[1], bins)


def _distances(shape: Size, device: torch.device) -> Tensor:
    y = torch.arange(shape[0], device=device, dtype=wide_dtype(device))
    x = torch.arange(shape[1], device=device, dtype=wide_dtype(device))
    return (y[:, None] ** 2 + x[None, :] ** 2).sqrt()


@constant
def nearest_bin(shape: Size, device: torch.device) -> Tensor:
    """Displacement rounded to the nearest integer, int64 of ``shape``. Square roots of integers never tie."""
    return (_distances(shape, device) + 0.5).floor().long()


@constant
def lower_bin(shape: Size, device: torch.device) -> Tensor:
    """Displacement rounded down, int64 of ``shape``; with `upper_weight` the linear interpolation between bins."""
    return _distances(shape, device).floor().long()


@constant
def upper_weight(shape: Size, device: torch.device) -> Tensor:
    """Share of the next bin in the linear interpolation, float64 of ``shape``; the lower bin has the rest."""
    distances = _distances(shape, device)
    return distances - distances.floor()


@constant
def pair_counts(size: Size, shape: Size, device: torch.device) -> Tensor:
    """Number of ordered pixel pairs of an image of ``size`` at each ``(|dy|, |dx|)``, int64 of ``shape``."""
    counts = []
    for extent, reach in zip(size, shape):
        d = torch.arange(reach, device=device)
        counts.append((extent - d) * torch.where(d > 0, 2, 1))
    return counts[0][:, None] * counts[1][None, :]


@constant
def _members(shape: Size, count: int, device: torch.device, lower: bool) -> Tensor:
    """Table positions of each bin, (count, longest bin), padded with the position one past the table's end."""
    index = (lower_bin if lower else nearest_bin)(shape, torch.device("cpu")).flatten()
    order = torch.argsort(index, stable=True)
    lengths = torch.bincount(index, minlength=count)[:count]
    starts = torch.cumsum(lengths, 0) - lengths
    slot = torch.arange(int(lengths.max()), device=index.device)
    position = (starts[:, None] + slot).clamp(max=index.numel() - 1)
    members = torch.where(slot < lengths[:, None], order[position], index.numel())
    return members.to(device)


def _sum_into_bins(table: Tensor, count: int, lower: bool) -> Tensor:
    """Sum ``table`` (..., h, w) over the cells of each bin, in a fixed order: (..., count)."""
    shape = (table.shape[-2], table.shape[-1])
    flat = table.flatten(-2)
    if tracing() or table.is_cpu:  # where index_add adds in a fixed order
        index = (lower_bin if lower else nearest_bin)(shape, table.device).flatten()
        longer = flat.new_zeros(*flat.shape[:-1], max(count, bin_count(shape, "linear") + 1))
        return longer.index_add(-1, index, flat)[..., :count]
    members = _members(shape, count, table.device, lower)
    padded = torch.nn.functional.pad(flat, (0, 1))
    return padded[..., members].sum(-1)


def _gather_bins(values: Tensor, index: Tensor) -> Tensor:
    """``values[..., index]``, zero where ``index`` lies beyond the last bin."""
    padded = torch.nn.functional.pad(values, (0, 1))
    return padded[..., index.clamp(max=values.shape[-1])]


def even_from_radial(values: Tensor, size: Size, binning: str = "rounded") -> Tensor:
    """Expand radial bins (C, C, K) to an even table (C, C, h, w) for images of ``size``; differentiable.

    ``"rounded"`` reads the nearest bin (paper, section 3.3), ``"linear"`` interpolates between the two neighbours.
    """
    shape = reach_of_bins(values.shape[-1], size)
    if binning == "rounded":
        return _gather_bins(values, nearest_bin(shape, values.device))
    lower, weight = lower_bin(shape, values.device), upper_weight(shape, values.device).to(values.dtype)
    return _gather_bins(values, lower) * (1 - weight) + _gather_bins(values, lower + 1) * weight


def radial_from_even(table_sums: Tensor, size: Size, bins: int, binning: str = "rounded") -> Tensor:
    """Mean over all ordered pixel pairs of each bin (Eq. 16), from their sums (C, C, h, w): (C, C, bins).

    ``table_sums[c, c', |dy|, |dx|]`` is the sum over the ordered pairs at that displacement. Linear binning spreads
    each pair over its two bins.
    """
    return _into_bins(table_sums, bins, binning) / bin_pair_counts(
        size, (table_sums.shape[-2], table_sums.shape[-1]), bins, binning, table_sums.device
    ).to(table_sums.dtype)


@constant
def bin_pair_counts(size: Size, shape: Size, bins: int, binning: str, device: torch.device) -> Tensor:
    """Ordered pixel pairs of each bin, within displacements of ``shape``, (bins,), in the widest type."""
    return _into_bins(pair_counts(size, shape, device).to(wide_dtype(device)), bins, binning)


def _into_bins(sums: Tensor, bins: int, binning: str) -> Tensor:
    """Sums over the bins of sums at each displacement; linear binning spreads them over two bins each."""
    if binning == "rounded":
        return _sum_into_bins(sums, bins, False)
    weight = upper_weight((sums.shape[-2], sums.shape[-1]), sums.device).to(sums.dtype)
    upper = torch.nn.functional.pad(_sum_into_bins(sums * weight, bins, True), (1, 0))[..., :bins]
    return _sum_into_bins(sums * (1 - weight), bins, True) + upper


def displacement_index(extent: int, device: torch.device) -> Tensor:
    """Displacement from position i to position j of an axis, ``j - i`` in row i and column j, int64."""
    position = torch.arange(extent, device=device)
    return position[None, :] - position[:, None]


def signed_from_table(table: Tensor, size: Size, form: str) -> Tensor:
    """Unfold an even or a shorter signed table to a signed one of full range, (C, C, 2H-1, 2W-1)."""
    height, width = size
    if form == "signed":
        pad_y, pad_x = height - (table.shape[-2] + 1) // 2, width - (table.shape[-1] + 1) // 2
        return torch.nn.functional.pad(table, (pad_x, pad_x, pad_y, pad_y))
    padded = torch.nn.functional.pad(table, (0, width - table.shape[-1], 0, height - table.shape[-2]))
    dy = torch.arange(1 - height, height, device=table.device).abs()
    dx = torch.arange(1 - width, width, device=table.device).abs()
    return padded[..., dy[:, None], dx[None, :]]


def dense_matrix(table: Tensor, size: Size, form: str = "even") -> Tensor:
    """The covariance matrix (C*H*W, C*H*W) that a table stands for; row-major pixels within each channel."""
    height, width = size
    signed = signed_from_table(table, size, form)
    dy = displacement_index(height, table.device) + height - 1
    dx = displacement_index(width, table.device) + width - 1
    blocks = signed[:, :, dy[:, None, :, None], dx[None, :, None, :]]  # (C, C', H, W, H', W')
    dimension = table.shape[0] * height * width
    return blocks.permute(0, 2, 3, 1, 4, 5).reshape(dimension, dimension)
