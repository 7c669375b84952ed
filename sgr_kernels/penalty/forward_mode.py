"""The penalty's gradient by a forward-mode tangent along ``v = Sigma g``, and one backward through it: exact."""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from sgr_kernels.penalty.gradients import differentiable_once, input_gradient
from sgr_kernels.penalty.layers.forward_rules import DifferentiableForwardMode
from sgr_kernels.penalty.outputs import detached, map_tensors
from sgr_kernels.penalty.passes import Passes
from sgr_kernels.penalty.way import Outcome, Task
from sgr_kernels.penalty.wrappers import PenaltyGradientError


class ForwardMode:
    """Losses and their slopes along v from one dual pass."""

    name = "forward-mode"
    exact, inside, traceable, repeats, proved = True, True, False, True, False

    def obstacle(self, model: Any) -> str | None:
        """None: what lacks a derivative says so itself."""
        return None

    def __call__(self, task: Task) -> Outcome:
        """Values from g, their gradients from the slopes."""
        x = task.leaf()
        first = task.start(x, inside=True)
        gradient, outputs = input_gradient(first.losses, x, shares=task.shares), detached(first.outputs)
        task.learn(first.losses.detach(), gradient)
        del first
        with torch.no_grad():
            omegas, direction = task.metric.omegas(gradient), task.metric.direction(gradient)
        base = task.images if task.images.requires_grad else task.images.detach()
        losses, slopes = slopes_along(task.passes, base, direction)
        slopes = differentiable_once(slopes.to(omegas.dtype))
        return task.outcome(losses, omegas + (slopes - slopes.detach()), outputs, gradient)


def slopes_along(passes: Passes, images: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and their slopes along ``direction``, both (B,): a forward-mode tangent of the model's outputs.

    The tangent stops at the outputs. From there the slope is the loss's own gradient times the tangent, because
    loss functions have forward-mode derivatives of which the backward fails (``log_softmax``).

    Raises:
        PenaltyGradientError: If a part of the model has no forward-mode derivative, or drops the tangent.
    """
    primals: list[Tensor] = []
    tangents: list[Tensor] = []

    def split(output: Tensor) -> Tensor:
        primal, tangent = forward_ad.unpack_dual(output)
        if tangent is not None:
            primals.append(primal)
            tangents.append(tangent)
        return primal

    with forward_ad.dual_level(), DifferentiableForwardMode():
        try:
            outputs = passes.run(forward_ad.make_dual(images, direction), inside=True)
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, RuntimeError) as error:
            raise PenaltyGradientError(f"method: the model has no forward-mode derivative ({error})") from error
        outputs = map_tensors(split, outputs)
    if not tangents:
        raise PenaltyGradientError("method: the model drops forward-mode tangents")
    losses = passes.evaluate(outputs, passes.labels)
    gradients = torch.autograd.grad(losses.sum(), primals, create_graph=True, allow_unused=True)
    slopes = [
        (gradient * tangent).flatten(1).sum(1) if gradient.dim() > 1 else gradient * tangent
        for gradient, tangent in zip(gradients, tangents)
        if gradient is not None
    ]
    return losses, torch.stack(slopes).sum(0)
