"""Layers that are written out have the values and derivatives of their definitions, to third order."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sgr_kernels.penalty.layers.activations import silu
from sgr_kernels.penalty.layers.convolution import DifferentiableTwice, fast_image_gradients
from sgr_kernels.penalty.layers.normalization import batch_norm


def arguments(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, generator=generator) + 3
    weight, bias = (torch.randn(shape[1], dtype=torch.float64, generator=generator) for _ in range(2))
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def derivatives(function, tensors: tuple[Tensor, ...], order: int) -> list[Tensor]:
    """Of a sum of cubes, and of sums of squares of the derivatives before."""
    value = function(*tensors).pow(3).sum()
    found: list[Tensor] = []
    for _ in range(order):
        found = list(torch.autograd.grad(value, tensors, create_graph=True, materialize_grads=True))
        value = sum(g.square().sum() for g in found)
    return found


def elementary(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The definition; PyTorch's own third derivative of batch normalization is another."""
    over, shape = (0, *range(2, x.dim())), (1, -1, *(1,) * (x.dim() - 2))
    centred = x - x.mean(over, keepdim=True)
    standard = centred * (centred.square().mean(over, keepdim=True) + 1e-5).rsqrt()
    return standard * weight.view(shape) + bias.view(shape)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 7), (3, 2, 4, 5), (2, 3, 2, 3, 2)], ids=str)
def test_batch_norm(shape: tuple[int, ...], order: int) -> None:
    tensors = arguments(shape)
    mine = derivatives(lambda x, w, b: batch_norm(x, None, None, w, b, True), tensors, order)
    exact = derivatives(elementary, tensors, order)
    for a, b in zip(mine, exact):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * float(b.detach().abs().max()))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_silu(order: int) -> None:
    x = torch.linspace(-30, 30, 61, dtype=torch.float64, requires_grad=True)
    mine, exact = (derivatives(function, (x,), order) for function in (silu, lambda x: x * torch.sigmoid(x)))
    torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-9)


def test_batch_norm_keeps_running_statistics() -> None:
    x, weight, bias = arguments((6, 3, 4, 4))
    states = [(torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    mine = batch_norm(x, *states[0], weight, bias, True, 0.3)
    theirs = F.batch_norm(x, *states[1], weight, bias, True, 0.3)
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(states[0], states[1])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch_norm(x[:1, :, 0, 0], *states[0], weight, bias, True)


NARROW = [
    {"channels": 1, "kernel": 3, "stride": 1, "padding": 0, "dilation": 1},
    {"channels": 3, "kernel": 3, "stride": 2, "padding": 1, "dilation": 1},
    {"channels": 2, "kernel": (3, 2), "stride": (2, 3), "padding": (2, 0), "dilation": (1, 3)},
    {"channels": 3, "kernel": 4, "stride": 4, "padding": 0, "dilation": 1},
    {
        "channels": 3,
        "kernel": 5,
        "stride": 5,
        "padding": 0,
        "dilation": 1,
    },  # windows of more values than there are kernels
]


@pytest.mark.parametrize("case", NARROW, ids=str)
def test_gradient_of_a_first_convolution(case: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = case["kernel"] if isinstance(case["kernel"], tuple) else (case["kernel"],) * 2
    x = torch.randn(3, case["channels"], 13, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(32, case["channels"], *kernel, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(32, generator=generator, dtype=torch.float64, requires_grad=True)

    def convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, case["stride"], case["padding"], case["dilation"])

    expected = [derivatives(convolved, (x, weight, bias), order) for order in (2, 1, 1)]
    with DifferentiableTwice():
        found = [derivatives(convolved, (x, weight, bias), 2)]
    with fast_image_gradients(None):
        found.append(derivatives(convolved, (x, weight, bias), 1))
        value = convolved(x, weight, bias).pow(3).sum()
    found.append(list(torch.autograd.grad(value, (x, weight, bias))))
    for a, b in zip(chain(*found), chain(*expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * float(b.detach().abs().max()))


def test_only_first_convolutions_are_replaced() -> None:
    """Deep ones keep their backend's kernel, and so does what is in channels_last."""
    images, deep = torch.rand(2, 3, 8, 8, requires_grad=True), torch.rand(2, 64, 8, 8, requires_grad=True)
    plain = {"ConvolutionBackward0"}
    cases = [(images, False), (deep, True), (images.contiguous(memory_format=torch.channels_last), True)]
    cases.append((images.detach(), True))
    for x, kept in cases:
        with fast_image_gradients(None):
            y = F.conv2d(x, torch.rand(64, x.shape[1], 3, 3, requires_grad=True))
        assert ({y.grad_fn.name()} == plain) == kept
    for outputs in (16, 64):
        with fast_image_gradients(None):
            pointwise = F.conv2d(deep, torch.rand(outputs, 64, 1, 1, requires_grad=True))
        assert pointwise.grad_fn.name() in plain
