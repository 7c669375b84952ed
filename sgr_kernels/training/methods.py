"""The training methods by name: each turns settings and training data into a criterion ``(model, images, labels)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from sgr_kernels.covariance import Covariance, CovarianceFunction, IdentityCovariance
from sgr_kernels.loss import SGRLoss, StepStatistics, linear_warmup
from sgr_kernels.per_sample import cross_entropy_per_sample
from sgr_kernels.perturbations import ATTACKS, FREE
from sgr_kernels.training.datasets import ImageSet

EXPONENTIAL = "exponential"
PERTURBATIONS = (*FREE, *ATTACKS, EXPONENTIAL)


@dataclass(frozen=True)
class Settings:
    """Everything that decides a training's result, apart from the data and the number of epochs.

    Attributes:
        architecture: Carlini-Wagner network, ``"mnist"`` or ``"cifar10"``.
        method: A name in ``METHODS``.
        strength: The penalty's strength, lambda; the covariance is at the training data's own variance, so that it
            reads as a noise-to-signal ratio.
        perturbation: What SGR estimates its covariance from, or ``"exponential"`` for a fixed covariance function
            exp(-r / decay_length), half of it between channels.
        decay_length: Of the fixed exponential covariance, in pixels.
        update_rate: Weight of a new batch in the running estimate (beta of Eq. 14).
        update_every: Steps from one update of the estimate to the next.
        penalty_every: Steps from one penalty to the next, each with that weight.
        fraction: Share of each batch that is penalized.
        penalty_method: Way to the penalty's gradient, as `SGRLoss` takes it.
        warmup: Steps over which the strength grows linearly to its value; 0: none.
        mean_correction: Whether the penalty takes the perturbations' mean into account (Eq. 12).
        binning: How displacements enter the estimate: ``"rounded"`` as in the paper, or ``"linear"``.
        psd: ``"clip"`` keeps the estimate positive semidefinite, ``"none"`` is the paper's.
        weight_decay: Squared-norm penalty on the parameters; None: the method's own default.
        learning_rate: Adam's.
        batch_size: Images in a batch.
        augment: Whether images are padded and cropped at random.
        flip: Whether half of them are mirrored; only with ``augment``.
        seed: Of initial weights, order, augmentation and random starts.
    """

    architecture: str
    method: str = "sgr"
    strength: float = 1.0
    perturbation: str = "sign"
    decay_length: float = 8.0
    update_rate: float = 0.1
    update_every: int = 1
    penalty_every: int = 1
    fraction: float = 1.0
    penalty_method: str = "double-backward"
    warmup: int = 0
    mean_correction: bool = False
    binning: str = "rounded"
    psd: str = "clip"
    weight_decay: float | None = None
    learning_rate: float = 1e-3
    batch_size: int = 128
    augment: bool = True
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.perturbation not in PERTURBATIONS:
            raise ValueError(f"perturbation must be one of {', '.join(PERTURBATIONS)}, got {self.perturbation!r}")
        for name in ("strength", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number >= 0, got {value}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be a number of steps >= 0, got {self.warmup}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be a finite number > 0, got {self.learning_rate}")

    def differences(self, other: Settings) -> list[str]:
        """Each setting that differs, as ``"name: own value, not the other's"``."""
        pairs = ((field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return [f"{name}: {own!r}, not {theirs!r}" for name, own, theirs in pairs if own != theirs]


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        summary: One line for the command's help.
        criterion: (settings, training data) -> module computing the loss from (model, images, labels) and leaving
            `StepStatistics` of it in ``last`` (with warnings) and ``peek()`` (without).
        weight_decay: Used where the settings name none.
    """

    summary: str
    criterion: Callable[[Settings, ImageSet], nn.Module]
    weight_decay: float = 0.0


class CrossEntropy(nn.Module):
    """Plain training: the mean cross-entropy."""

    def __init__(self) -> None:
        super().__init__()
        self._last: StepStatistics | None = None

    def forward(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of ``model(images)``, a scalar."""
        outputs = model(images)
        loss = cross_entropy_per_sample(outputs, labels).sum() / max(1, len(labels))
        value = loss.detach()
        self._last = StepStatistics(
            loss=value,
            cross_entropy=value,
            penalty=None,
            strength=0.0,
            outputs=outputs.detach(),
            gradient_norm=None,
            nonfinite_penalties=torch.zeros((), dtype=torch.int64),
        )
        return loss

    def peek(self) -> StepStatistics:
        """What the last call computed.

        Raises:
            RuntimeError: if there was no call yet.
        """
        if self._last is None:
            raise RuntimeError("peek: the criterion has not been called yet")
        return self._last

    @property
    def last(self) -> StepStatistics:
        """The same; there is nothing to warn of."""
        return self.peek()


def _plain(settings: Settings, data: ImageSet) -> nn.Module:
    return CrossEntropy()


def _gradient_norm(settings: Settings, data: ImageSet) -> nn.Module:
    return _penalized(settings, IdentityCovariance(data.pixel_variance()))


def _structured(settings: Settings, data: ImageSet) -> nn.Module:
    channels, height, width = data.images.shape[1:]
    size, variance = (height, width), data.pixel_variance()
    if settings.perturbation == EXPONENTIAL:
        fixed = CovarianceFunction.exponential(channels, size, settings.decay_length, target_variance=variance)
        return _penalized(settings, fixed)
    running = CovarianceFunction(
        channels,
        size,
        decay=settings.update_rate,
        binning=settings.binning,
        target_variance=variance,
        psd=settings.psd,
    )
    return _penalized(
        settings,
        running,
        perturbation=settings.perturbation,
        update_every=settings.update_every,
        mean_correction=settings.mean_correction,
    )


def _penalized(settings: Settings, covariance: Covariance, **options: Any) -> SGRLoss:
    strength = linear_warmup(settings.strength, settings.warmup) if settings.warmup else settings.strength
    return SGRLoss(
        covariance,
        strength,
        penalty_every=settings.penalty_every,
        fraction=settings.fraction,
        method=settings.penalty_method,
        **options,
    )


METHODS: dict[str, Method] = {
    "clean": Method("cross-entropy alone", _plain),
    "wdecay": Method("cross-entropy with weight decay", _plain, weight_decay=5e-4),
    "gn": Method("gradient-norm penalty: SGR with an identity covariance", _gradient_norm),
    "sgr": Method("structured gradient regularization", _structured),
}


def build_criterion(settings: Settings, data: ImageSet) -> nn.Module:
    """The criterion of ``settings.method``, its covariance scaled to the variance of ``data``."""
    return METHODS[settings.method].criterion(settings, data)


def weight_decay(settings: Settings) -> float:
    """The weight decay that applies: the settings' own or the method's default."""
    if settings.weight_decay is not None:
        return settings.weight_decay
    return METHODS[settings.method].weight_decay


def settings_from_dict(values: dict[str, Any]) -> Settings:
    """Settings as ``dataclasses.asdict`` wrote them.

    Raises:
        ValueError: for unknown names.
    """
    unknown = sorted(set(values) - {field.name for field in fields(Settings)})
    if unknown:
        raise ValueError(f"unknown training setting {unknown[0]!r}: written by another version?")
    return Settings(**values)
