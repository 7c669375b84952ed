"""Gradient attacks inside an L-infinity or L2 ball: the fast gradient methods and projected gradient ascent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sgr_kernels.attacks.guard import Model, plain, preserve
from sgr_kernels.attacks.inputs import (
    add_perturbation,
    check_images,
    norms,
    per_image,
    private_generator,
    refuse_while_capturing,
    shrink_to_ball,
    working_dtype,
)
from sgr_kernels.attacks.levels import Bounds, Eps, Level, levels_of, one_or_stacked, takes_many_eps
from sgr_kernels.attacks.objective import (
    LossName,
    Objective,
    ascent,
    choose_labels,
    clean_logits,
    differentiable,
    input_gradient,
    inspect_logits,
    logit_loss,
    logits_of,
    objective_for,
)
from sgr_kernels.checks import check_count, check_number

Norm = Literal["Linf", "L2"]
Schedule = Literal["constant", "cosine"]

STRONG_PGD: dict[str, Any] = {"loss": "scaled", "steps": 50, "schedule": "cosine", "restarts": 5}
"""Options of `pgd` at its strongest: a loss that the logits' scale does not touch, steps that shrink from the ball's
diameter on, several starts. On ten networks it left within 0.7 points of what AutoAttack left
(``benchmarks/results/beyond``)."""


@takes_many_eps(labels="own")
def fgsm(
    model: Model,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    eps: Eps,
    targeted: bool = False,
    bounds: Bounds = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fast gradient sign method: ``clip(x + eps sign(grad_x loss))`` (Goodfellow, Shlens, Szegedy 2015).

    The gradient is the cross-entropy's; one gradient serves a whole list of strengths. Where it is exactly zero the
    pixel stays. The model is left as it was: mode, gradients, flags, buffers, hooks, global random streams.

    Args:
        model: maps images to logits (B, classes); runs in evaluation mode.
        images: (B, C, H, W), floating point, inside ``bounds``.
        labels: (B,) classes to move away from, or the targets if ``targeted``. None: the model's own prediction, so
            that no label leaks; if ``targeted``, another class drawn uniformly.
        eps: largest change of a pixel, in pixel units such as 8/255; a list gives a stack (len(eps), B, C, H, W). A
            tensor () on a GPU is not waited for, and not checked.
        targeted: descend towards ``labels`` instead of ascending away from them.
        bounds: range of the pixels; None if there is none.
        generator: draws the targets; None means a private one with a fixed seed.

    Returns:
        Adversarial images, in the images' shape and dtype, detached; ``eps=0`` returns the images bit for bit.

    Raises:
        TypeError: images that are not floating point, or labels that are not integers.
        ValueError: a bad strength, images that are not finite and in bounds, labels out of range, or a model without
            finite logits and input gradients.
    """
    return _one_step(model, images, labels, eps, "Linf", targeted, bounds, generator)


@takes_many_eps(labels="own")
def fgm(
    model: Model,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    eps: Eps,
    targeted: bool = False,
    bounds: Bounds = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fast gradient method in L2: ``clip(x + eps g / ||g||)`` with ``g = grad_x loss``; as ``fgsm`` in all else.

    ``eps`` bounds the L2 norm of an image's whole perturbation, in pixel units.
    """
    return _one_step(model, images, labels, eps, "L2", targeted, bounds, generator)


@takes_many_eps(labels="own")
def pgd(
    model: Model,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    eps: Eps,
    norm: Norm = "Linf",
    loss: LossName = "cross-entropy",
    steps: int = 20,
    step_size: float | None = None,
    schedule: Schedule = "constant",
    random_start: bool = True,
    restarts: int = 1,
    targeted: bool = False,
    early_stop: bool = False,
    bounds: Bounds = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient ascent on the cross-entropy or another loss (Madry et al. 2018), keeping the best iterate.

    Best is, over all restarts and iterates and the clean image: adversarial before not adversarial, then the largest
    loss, or for "scaled" the largest margin (smallest, for the target, if ``targeted``). Every iterate is judged
    exactly as it would be returned.

    Args:
        model: as in ``fgsm``, and so are ``images``, ``labels``, ``targeted`` and ``bounds``.
        images: (B, C, H, W).
        labels: (B,) or None.
        eps: radius of the ball in pixel units; a list gives a stack (len(eps), B, C, H, W), each equal to a call of
            its own with the generator in the same state.
        norm: "Linf" (steps along the gradient's sign) or "L2" (along the normalised gradient).
        loss: "cross-entropy"; or, where the logits' scale must not matter, "scaled", the cross-entropy of logits
            brought to one spread, or "dlr", the difference of logits ratio (Croce and Hein 2020), which needs 3
            classes, 4 if ``targeted``. Where logits lie a thousandth or a thousand apart the plain cross-entropy hides
            what these two find.
        steps: gradient steps in each run.
        step_size: length of a step in pixel units, of the first with "cosine"; None means ``2.5 eps / steps``, with
            "cosine" ``2 eps``: from one end of the ball to the other, as the first step of APGD (Croce and Hein 2020).
        schedule: "constant", or "cosine": steps that shrink along half a cosine towards zero, and find more
            (``**STRONG_PGD``).
        random_start: start uniformly inside the ball instead of at the image.
        restarts: runs from fresh random starts.
        targeted: descend towards ``labels``.
        early_stop: leave an image at its first adversarial iterate. The same images are broken, at less cost, but
            less deeply: keep it off for transfer attacks and training.
        bounds: range of the pixels, or None.
        generator: draws starts and targets; None means a private one with a fixed seed.

    Returns:
        Adversarial images, detached; ``eps=0`` returns the images bit for bit.

    Raises:
        TypeError: as ``fgsm``.
        ValueError: as ``fgsm``; also an unknown norm, loss or schedule, too few classes for the loss, fewer than one
            step or restart, a step size that is not positive and finite, or several restarts without a random start.
        RuntimeError: while a CUDA graph captures, with ``early_stop``, or a random start whose generator is not on the
            images' device.
    """
    if norm not in ("Linf", "L2"):
        raise ValueError(f"norm: expected 'Linf' or 'L2', got {norm!r}")
    if schedule not in ("constant", "cosine"):
        raise ValueError(f"schedule: expected 'constant' or 'cosine', got {schedule!r}")
    check_count("steps", steps)
    check_count("restarts", restarts)
    if step_size is not None:
        step_size = check_number("step_size", step_size, above=True)
    if restarts > 1 and not random_start:
        raise ValueError(f"restarts: expected 1 without random_start, got {restarts}")
    images = check_images(images, bounds)
    levels = levels_of(eps, bounds if norm == "Linf" else None)
    if early_stop:
        refuse_while_capturing("early_stop")
    if random_start and (generator is None or generator.device.type != images.device.type):
        refuse_while_capturing("random_start of a generator on the host")
    generator = private_generator(generator)
    with preserve(model):
        images = plain(images)
        clean = clean_logits(model, images)
        classes = choose_labels(labels, clean, targeted, generator)
        starts = [_unit_start(images, norm, generator) if random_start else None for _ in range(restarts)]
        objective = objective_for(loss, targeted, clean.shape[1])
        task = _Task(model, images, classes, clean, objective, norm, targeted, early_stop, bounds)
        results = []
        for level in levels:
            best = _Best(task)
            if len(images) and (isinstance(level, Tensor) or level > 0):
                for start in starts:
                    _climb(task, best, start, level, _lengths(level, steps, step_size, schedule))
            results.append(best.images)
    return one_or_stacked(results, eps)


def _one_step(
    model: Model,
    images: Tensor,
    labels: Tensor | None,
    eps: Eps,
    norm: Norm,
    targeted: bool,
    bounds: Bounds,
    generator: torch.Generator | None,
) -> Tensor:
    images = check_images(images, bounds)
    levels = levels_of(eps, bounds if norm == "Linf" else None)
    with preserve(model):
        leaf = differentiable(plain(images))
        logits = logits_of(model, leaf)
        inspect_logits(logits)
        classes = choose_labels(labels, logits, targeted, generator)
        gradient = input_gradient(logit_loss(logits, classes), leaf)
    images = leaf.detach()
    uphill = _direction(gradient.to(working_dtype(images)), norm)
    results = []
    for level in levels:
        delta = (-level if targeted else level) * uphill
        results.append(add_perturbation(images, shrink_to_ball(delta, level) if norm == "L2" else delta, bounds))
    return one_or_stacked(results, eps)


@dataclass(frozen=True)
class _Task:
    """One attack: what stays the same over strengths, restarts and steps."""

    model: Model
    images: Tensor
    labels: Tensor
    clean: Tensor  # logits (B, K)
    objective: Objective
    norm: Norm
    targeted: bool
    early_stop: bool
    bounds: Bounds

    def judge(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The attacker's gain (B,) and whether the images are adversarial (B,)."""
        loss = self.objective.ranked(logits, labels)
        return (-loss if self.targeted else loss), (logits.argmax(1) == labels) == self.targeted


class _Best:
    """The best iterate of each image so far, beginning with the clean image."""

    def __init__(self, task: _Task) -> None:
        self.images = task.images.clone()
        self.gain, self.broken = task.judge(task.clean, task.labels)

    def update(self, index: Tensor, images: Tensor, gain: Tensor, broken: Tensor) -> None:
        """Takes over those of the candidates at batch positions ``index`` that are better."""
        before, gain_before = self.broken[index], self.gain[index]
        better = (broken & ~before) | ((broken == before) & (gain > gain_before))
        self.images[index] = torch.where(per_image(better, images), images, self.images[index])
        self.gain[index] = torch.where(better, gain, gain_before)
        self.broken[index] = broken | before


def _climb(task: _Task, best: _Best, start: Tensor | None, eps: Level, lengths: Sequence[Level]) -> None:
    """One run of projected ascent from ``eps * start``, in steps of these lengths, on the images that still matter."""
    index = torch.arange(len(task.images), device=task.images.device)
    if task.early_stop:
        index = index[~best.broken]
    base = task.images[index].to(working_dtype(task.images))
    delta = torch.zeros_like(base) if start is None else eps * start[index]
    for step in range(len(lengths) + 1):
        if len(index) == 0:
            return
        delta = _project(base, delta, task.norm, eps, task.bounds)
        candidates = add_perturbation(task.images[index], delta, task.bounds)
        labels = task.labels[index]
        if step == len(lengths):
            with torch.no_grad():
                gain, broken = task.judge(logits_of(task.model, candidates), labels)
            best.update(index, candidates, gain, broken)
            return
        logits, _, gradient = ascent(task.model, candidates, labels, task.objective.climbed)
        gain, broken = task.judge(logits, labels)
        best.update(index, candidates, gain, broken)
        uphill = _direction(gradient.to(delta.dtype), task.norm)
        delta = delta + (-lengths[step] if task.targeted else lengths[step]) * uphill
        if task.early_stop:
            index, base, delta = index[~broken], base[~broken], delta[~broken]


def _lengths(eps: Level, steps: int, first: float | None, schedule: Schedule) -> list[Level]:
    """The lengths of a run's steps."""
    if schedule == "constant":
        return [first or 2.5 * eps / steps] * steps
    return [(first or 2 * eps) * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]


def _project(base: Tensor, delta: Tensor, norm: Norm, eps: Level, bounds: Bounds) -> Tensor:
    """Into the ball, then into the box: the box holds the ball's centre, so its clipping cannot leave the ball.

    The perturbation itself is clipped, not the image: an image's rounding would lengthen it.
    """
    # Both ends are numbers or both tensors.
    delta = delta.clamp(-eps, eps) if norm == "Linf" else shrink_to_ball(delta, eps)  # type: ignore[arg-type]
    return delta if bounds is None else delta.clamp(bounds[0] - base, bounds[1] - base)


def _direction(gradient: Tensor, norm: Norm) -> Tensor:
    """Steepest ascent for a step of unit norm; zero where the gradient is zero."""
    if norm == "Linf":
        return gradient.sign()
    # Scaled first: squares of tiny gradients would underflow.
    peak = per_image(gradient.abs().flatten(1).amax(1), gradient)
    scaled = gradient / torch.where(peak > 0, peak, torch.ones_like(peak))
    length = norms(scaled)
    return scaled / per_image(torch.where(length > 0, length, torch.ones_like(length)), scaled).to(scaled.dtype)


def _unit_start(images: Tensor, norm: Norm, generator: torch.Generator) -> Tensor:
    """A uniform draw from the unit ball for each image, the same for every strength."""
    shape, device, dtype = images.shape, generator.device, working_dtype(images)
    if norm == "Linf":
        return (2 * torch.rand(shape, generator=generator, device=device, dtype=dtype) - 1).to(images.device)
    gauss = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    radius = torch.rand(len(images), generator=generator, device=device, dtype=dtype) ** (1 / math.prod(shape[1:]))
    return (per_image(radius, gauss) * _direction(gauss, "L2")).to(images.device)
