"""The answers of a network to noisy copies of images, counted: what certificates are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sgr_kernels.attacks.guard import Model, model_device, plain, preserve
from sgr_kernels.attacks.inputs import check_labels, child_generator, working_dtype
from sgr_kernels.attacks.objective import clean_logits, logits_of
from sgr_kernels.checks import check_count, check_number, number
from sgr_kernels.covariance import Covariance

DRAWS_AT_ONCE = 100
"""Draws that are made together; fixed, so that none depends on ``chunk_size``."""

Row = tuple[int, list[int]]
"""What is counted of an image: the class selected, and how many certifying draws each class got."""


@dataclass(frozen=True)
class Settings:
    """The numbers of `certify`.

    Raises:
        ValueError: one is out of range.
    """

    sigma: float
    draws: int
    selection: int
    alpha: float
    chunk_size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma", check_number("sigma", self.sigma, above=True))
        alpha = number("alpha", self.alpha, "a number inside (0, 1)", lambda x: 0 < x < 1)
        object.__setattr__(self, "alpha", alpha)
        for name in ("draws", "selection", "chunk_size"):
            check_count(name, getattr(self, name))
        needed = fewest_draws(self.alpha)
        if self.draws < needed:
            raise ValueError(
                f"draws: expected at least {needed}, got {self.draws}: with fewer, no certificate reaches "
                f"alpha = {self.alpha:g}, even where all draws agree"
            )


def fewest_draws(alpha: float) -> int:
    """Draws that, all alike, show a probability above 1/2 at level ``1 - alpha``."""
    return math.floor(math.log(alpha) / math.log(0.5)) + 1


def count_answers(
    model: Model,
    images: Tensor,
    labels: Tensor | None,
    covariance: Covariance,
    settings: Settings,
    generator: torch.Generator,
    on_row: Callable[[int, Row], None],
    done: int = 0,
) -> None:
    """Count the answers to noisy copies of checked images, one after the other, after the first ``done``.

    An image's noise depends on the generator's state and on how many images came before, and on nothing else.
    ``on_row`` is called with each image's number and row; the ``done`` images are left out, their numbers passed over.
    Other arguments, and errors, as for `certify`.
    """
    if not len(images):
        raise ValueError("images: expected at least one image, got none")
    with preserve(model):
        images = plain(images)
        home = model_device(covariance) or images.device
        probe = plain(covariance.sample(2, generator=torch.Generator(home).manual_seed(0)))
        if probe.shape[1:] != images.shape[1:]:
            expected, found = tuple(images.shape[1:]), tuple(probe.shape[1:])
            raise ValueError(f"covariance: expected samples of shape {expected}, got {found}")
        if not bool(probe.any()):
            raise ValueError("covariance: expected a positive variance, got draws of zero: nothing would be smoothed")
        classes = _checked_classes(model, images, labels, probe, settings.sigma)
        for index, image in enumerate(images):
            stream = child_generator(generator, home)
            if index < done:
                continue
            answers = _Answers(model, image, covariance, settings, stream, classes)
            selected = int(answers.count(settings.selection).argmax())
            on_row(index, (selected, answers.count(settings.draws).tolist()))


def _checked_classes(model: Model, images: Tensor, labels: Tensor | None, noise: Tensor, sigma: float) -> int:
    """The number of classes, of a model that answers alike when asked twice, in whatever company."""
    few = images[: DRAWS_AT_ONCE // 2]
    logits, again = (clean_logits(model, torch.cat([few, _noisy(few, each, sigma)]))[: len(few)] for each in noise)
    off = float((logits - again).abs().max() / logits.abs().max().clamp_min(1e-12))
    if off > 1e-4:
        raise ValueError(
            f"model: expected the same logits for the same images, got some that differ by {off:.1e} of the largest: "
            "a model's own random numbers, and what it takes from the other images of a batch (as BatchNorm does in "
            "training mode), are no part of the certificate"
        )
    if labels is not None:
        check_labels(labels, len(images), logits.shape[1])
    return logits.shape[1]


def _noisy(images: Tensor, noise: Tensor, sigma: float) -> Tensor:
    dtype = working_dtype(images)
    return (images.to(dtype) + sigma * noise.to(images.device, dtype)).to(images.dtype)


class _Answers:
    """The classes that a model gives to noisy copies of one image."""

    def __init__(
        self,
        model: Model,
        image: Tensor,
        covariance: Covariance,
        settings: Settings,
        stream: torch.Generator,
        classes: int,
    ) -> None:
        self.model, self.image, self.covariance, self.settings = model, image, covariance, settings
        self.stream, self.classes = stream, classes

    def count(self, draws: int) -> Tensor:
        """How many of the next draws each class gets, (classes,) int64 on the CPU."""
        total = torch.zeros(self.classes, dtype=torch.int64)
        waiting: list[Tensor] = []
        for start in range(0, draws, DRAWS_AT_ONCE):
            waiting.append(self._noisy(min(DRAWS_AT_ONCE, draws - start)))
            last = start + DRAWS_AT_ONCE >= draws
            if last or sum(map(len, waiting)) + DRAWS_AT_ONCE > self.settings.chunk_size:
                for part in torch.cat(waiting).split(self.settings.chunk_size):
                    total += self._classes(part)
                waiting.clear()
        return total

    def _noisy(self, size: int) -> Tensor:
        noise = plain(self.covariance.sample(size, generator=self.stream))
        return _noisy(self.image, noise, self.settings.sigma)

    def _classes(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            logits = logits_of(self.model, images)
        if not bool(logits.isfinite().all()):
            raise ValueError("model: expected finite logits for noisy images, got NaN or infinity")
        return torch.bincount(logits.argmax(1), minlength=self.classes).cpu()
