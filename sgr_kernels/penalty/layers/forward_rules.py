"""Layers rewritten so that their forward-mode derivative can be differentiated backwards.

PyTorch's forward-mode formulas of normalization layers take saved statistics for constants, so that a backward through
them is silently wrong; those of softmax fail in the backward, and fused attention has none. Written out in elementary
functions all of them are right. Convolutions are right, too, but do twice the work.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sgr_kernels.penalty.layers.elementary import RULES


def _standardize(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    x = x if weight is None else x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)


def _layer_norm(
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    shape = tuple(normalized_shape)
    return _affine(_standardize(x, tuple(range(-len(shape), 0)), eps), weight, bias, shape)


def _channel_shape(x: Tensor) -> tuple[int, ...]:
    return (1, -1, *(1,) * (x.dim() - 2))


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Without an update of the running statistics: this is a pass that leaves no trace."""
    shape = _channel_shape(x)
    if training or running_mean is None or running_var is None:
        normal = _standardize(x, (0, *range(2, x.dim())), eps)
    else:
        normal = (x - running_mean.view(shape)) * (running_var.view(shape) + eps).rsqrt()
    return _affine(normal, weight, bias, shape)


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return _batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    return _affine(_standardize(x, tuple(range(2, x.dim())), eps), weight, bias, _channel_shape(x))


def _log_softmax(x: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    dim = (0 if x.dim() in (0, 1, 3) else 1) if dim is None else dim  # the default of torch.nn.functional
    x = x if dtype is None else x.to(dtype)
    shifted = x - x.detach().amax(dim, keepdim=True)
    return shifted - shifted.exp().sum(dim, keepdim=True).log()


def _softmax(x: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    dim = (0 if x.dim() in (0, 1, 3) else 1) if dim is None else dim
    x = x if dtype is None else x.to(dtype)
    maximum = x.detach().amax(dim, keepdim=True)
    # A row of -inf stays what softmax makes of it, NaN; elsewhere exp(-inf) is zero and so is its derivative.
    powers = (x - maximum).exp()
    return powers / powers.sum(dim, keepdim=True)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        scores = torch.where(attn_mask, scores, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    # A row of which everything is masked attends to nothing.
    masked = (scores.detach() == -torch.inf).all(-1, keepdim=True)
    weights = torch.where(masked, 0, _softmax(torch.where(masked, 0, scores), -1))
    return (F.dropout(weights, dropout_p) if dropout_p > 0 else weights) @ value


def _with(function: Any, **names: Any) -> Callable[..., Any]:
    """A function of ``torch.nn.functional`` with other meanings of some names in its body, which no mode sees into."""
    names["has_torch_function"] = lambda tensors: False
    copy = FunctionType(function.__code__, {**function.__globals__, **names}, None, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _builtin(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A softmax rule behind the signature ``(x, dim, dtype)`` of ``torch.softmax`` and ``Tensor.softmax``."""

    def call(input: Tensor, dim: int | None = None, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return rule(input, dim, 3, dtype)

    return call


def _convolution(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Tangents of images alone: PyTorch's rule also convolves with the weight's tangent, a tensor of zeros."""

    def call(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        primal, tangent = forward_ad.unpack_dual(input)
        if tangent is None or any(
            t is not None and forward_ad.unpack_dual(t).tangent is not None for t in (weight, bias)
        ):
            return function(input, weight, bias, *args, **kwargs)
        output = function(primal, weight, bias, *args, **kwargs)
        return forward_ad.make_dual(output, function(tangent, weight, None, *args, **kwargs))

    return call


def _builtin_norm(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The rule of batch or instance normalization behind the argument order of PyTorch's own function."""

    def call(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        own: bool,
        momentum: float,
        eps: float,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        return rule(x, mean, variance, weight, bias, own, momentum, eps)

    return call


_aten = torch.ops.aten
_RULES: dict[Any, Callable[..., Tensor]] = {
    **RULES,
    **{function: _convolution(function) for function in (F.conv1d, F.conv2d, F.conv3d)},
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.softmax: _softmax,
    F.log_softmax: _log_softmax,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _with(
        F.multi_head_attention_forward, scaled_dot_product_attention=_attention, softmax=_softmax
    ),
    torch.batch_norm: _builtin_norm(_batch_norm),
    torch.instance_norm: _builtin_norm(_instance_norm),
    # What exported models call.
    _aten.batch_norm.default: _builtin_norm(_batch_norm),
    _aten.instance_norm.default: _builtin_norm(_instance_norm),
    _aten.layer_norm.default: _layer_norm,
    _aten.softmax.int: _builtin(_softmax),
    _aten.log_softmax.int: _builtin(_log_softmax),
    _aten.scaled_dot_product_attention.default: _attention,
    torch.softmax: _builtin(_softmax),
    Tensor.softmax: _builtin(_softmax),
    torch.log_softmax: _builtin(_log_softmax),
    Tensor.log_softmax: _builtin(_log_softmax),
}


class DifferentiableForwardMode(TorchFunctionMode):
    """While active, the layers named above run as elementary functions."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Apply the rule of ``func``, or ``func`` itself."""
        return _RULES.get(func, func)(*args, **(kwargs or {}))
