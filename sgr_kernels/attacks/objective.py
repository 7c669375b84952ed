"""What the gradient attacks climb: the cross-entropy, in a form that keeps its direction for confident models.

Or functions whose direction does not depend on the logits' scale: the cross-entropy of logits brought to one scale, and
the difference of logits ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sgr_kernels.attacks.guard import Model, ask, plain
from sgr_kernels.attacks.inputs import check_labels, private_generator
from sgr_kernels.checks.caller import warn_caller
from sgr_kernels.toeplitz.constants import recording

LossName = Literal["cross-entropy", "scaled", "dlr"]
LOSSES = get_args(LossName)
SPREAD = 3.0  # of the three largest logits: what a trained network has where it is in doubt
Loss = Callable[[Tensor, Tensor], Tensor]
"""Of logits (B, K) and classes (B,); rises with the distance from them, (B,)."""


class Objective(NamedTuple):
    """What an attack climbs, and what it ranks an image's iterates by."""

    climbed: Loss
    ranked: Loss


class Ascent(NamedTuple):
    """Logits (B, K), loss (B,) and its gradient, shaped like the images."""

    logits: Tensor
    loss: Tensor
    gradient: Tensor


def logit_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """``log((1 - p_y) / p_y) = logsumexp_{k != y} z_k - z_y`` for each sample, (B,).

    A strictly increasing function of the cross-entropy ``-log p_y``: it ranks images alike, and its input gradient is
    that of the cross-entropy times ``1 / (1 - p_y)`` > 0, so signs and directions are the same. Unlike the
    cross-entropy's, it does not vanish or lose its leading term once ``p_y`` rounds to one.
    """
    index = labels.unsqueeze(1)
    others = logits.scatter(1, index, float("-inf")).logsumexp(1)
    return others - logits.gather(1, index).squeeze(1)


def scaled_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """``logit_loss`` of each sample's logits times ``3 / (z_(1) - z_(3))``, a factor held constant, (B,).

    The cross-entropy of logits a millionth apart points away from the mean of the other classes, that of logits a
    million apart away from one of them; either hides a nearer boundary. On one scale for all, it does neither. With two
    classes the spread is ``z_(1) - z_(2)``.
    """
    highest = logits.detach().topk(min(3, logits.shape[1]), dim=1).values
    return logit_loss(logits * (SPREAD / _or_one(highest[:, :1] - highest[:, -1:])), labels)


def logit_ratio(logits: Tensor, labels: Tensor) -> Tensor:
    """``(max_{k != y} z_k - z_y) / (z_(1) - z_(3))`` for each sample, (B,), with ``z_(i)`` the i-th largest logit.

    The difference of logits ratio of Croce and Hein (2020): a shift or a positive scale of the logits changes neither
    its value nor its gradient's direction. It is at least -1, and positive where the sample is misclassified. Logits
    without a spread count as differences alone.
    """
    highest = logits.topk(3, dim=1).values
    return margin(logits, labels) / _or_one(highest[:, 0] - highest[:, 2])


def targeted_logit_ratio(logits: Tensor, targets: Tensor) -> Tensor:
    """``(max_{k != t} z_k - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)`` for each sample, (B,): to be descended.

    As the targeted ratio of Croce and Hein (2020), but negative only where the target is the answer: the largest other
    logit stands where theirs has that of the true class.
    """
    highest = logits.topk(4, dim=1).values
    return margin(logits, targets) / _or_one(highest[:, 0] - highest[:, 2:].mean(1))


def objective_for(loss: LossName, targeted: bool, classes: int) -> Objective:
    """The functions behind a loss's name.

    Raises:
        ValueError: an unknown name, or too few classes for it.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {loss!r}")
    if loss == "cross-entropy":
        return Objective(logit_loss, logit_loss)
    if loss == "scaled":  # each iterate has a scale of its own, so their losses do not compare
        return Objective(scaled_loss, margin)
    least = 4 if targeted else 3
    if classes < least:
        aim = "towards a target" if targeted else "away from a class"
        raise ValueError(f"loss: 'dlr' {aim} expects at least {least} classes, got {classes}; take 'scaled'")
    ratio = targeted_logit_ratio if targeted else logit_ratio
    return Objective(ratio, ratio)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """``max_{k != y} z_k - z_y`` for each sample, (B,)."""
    index = labels.unsqueeze(1)
    others = logits.scatter(1, index, float("-inf")).amax(1)
    return others - logits.gather(1, index).squeeze(1)


def _or_one(spread: Tensor) -> Tensor:
    return torch.where(spread > 0, spread, torch.ones_like(spread))


def logits_of(model: Model, images: Tensor) -> Tensor:
    """The model's output (B, K) in float32 or better.

    Raises:
        ValueError: the output is not one row of at least two logits per image.
    """
    logits = ask(model, images)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != len(images) or logits.shape[1] < 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model: expected logits of shape ({len(images)}, classes >= 2), got {got}")
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def clean_logits(model: Model, images: Tensor) -> Tensor:
    """``logits_of`` without a graph, with a look at the values."""
    with torch.no_grad():
        logits = logits_of(model, images)
    inspect_logits(logits)
    return logits


def inspect_logits(logits: Tensor) -> None:
    """Raises ValueError for NaN or infinite logits; warns when they look like probabilities."""
    if recording():
        return
    logits = logits.detach()
    if not bool(logits.isfinite().all()):
        count = int((~logits.isfinite()).any(1).sum())
        raise ValueError(f"model: expected finite logits, got NaN or infinity for {count} of {len(logits)} images")
    if len(logits) and bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-3).all()):
        warn_caller(
            "model: the outputs are non-negative and sum to one; expected logits, not probabilities: a softmax before "
            "the attack hides the gradient"
        )


def choose_labels(
    labels: Tensor | None, logits: Tensor, targeted: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """The classes an attack works with, (B,): those given, else the own prediction, or a random other class as target.

    Raises:
        TypeError: labels that are not integers.
        ValueError: labels of the wrong shape, or out of range.
    """
    batch, classes = logits.shape
    if labels is not None:
        check_labels(labels, batch, classes)
        return plain(labels).to(device=logits.device, dtype=torch.int64)
    own = logits.detach().argmax(1)
    if not targeted:
        return own
    generator = private_generator(generator)
    offset = torch.randint(1, classes, (batch,), generator=generator, device=generator.device)
    return (own + offset.to(own.device)) % classes


def differentiable(images: Tensor) -> Tensor:
    """The images as a leaf that asks for a gradient; the caller's tensor is left alone."""
    return images.detach().requires_grad_()


def input_gradient(outputs: Tensor, images: Tensor, *, retain_graph: bool = False) -> Tensor:
    """Gradient of ``outputs.sum()`` with respect to the images only: parameters collect nothing.

    Raises:
        ValueError: the outputs do not depend differentiably on the images, or the gradient is not finite.
    """
    gradient = None
    if outputs.requires_grad:
        (gradient,) = torch.autograd.grad(outputs.sum(), images, retain_graph=retain_graph, allow_unused=True)
    if gradient is None:
        raise ValueError("model: expected logits that are differentiable in the images, got logits without a gradient")
    if not recording() and not bool(gradient.isfinite().all()):
        count = int((~gradient.isfinite()).flatten(1).any(1).sum())
        raise ValueError(
            f"model: expected finite input gradients, got NaN or infinity for {count} of {len(images)} images"
        )
    return gradient


def ascent(model: Model, images: Tensor, labels: Tensor, loss: Loss = logit_loss) -> Ascent:
    """Logits, the loss and its input gradient at ``images`` for labels known to be in range."""
    leaf = differentiable(images)
    logits = logits_of(model, leaf)
    values = loss(logits, labels)
    gradient = input_gradient(values, leaf)
    return Ascent(logits.detach(), values.detach(), gradient)
