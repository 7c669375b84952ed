"""The penalty's gradient by differentiating the input gradient: exact, in one forward and two backward passes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor, nn

from sgr_kernels.penalty.gradients import graph_nodes, input_gradient
from sgr_kernels.penalty.layers.convolution import DifferentiableTwice
from sgr_kernels.penalty.way import Outcome, Task
from sgr_kernels.penalty.wrappers import PenaltyGradientError, is_sharded


class DoubleBackward:
    """Omega of an input gradient that has a graph."""

    name = "double-backward"
    exact, inside, traceable, repeats, proved = True, True, False, False, False

    def obstacle(self, model: Any) -> str | None:
        """Parameters that come and go."""
        return "fully sharded parameters are freed before the second backward" if is_sharded(model) else None

    def __call__(self, task: Task) -> Outcome:
        """Cross-entropy and penalty in one graph."""
        x = task.leaf()
        with differentiable_twice() as rules:
            first = task.start(x, inside=True)
            gradient = self._gradient(first.losses, x, task.shares, rules)
        self._expect_graph(gradient, task.passes.model)
        task.learn(first.losses.detach(), gradient.detach())
        return task.outcome(first.losses, task.metric.omegas(gradient), first.outputs, gradient)

    def _gradient(self, losses: Tensor, x: Tensor, shares: Tensor | None, rules: DifferentiableTwice | None) -> Tensor:
        if rules is not None:
            rules.skipped = True
        try:
            return input_gradient(losses, x, create_graph=True, shares=shares)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise PenaltyGradientError(f"method: the model cannot be differentiated twice ({error})") from error
        finally:
            if rules is not None:
                rules.skipped = False

    def _expect_graph(self, gradient: Tensor, model: Any) -> None:
        trainable = isinstance(model, nn.Module) and any(p.requires_grad for p in model.parameters())
        if trainable and not gradient.requires_grad:
            raise PenaltyGradientError(
                "method: the model's input gradient has no graph, so the penalty would train nothing"
            )


def has_no_second_derivative(gradient: Tensor) -> bool:
    """Whether a part of the model is differentiable only once, which autograd may pass by in silence."""
    return any(node.name() == "torch::autograd::Error" for node in graph_nodes(gradient))


@contextlib.contextmanager
def differentiable_twice() -> Iterator[DifferentiableTwice | None]:
    """Run fused attention, which has no second derivative, as its definition, and convolutions with a fast one."""
    if torch.compiler.is_compiling():
        yield None
        return
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), DifferentiableTwice() as rules:
        yield rules
