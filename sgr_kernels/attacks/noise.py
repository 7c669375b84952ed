"""Noise attacks: the worst of several random perturbations, uniform or with a given covariance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sgr_kernels.attacks.guard import Model, model_device, plain, preserve
from sgr_kernels.attacks.inputs import (
    add_perturbation,
    check_images,
    child_generator,
    per_image,
    private_generator,
    refuse_while_capturing,
    working_dtype,
)
from sgr_kernels.attacks.levels import Bounds, Eps, Level, levels_of, one_or_stacked, takes_many_eps
from sgr_kernels.attacks.objective import choose_labels, clean_logits, logit_loss, logits_of
from sgr_kernels.checks import check_count
from sgr_kernels.covariance import CovarianceFunction

DRAWS_AT_ONCE = 10
"""Draws per image between two looks at which images are broken; fixed, so that nothing depends on ``chunk_size``."""

Sampler = Callable[[int, torch.Generator], Tensor]


class NoiseCovariance(Protocol):
    """What ``correlated_noise`` needs of a covariance."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Zero-mean Gaussian draws, (n, C, H, W)."""

    def quadratic_form(self, gradient: Tensor) -> Tensor:
        """``g^T Sigma g`` for each sample, (B,)."""


@takes_many_eps(labels="true")
def uniform_noise(
    model: Model,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    eps: Eps,
    draws: int = 1,
    chunk_size: int = 1024,
    early_stop: bool = True,
    bounds: Bounds = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Independent noise, uniform in [-eps, eps] for each pixel, clipped to the bounds.

    Args:
        model: asked only when there are several draws to choose from.
        images: (B, C, H, W), floating point, inside ``bounds``.
        labels: (B,) true labels; None: the model's own prediction.
        eps: largest change of a pixel, in pixel units; a list gives a stack (len(eps), B, C, H, W).
        draws: keep the worst of this many (see ``correlated_noise``).
        chunk_size: noisy images per forward pass; the draws do not depend on it.
        early_stop: see ``correlated_noise``.
        bounds: range of the pixels, or None.
        generator: the source of all noise; None means a private one with a fixed seed.

    Returns:
        Noisy images, detached; ``eps=0`` returns the images bit for bit.

    Raises:
        TypeError: as ``fgsm``.
        ValueError: as ``fgsm``, or a count below one.
        RuntimeError: while a CUDA graph captures.
    """
    refuse_while_capturing("uniform_noise")
    images = check_images(images, bounds)
    levels = levels_of(eps, bounds)
    check_count("draws", draws)
    check_count("chunk_size", chunk_size)
    shape, dtype, device = images.shape[1:], working_dtype(images), images.device

    def sample(n: int, stream: torch.Generator) -> Tensor:
        return 2 * torch.rand((n, *shape), generator=stream, device=device, dtype=dtype) - 1

    with preserve(model):
        images = plain(images)
        stream = child_generator(private_generator(generator), device)
        if draws == 1:
            unit = sample(len(images), stream)
            results = [add_perturbation(images, level * unit, bounds) for level in levels]
        else:
            search = _Search(model, images, labels, bounds, chunk_size, early_stop)
            results = search.run(levels, sample, draws, stream)
    return one_or_stacked(results, eps)


@takes_many_eps(labels="true")
def correlated_noise(
    model: Model,
    images: Tensor,
    labels: Tensor | None,
    *,
    covariance: NoiseCovariance,
    eps: Eps,
    draws: int = 100,
    chunk_size: int = 1024,
    early_stop: bool = True,
    clip: bool = True,
    bounds: Bounds = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Long-range correlated noise: the worst of ``draws`` Gaussian perturbations (paper, section 4.3).

    An image x becomes ``x + eps * std(x) * xi`` with ``xi ~ N(0, Sigma)``, Sigma scaled to a mean diagonal of one:
    ``eps`` is in units of the image's own standard deviation, as for a model that standardises its input. Kept is the
    first draw that the model misclassifies or, if there is none, the one with the largest loss. An image counts as
    broken if any of its draws breaks it. All draws are independent, also between images.

    Args:
        model: maps images to logits (B, classes); left as it was.
        images: (B, C, H, W), floating point, inside ``bounds``.
        labels: (B,) true labels; None: the model's own prediction.
        covariance: anything with ``sample(n, generator)`` and ``quadratic_form(g)``, such as ``CovarianceFunction``.
        eps: standard deviation of the noise relative to the image's; a list gives a stack (len(eps), B, C, H, W) in
            which all strengths share their draws.
        draws: perturbations tried for each image.
        chunk_size: noisy images per forward pass; the draws do not depend on it.
        early_stop: stop on images already broken. Off: go on, and keep the misclassified draw with the largest loss;
            the same images are broken.
        clip: clip the noisy images to ``bounds``.
        bounds: range of the pixels, or None.
        generator: the source of all noise, advanced by one number; None means a private one with a fixed seed.

    Returns:
        Noisy images, detached; ``eps=0`` returns the images bit for bit.

    Raises:
        TypeError: as ``fgsm``.
        ValueError: as ``fgsm``, a count below one, or a covariance of another size than the images.
        RuntimeError: while a CUDA graph captures.
    """
    refuse_while_capturing("correlated_noise")
    images = check_images(images, bounds)
    levels = levels_of(eps)
    check_count("draws", draws)
    check_count("chunk_size", chunk_size)
    with preserve(model):
        images = plain(images)
        shape, dtype, device = images.shape[1:], working_dtype(images), images.device
        home = model_device(covariance) or device
        stream = child_generator(private_generator(generator), home)
        probe = covariance.sample(1, generator=stream)
        if probe.shape[1:] != shape:
            raise ValueError(f"covariance: expected samples of shape {tuple(shape)}, got {tuple(probe.shape[1:])}")
        scale = mean_variance(covariance, shape, home) ** -0.5

        def sample(n: int, stream: torch.Generator) -> Tensor:
            return plain(covariance.sample(n, generator=stream)).to(device=device, dtype=dtype) * scale

        search = _Search(model, images, labels, bounds if clip else None, chunk_size, early_stop)
        flat = images.to(dtype).flatten(1)
        deviation = (flat - flat.mean(1, keepdim=True)).square().mean(1).sqrt()
        return one_or_stacked(search.run(levels, sample, draws, stream, deviation), eps)


def mean_variance(covariance: NoiseCovariance, shape: torch.Size, device: torch.device) -> float:
    """Mean diagonal entry of a covariance, from its quadratic form at the unit vectors.

    Raises:
        ValueError: it is not a positive number.
    """
    channels, pixels = shape[0], math.prod(shape[1:])
    if isinstance(covariance, CovarianceFunction):
        pixels = 1  # depends on displacement alone: every pixel of a channel has the same variance
    total = 0.0
    for part in torch.arange(channels * pixels, device=device).split(256):
        unit = torch.zeros(len(part), channels, math.prod(shape[1:]), device=device)
        unit[torch.arange(len(part), device=device), part // pixels, part % pixels] = 1
        total += float(covariance.quadratic_form(unit.view(len(part), *shape)).sum())
    mean = total / (channels * pixels)
    if not mean > 0:
        raise ValueError(f"covariance: expected a positive mean variance, got {mean:g}")
    return mean


class _Search:
    """The worst of many draws for each image, at several strengths that share their draws."""

    def __init__(
        self, model: Model, images: Tensor, labels: Tensor | None, bounds: Bounds, chunk_size: int, early_stop: bool
    ) -> None:
        self.model, self.images, self.bounds = model, images, bounds
        self.chunk_size, self.early_stop = chunk_size, early_stop
        clean = clean_logits(model, images)
        self.labels = choose_labels(labels, clean)
        self.clean_loss = logit_loss(clean, self.labels)

    def run(
        self,
        levels: Sequence[Level],
        sample: Sampler,
        draws: int,
        stream: torch.Generator,
        deviation: Tensor | None = None,
    ) -> list[Tensor]:
        """The kept images for each strength; the noise of an image is ``level * deviation * sample``."""
        count = len(self.images)
        kept = [self.images.clone() for _ in levels]
        worst = [torch.full_like(self.clean_loss, float("-inf")) for _ in levels]
        broken = [torch.zeros(count, dtype=torch.bool, device=self.images.device) for _ in levels]
        sizes = [min(DRAWS_AT_ONCE, draws - done) for done in range(0, draws, DRAWS_AT_ONCE)]
        for size in sizes:
            todo = [(level > 0) & ~(b & self.early_stop) for level, b in zip(levels, broken)]
            if not any(bool(t.any()) for t in todo):
                break
            # Draws for broken images are made and dropped: then no image's noise depends on another's fate.
            noise = sample(count * size, stream).unflatten(0, (count, size))
            if deviation is not None:
                noise = noise * per_image(deviation, noise)
            for level, active, images, loss, hit in zip(levels, todo, kept, worst, broken):
                index = active.nonzero().squeeze(1)
                for part in index.split(max(1, self.chunk_size // size)):
                    self._try(part, level * noise[part], images, loss, hit)
        return kept

    def _try(self, index: Tensor, noise: Tensor, kept: Tensor, worst: Tensor, broken: Tensor) -> None:
        """Evaluates draws (n, k, C, H, W) for the images at ``index`` and keeps the worst seen so far."""
        size = noise.shape[1]
        labels = self.labels[index].repeat_interleave(size)
        noisy = add_perturbation(self.images[index].repeat_interleave(size, dim=0), noise.flatten(0, 1), self.bounds)
        with torch.no_grad():
            logits = torch.cat([logits_of(self.model, part) for part in noisy.split(self.chunk_size)])
        hit = (logits.argmax(1) != labels).unflatten(0, (-1, size))
        loss = logit_loss(logits, labels).unflatten(0, (-1, size))
        # Broken draws come before the others, then the larger loss counts; when stopping early, the first broken one.
        rank = torch.where(hit & self.early_stop, torch.full_like(loss, float("inf")), loss)
        rank = torch.where(hit.any(1, keepdim=True) & ~hit, torch.full_like(loss, float("-inf")), rank)
        best = rank.argmax(1)
        rows = torch.arange(len(index), device=index.device)
        loss, hit = loss[rows, best], hit[rows, best]
        better = (hit & ~broken[index]) | ((hit == broken[index]) & (loss > worst[index]))
        chosen = noisy.unflatten(0, (-1, size))[rows, best]
        kept[index] = torch.where(per_image(better, chosen), chosen, kept[index])
        worst[index] = torch.where(better, loss, worst[index])
        broken[index] |= hit
