"""The penalty's gradient by a one-sided difference along ``v = Sigma g``, from two plain passes.

The slope ``(l_b(x_b + h_b v_b) - l_b(x_b)) / h_b`` enters the loss with weight w, so that what is to be differentiated
is

    mean_b  (1 + w / h_b) l_b(x_b + h_b v_b)  -  (w / h_b) l_b(x_b),

or rather, with ``h_b = w / (1 + w q_b)``, so that cross-entropy's own term may be taken ahead as well without an error,

    mean_b  (1 + w q_b) l_b(x_b + h_b v_b)  -  w q_b l_b(x_b).

If ``q_b = c u_b`` with u_b known after the first forward pass, the backward that gives g also gives the parameters'
gradients of the second term, up to the factor ``-w c``. Then the first pass's graph is gone before the second one
begins: the time of two clean steps, and the memory of little more than one. Of a part of the batch the gradients of the
second term would be a further copy of the parameters' size beside those of the whole batch: there both small graphs are
kept for one backward, where the first can be.

On smooth networks this is the exact gradient up to rounding. At kinks of ReLU and max-pooling a step of finite length
sees curvature that the exact derivative drops. On the Carlini-Wagner network, batches of 128 digits, strength 1, the
cosine between the parameters' gradients by differences in float32 and the exact ones is 1.00 untrained, where the
penalty hardly counts, and 0.68 after an epoch with it (the penalty's alone: 0.04 and 0.33); in float64, whose steps
are shorter, 1.00 and 1.00 (0.98 and 1.00). ``sgr bench agreement`` measures it; see benchmarks/results/README.md. So
`sgr_kernels.penalty.proof` measures that cosine before the first step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from sgr_kernels.penalty.gradients import (
    SpentPass,
    coarsest_rounding,
    input_gradient,
    may_be_retained,
    spend,
    substitute,
)
from sgr_kernels.penalty.layers.convolution import fast_image_gradients
from sgr_kernels.penalty.outputs import detached
from sgr_kernels.penalty.passes import Passes
from sgr_kernels.penalty.way import Outcome, Task, mean
from sgr_kernels.penalty.wrappers import is_sharded
from sgr_kernels.toeplitz.constants import wide_dtype


class FiniteDifference:
    """Two plain passes; see the module.

    Attributes:
        coupled: Whether the weight of one sample's loss changes the gradient in another's image, found by a trial.
    """

    name = "finite-difference"
    exact, inside, traceable, repeats, proved = False, False, True, True, False
    coupled = False

    def obstacle(self, model: Any) -> str | None:
        """None: plain passes always run."""
        return None

    @_disable_dynamo(recursive=False)
    def __call__(self, task: Task) -> Outcome:
        """A loss of which a part of the gradient is there already."""
        whole = task.shares is None
        # A leaf, so that g's backward does not go on into what the images, and perhaps the model, were made of.
        leaf = task.images.detach().requires_grad_() if whole else task.leaf()
        with fast_image_gradients(task.passes.model):
            first = task.start(leaf)
        coupled = self.coupled or task.passes.coupled
        shares = _relative_shares(task, first.losses)
        weights = sample_weights(first.losses, leaf, coupled, shares)
        outputs, losses = detached(first.outputs), first.losses.detach()
        spent, behind = _backward(task, first.losses, leaf, weights)
        del first  # and with it the graph of a whole batch, before the next one grows
        task.learn(losses, spent.gradient)
        return self._second_pass(task, spent, behind, weights, shares, losses, outputs)

    def _second_pass(
        self,
        task: Task,
        spent: SpentPass,
        behind: Tensor | None,
        weights: Tensor,
        shares: Tensor,
        losses: Tensor,
        outputs: Any,
    ) -> Outcome:
        base = task.images if task.images.requires_grad else task.images.detach()
        whole = task.shares is None
        with torch.no_grad():
            omegas = task.metric.omegas(spent.gradient)
            penalty = mean(shares.to(omegas.dtype) * omegas)
            # A penalty that is not finite leaves a step of zero, that is, a plain one.
            finite = task.count_finite(penalty)
            direction = torch.where(finite, task.metric.direction(spent.gradient), 0)
            scale = scale_of_steps(base, direction, weights, shares, spent.rounding**0.5)
            sides = difference(torch.where(finite, scale, 0), weights, task.weight, shares, with_loss=whole)
            cross_entropy = mean(losses)
            value = task.weight * torch.where(finite, penalty, 0)
        ahead = task.passes.again(moved(base, direction, sides.steps)).losses
        value = cross_entropy + value if whole else value
        scalar = (sides.ahead * ahead).sum()
        scalar = scalar if behind is None else scalar + sides.behind * behind
        loss = substitute(value, scalar, sides.behind, spent)
        return Outcome(loss, cross_entropy, penalty, outputs, spent.gradient)


@_disable_dynamo
def _backward(task: Task, losses: Tensor, leaf: Tensor, weights: Tensor) -> tuple[SpentPass, Tensor | None]:
    """The gradient g, and of ``sum_b u_b l_b`` the parameters' gradients or, to be differentiated yet, the sum."""
    if task.shares is None or is_sharded(task.passes.model) or not may_be_retained(losses):
        return spend(losses, leaf, task.images if task.images.requires_grad else None, weights), None
    gradient = input_gradient(losses, leaf, shares=weights, retain_graph=True)
    kept = SpentPass(gradient, (), [], coarsest_rounding(losses, leaf))
    return kept, (weights.to(losses.dtype) * losses).sum()


def _relative_shares(task: Task, losses: Tensor) -> Tensor:
    """Weight of each sample in the penalty relative to an equal one, (B,)."""
    ones = torch.ones_like(losses.detach(), dtype=wide_dtype(losses.device))
    return ones if task.shares is None else task.shares.to(ones.dtype) * len(ones)


def samples_interact(passes: Passes, images: Tensor) -> bool:
    """Whether the weight of one sample's loss changes the gradient in another's image, tried."""
    found = []
    for period in (1, 2):
        losses = passes.again(images).losses
        found.append(spend(losses, images, None, 4.0 ** (torch.arange(len(images), device=images.device) % period)))
    first, second = (pass_.gradient.detach() for pass_ in found)
    return bool((first - second).norm() > 1e-3 * first.norm())


def _norms(values: Tensor) -> Tensor:
    return values.detach().float().flatten(1).norm(dim=1)


def _root_mean_square(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


def _reach(images: Tensor) -> Tensor:
    """Norm of each image, (B,); a dark one has at least a tenth of the batch's, or a thousandth of a unit per pixel."""
    norms = _norms(images)
    return norms.maximum(0.1 * _root_mean_square(norms)).clamp(min=1e-3 * math.sqrt(images[0].numel()))


def sample_weights(losses: Tensor, images: Tensor, coupled: bool, shares: Tensor) -> Tensor:
    """The u_b, (B,): about proportional to what ``s_b |v_b| / |x_b|`` will be, with mean square about 1.

    A cross-entropy's gradient is proportional to ``1 - phi_y = 1 - exp(-l)``. Powers of two cost no rounding when they
    are divided out of g. The shares where samples are coupled: with others g would not be that of the sum.
    """
    if coupled or len(losses) == 0:
        return torch.where(shares > 0, shares, 1)
    weights = (-torch.expm1(-losses.detach().float())).clamp(min=1e-2) * shares.clamp(min=1e-2) / _reach(images)
    return torch.exp2(torch.log2(weights / _root_mean_square(weights)).round()).to(shares.dtype)


def scale_of_steps(images: Tensor, direction: Tensor, weights: Tensor, shares: Tensor, step: float) -> Tensor:
    """The c of ``q_b = c u_b``: steps are about ``step |x_b| / |v_b|``; zero along a zero direction."""
    if len(images) == 0:
        return weights.new_zeros(())
    wanted = shares * _norms(direction) / _reach(images)
    return _root_mean_square(wanted) / (_root_mean_square(weights) * step)


def moved(images: Tensor, direction: Tensor, steps: Tensor) -> Tensor:
    """``x_b + h_b v_b``."""
    shape = (-1, *(1,) * (images.dim() - 1))
    return images + (steps.to(direction.dtype).view(shape) * direction).to(images.dtype)


@dataclass
class Difference:
    """Steps of a difference and the weights with which its two sides enter the loss.

    Attributes:
        steps: h, (B,).
        ahead: Of ``l_b(x_b + h_b v_b)``, (B,).
        behind: Of ``sum_b u_b l_b(x_b)``, ().
    """

    steps: Tensor
    ahead: Tensor
    behind: Tensor


def difference(scale: Tensor, weights: Tensor, weight: float, shares: Tensor, with_loss: bool) -> Difference:
    """What makes ``mean_b [l_b] + weight s_b slope_b`` of the two sides; the l_b only if ``with_loss``, s_b = 1."""
    samples = max(1, len(weights))
    ahead = weight * scale * weights + float(with_loss)
    steps = torch.where(ahead > 0, weight * shares / torch.where(ahead > 0, ahead, 1), 0)
    return Difference(steps, ahead / samples, -weight * scale / samples)
