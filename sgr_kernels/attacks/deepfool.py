"""DeepFool: the nearest decision boundary by repeated linearisation, batched over images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sgr_kernels.attacks.guard import Model, plain, preserve
from sgr_kernels.attacks.inputs import check_images, norms, per_image, refuse_while_capturing, working_dtype
from sgr_kernels.attacks.levels import Bounds
from sgr_kernels.attacks.objective import (
    choose_labels,
    differentiable,
    input_gradient,
    inspect_logits,
    logits_of,
)
from sgr_kernels.checks import check_count, check_number

ConventionName = Literal["cleverhans", "authors", "foolbox"]


@dataclass(frozen=True)
class _Convention:
    """Where the published implementations differ."""

    logit_slack: float  # added to |f_k| before dividing by ||w_k||
    length_slack: float  # added to the step's length
    reranked: bool  # candidate classes chosen anew at every iterate
    overshoot_inside: bool  # iterates are overshot already, not only the result
    clipped: bool  # iterates and result are clipped to the bounds


_CONVENTIONS: dict[str, _Convention] = {
    "cleverhans": _Convention(1e-5, 0.0, reranked=True, overshoot_inside=False, clipped=True),
    "authors": _Convention(0.0, 1e-4, reranked=False, overshoot_inside=True, clipped=False),
    "foolbox": _Convention(0.0, 1e-4, reranked=False, overshoot_inside=True, clipped=True),
}


def deepfool(
    model: Model,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    overshoot: float = 0.02,
    max_iterations: int = 50,
    candidates: int = 10,
    convention: ConventionName = "cleverhans",
    bounds: Bounds = (0.0, 1.0),
) -> Tensor:
    """DeepFool in L2 (Moosavi-Dezfooli, Fawzi, Frossard 2016).

    While an image keeps its class y, it takes the shortest step ``|f_k| / ||w_k|| * w_k / ||w_k||`` over the
    candidate classes k, with ``f_k = z_k - z_y`` and ``w_k = grad_x f_k``; the result is
    ``x + (1 + overshoot) * (sum of the steps)``. An image that nothing moves (all ``w_k`` zero) is left where it is.

    Args:
        model: maps images to logits (B, classes); left as it was.
        images: (B, C, H, W), floating point, inside ``bounds``.
        labels: (B,) reference classes; None: the model's own prediction, as in the paper's figure. Images already
            classified otherwise are returned unchanged.
        overshoot: relative length added to get across the boundary.
        max_iterations: linearisations at most.
        candidates: the most likely classes that are considered, the reference included.
        convention: "cleverhans" (version 3.1: candidates ranked anew at every iterate, 1e-5 added to ``|f_k|``,
            overshoot once, at the end), "authors" (initial ranking, 1e-4 added to the step's length, every iterate
            overshot, no clipping), or "foolbox" (the authors', clipped).
        bounds: range of the pixels, or None.

    Returns:
        Perturbed images, detached, in the images' shape and dtype.

    Raises:
        TypeError: as ``fgsm``.
        ValueError: bad images or labels, as ``fgsm``, a negative overshoot, or an unknown convention.
    """
    if convention not in _CONVENTIONS:
        raise ValueError(f"convention: expected one of {sorted(_CONVENTIONS)}, got {convention!r}")
    overshoot = check_number("overshoot", overshoot)
    check_count("max_iterations", max_iterations, least=0)
    check_count("candidates", candidates, least=2)
    refuse_while_capturing("deepfool")
    images = check_images(images, bounds)
    rules = _CONVENTIONS[convention]
    limits = bounds if rules.clipped else None
    inside = 1 + overshoot if rules.overshoot_inside else 1.0

    with preserve(model):
        images = plain(images)
        base = images.to(working_dtype(images))
        total = torch.zeros_like(base)
        active = torch.arange(len(images), device=images.device)
        classes = ranking = None
        for _ in range(max_iterations):
            if len(active) == 0:
                break
            leaf = differentiable(_moved(base[active], inside * total[active], limits).to(images.dtype))
            logits = logits_of(model, leaf)
            if classes is None or ranking is None:
                inspect_logits(logits)
                classes = choose_labels(labels, logits)
                ranking = _rank(logits, classes, candidates)
            unbroken = logits.argmax(1) == classes[active]
            if not bool(unbroken.all()):
                # The forward pass is repeated for the images that remain, so that the backward passes shrink too.
                active = active[unbroken]
                if len(active) == 0:
                    break
                leaf = differentiable(leaf.detach()[unbroken])
                logits = logits_of(model, leaf)
            others = _rank(logits, classes[active], candidates) if rules.reranked else ranking[active]
            step = _shortest_step(logits, leaf, classes[active], others, rules)
            moving = norms(step) > 0
            total[active] += step.to(total.dtype)
            active = active[moving]
        return _moved(base, (1 + overshoot) * total, limits).to(images.dtype)


def relative_norm(images: Tensor, adversarial: Tensor) -> Tensor:
    """``||r|| / ||x||`` for each image, (B,) in float64: DeepFool's figure of merit is its mean.

    An unperturbed image gives 0 and a perturbed all-zero image gives infinity, never NaN.
    """
    if images.shape != adversarial.shape:
        raise ValueError(f"adversarial: expected shape {tuple(images.shape)}, got {tuple(adversarial.shape)}")
    moved = norms(adversarial.double() - images.double())
    return torch.where(moved == 0, moved, moved / norms(images))


def _moved(base: Tensor, delta: Tensor, bounds: Bounds) -> Tensor:
    return base + delta if bounds is None else (base + delta).clamp(*bounds)


def _rank(logits: Tensor, classes: Tensor, candidates: int) -> Tensor:
    """The most likely classes beside the reference, (B, candidates - 1), best first."""
    others = logits.detach().scatter(1, classes.unsqueeze(1), float("-inf"))
    return others.topk(min(candidates, logits.shape[1]) - 1, dim=1).indices


def _shortest_step(logits: Tensor, leaf: Tensor, classes: Tensor, others: Tensor, rules: _Convention) -> Tensor:
    """The step to the nearest of the linearised boundaries, zero where no candidate has a slope."""
    reference = logits.gather(1, classes.unsqueeze(1))
    shortest = torch.full((len(leaf),), float("inf"), dtype=torch.float64, device=leaf.device)
    step = torch.zeros_like(leaf, dtype=working_dtype(leaf))
    for k in range(others.shape[1]):
        gap = (logits.gather(1, others[:, k : k + 1]) - reference).squeeze(1)
        slope = input_gradient(gap, leaf, retain_graph=True).to(step.dtype)
        length = norms(slope)
        distance = (gap.detach().abs() + rules.logit_slack) / length
        # Zero slopes give an infinite distance, or NaN for identical logits: neither is ever shorter.
        shorter = distance < shortest
        unit = slope * per_image((distance + rules.length_slack) / length, slope).to(slope.dtype)
        step = torch.where(per_image(shorter, step), unit, step)
        shortest = torch.where(shorter, distance, shortest)
    return step
