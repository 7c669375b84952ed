"""What a way to the penalty's gradient is asked for, and what it answers.

With ``v = Sigma g`` held constant, ``grad_theta Omega = mean_b grad_theta (v_b . grad_x l_b)``: the gradient of each
loss's slope along v. A way has the slope by differentiating twice, by a forward-mode tangent, or by a difference of
losses. The *value* of the penalty always comes from g itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sgr_kernels.penalty.metric import Metric
from sgr_kernels.penalty.passes import Pass, Passes
from sgr_kernels.toeplitz.constants import at_hand


def mean(values: Tensor) -> Tensor:
    """Over the samples; zero for none."""
    return values.sum() / max(1, values.shape[0])


@dataclass
class Outcome:
    """A step's loss and what was computed on the way.

    Attributes:
        loss: ``mean_b l_b + weight * Omega``, or the penalty of chosen samples alone; to be differentiated.
        cross_entropy: Mean of the per-sample losses.
        penalty: Omega.
        outputs: What the model returned.
        gradient: Of each sample's loss in its image.
    """

    loss: Tensor
    cross_entropy: Tensor
    penalty: Tensor | None
    outputs: Any
    gradient: Tensor | None


@dataclass(frozen=True)
class Task:
    """The penalty of a batch, or of chosen samples.

    Attributes:
        passes: The model's forward passes, on the samples in question.
        images: Of those samples; with their graph where the loss is to have a gradient in them.
        metric: Gives Omega and its derivative.
        weight: Of the penalty in the loss.
        learn: Called with the losses and the gradient g, or None, without their graphs, before the metric is used.
        count_finite: Whether a penalty is finite, a flag on its device; keeps count.
        shares: Weight of each sample's omega in the penalty, (B,); None for the whole batch, where each has 1/B and
            the cross-entropy joins.
    """

    passes: Passes
    images: Tensor
    metric: Metric
    weight: float
    learn: Callable[[Tensor, Tensor | None], None] = lambda losses, gradient: None
    count_finite: Callable[[Tensor], Tensor] = lambda penalty: penalty.detach().isfinite()
    shares: Tensor | None = None

    def start(self, images: Tensor, inside: bool = False) -> Pass:
        """The pass that gives g; ``inside`` looks into a compiled model."""
        return self.passes.first(images, inside) if self.shares is None else self.passes.again(images, inside)

    def leaf(self) -> Tensor:
        """The images, to be differentiated in, with what graph they have."""
        return self.images.view_as(self.images) if self.images.requires_grad else self.images.detach().requires_grad_()

    def outcome(self, losses: Tensor, omegas: Tensor, outputs: Any, gradient: Tensor) -> Outcome:
        """Cross-entropy and weighted penalty, of losses and omegas with a graph."""
        cross_entropy = mean(losses)
        penalty = mean(omegas) if self.shares is None else (self.shares.to(omegas.dtype) * omegas).sum()
        weighted = self.weight * self._finite_or_zero(penalty, gradient)
        loss = cross_entropy + weighted if self.shares is None else weighted
        return Outcome(loss, cross_entropy.detach(), penalty.detach(), outputs, gradient)

    def _finite_or_zero(self, penalty: Tensor, gradient: Tensor) -> Tensor:
        """The penalty, or zero where it is not finite."""
        finite = self.count_finite(penalty)
        if at_hand(finite):
            return penalty if bool(finite) else torch.zeros_like(penalty)
        # Elsewhere without waiting for the device: nothing flows back from a penalty that is left out.
        if gradient.requires_grad:
            gradient.register_hook(lambda incoming: torch.where(finite, incoming, 0.0))
        return torch.where(finite, penalty, 0.0)


class Way(Protocol):
    """A way to the penalty's gradient.

    Attributes:
        name: As ``SGRLoss(method=...)`` has it.
        exact: Whether the gradient is exact up to rounding.
        inside: Whether the passes look into a compiled model, which then runs uncompiled.
        traceable: Whether a compiler of the whole training step may trace the passes.
        repeats: Whether it passes forward more than once.
        proved: Whether a trial had a gradient to compare.
    """

    name: str
    exact: bool
    inside: bool
    traceable: bool
    repeats: bool
    proved: bool

    def __call__(self, task: Task) -> Outcome:
        """Solve a task.

        Raises:
            ValueError: If the loss does not depend on the images.
            PenaltyGradientError: If the model lacks a derivative.
        """
        ...

    def obstacle(self, model: Any) -> str | None:
        """Why a model is out of the question, as far as its class tells."""
        ...
