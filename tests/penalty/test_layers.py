"""Layers that are written out have the values and derivatives of their definitions, to third order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

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


def test_batch_norm_keeps_running_statistics() -> None:
    x, weight, bias = arguments((6, 3, 4, 4))
    states = [(torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    mine = batch_norm(x, *states[0], weight, bias, True, 0.3)
    theirs = F.batch_norm(x, *states[1], weight, bias, True, 0.3)
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(states[0], states[1])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch_norm(x[:1, :, 0, 0], *states[0], weight, bias, True)
