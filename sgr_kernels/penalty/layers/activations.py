"""SiLU with a second derivative in a few passes; PyTorch's is of some twenty, of its first one written out.

With ``s = sigmoid(x)``: the second derivative of ``x s`` is ``s (1 - s) (2 + x (1 - 2 s))``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten


class _SiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _aten.silu(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _Backward.apply(gradient, x)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(gradient, x)
        return _aten.silu_backward(gradient, x)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        gradient, x = ctx.saved_tensors
        by_gradient = _Backward.apply(u, x) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return by_gradient, None
        s = x.sigmoid()
        return by_gradient, _aten.sigmoid_backward(u * gradient, s) * torch.addcmul(x + 2, x, s, value=-2)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.silu`, as above for ordinary tensors of single or double precision."""
    ordinary = type(input) is Tensor and input.dtype in (torch.float32, torch.float64)
    if not ordinary or torch._C._are_functorch_transforms_active():
        return F.silu(input, inplace)
    return _SiLU.apply(input)
