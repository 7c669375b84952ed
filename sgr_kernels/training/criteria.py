"""Criteria without a penalty: plain cross-entropy, and cross-entropy on a mixture of clean and perturbed images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sgr_kernels import attacks
from sgr_kernels.attacks.guard import ask
from sgr_kernels.attacks.levels import Level
from sgr_kernels.checks import check_floating_point, describe
from sgr_kernels.covariance import Covariance
from sgr_kernels.penalty.per_sample import cross_entropy_per_sample
from sgr_kernels.penalty.statistics import Criterion, StepStatistics
from sgr_kernels.toeplitz.constants import recording

Perturb = Callable[[nn.Module, Tensor, Tensor, Level, torch.Generator], Tensor]
LossFunction = Callable[[Any, Any], Tensor]


def classes(labels: Tensor) -> Tensor:
    """Labels as classes (B,): of probabilities (B, classes) the most likely one."""
    return labels.argmax(1) if labels.is_floating_point() else labels


class CrossEntropy(Criterion):
    """Plain training: the mean cross-entropy.

    Args:
        loss_fn: Loss of each sample, ``(outputs, labels) -> (B,)``.
    """

    def __init__(self, loss_fn: LossFunction = cross_entropy_per_sample) -> None:
        super().__init__()
        self.loss_fn = loss_fn

    def forward(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of ``model(images)``, a scalar.

        Raises:
            TypeError: images that are not floating point, labels or outputs that are not tensors.
            ValueError: shapes that do not fit, or labels out of range.
        """
        check_floating_point("images", images)
        outputs = ask(model, images)
        loss = self.loss_fn(outputs, labels).sum() / max(1, len(labels))
        value = loss.detach()
        self.remembered = StepStatistics(
            loss=value,
            cross_entropy=value,
            penalty=None,
            strength=0.0,
            outputs=outputs.detach(),
            gradient_norm=None,
            nonfinite_penalties=torch.zeros((), dtype=torch.int64),
        )
        return loss


class Augmented(CrossEntropy):
    """Training on a mixture: in training mode, half of each batch is perturbed before the cross-entropy is taken.

    Strength and random numbers come from one number of torch's default generator per step, whose state a checkpoint
    holds; on a CUDA device they are drawn there, so that a CUDA graph can.

    Args:
        perturb: ``(model, images, labels, eps, generator) -> perturbed images``; leaves the model as it was. On a
            device the strength is a tensor ().
        largest: The strength is drawn uniformly from [0, largest], one for each batch.
        loss_fn: As of `CrossEntropy`.
    """

    def __init__(self, perturb: Perturb, largest: float, loss_fn: LossFunction = cross_entropy_per_sample) -> None:
        super().__init__(loss_fn)
        self.perturb, self.largest = perturb, largest
        self._generator, self._seeded = torch.Generator(), False

    def forward(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the mixture, a scalar."""
        return super().forward(model, self.mixture(model, images, labels) if self.training else images, labels)

    def mixture(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The images, the second half of them perturbed. Batches are in random order, so any half will do."""
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels: expected a tensor of classes or of probabilities, got {describe(labels)}")
        if not self._seeded and not recording():  # nobody has begun a step, which may be of several calls
            self.before_step()
            self._seeded = False
        generator = self._generator
        eps = self.largest * torch.rand((), generator=generator, device=generator.device).double()
        clean, rest = images.split([len(images) // 2, len(images) - len(images) // 2])
        return torch.cat([clean, self.perturb(model, rest, classes(labels[len(clean) :]), eps, generator)])

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        device = fn(torch.empty(0)).device
        if device != self._generator.device:
            self._generator, self._seeded = torch.Generator(device if device.type == "cuda" else "cpu"), False
        return self

    def generators(self) -> list[torch.Generator]:
        return [self._generator]

    def before_step(self) -> None:
        self._generator.manual_seed(int(torch.randint(2**62, ())))
        self._seeded = True


def with_fgsm(
    largest: float, *, true_labels: bool = False, loss_fn: LossFunction = cross_entropy_per_sample
) -> Augmented:
    """Adversarial training with FGSM, strengths up to ``largest`` in pixel units.

    Args:
        largest: End of the strengths.
        true_labels: Start from the labels instead of the model's own predictions: the label leaks into the sign.
        loss_fn: As of `CrossEntropy`.
    """

    def perturb(model: nn.Module, images: Tensor, labels: Tensor, eps: Level, generator: torch.Generator) -> Tensor:
        return attacks.fgsm(model, images, labels if true_labels else None, eps=eps)

    return Augmented(perturb, largest, loss_fn)


def with_pgd(largest: float, steps: int, *, loss_fn: LossFunction = cross_entropy_per_sample) -> Augmented:
    """Adversarial training with PGD from the model's own predictions, strengths up to ``largest`` in pixel units."""

    def perturb(model: nn.Module, images: Tensor, labels: Tensor, eps: Level, generator: torch.Generator) -> Tensor:
        return attacks.pgd(model, images, eps=eps, steps=steps, generator=generator)

    return Augmented(perturb, largest, loss_fn)


def with_noise(
    largest: float, covariance: Covariance, *, loss_fn: LossFunction = cross_entropy_per_sample
) -> Augmented:
    """Training with noise from N(0, Sigma), strengths up to ``largest`` in units of each image's standard deviation."""

    def perturb(model: nn.Module, images: Tensor, labels: Tensor, eps: Level, generator: torch.Generator) -> Tensor:
        return attacks.correlated_noise(
            model, images, labels, covariance=home, eps=eps, draws=1, clip=False, generator=generator
        )

    criterion = Augmented(perturb, largest, loss_fn)
    # A submodule, so that it moves to the device of the training.
    criterion.covariance = home = covariance
    return criterion
