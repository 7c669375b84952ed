"""Many small Hermitian matrices without a word to the host: eigenvalues, and projection onto the semidefinite cone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sgr_kernels.toeplitz.constants import constant

SWEEPS = 8
"""Convergence is quadratic: of float64, 5 sweeps suffice for 2 x 2 to 4 x 4, 7 for 16 x 16."""
_CHUNK = 1 << 13
"""Matrices treated at a time on a CPU, so that what a formula makes on its way stays in cache."""


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n, C), in no order, and vectors (n, C, C) in columns, by cyclic Jacobi rotations.

    ``torch.linalg.eigh`` is faster for large matrices, but asks the device whether it converged.

    Args:
        matrices: (n, C, C), real symmetric or complex Hermitian. A matrix with NaN gives NaN.
    """
    count = matrices.shape[-1]
    # Rows of the matrix, and below them of the vectors; the batch last, so that every operation runs along it.
    a = matrices.permute(1, 2, 0).clone()
    v = torch.eye(count, dtype=a.dtype, device=a.device)[..., None].expand_as(a).clone()
    for _ in range(SWEEPS):
        for p in range(count):
            for q in range(p + 1, count):
                c, s, phase = _rotation(a[p, p].real, a[q, q].real, a[p, q])
                for m in (a, v):
                    last = phase.conj() * m[:, q]
                    m[:, p], m[:, q] = c * m[:, p] - s * last, s * m[:, p] + c * last
                last = phase * a[q]
                a[p], a[q] = c * a[p] - s * last, s * a[p] + c * last
    return a.diagonal().real, v.permute(2, 0, 1)


def _rotation(first: Tensor, last: Tensor, between: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine, sine and phase of the rotation that makes ``[[first, between], [between*, last]]`` diagonal."""
    size = between.abs()
    present = size > torch.finfo(size.dtype).tiny  # what is smaller has no direction to speak of
    size, phase = torch.where(present, size, 0), torch.where(present, between.sgn(), 1)
    gap = last - first
    # tan = sign(gap) |between| 2 / (|gap| + hypot(gap, 2 |between|)), the smaller of the two
    denominator = gap.abs() + torch.hypot(gap, 2 * size)
    tangent = torch.where(gap < 0, -2.0, 2.0) * torch.where(denominator > 0, size / denominator, 0)
    c = torch.rsqrt(tangent * tangent + 1)
    return c, c * tangent, phase


def pack(matrices: Tensor) -> Tensor:
    """The distinct entries of symmetric matrices (C, C, ...): the diagonals, then what is above them, backwards.

    So, in three dimensions: xx, yy, zz, yz, xz, xy.
    """
    rows, columns = _distinct(matrices.shape[0], matrices.device)
    return matrices[rows, columns]


def unpack(entries: Tensor) -> Tensor:
    """Symmetric matrices (C, C, ...) from their distinct entries."""
    return entries[_place(math.isqrt(2 * entries.shape[0]), entries.device)]


@constant
def _distinct(count: int, device: torch.device) -> Tensor:
    """Rows and columns of the distinct entries, (2, n)."""
    diagonal = torch.arange(count, device=device).expand(2, -1)
    return torch.cat([diagonal, torch.triu_indices(count, count, 1, device=device).flip(1)], 1)


@constant
def _place(count: int, device: torch.device) -> Tensor:
    """Where each entry of a matrix is among the distinct ones, (C, C)."""
    rows, columns = _distinct(count, device)
    place = torch.empty(count, count, dtype=torch.long, device=device)
    place[rows, columns] = place[columns, rows] = torch.arange(len(rows), device=device)
    return place


def positive_part(entries: Tensor) -> Tensor | None:
    """The nearest positive semidefinite matrices of symmetric ones; None where there is no formula: from order 4 on.

    Args:
        entries: (C (C + 1) / 2, ...), as `pack` lays them out; float64.
    """
    formula = {1: _of_numbers, 3: _of_pairs, 6: _of_triples}.get(entries.shape[0])
    if formula is None:
        return None
    flat = entries.flatten(1)
    chunk = _CHUNK if flat.is_cpu else max(1, flat.shape[1])
    return torch.cat([formula(part) for part in flat.split(chunk, 1)], 1).view_as(entries)


def _of_numbers(entries: Tensor) -> Tensor:
    return entries.clamp(min=0)


def _scaled(formula: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Apply a formula to entries of size one: their cubes then neither overflow nor vanish."""

    def apply(entries: Tensor) -> Tensor:
        scale = entries.abs().amax(0)
        return formula(entries / torch.where(scale > 0, scale, 1.0)) * scale

    return apply


@_scaled
def _of_pairs(a: Tensor) -> Tensor:
    return _positive_part_in_plane(a, _identity(a), a[:2].mean(0))


@_scaled
def _of_triples(a: Tensor) -> Tensor:
    """The eigenvalue farther from the other two is found by Viete's formula and split off: what remains is of rank two.

    Both steps lose no accuracy where eigenvalues meet.
    """
    middle, identity = a[:3].mean(0), _identity(a)
    shifted = a - middle * identity
    cofactors = _cofactors(shifted)
    spread = (_inner(shifted, shifted) / 6).sqrt()
    determinant = _inner(shifted, cofactors) / 3
    cosine = determinant / torch.where(spread > 0, 2 * spread**3, 1.0)
    angle = cosine.abs().clamp_(max=1).acos_() / 3
    extreme = 2 * spread * angle.cos_().copysign_(cosine)
    # The cofactors of (shifted - extreme): a multiple of the projector onto its eigenvector.
    projector = cofactors + extreme * shifted + extreme * extreme * identity
    trace = projector[:3].sum(0)
    projector = projector / torch.where(trace > 0, trace, 1.0)
    projector[0] += trace <= 0  # of a multiple of the identity any direction will do
    extreme = middle + extreme
    rest = _positive_part_in_plane(a - extreme * projector, identity - projector, (3 * middle - extreme) / 2)
    return rest + extreme.clamp(min=0) * projector


def _positive_part_in_plane(a: Tensor, plane: Tensor, middle: Tensor) -> Tensor:
    """Of matrices that vanish outside a plane (its projector), from the mean of their two eigenvalues in it."""
    deviation = a - middle * plane
    reach = (_inner(deviation, deviation) / 2).sqrt()
    low, high = middle - reach, middle + reach
    share = torch.where(low < 0, high.clamp(min=0) / torch.where(reach > 0, 2 * reach, 1.0), 1.0)
    return share * (a - low.clamp(max=0) * plane)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Of symmetric matrices of order 2 or 3: the trace of their product."""
    return (a * b * (2 - _identity(a))).sum(0)


def _cofactors(a: Tensor) -> Tensor:
    """Of symmetric matrices of order 3."""
    diagonal, off = a[:3], a[3:]
    turned, twice = a.view(2, 3, -1).roll(-1, 1), a.view(2, 3, -1).roll(-2, 1)
    product = turned * twice
    return torch.cat([product[0] - off * off, product[1] - off * diagonal])


def _identity(a: Tensor) -> Tensor:
    """Entries of the identity of order 2 or 3, (n, 1)."""
    return _diagonal(a.shape[0], a.dtype, a.device)


@constant
def _diagonal(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return (torch.arange(count, device=device) < (2 if count == 3 else 3)).to(dtype)[:, None]
