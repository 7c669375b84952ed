"""The smallest eigenvalue of a symmetric operator that is known by its products alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def smallest_eigenvalue(
    product: Callable[[Tensor], Tensor], dimension: int, device: torch.device, tolerance: float = 1e-8
) -> float:
    """Lanczos iteration with full reorthogonalization, in float64.

    Args:
        product: Maps a vector (dimension,) to its product with the operator.
        dimension: Order of the operator.
        device: Where the vectors live.
        tolerance: Stops when the residual of the wanted pair is below this fraction of the operator's norm.
    """
    generator = torch.Generator(device).manual_seed(0)
    v = torch.randn(dimension, dtype=torch.float64, device=device, generator=generator)
    v /= v.norm()
    vectors = [v]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        w = product(vectors[-1])
        diagonal.append(float(w @ vectors[-1]))
        basis = torch.stack(vectors)
        for _ in range(2):  # once is not enough in floating point
            w = w - basis.mT @ (basis @ w)
        step = len(diagonal)
        norm = float(w.norm())
        scale = max(map(abs, diagonal + beside))
        exhausted = step == dimension or norm <= 1e-14 * scale
        if exhausted or step % 8 == 0:
            off = torch.tensor(beside, dtype=torch.float64)
            small = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
            small = small + torch.diag(off, 1) + torch.diag(off, -1)
            values, coefficients = torch.linalg.eigh(small)
            residual = norm * abs(float(coefficients[-1, 0]))
            if exhausted or residual <= tolerance * float(values.abs().max()):
                return float(values[0])
        beside.append(norm)
        vectors.append(w / norm)
