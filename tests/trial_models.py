"""Small models for the tests of the trial, a batch for them, and what is expected of a method on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sgr_kernels import PenaltyGradientError
from tests.support_matrix import CLASSES, SIZE, criterion, difference_of_losses, gradients

BATCH = 6

EXACT = ("double-backward", "forward-mode")


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(BATCH, 1, SIZE, SIZE, dtype=torch.float64, generator=generator)
    return images, torch.randint(0, CLASSES, (BATCH,), generator=generator)


def head(*layers: nn.Module, channels: int = 3) -> nn.Sequential:
    """A convolution, the layers, which keep the shape, and a linear head, float64."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, channels, 3), *layers)
    return nn.Sequential(body, nn.Flatten(), nn.Linear(channels * 36, CLASSES)).double()


def assert_right(model: nn.Module, method: str, call: Callable[[Tensor], Any] | None = None) -> None:
    images, labels = batch()
    expected = difference_of_losses(model, images, labels)
    torch.manual_seed(0)
    criterion(method)(call or model, images, labels).backward()
    assert (gradients(model) - expected).norm() <= 1e-5 * expected.norm()


def refusal(step: Callable[[], object]) -> str:
    """Why a model is refused; empty where it is not."""
    try:
        step()
    except PenaltyGradientError as error:
        return str(error)
    return ""


class Remembers(torch.autograd.Function):
    """A hand-written Swish that saves its sigmoid: right once, and a constant to a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate = torch.sigmoid(x)
        ctx.save_for_backward(x, gate)
        return x * gate

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> Tensor:
        x, gate = ctx.saved_tensors
        return incoming * (gate + x * gate.detach() * (1 - gate.detach()))
