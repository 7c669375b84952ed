"""Covariance functions of the perturbations that attacks find (section 4.2 of the paper)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sgr_kernels.attacks import fgsm, pgd
from sgr_kernels.attacks.guard import model_device, preserve, random_streams
from sgr_kernels.attacks.inputs import check_images, check_labels, seeded
from sgr_kernels.attacks.objective import differentiable, input_gradient, logits_of
from sgr_kernels.evaluation.loaders import Loader, batches
from sgr_kernels.functional import displacement_covariance

SOURCES = ("gradient", "sign", "fgsm", "pgd")


def perturbations(
    model: nn.Module, images: Tensor, labels: Tensor, source: str, *, eps: float, generator: torch.Generator
) -> Tensor:
    """Perturbations of a batch.

    Args:
        model: Images (B, C, H, W) in [0, 1] to logits; left as it was.
        images: (B, C, H, W).
        labels: (B,), used by ``"gradient"`` and ``"sign"``; the attacks start from the model's own prediction.
        source: ``"gradient"`` (of the loss), ``"sign"`` of it, ``"fgsm"`` or ``"pgd"`` (20 steps), both clipped to
            the range of pixels.
        eps: Strength of the attacks, in pixel units.
        generator: Of PGD's random starts.

    Returns:
        (B, C, H, W), detached.

    Raises:
        TypeError: images that are not floating point, or labels that are not integers.
        ValueError: an unknown source, bad images, labels or strengths, or a model without finite input gradients.
    """
    if source in ("gradient", "sign"):
        with preserve(model), torch.enable_grad():
            leaf = differentiable(check_images(images, None))
            logits = logits_of(model, leaf)
            check_labels(labels, *logits.shape)
            gradient = input_gradient(nn.functional.cross_entropy(logits, labels, reduction="none"), leaf)
        return gradient if source == "gradient" else gradient.sign()
    attacks: dict[str, Callable[..., Tensor]] = {"fgsm": fgsm, "pgd": pgd}
    if source not in attacks:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
    return attacks[source](model, images, eps=eps, generator=generator) - images


def image_covariance(loader: Loader) -> Tensor:
    """Covariance function of the images themselves, by rounded displacement, (C, C, K); gone through twice.

    Args:
        loader: Batches (images, labels), each time the same.

    Raises:
        ValueError: for an empty loader.
    """
    total, count = torch.zeros(()), 0
    for images, _ in batches(loader, None):
        total, count = total.to(images.device) + images.double().sum(0), count + len(images)
    mean, moments = total / count, torch.zeros(())
    for images, _ in batches(loader, None):
        centred = (images.double() - mean).to(images.dtype)
        moments = moments.to(images.device) + displacement_covariance(centred).double() * len(images)
    return (moments / count).float()


def perturbation_covariance(model: nn.Module, loader: Loader, source: str, *, eps: float, seed: int = 0) -> Tensor:
    """Covariance function of the perturbations of all images: second moments by rounded displacement, (C, C, K).

    Args:
        model: As for ``perturbations``.
        loader: Batches (images, labels).
        source: As for ``perturbations``.
        eps: As for ``perturbations``.
        seed: Of PGD's random starts.

    Raises:
        ValueError: for an unknown source or an empty loader.
    """
    generator = seeded(seed)
    total, count = torch.zeros(()), 0
    with random_streams(model):
        for images, labels in batches(loader, model_device(model)):
            found = perturbations(model, images, labels, source, eps=eps, generator=generator)
            part = displacement_covariance(found).double() * len(images)
            total, count = total.to(part) + part, count + len(images)
    return (total / count).float()
