"""Functions without a second derivative in PyTorch, or with NaN for one at zero, in terms of others.

What they return is the same, and so is their first derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    return (input / 6 + 0.5).clamp(0, 1)


def _hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    return input * _hardsigmoid(input)


def _size(x: Tensor, dim: Any, keepdim: bool, least: float = 0.0) -> Tensor:
    """Euclidean norm, or ``least`` if that is more; constant where it is no more than that. Of 16 bits in 32."""
    if x.dtype.itemsize < 4:
        return (
            _size(x.float(), dim, keepdim, least).to(x.dtype) if least == 0 else _size(x.float(), dim, keepdim, least)
        )
    squares = x.square().sum(dim, keepdim=keepdim) if dim is not None else x.square().sum()
    if dim is None and keepdim:
        squares = squares.view((1,) * x.dim())
    more = squares > least**2
    return torch.where(more, torch.where(more, squares, 1).sqrt(), least)


def _normalize(input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Tensor | None = None) -> Tensor:
    if p != 2 or out is not None or input.is_complex():
        return F.normalize(input, p, dim, eps, out)
    return (input / _size(input, dim, True, eps)).to(input.dtype)


def _vector_norm(x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, **options: Any) -> Tensor:
    if ord != 2 or x.is_complex() or options.get("out") is not None:
        return torch.linalg.vector_norm(x, ord, dim, keepdim, **options)
    dtype = options.get("dtype")
    return _size(x if dtype is None else x.to(dtype), dim, keepdim)


def _norm(input: Tensor, p: Any = "fro", dim: Any = None, keepdim: bool = False, *rest: Any, **options: Any) -> Tensor:
    if p not in ("fro", 2, None) or rest or any(value is not None for value in options.values()) or input.is_complex():
        return torch.norm(input, p, dim, keepdim, *rest, **options)
    return _size(input, dim, keepdim)


def _cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    cosines = (x1 / _size(x1, dim, True, eps) * (x2 / _size(x2, dim, True, eps))).sum(dim)
    return cosines.to(torch.promote_types(x1.dtype, x2.dtype))


RULES: dict[Any, Callable[..., Any]] = {
    F.hardsigmoid: _hardsigmoid,
    F.hardswish: _hardswish,
    torch.ops.aten.hardsigmoid.default: _hardsigmoid,
    torch.ops.aten.hardsigmoid_.default: _hardsigmoid,
    torch.ops.aten.hardswish.default: _hardswish,
    torch.ops.aten.hardswish_.default: _hardswish,
    F.normalize: _normalize,
    torch.linalg.vector_norm: _vector_norm,
    torch.norm: _norm,
    Tensor.norm: _norm,
    F.cosine_similarity: _cosine_similarity,
}
