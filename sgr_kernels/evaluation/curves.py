"""Accuracy against the strength of an attack, with work shared between strengths."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import torch
from torch import Tensor

from sgr_kernels.attacks.guard import Model, model_device, preserve, random_streams
from sgr_kernels.attacks.inputs import check_labels, private_generator
from sgr_kernels.attacks.levels import check_eps, traits_of
from sgr_kernels.attacks.objective import clean_logits
from sgr_kernels.evaluation.loaders import Loader, batches

Attack = Callable[..., Tensor]
LabelSource = Literal["auto", "own", "true"]


@dataclass(frozen=True)
class RobustnessCurve:
    """Which images are classified correctly under an attack, for each strength.

    Attributes:
        eps: the strengths, as given.
        correct: (len(eps), n), bool, on the CPU, images in the loader's order; False is the attack's success.
        clean: (n,), bool: correct without any attack.
        attack: name of the attack.
        labels: "own" or "true": what the attack was given to start from. Accuracy always counts true labels.
    """

    eps: list[float]
    correct: Tensor
    clean: Tensor
    attack: str
    labels: Literal["own", "true"]

    @property
    def accuracy(self) -> list[float]:
        """Fraction of images classified correctly, for each strength."""
        return [count / self.correct.shape[1] for count in self.correct.sum(1).tolist()]

    @property
    def clean_accuracy(self) -> float:
        """Fraction of images classified correctly without any attack."""
        return float(self.clean.double().mean())

    @property
    def area(self) -> float:
        """Mean accuracy over the grid of strengths, the figure in the cells of the paper's tables."""
        return sum(self.accuracy) / len(self.eps)

    def interval(self, confidence: float = 0.95) -> list[tuple[float, float]]:
        """Wilson interval of the accuracy, for each strength."""
        n = self.correct.shape[1]
        return [wilson_interval(count, n, confidence) for count in self.correct.sum(1).tolist()]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the masks, ready for JSON."""
        return {
            "attack": self.attack,
            "labels": self.labels,
            "images": self.correct.shape[1],
            "clean_accuracy": self.clean_accuracy,
            "eps": self.eps,
            "accuracy": self.accuracy,
            "interval95": [list(interval) for interval in self.interval()],
            "area": self.area,
        }


def robustness_curve(
    model: Model,
    loader: Loader,
    attack: Attack,
    eps: Sequence[float],
    generator: torch.Generator | None = None,
    *,
    labels: LabelSource = "auto",
) -> RobustnessCurve:
    """Accuracy of a model under an attack on it, for each strength.

    Work is shared between the strengths, yet the result is exactly that of a separate curve for each of them: they
    see the same random numbers, and every forward pass has the same batch. For white-box curves of PGD,
    ``functools.partial(pgd, early_stop=True)`` is enough and costs less.

    Args:
        model: maps images to logits (B, classes); left as it was.
        loader: yields (images, labels) with images (B, C, H, W) in the attack's bounds and true labels (B,), and
            perhaps more, which is ignored; batches are moved to the model's device.
        attack: called as ``attack(model, images, labels, eps=..., generator=...)`` and returns adversarial images;
            those of ``sgr_kernels.attacks``, also inside ``functools.partial``, take all strengths at once.
        eps: strengths in the attack's units.
        generator: source of the attack's random numbers, advanced as by one curve of a single strength; None means a
            private one with a fixed seed.
        labels: what the attack is given: "true" labels, or None for the model's "own" prediction. "auto": own for
            the gradient attacks of this package, so that no label leaks, and true for everything else.

    Raises:
        ValueError: a bad strength, an empty loader, labels out of range, and what the attack raises.
    """
    return transfer_curves(model, {"model": model}, loader, attack, eps, generator, labels=labels)["model"]


def transfer_curves(
    source: Model,
    targets: Mapping[str, Model],
    loader: Loader,
    attack: Attack,
    eps: Sequence[float],
    generator: torch.Generator | None = None,
    *,
    labels: LabelSource = "auto",
) -> dict[str, RobustnessCurve]:
    """Accuracies of several models under an attack on ``source``, one set of adversarial images for all of them.

    Arguments as for ``robustness_curve``; ``targets`` are the models that classify, by name.

    Returns:
        One curve for each target, under its name.
    """
    levels = check_eps(eps)
    if labels not in ("auto", "own", "true"):
        raise ValueError(f"labels: expected 'auto', 'own' or 'true', got {labels!r}")
    traits = traits_of(attack)
    given: Literal["own", "true"] = (traits.labels if traits else "true") if labels == "auto" else labels
    generator = private_generator(generator)
    # An unknown attack may draw as much as it likes, so each strength has a stream of its own.
    streams = [generator] if traits else [generator, *(generator.clone_state() for _ in levels[1:])]
    clean: dict[str, list[Tensor]] = {name: [] for name in targets}
    correct: dict[str, list[Tensor]] = {name: [] for name in targets}
    device = model_device(source)
    # Shuffling loaders and models with random numbers draw from the global streams.
    with random_streams(source, *targets.values()):
        for images, truth in batches(loader, device):
            start = None if given == "own" else truth
            with preserve(source):
                adversarial: Iterable[Tensor]
                if traits:
                    adversarial = attack(source, images, start, eps=levels, generator=streams[0])
                else:
                    runs = zip(levels, streams)
                    # Tensors of its own for each run: some attacks write into what they are given.
                    adversarial = [
                        attack(source, images.clone(), _copied(start), eps=e, generator=stream) for e, stream in runs
                    ]
            for name, target in targets.items():
                unperturbed = correct_answers(target, images, truth)
                clean[name].append(unperturbed)
                rows = [
                    unperturbed if torch.equal(perturbed, images) else correct_answers(target, perturbed, truth)
                    for perturbed in adversarial
                ]
                correct[name].append(torch.stack(rows))
    title = _name_of(attack)
    return {
        name: RobustnessCurve(levels, torch.cat(correct[name], dim=1), torch.cat(clean[name]), title, given)
        for name in targets
    }


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a binomial proportion.

    Raises:
        ValueError: no trials, or a confidence outside (0, 1).
    """
    if trials < 1:
        raise ValueError(f"trials: expected at least one, got {trials}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number inside (0, 1), got {confidence}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / trials
    centre = p + z * z / (2 * trials)
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def correct_answers(model: Model, images: Tensor, truth: Tensor) -> Tensor:
    """Which of a batch's images a model, left as it was, classifies as the true labels say: (B,), bool, on the CPU."""
    with preserve(model):
        logits = clean_logits(model, images)
    check_labels(truth, len(images), logits.shape[1])
    return (logits.argmax(1) == truth).cpu()


def _copied(labels: Tensor | None) -> Tensor | None:
    return None if labels is None else labels.clone()


def _name_of(attack: Attack) -> str:
    while isinstance(attack, functools.partial):
        attack = attack.func
    return getattr(attack, "__name__", type(attack).__name__)
