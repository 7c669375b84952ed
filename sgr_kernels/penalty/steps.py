"""Training steps that are not a way's own: without a penalty, without gradients, and on chosen samples."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sgr_kernels.penalty import sampling
from sgr_kernels.penalty.gradients import SpentPass, input_gradient, spend, substitute
from sgr_kernels.penalty.layers.convolution import fast_image_gradients
from sgr_kernels.penalty.outputs import detached
from sgr_kernels.penalty.passes import Pass
from sgr_kernels.penalty.way import Outcome, Task, Way, mean


def plain(task: Task) -> Outcome:
    """Cross-entropy alone."""
    first = task.passes.first(task.images)
    task.learn(first.losses.detach(), None)
    loss = mean(first.losses)
    return Outcome(loss, loss, None, first.outputs, None)


def learning(task: Task) -> Outcome:
    """Cross-entropy, and the gradient g from the same backward, to learn from."""
    first, spent = _spent(task)
    task.learn(first.losses, spent.gradient)
    value = mean(first.losses)
    return Outcome(_loss(value, None, spent), value, None, first.outputs, spent.gradient)


def evaluated(task: Task, penalized: bool) -> Outcome:
    """The value of the loss, without its gradient."""
    leaf = task.images.detach().requires_grad_()
    first = task.passes.first(leaf)
    gradient = input_gradient(first.losses, leaf)
    task.learn(first.losses.detach(), gradient)
    cross_entropy, penalty = mean(first.losses.detach()), None
    loss = cross_entropy
    if penalized:
        with torch.no_grad():
            penalty = mean(task.metric.omegas(gradient))
        loss = cross_entropy + task.weight * torch.where(task.count_finite(penalty), penalty, 0)
    return Outcome(loss, cross_entropy, penalty, first.outputs, gradient)


def sampled(task: Task, way: Way, count: int, offset: Tensor, uniformly: bool) -> Outcome:
    """Cross-entropy and the penalty's value of the whole batch, the penalty's gradient of ``count`` samples.

    The estimate of the gradient is unbiased given the batch (`sgr_kernels.penalty.sampling`). Samples with an omega
    that is not finite are left out of value and gradient.
    """
    first, spent = _spent(task)
    task.learn(first.losses, spent.gradient)
    with torch.no_grad():
        omegas = task.metric.omegas(spent.gradient)
        task.count_finite(omegas.sum())
        penalty = mean(torch.where(omegas.isfinite(), omegas, 0))
        chosen, shares = sampling.draw(omegas, count, offset, uniformly)
    part = replace(
        task,
        passes=task.passes.part(chosen, shares, len(task.images)),
        images=task.images[chosen],
        shares=shares,
        learn=lambda losses, gradient: None,
        count_finite=lambda penalty: penalty.detach().isfinite(),
    )
    cross_entropy = mean(first.losses)
    loss = _loss(cross_entropy + task.weight * penalty, way(part).loss, spent)
    return Outcome(loss, cross_entropy, penalty, first.outputs, spent.gradient)


def _spent(task: Task) -> tuple[Pass, SpentPass]:
    """The plain pass after its backward; its graph is gone before another begins."""
    leaf = task.images.detach().requires_grad_()
    with fast_image_gradients(task.passes.model):
        first = task.passes.first(leaf)
    spent = spend(first.losses, leaf, task.images if task.images.requires_grad else None, _unit(leaf))
    return Pass(detached(first.outputs), first.losses.detach()), spent


def _loss(value: Tensor, penalty: Tensor | None, spent: SpentPass) -> Tensor:
    """A value with the gradient of the mean loss, and of a penalty."""
    share = value.new_full((), 1 / (_unit(spent.gradient) * max(1, len(spent.gradient))))
    return substitute(value, penalty, share, spent)


def _unit(images: Tensor) -> float:
    """Weight of a loss in a backward that a gradient scaler cannot reach: in half precision small gradients vanish."""
    device = images.device.type
    half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    return 1024.0 if half or images.dtype == torch.float16 else 1.0
