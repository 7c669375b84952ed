"""The search for a penalty's strength: the most robustness that costs no accuracy to speak of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from sgr_kernels.attacks import correlated_noise, pgd
from sgr_kernels.checks import check_number
from sgr_kernels.covariance import CovarianceFunction
from sgr_kernels.evaluation.curves import robustness_curve
from sgr_kernels.training.batches import Batches
from sgr_kernels.training.images import DataSet, Indexed
from sgr_kernels.training.methods import METHODS, Settings
from sgr_kernels.training.trained import accuracy

STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
TOLERANCE = 0.01

Attack = Literal["pgd", "noise"]


@dataclass(frozen=True)
class Trial:
    """One strength.

    Attributes:
        strength: lambda, at the data's own variance.
        accuracy: On the validation images, without an attack.
        area: Mean accuracy over the attack's strengths.
        allowed: Whether the accuracy is within the tolerance of plain training's.
    """

    strength: float
    accuracy: float
    area: float
    allowed: bool


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        method: The method searched for.
        attack: The attack whose curve decides.
        clean_accuracy: Of plain training.
        clean_area: Of plain training, under the attack.
        trials: One for each strength, ascending.
        strength: The one chosen.
    """

    method: str
    attack: str
    clean_accuracy: float
    clean_area: float
    trials: list[Trial]
    strength: float

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def strength_search(
    settings: Settings,
    strengths: Sequence[float],
    validation: Indexed,
    train: Callable[[Sequence[Settings]], Sequence[nn.Module]],
    area: Callable[[nn.Module], float],
    *,
    attack: str = "pgd",
    tolerance: float = TOLERANCE,
    device: torch.device | str = "cpu",
) -> Search:
    """The strength with the largest area under the attack curve, at no loss of accuracy beyond the tolerance.

    Where every strength loses more than that, the most accurate one is chosen.

    Args:
        settings: What to train; its strength is replaced.
        strengths: To try, each > 0.
        validation: Images that decide. They must not be test images, nor among those trained on.
        train: Settings to trained networks, all at once; asked for plain training too.
        area: A network's mean accuracy over the attack's strengths (`attack_area`).
        attack: The attack's name, for the record.
        tolerance: Loss of accuracy allowed, relative to plain training.
        device: Where the networks are.

    Raises:
        ValueError: if there are no strengths, or the method has none.
    """
    ascending = sorted(check_number("strengths", strength, above=True) for strength in strengths)
    if not ascending:
        raise ValueError("strengths: expected at least one, got none")
    if not METHODS[settings.method].penalized:
        raise ValueError(f"method {settings.method!r} has no strength to search for")
    batches = Batches(validation, 100, device=device)

    plain = replace(
        settings, method="clean", strength=0.0, perturbation="sign", corruption=None, severity=Settings.severity
    )
    models = train([plain, *(replace(settings, strength=strength) for strength in ascending)])
    (clean_accuracy, clean_area), *measured = [(accuracy(model, batches), area(model)) for model in models]
    trials = [
        Trial(strength, found, robust, found >= clean_accuracy - tolerance)
        for strength, (found, robust) in zip(ascending, measured, strict=True)
    ]
    return Search(settings.method, attack, clean_accuracy, clean_area, trials, choose(trials))


def choose(trials: Sequence[Trial]) -> float:
    """The strength that the rule picks; of equals the smallest."""
    allowed = [trial for trial in trials if trial.allowed]
    if allowed:
        return max(allowed, key=lambda trial: trial.area).strength
    return max(trials, key=lambda trial: trial.accuracy).strength


def attack_area(
    model: nn.Module,
    images: Indexed,
    attack: Attack,
    eps: Sequence[float],
    *,
    steps: int = 20,
    decay_length: float = 16.0,
    draws: int = 10,
    device: torch.device | str = "cpu",
) -> float:
    """Mean accuracy under PGD, or under the worst of several draws of exponentially correlated noise.

    Args:
        model: Images in [0, 1] to logits.
        images: To attack.
        attack: ``"pgd"`` or ``"noise"``.
        eps: Strengths: in pixel units, or in units of each image's standard deviation.
        steps: Of PGD.
        decay_length: Of the noise, in pixels.
        draws: Of the noise.
        device: Where the network is.
    """
    batches = Batches(images, 100, device=device)
    if attack == "pgd":
        return robustness_curve(model, batches, partial(pgd, steps=steps, early_stop=True), eps).area
    channels, height, width = images.shape
    covariance = CovarianceFunction.exponential(channels, (height, width), decay_length).to(device)
    noise = partial(correlated_noise, covariance=covariance, draws=draws, clip=False)
    return robustness_curve(model, batches, noise, eps).area


def held_out(data: DataSet, train_images: int | None, validation_images: int) -> DataSet:
    """Training images, and in place of the test images the last ones of the training set: nothing is in both.

    Raises:
        ValueError: if the training set is too small for both.
    """
    rest = len(data.train) - validation_images
    if rest < 1 or (train_images is not None and train_images > rest):
        raise ValueError(
            f"the {len(data.train)} training images do not suffice for {validation_images} validation images "
            f"and {train_images or 'any'} to train on"
        )
    return DataSet(data.train.first(rest).first(train_images), data.train.part(slice(rest, None)))
