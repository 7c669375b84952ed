"""Eigenvalues of many small Hermitian matrices without a word to the host, so that a CUDA graph can record them."""

from __future__ import annotations

import torch
from torch import Tensor

SWEEPS = 8
"""Convergence is quadratic: of float64, 5 sweeps suffice for 2 x 2 to 4 x 4, 7 for 16 x 16."""


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
