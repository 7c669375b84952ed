"""The standard evaluation of a classifier: gradient attacks by strength, correlated noise by decay length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from sgr_kernels.attacks import STRONG_PGD, correlated_noise, fgsm, pgd
from sgr_kernels.attacks.guard import model_device, random_streams
from sgr_kernels.attacks.inputs import seeded
from sgr_kernels.covariance import CovarianceFunction
from sgr_kernels.evaluation.curves import LabelSource, RobustnessCurve, robustness_curve
from sgr_kernels.evaluation.loaders import Loader, batches

PIXEL_LEVELS = 255

# Strengths in grey levels: the paper's ranges.
EPS_GRIDS = {"mnist": tuple(range(0, 33, 4)), "cifar10": tuple(range(9))}
DECAY_LENGTHS = (1.0, 2.0, 4.0, 8.0, 16.0)


def like_mnist(shape: Sequence[int]) -> bool:
    """Whether images of a shape (C, H, W) are taken to be bright strokes on black, as MNIST's, not photographs."""
    return tuple(shape) == (1, 28, 28)


def eps_grid(shape: Sequence[int]) -> tuple[int, ...]:
    """Strengths of attacks, in grey levels, for images of a shape (C, H, W): MNIST's for its own, else CIFAR-10's."""
    return EPS_GRIDS["mnist" if like_mnist(shape) else "cifar10"]


@dataclass(frozen=True)
class Plan:
    """What to attack with.

    Attributes:
        eps: Strengths of FGSM and PGD, in grey levels (units of 1/255).
        pgd_steps: Steps of PGD.
        decay_lengths: Of the correlated noise exp(-r / decay length), in pixels.
        noise_eps: Its strengths, in units of the image's own standard deviation.
        draws: Draws of noise for each image, of which the worst counts.
        clip_noise: Clip noisy images to [0, 1]. On a black background that removes half of the noise and changes its
            covariance; a network that standardizes its input needs no clipping.
        seed: Of random starts and noise.
        labels: What FGSM and PGD start from: ``"true"`` labels, or the model's ``"own"`` answers, as the paper has it;
            then images that were misclassified may count as right under attack. ``"auto"`` is ``"own"``.
        strong_pgd: PGD at its strongest (`sgr_kernels.attacks.STRONG_PGD`) besides, at a dozen times the cost.
    """

    eps: Sequence[float]
    pgd_steps: int = 20
    decay_lengths: Sequence[float] = DECAY_LENGTHS
    noise_eps: Sequence[float] = (0.3,)
    draws: int = 100
    clip_noise: bool = False
    seed: int = 0
    labels: LabelSource = "auto"
    strong_pgd: bool = False


@dataclass(frozen=True)
class Evaluation:
    """Results of a plan on one model.

    Attributes:
        clean: Accuracy without any attack: a curve of the one strength 0.
        attacks: ``"fgsm"``, ``"pgd"`` and, where it was asked for, ``"strong pgd"``, strengths in grey levels.
        noise: Correlated noise, by decay length.
    """

    clean: RobustnessCurve
    attacks: dict[str, RobustnessCurve]
    noise: dict[float, RobustnessCurve]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "units": {"attacks": "pixels in [0, 1]", "noise": "the image's standard deviation"},
            "clean": self.clean.to_dict(),
            "attacks": {name: curve.to_dict() for name, curve in self.attacks.items()},
            "noise": {f"{length:g}": curve.to_dict() for length, curve in self.noise.items()},
        }


def evaluate(
    model: nn.Module,
    loader: Loader,
    plan: Plan,
    *,
    on_part: Callable[[str], None] = lambda part: None,
) -> Evaluation:
    """Attack a model by plan.

    Args:
        model: Images (B, C, H, W) in [0, 1] to logits.
        loader: Batches (images, labels); gone through several times, each time the same. About 100 images in a batch
            are fastest on a CPU: larger intermediate results are returned to the system after each operation.
        plan: Which attacks.
        on_part: Called with the name of each part as it begins.

    Returns:
        One curve for each attack. All decay lengths see the same standard normal draws.
    """
    with random_streams(model):
        images, _ = next(batches(loader, model_device(model)))
    channels, height, width = images.shape[1:]

    def curve(attack: Callable[..., Tensor], eps: Sequence[float], labels: LabelSource = "auto") -> RobustnessCurve:
        generator = seeded(plan.seed)
        return robustness_curve(model, loader, attack, list(eps), generator, labels=labels)

    on_part("clean")
    clean = curve(fgsm, [0.0])
    attacks = {}
    gradient_attacks: dict[str, Callable[..., Tensor]] = {
        "fgsm": fgsm,
        "pgd": partial(pgd, steps=plan.pgd_steps, early_stop=True),
    }
    if plan.strong_pgd:
        gradient_attacks["strong pgd"] = partial(pgd, early_stop=True, **STRONG_PGD)
    for name, gradient_attack in gradient_attacks.items():
        on_part(name)
        attacks[name] = curve(gradient_attack, [level / PIXEL_LEVELS for level in plan.eps], plan.labels)
    noise = {}
    for length in plan.decay_lengths:
        on_part(f"noise {length:g}")
        covariance = CovarianceFunction.exponential(channels, (height, width), length).to(images.device)
        attack = partial(
            correlated_noise,
            covariance=covariance,
            draws=plan.draws,
            clip=plan.clip_noise,
            chunk_size=2 * len(images),
        )
        noise[length] = curve(attack, plan.noise_eps)
    return Evaluation(clean, attacks, noise)


def parts(plan: Plan) -> int:
    """How often ``evaluate`` calls ``on_part``."""
    return 3 + plan.strong_pgd + len(plan.decay_lengths)
