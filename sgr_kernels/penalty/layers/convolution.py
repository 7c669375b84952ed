"""Convolutions whose second derivatives are convolutions' first derivatives, and a fast gradient of images.

PyTorch differentiates a convolution's backward by convolving with kernels as large as images, after transposing both:
several times as slow as the weight gradient that it amounts to, which backends have a kernel of its own for.

Nobody but who wants the gradient in the images asks for that of a first layer in its input, and on CPUs its kernel
computes as if an image had 8 or 16 channels. It is a matrix product with windows added up, in 0.3 to 0.8 of the time.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from sgr_kernels.penalty.layers.activations import silu
from sgr_kernels.penalty.layers.elementary import RULES
from sgr_kernels.penalty.layers.normalization import batch_norm
from sgr_kernels.penalty.wrappers import has_compiled_part, is_compiled

_RULES = {**RULES, F.batch_norm: batch_norm, F.silu: silu}
_LACKING = {function: rule for function, rule in RULES.items() if rule.__name__ == "_hardsigmoid"}
_CONVOLUTIONS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}


class _Geometry(NamedTuple):
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        zeros = (0,) * len(self.stride)
        return torch.ops.aten.convolution(
            x, weight, bias, self.stride, self.padding, self.dilation, False, zeros, self.groups
        )

    def backward(self, gradient: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> list[Tensor | None]:
        """Gradients in input, weight and bias."""
        if wanted[0] and self.is_narrow(gradient, x, weight):
            others = self.backward(gradient, x, weight, [False, *wanted[1:]]) if any(wanted[1:]) else [None] * 3
            return [self._by_windows(gradient, x, weight), *others[1:]]
        zeros = (0,) * len(self.stride)
        return torch.ops.aten.convolution_backward(
            gradient,
            x,
            weight,
            [weight.shape[0]],
            self.stride,
            self.padding,
            self.dilation,
            False,
            zeros,
            self.groups,
            wanted,
        )

    def is_narrow(self, gradient: Tensor | None, x: Tensor, weight: Tensor) -> bool:
        """Whether the gradient in the input is faster by windows: of images, few values in them, or none in two."""
        windows = weight.shape[2:]
        return (
            (x.device.type, len(windows), self.groups) == ("cpu", 2, 1)
            and x.shape[1] < 8
            and x.dtype in (torch.float32, torch.float64)
            and (weight[0].numel() <= len(weight) or tuple(windows) == tuple(self.stride))
            and (gradient is None or gradient.is_contiguous())
        )

    def _by_windows(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # a backward runs in its caller's, not in its forward's
            windows = weight.flatten(1).t().expand(len(gradient), -1, -1).bmm(gradient.flatten(2))
            return F.fold(windows, x.shape[2:], weight.shape[2:], self.dilation, self.padding, self.stride)


class _Convolution(torch.autograd.Function):
    """``x * w``, bilinear, plus a bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry, leaves: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.leaves = geometry, leaves
        return geometry.forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        by_x, by_weight, by_bias = ctx.needs_input_grad[:3]
        if ctx.leaves is not None and ctx.leaves.skipped:
            by_weight = by_bias = False
        if not torch.is_grad_enabled():
            return *ctx.geometry.backward(gradient, x, weight, [by_x, by_weight, by_bias]), None, None
        return (
            _ByInput.apply(gradient, weight, x, ctx.geometry) if by_x else None,
            _ByWeight.apply(gradient, x, weight, ctx.geometry) if by_weight else None,
            gradient.sum((0, *range(2, gradient.dim()))) if by_bias else None,
            None,
            None,
        )


class _ByInput(torch.autograd.Function):
    """The adjoint of ``x -> x * w``, bilinear in its argument and w; ``like`` is of the shape of x."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, weight: Tensor, like: Tensor, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(gradient, weight)
        ctx.geometry = geometry
        return geometry.backward(gradient, like, weight, [True, False, False])[0]  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
        gradient, weight = ctx.saved_tensors
        return (
            _plain(x, weight, ctx.geometry) if ctx.needs_input_grad[0] else None,
            _ByWeight.apply(gradient, x, weight, ctx.geometry) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


class _ByWeight(torch.autograd.Function):
    """The adjoint of ``w -> x * w``, bilinear in its argument and x; ``like`` is of the shape of w."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor, like: Tensor, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(gradient, x)
        ctx.geometry = geometry
        return geometry.backward(gradient, x, like, [False, True, False])[1]  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        gradient, x = ctx.saved_tensors
        return (
            _plain(x, weight, ctx.geometry) if ctx.needs_input_grad[0] else None,
            _ByInput.apply(gradient, weight, x, ctx.geometry) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


def _plain(x: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
    if torch.is_grad_enabled():
        return _Convolution.apply(x, weight, None, geometry, None)
    return geometry.forward(x, weight)


class _Call(NamedTuple):
    """The arguments of ``F.conv1d`` and its relatives."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1

    def is_ordinary(self, dims: int) -> bool:
        """Whether it is of a batch of plain tensors, by plain numbers of pixels."""
        plain = all(type(t) in (Tensor, Parameter) and t.is_floating_point() for t in (self.input, self.weight))
        transformed = torch._C._are_functorch_transforms_active()
        return plain and not transformed and self.input.dim() == dims + 2 and not isinstance(self.padding, str)

    def geometry(self, dims: int) -> _Geometry:
        """How windows lie."""
        stride, padding, dilation = (_tuple(value, dims) for value in (self.stride, self.padding, self.dilation))
        return _Geometry(stride, padding, dilation, self.groups)


class _Narrow(TorchFunctionMode):
    """While active, convolutions of few channels that have an input gradient run as above."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Route them, or call what was called."""
        if func is F.conv2d:
            call = _Call(*args, **(kwargs or {}))
            x, weight, autocast = call.input, call.weight, torch.is_autocast_enabled(call.input.device.type)
            if (
                call.is_ordinary(2)
                and x.requires_grad
                and x.is_contiguous()
                and x.dtype == weight.dtype
                and not autocast
            ):
                geometry = call.geometry(2)
                if geometry.is_narrow(None, x, weight):
                    return _Convolution.apply(x, weight, call.bias, geometry, None)
        return func(*args, **(kwargs or {}))


def fast_image_gradients(model: Any) -> contextlib.AbstractContextManager[Any]:
    """A plain pass in which the gradient in the images is cheap; what is compiled runs as it is."""
    if torch.compiler.is_compiling() or is_compiled(model) or has_compiled_part(model):
        return contextlib.nullcontext()
    return _Narrow()


class DifferentiableTwice(TorchFunctionMode):
    """While active, convolutions run as above, and what has no second derivative by `RULES`.

    Attributes:
        skipped: Set while a backward is for the images alone. Custom functions are not told what a backward is for, so
            that they would compute the gradients of weights, to be thrown away.
    """

    skipped = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a convolution of ordinary tensors differentiably, and what has no second derivative by its rule."""
        dims = _CONVOLUTIONS.get(func)
        if dims is not None:
            call = _Call(*args, **(kwargs or {}))
            return self._convolve(call, dims) if call.is_ordinary(dims) else func(*call)
        # What a checkpoint computes again, outside of this mode, is as it was: so it runs here, too.
        rules = _LACKING if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None else _RULES
        return rules.get(func, func)(*args, **(kwargs or {}))

    def _convolve(self, call: _Call, dims: int) -> Tensor:
        input, weight, bias = call.input, call.weight, call.bias
        # The images do not come before a parameter; they may before a weight that a network computes, or be one.
        leaves = self if isinstance(weight, Parameter) and (bias is None or isinstance(bias, Parameter)) else None
        device = input.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            input, weight = _lowered(input, dtype), _lowered(weight, dtype)
            bias = None if bias is None else _lowered(bias, dtype)
        with torch.autocast(device, enabled=False):
            return _Convolution.apply(input, weight, bias, call.geometry(dims), leaves)


def _lowered(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast has it: float64 stays what it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values
