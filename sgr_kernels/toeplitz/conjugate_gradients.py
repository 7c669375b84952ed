"""Preconditioned conjugate gradients for a batch of systems with one positive definite operator, in mixed precision.

The recurrences run in single precision, where products are fast. Each time a system's residual has fallen far enough
for rounding to matter, its solution so far and its residual are renewed in the right side's own precision, and the
recurrences go on from there, with the direction they have. Systems too ill-conditioned for that end in full precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]

_RENEW = 1e-3
"""Fall of a residual after which it is renewed."""
_STALLED = 0.5
"""A renewed residual that is not below this share of the last one has met its precision's end."""


@dataclass
class Solution:
    """What was found for each system of a batch.

    Attributes:
        y: (B, ...), like the right sides.
        residual: ``|x - A y| / |x|``, (B,); NaN for right sides that are not finite.
        iterations: (B,), int64.
        indefinite: Whether some direction p had ``p^T A p <= 0``.
    """

    y: Tensor
    residual: Tensor
    iterations: Tensor
    indefinite: bool = False


def solve(
    product: Operator,
    precondition: Operator,
    x: Tensor,
    tolerance: float,
    limit: int,
    working: torch.dtype = torch.float32,
) -> Solution:
    """Solve ``A y = x``; each system stops when its own residual is small, and costs nothing from then on.

    Args:
        product: ``p -> A p`` for any number of p, each on its own, in their precision; A symmetric.
        precondition: ``r -> M^-1 r``, likewise, M symmetric and positive definite.
        x: (B, ...), right sides.
        tolerance: Relative residual to reach.
        limit: Iterations of a system after which to give up.
        working: Precision to begin in.
    """
    size = _norm(x)
    residual = torch.where(size.isfinite(), (size > 0).to(size.dtype), torch.nan)
    unit = x / _column(torch.where(size > 0, size, 1), x)  # single precision can then hold it
    found = Solution(torch.zeros_like(x), residual, torch.zeros(len(x), dtype=torch.int64, device=x.device))
    for dtype in dict.fromkeys((working, x.dtype)):
        left = ((found.residual > tolerance) & (found.iterations < limit)).nonzero().squeeze(1)
        if len(left) and not found.indefinite:
            _Stage(product, precondition, unit, found, left, tolerance, dtype).run(limit)
    found.y *= _column(size, x)
    return found


class _Stage:
    """Systems that are iterated in one precision, kept together; they leave as they end."""

    def __init__(
        self,
        product: Operator,
        precondition: Operator,
        x: Tensor,
        found: Solution,
        index: Tensor,
        tolerance: float,
        dtype: torch.dtype,
    ) -> None:
        self.product, self.precondition, self.found = product, precondition, found
        self.tolerance, self.final, self.index = tolerance, dtype == x.dtype, index
        self.x, self.base = x[index], found.residual[index]
        fresh = bool((found.iterations[index] == 0).all())
        self.r = (self.x if fresh else self.x - product(found.y[index])).to(dtype, copy=True)
        self.gained = torch.zeros_like(self.r)
        z = precondition(self.r)
        self.p, self.rz = z.clone(), _inner(self.r, z)

    def run(self, limit: int) -> None:
        """Iterate until all systems have left, or one must."""
        found = self.found
        while len(self.index):
            q = self.product(self.p)
            curvature = _inner(self.p, q)
            bad = ~(curvature > 0)
            if bool(bad.any()):
                if self.final:
                    self._write(slice(None))
                    found.indefinite = True
                    return
                self._leave(bad)  # rounding may have done it
                q, curvature = q[~bad], curvature[~bad]
                if not len(self.index):
                    return
            alpha = self.rz / curvature
            self.gained.addcmul_(_column(alpha, q), self.p)
            self.r.addcmul_(_column(-alpha, q), q)
            found.iterations[self.index] += 1
            now = _norm(self.r)
            due = now <= (_RENEW * self.base).clamp(min=self.tolerance)
            over = found.iterations[self.index] >= limit
            if bool((due | over).any()):
                self._renew(due, over)
                if not len(self.index):
                    return
            z = self.precondition(self.r)
            before, self.rz = self.rz, _inner(self.r, z)
            self.p.mul_(_column(self.rz / before, z)).add_(z)

    def _renew(self, due: Tensor, over: Tensor) -> None:
        """Take what was gained into the solution, and the residual anew from that; some systems leave."""
        some = (due | over).nonzero().squeeze(1)
        self._write(some)
        exact = self.x[some] - self.product(self.found.y[self.index[some]])
        self.gained[some], self.r[some] = 0, exact.to(self.r.dtype)
        now, last = _norm(exact), self.base[some]
        self.found.residual[self.index[some]] = self.base[some] = now
        ended = torch.zeros_like(due)
        ended[some] = (now <= self.tolerance) | ~(now <= _STALLED * last) | over[some]
        self._leave(ended)

    def _write(self, some: Tensor | slice) -> None:
        at = self.index[some]
        self.found.y[at] += self.gained[some].to(self.found.y.dtype)

    def _leave(self, gone: Tensor) -> None:
        stay = ~gone
        for name in ("index", "x", "base", "r", "gained", "p", "rz"):
            setattr(self, name, getattr(self, name)[stay])


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1))


def _norm(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a.flatten(1), dim=1).to(torch.promote_types(a.dtype, torch.float32))


def _column(factor: Tensor, like: Tensor) -> Tensor:
    return factor.view(-1, *[1] * (like.dim() - 1)).to(like.dtype)
