"""What is found of a symmetric operator that is known by its products alone: smallest eigenvalue, logarithms."""

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


def log_quadrature(
    product: Callable[[Tensor], Tensor], probes: Tensor, share: float = 0.05, limit: int = 512
) -> Tensor:
    """``z^T log(A) z`` for each probe z, (n,), by Gauss quadrature on Lanczos' tridiagonal matrices.

    Their mean estimates ``tr log A = log det A`` where probes have independent entries of unit variance. The vectors
    are not orthogonalized anew: what is lost of it repeats eigenvalues and splits their weights, and leaves the sums.

    Args:
        product: Maps probes (n, ...) to their products with a positive definite A, each on its own.
        probes: (n, ...), float64.
        share: Stops once the mean changes by less than this share of its standard error (in eight steps).
        limit: Steps at the most.

    Raises:
        ValueError: If A is not positive definite.
    """
    size = torch.linalg.vector_norm(probes.flatten(1), dim=1)
    v, before, beta = probes / _column(size, probes), torch.zeros_like(probes), torch.zeros_like(size)
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    found = torch.full_like(size, torch.nan)
    while True:
        w = product(v) - _column(beta, v) * before
        diagonal.append(torch.linalg.vecdot(w.flatten(1), v.flatten(1)))
        w -= _column(diagonal[-1], v) * v
        beta = torch.linalg.vector_norm(w.flatten(1), dim=1)
        steps = len(diagonal)
        ended = steps >= min(limit, probes[0].numel()) or bool((beta <= 1e-12 * diagonal[0].abs()).any())
        if ended or steps % 8 == 0:
            previous, found = found, _quadrature(diagonal, beside) * size.square()
            error = found.std() / len(found) ** 0.5
            if ended or bool((found - previous).mean().abs() <= share * error + 1e-10 * probes[0].numel()):
                return found
        beside.append(beta)
        v, before = w / _column(beta, w), v


def _quadrature(diagonal: list[Tensor], beside: list[Tensor]) -> Tensor:
    """``e_1^T log(T) e_1`` of tridiagonal matrices T, (n,)."""
    small = torch.diag_embed(torch.stack(diagonal, 1))
    if beside:
        off = torch.stack(beside, 1)
        small = small + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    nodes, vectors = torch.linalg.eigh(small)
    if bool((nodes <= 0).any()):
        raise ValueError(f"expected a positive definite operator, got a Ritz value of {float(nodes.min()):.3g}")
    return (nodes.log() * vectors[:, 0].square()).sum(1)


def _column(factor: Tensor, like: Tensor) -> Tensor:
    return factor.view(-1, *[1] * (like.dim() - 1))
