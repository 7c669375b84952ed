"""Preconditioned conjugate gradients for a batch of systems with one positive definite operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Solution:
    """What was found for each system of a batch.

    Attributes:
        y: (B, ...), like the right sides.
        residual: ``|x - A y| / |x|``, (B,), as the recurrence has it; NaN for right sides that are not finite.
        iterations: (B,), int64.
        indefinite: Whether some direction p had ``p^T A p <= 0``.
    """

    y: Tensor
    residual: Tensor
    iterations: Tensor
    indefinite: bool


def solve(product: Operator, precondition: Operator, x: Tensor, tolerance: float | Tensor, limit: int) -> Solution:
    """Solve ``A y = x``; each system stops when its own residual is small, and costs nothing from then on.

    Args:
        product: ``p -> A p`` for any number of p, each on its own; A symmetric.
        precondition: ``r -> M^-1 r``, likewise, M symmetric and positive definite; it need not be exact.
        x: (B, ...), right sides, in the precision to compute in.
        tolerance: Relative residual to reach; of each system, (B,), or of all.
        limit: Iterations after which to give up.
    """
    size = _norm(x)
    wanted = torch.as_tensor(tolerance, dtype=size.dtype, device=x.device).expand(len(x))
    residual = torch.where(size.isfinite(), (size > 0).to(size.dtype), torch.nan)
    iterations = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    result = torch.where(_column(residual.isnan(), x), torch.nan, torch.zeros_like(x))
    # What is left to do is kept together: systems leave as they end.
    index = (residual > wanted).nonzero().squeeze(1)
    r = (x / _column(size, x))[index]  # whatever the scale of x, its squares can be summed
    y = torch.zeros_like(r)
    z = precondition(r)
    p, rz = z.clone(), _inner(r, z)
    for step in range(1, limit + 1):
        if len(index) == 0:
            break
        q = product(p)
        curvature = _inner(p, q)
        if bool((curvature <= 0).any()):
            return Solution(result, residual, iterations, True)
        alpha = _column(rz / curvature, p)
        y.addcmul_(alpha, p)
        r.addcmul_(alpha, q, value=-1)
        now = _norm(r)
        residual[index], iterations[index] = now, step
        going = ~(now <= wanted[index])
        if not bool(going.all()):
            ended = index[~going]
            result[ended] = y[~going] * _column(size[ended], y)
            index, y, r, p, rz = (t[going] for t in (index, y, r, p, rz))
        z = precondition(r)
        before, rz = rz, _inner(r, z)
        p.mul_(_column(rz / before, p)).add_(z)
    return Solution(result, residual, iterations, False)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1))


def _norm(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a.flatten(1), dim=1)


def _column(factor: Tensor, like: Tensor) -> Tensor:
    return factor.view(-1, *[1] * (like.dim() - 1))
