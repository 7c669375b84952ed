"""BatchNorm by its own batch, with a second derivative in a dozen passes over the activations.

PyTorch composes that derivative of some thirty elementwise operations. With ``r = 1 / sqrt(var + eps)``,
``h = r (x - mean)`` and ``P(v) = v - mean(v) - h mean(v h)``, all per channel over n values, the first derivative is

    gx = weight r P(g),    gw = sum g h,    gb = sum g,

and of ``u . gx + s . gw + t . gb``, with A = weight (sum u g - n mean(u) mean(g) - n mean(u h) mean(g h)),

    in g: weight r P(u) + s h + t,    in weight: r A / weight,
    in x: r P(w) - A r^2 h / n,       w = (s - weight r mean(u h)) g - weight r mean(g h) u.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running: tuple[Tensor | None, Tensor | None],
        momentum: float,
        eps: float,
    ) -> Tensor:
        result, mean, rstd = torch.native_batch_norm(x, weight, bias, *running, True, momentum, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.eps = eps
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        return *_Backward.apply(gradient, x, weight, mean, rstd, ctx.eps), None, None, None


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, eps: float) -> Any:
        ctx.save_for_backward(gradient, x, weight, mean, rstd)
        ctx.eps = eps
        return torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, None, None, mean, rstd, True, eps, [True, True, True]
        )

    @staticmethod
    def backward(ctx: Any, u: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor | None, ...]:
        g, x, weight, mean, rstd = ctx.saved_tensors
        over = (0, *range(2, x.dim()))
        if torch.is_grad_enabled():  # a third derivative goes through the statistics, too
            mean = x.mean(over)
            rstd = ((x - _of_channels(mean, x)).square().mean(over) + ctx.eps).rsqrt()
        count = x.numel() // x.shape[1]
        h = (x - _of_channels(mean, x)) * _of_channels(rstd, x)
        mean_u, mean_g, uh, gh = u.mean(over), g.mean(over), (u * h).mean(over), (g * h).mean(over)
        common = count * ((u * g).mean(over) - mean_u * mean_g - uh * gh)
        scale = weight * rstd
        by_g = _combined(x, t - scale * mean_u, (u, scale), (h, s - scale * uh))
        of_g, of_u = s - scale * uh, -scale * gh
        constant = -rstd * (of_g * mean_g + of_u * mean_u)
        of_h = -rstd * (of_g * gh + of_u * uh) - weight * common * rstd.square() / count
        by_x = _combined(x, constant, (g, rstd * of_g), (u, rstd * of_u), (h, of_h))
        return by_g, by_x, rstd * common, None, None, None


def _of_channels(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *(1,) * (like.dim() - 2))


def _combined(like: Tensor, constant: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """``constant + sum of tensor * factor``, factors per channel."""
    total = _of_channels(constant, like)
    for tensor, factor in terms:
        total = torch.addcmul(total, tensor, _of_channels(factor, like))
    return total


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm`, as above in training mode on CPUs; elsewhere it has not been measured."""
    tensors = [t for t in (input, weight, bias, running_mean, running_var) if t is not None]
    ordinary = training and weight is not None and bias is not None and input.device.type == "cpu"
    if (
        not ordinary
        or any(t.dtype != input.dtype for t in tensors)
        or input.dtype not in (torch.float32, torch.float64)
        or torch._C._are_functorch_transforms_active()
    ):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    F._verify_batch_size(input.size())  # type: ignore[attr-defined]
    return _BatchNorm.apply(input, weight, bias, (running_mean, running_var), momentum, eps)
