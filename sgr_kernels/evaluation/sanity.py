"""Is a measured robustness real? Smoothness defences are often over-sold: checks for the usual ways to fool oneself.

Strong attacks of other projects complement this report: AutoAttack (``sgr_kernels.evaluation.autoattack``), and those
below. They take a model of ours as it is, because it maps pixels in [0, 1] to logits; put it in evaluation mode first.
With images (B, C, H, W) and labels (B,) on the model's device:

torchattacks::

    import torchattacks

    adversarial = torchattacks.APGD(model, norm="Linf", eps=8 / 255)(images, labels)

Foolbox::

    import foolbox

    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
    attack = foolbox.attacks.LinfProjectedGradientDescentAttack()
    raw, clipped, success = attack(wrapped, images, labels, epsilons=[4 / 255, 8 / 255])
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sgr_kernels.attacks.gradient import pgd
from sgr_kernels.attacks.guard import Model, model_device, preserve
from sgr_kernels.attacks.inputs import check_images, private_generator
from sgr_kernels.attacks.levels import Bounds, check_eps
from sgr_kernels.attacks.noise import uniform_noise
from sgr_kernels.attacks.objective import (
    ascent,
    choose_labels,
    clean_logits,
    differentiable,
    input_gradient,
    logit_loss,
    logits_of,
)
from sgr_kernels.checks import check_count, check_number
from sgr_kernels.evaluation.curves import wilson_interval
from sgr_kernels.evaluation.loaders import Loader, first_images
from sgr_kernels.evaluation.planted import planted_examples

NOISE_DRAWS = 50
PLANTED_IMAGES = 32


@dataclass(frozen=True)
class Check:
    """One question asked of an evaluation.

    Attributes:
        name: what a sound evaluation shows.
        passed: the answer; None if the check could not be made.
        value: the figure that decided it, if there is one.
        detail: what was measured and what it means.
    """

    name: str
    passed: bool | None
    value: float | None
    detail: str


@dataclass(frozen=True)
class SanityReport:
    """All checks on one model.

    Attributes:
        eps: radius of the L-infinity ball.
        images: how many images were used.
        clean_accuracy: without an attack.
        accuracy: under the report's PGD on the true labels.
        checks: one for each question.
    """

    eps: float
    images: int
    clean_accuracy: float
    accuracy: float
    checks: list[Check]

    @property
    def passed(self) -> bool:
        """No check failed."""
        return all(check.passed is not False for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        """One line a check."""
        mark = {True: "ok", False: "FAILED", None: "skipped"}
        accuracies = f"accuracy {self.clean_accuracy:.1%}, under PGD {self.accuracy:.1%}"
        lines = [f"{mark[check.passed]:>8}  {check.name}: {check.detail}" for check in self.checks]
        return "\n".join([f"{self.images} images, eps {self.eps:.4g}: {accuracies}", *lines])


def sanity_report(
    model: Model,
    loader: Loader,
    *,
    eps: float,
    surrogate: Model | None = None,
    steps: int = 20,
    max_images: int = 128,
    bounds: Bounds = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> SanityReport:
    """Asks whether the accuracy of a model under PGD in L-infinity can be believed.

    Checked are: input gradients are there and predict the loss; the forward pass is deterministic; PGD is at least as
    strong as random noise and as attacks carried over from a surrogate; neither the logits' scale nor too few
    iterations hide anything; nothing survives a ball that holds every image; and adversarial examples planted on
    purpose are found. All attacks start from the true labels. A report that passes is no proof of robustness; one that
    fails says that PGD accuracies of this model must not be trusted.

    Args:
        model: maps images to logits (B, classes); runs in evaluation mode and is left as it was.
        loader: yields (images, labels); read until ``max_images`` are found.
        eps: radius of the ball in pixel units.
        surrogate: another model of the same task, for transferred attacks; None skips that check.
        steps: iterations of PGD.
        max_images: images to use.
        bounds: range of the pixels; None skips the check with the largest ball.
        generator: source of all random numbers; None means a private one with a fixed seed.

    Raises:
        TypeError: as the attacks.
        ValueError: as the attacks, or an empty loader.
    """
    check_number("eps", eps)
    (eps,) = check_eps(eps, bounds)
    check_count("steps", steps)
    check_count("max_images", max_images)
    generator = private_generator(generator)
    images, labels = first_images(loader, max_images, model_device(model))
    images = check_images(images, bounds)
    with preserve(model):
        clean = clean_logits(model, images)
        labels = choose_labels(labels, clean)
        repeated = clean_logits(model, images)
    count, classes = clean.shape
    attack = functools.partial(pgd, steps=steps, bounds=bounds)

    def survivors(attack: Callable[..., Tensor], eps: float = eps, source: Model = model) -> float:
        adversarial = attack(source, images, labels, eps=eps, generator=generator)
        with preserve(model), torch.no_grad():
            return float((logits_of(model, adversarial).argmax(1) == labels).double().mean())

    accuracy = survivors(attack)
    checks = [
        *_gradients(model, images, labels, eps),
        _deterministic(clean, repeated),
        _no_better(
            "PGD is stronger than noise",
            f"the worst of {NOISE_DRAWS} uniform draws",
            survivors(functools.partial(uniform_noise, draws=NOISE_DRAWS, bounds=bounds)),
            accuracy,
            count,
        ),
        Check("PGD is stronger than transfer", None, None, "no surrogate given")
        if surrogate is None
        else _no_better(
            "PGD is stronger than transfer",
            "PGD on the surrogate",
            survivors(attack, source=surrogate),
            accuracy,
            count,
        ),
        _scale_free(
            clean,
            accuracy,
            {
                loss: survivors(functools.partial(attack, loss=loss))
                for loss in ("scaled", "dlr")
                if classes > 2 or loss == "scaled"
            },
        ),
        _converged(accuracy, survivors(functools.partial(pgd, steps=5 * steps, bounds=bounds)), steps, count),
        Check("nothing survives the full range", None, None, "no bounds given")
        if bounds is None
        else _full_range(survivors(attack, eps=bounds[1] - bounds[0]), count, classes),
        _planted(model, images[:PLANTED_IMAGES], attack, eps, bounds, generator),
    ]
    return SanityReport(eps, count, float((clean.argmax(1) == labels).double().mean()), accuracy, checks)


def _gradients(model: Model, images: Tensor, labels: Tensor, eps: float) -> list[Check]:
    """Are there gradients, and does the loss follow them? A tenth of eps along the sign, both ways."""
    step = eps / 10
    with preserve(model):
        gradient = ascent(model, images, labels).gradient
        leaf = differentiable(images)
        plain_gradient = input_gradient(cross_entropy(logits_of(model, leaf), labels, reduction="none"), leaf)
        with torch.no_grad():
            up, down = (
                logit_loss(logits_of(model, images + side * step * gradient.sign()), labels) for side in (1, -1)
            )
    slope = gradient.double().abs().flatten(1).sum(1)
    zero = float((slope == 0).double().mean())
    underflow = float((plain_gradient.flatten(1) == 0).all(1).double().mean())
    detail = (
        f"{zero:.1%} of the images have an input gradient of zero "
        f"({underflow:.1%} for attacks on the plain cross-entropy, which rounds to zero for confident models)"
    )
    checks = [Check("gradients are there", zero <= 0.01, zero, detail)]
    usable = (slope > 0) & (eps > 0)
    if not bool(usable.any()):
        return [*checks, Check("the loss follows its gradient", None, None, "no gradient to follow, or eps is zero")]
    ratio = float(((up - down).double() / (2 * step * slope))[usable].median())
    detail = f"along the gradient's sign the loss changes {ratio:.2f} times as much as the gradient says (median)"
    return [*checks, Check("the loss follows its gradient", 0.5 <= ratio <= 2, ratio, detail)]


def _deterministic(first: Tensor, second: Tensor) -> Check:
    difference = float((first - second).abs().max() / first.abs().max().clamp_min(1e-12))
    detail = f"two passes over the same images differ by {difference:.1e} of the largest logit"
    return Check("the forward pass is deterministic", difference <= 1e-4, difference, detail)


def _no_better(name: str, rival: str, rival_accuracy: float, accuracy: float, count: int) -> Check:
    """A single image may go either way."""
    detail = f"accuracy {accuracy:.1%} under PGD, {rival_accuracy:.1%} under {rival}"
    return Check(name, round((accuracy - rival_accuracy) * count) <= 1, rival_accuracy, detail)


def _scale_free(clean: Tensor, accuracy: float, others: dict[str, float]) -> Check:
    """Losses that do not see the logits' scale; a sound cross-entropy may do a little worse than they."""
    best = min(others, key=lambda loss: others[loss])
    highest = clean.topk(min(3, clean.shape[1]), dim=1).values
    spread = float((highest[:, 0] - highest[:, -1]).median())
    detail = f"accuracy {accuracy:.1%} under PGD on the cross-entropy, {others[best]:.1%} with loss={best!r}"
    passed = round((accuracy - others[best]) * len(clean)) <= max(1, 0.05 * len(clean))
    if not passed:
        detail += (
            f": the cross-entropy misses what is there; the largest logits lie {spread:.1e} apart (usual: 1 to 100). "
            f"Attack with pgd(..., loss={best!r}) or AutoAttack, or scale the logits first"
        )
    return Check("the logits' scale hides nothing", passed, others[best], detail)


def _converged(accuracy: float, longer: float, steps: int, count: int) -> Check:
    detail = f"accuracy {accuracy:.1%} after {steps} iterations, {longer:.1%} after {5 * steps}"
    gained = round((accuracy - longer) * count)
    return Check("more iterations gain nothing", gained <= max(1, 0.02 * count), longer, detail)


def _full_range(accuracy: float, count: int, classes: int) -> Check:
    lower, _ = wilson_interval(round(accuracy * count), count)
    detail = f"accuracy {accuracy:.1%} in a ball that holds every image; chance is {1 / classes:.1%}"
    return Check("nothing survives the full range", lower <= 1 / classes, accuracy, detail)


def _planted(
    model: Model,
    images: Tensor,
    attack: Callable[..., Tensor],
    eps: float,
    bounds: Bounds,
    generator: torch.Generator,
) -> Check:
    name = "planted examples are found"
    if eps == 0:
        return Check(name, None, None, "eps is zero")
    result = planted_examples(model, images, attack, eps=eps, bounds=bounds, generator=generator)
    if not result.tested:
        return Check(name, None, None, "no readout of the features separates a corner of the ball from its inside")
    detail = (
        f"{result.found} of {result.tested} planted adversarial examples found "
        f"({result.by_chance:.1%} of random points hit one)"
    )
    return Check(name, result.rate >= 0.9 and math.isfinite(result.by_chance), result.rate, detail)
