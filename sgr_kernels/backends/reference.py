"""The operators as one would write them down: the dense matrix, formed. Slow, readable, differentiable by itself.

``oracle`` holds the same in NumPy with explicit loops; the two share no code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sgr_kernels.backends.registry import Backend, Request
from sgr_kernels.toeplitz.constants import wide_dtype
from sgr_kernels.toeplitz.geometry import Size, dense_matrix, displacement_index, signed_from_table

MAX_DIMENSION = 8192


def _can_run(request: Request) -> str | None:
    dimension = request.channels * request.size[0] * request.size[1]
    if dimension > MAX_DIMENSION:
        gib = dimension**2 * 8 / 2**30
        return f"the dense matrix of dimension {dimension} would need {gib:.1f} GiB; the limit is {MAX_DIMENSION}"
    return None


BACKEND = Backend("reference", _can_run)


def product(gradient: Tensor, table: Tensor, form: str) -> Tensor:
    """``v = Sigma g`` for a gradient (B, C, H, W) and an even or signed table."""
    wide = wide_dtype(gradient.device)
    with torch.autocast(gradient.device.type, enabled=False):
        sigma = dense_matrix(table.to(wide), (gradient.shape[2], gradient.shape[3]), form)
        return (gradient.flatten(1).to(wide) @ sigma.mT).view(gradient.shape).to(gradient.dtype)


def quadratic_form(gradient: Tensor, table: Tensor, form: str) -> Tensor:
    """``q_b = g_b^T Sigma g_b``, (B,) in float64."""
    wide = wide_dtype(gradient.device)
    with torch.autocast(gradient.device.type, enabled=False):
        sigma = dense_matrix(table.to(wide), (gradient.shape[2], gradient.shape[3]), form)
        flat = gradient.flatten(1).to(wide)
        return ((flat @ sigma.mT) * flat).sum(1)


def correlate(a: Tensor, b: Tensor, shape: Size, form: str) -> Tensor:
    """Sums over samples and pixel pairs of ``a[c, i] b[c', j]`` at each displacement ``j - i``; float64.

    Returns a table of ``shape``: (C, C, h, w) or, signed, (C, C, 2h-1, 2w-1).
    """
    _, channels, height, width = a.shape
    wide = wide_dtype(a.device)
    with torch.autocast(a.device.type, enabled=False):
        gram = torch.einsum("ncyx,ndvu->cdyvxu", a.to(wide), b.to(wide))  # (C, C', H, H', W, W')
    dy = (displacement_index(height, a.device) + height - 1)[:, :, None, None]
    dx = (displacement_index(width, a.device) + width - 1)[None, None]
    index = (dy * (2 * width - 1) + dx).flatten()
    cells = gram.new_zeros(channels, channels, (2 * height - 1) * (2 * width - 1))
    signed = cells.index_add(2, index, gram.flatten(2)).view(channels, channels, 2 * height - 1, 2 * width - 1)
    if form == "signed":
        up, left = height - (shape[0] + 1) // 2, width - (shape[1] + 1) // 2
        return signed[:, :, up : up + shape[0], left : left + shape[1]]
    # Folding opposite displacements together is the adjoint of unfolding an even table.
    unfold = torch.arange(height * width, device=a.device, dtype=wide).view(1, 1, height, width)
    cell = signed_from_table(unfold, (height, width), "even").long().flatten()
    folded = gram.new_zeros(channels, channels, height * width).index_add(2, cell, signed.flatten(2))
    return folded.view(channels, channels, height, width)[:, :, : shape[0], : shape[1]]
