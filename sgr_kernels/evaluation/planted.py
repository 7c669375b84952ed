"""Can the attack find an adversarial example that is known to exist?

The binarization test of Zimmermann, Brendel, Tramer and Carlini, "Increasing Confidence in Adversarial Robustness
Evaluations" (2022): around each image, a linear readout of the model's features is fitted that tells one chosen corner
of the eps ball from many random points inside it. That corner is adversarial for the readout by construction. An
attack that does not break the readout says nothing about the model either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sgr_kernels.attacks.guard import Model, ask, plain, preserve
from sgr_kernels.attacks.inputs import add_perturbation, child_generator, private_generator, working_dtype
from sgr_kernels.attacks.levels import Bounds

INNER_POINTS = 64
RIDGE = 1.0  # times the mean squared spread: a thinner margin traps honest attacks in local maxima


@dataclass(frozen=True)
class PlantedResult:
    """How many planted examples an attack found.

    Attributes:
        tested: images for which a readout could be fitted.
        found: those that the attack broke.
        by_chance: fraction of uniform random points in the ball that break the readouts: a test is only as sharp as
            this is small.
    """

    tested: int
    found: int
    by_chance: float

    @property
    def rate(self) -> float:
        """Fraction found; NaN if nothing could be tested."""
        return self.found / self.tested if self.tested else float("nan")


def planted_examples(
    model: Model,
    images: Tensor,
    attack: Callable[..., Tensor],
    *,
    eps: float,
    bounds: Bounds = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> PlantedResult:
    """Plants one adversarial example near each image and lets the attack look for it.

    Args:
        model: maps images to logits. Its features are the input of its last ``nn.Linear``, or the logits if it has
            none.
        images: (B, C, H, W) on the model's device, inside ``bounds``.
        attack: called as ``attack(readout, image, labels, eps=..., generator=...)`` with one image, L-infinity.
        eps: radius of the L-infinity ball.
        bounds: range of the pixels, or None.
        generator: source of all random numbers; None means a private one with a fixed seed.
    """
    stream = child_generator(private_generator(generator), images.device)
    tested = found = 0
    by_chance = []
    with preserve(model), _features(model) as features:
        for image in plain(images).split(1):
            corner, inner, probes = _points(image, eps, bounds, stream)
            with torch.no_grad():
                readout = _fit(features, features(corner), features(torch.cat([image, inner])))
            if readout is None:
                continue
            tested += 1
            label = torch.zeros(1, dtype=torch.int64, device=image.device)
            adversarial = attack(readout, image, label, eps=eps, generator=stream)
            with torch.no_grad():
                found += int(readout(adversarial).argmax(1))
                by_chance.append(readout(probes).argmax(1).double().mean())
    return PlantedResult(tested, found, float(torch.stack(by_chance).mean()) if by_chance else float("nan"))


def _points(image: Tensor, eps: float, bounds: Bounds, stream: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A corner of the ball, uniform points inside it to fit with, and as many to test chance with."""
    shape, dtype = (1 + 2 * INNER_POINTS, *image.shape[1:]), working_dtype(image)
    noise = 2 * torch.rand(shape, generator=stream, device=image.device, dtype=dtype) - 1
    noise[0] = noise[0].sign()
    points = add_perturbation(image.expand(shape), eps * noise, bounds)
    return points[:1], points[1 : 1 + INNER_POINTS], points[1 + INNER_POINTS :]


def _fit(features: Model, corner: Tensor, inner: Tensor) -> Model | None:
    """Two-class logits ``(0, w . features - b)`` positive at the corner alone, by ridge discriminant; None if none."""
    wide = inner.double()
    centre = wide.mean(0)
    spread, gap = wide - centre, corner[0].double() - centre
    gram = spread @ spread.T
    ridge = RIDGE * float(gram.diagonal().mean()) + torch.finfo(inner.dtype).tiny
    # The dual form of (spread^T spread + ridge I)^{-1} gap: few points, many features.
    system = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = gap - spread.T @ torch.linalg.solve(system, spread @ gap)
    highest, planted = float((wide @ weight).max()), float(corner[0].double() @ weight)
    # Not separable, or by less than the features' own precision.
    if not planted - highest > 1e-3 * abs(planted - float(centre @ weight)):
        return None
    threshold, weight = (highest + planted) / 2, weight / (planted - highest)
    threshold /= planted - highest

    def readout(images: Tensor) -> Tensor:
        score = features(images).double() @ weight - threshold
        return torch.stack([torch.zeros_like(score), score], dim=1)

    return readout


@contextmanager
def _features(model: Model) -> Iterator[Model]:
    """A function from images to features (B, d): what enters the last linear layer, or else the logits."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)] if isinstance(model, nn.Module) else []
    if not layers:
        yield lambda images: ask(model, images).flatten(1)
        return
    entering: list[Tensor] = []
    handle = layers[-1].register_forward_pre_hook(lambda module, inputs: entering.append(inputs[0]))

    def features(images: Tensor) -> Tensor:
        entering.clear()
        logits = ask(model, images)
        return (entering[-1] if entering else logits).flatten(1)

    try:
        yield features
    finally:
        handle.remove()
