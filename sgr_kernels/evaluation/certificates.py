"""Certificates of several networks, by decay length and scale of the noise; each image counted once, ever."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sgr_kernels.attacks.guard import Model
from sgr_kernels.attacks.inputs import check_images, seeded
from sgr_kernels.checks import check_number
from sgr_kernels.covariance import CovarianceFunction
from sgr_kernels.evaluation.certify import Certification, certification, unit_shift, unit_volume
from sgr_kernels.evaluation.smoothing import Row, Settings, count_answers

Key = tuple[str, float, float]
"""Network, decay length, sigma."""


@dataclass(frozen=True)
class CertificatePlan:
    """What to certify with.

    Attributes:
        decay_lengths: Of the noise, exp(-r / decay length) with variance one, in pixels.
        sigmas: Its scales, in pixel units.
        draws: Certifying draws an image.
        selection: Selecting draws an image.
        alpha: Probability that an image's certificate is wrong.
        seed: Of the noise, which all networks and scales share.
    """

    decay_lengths: Sequence[float] = (1.0, 4.0, 16.0)
    sigmas: Sequence[float] = (0.25, 0.5, 1.0)
    draws: int = 10_000
    selection: int = 100
    alpha: float = 1e-3
    seed: int = 0

    def keys(self, networks: Sequence[str]) -> list[Key]:
        """All that is certified, in order."""
        return [(name, length, sigma) for length in self.decay_lengths for sigma in self.sigmas for name in networks]


@dataclass(frozen=True)
class Certificates:
    """Results of a plan.

    Attributes:
        found: By network, decay length and sigma.
        shift: By decay length, the change of all pixels at once, in pixel units, that lies at radius one.
        volume: By decay length, the L2 radius of the ball with the volume of the ellipsoid of radius one.
    """

    found: dict[Key, Certification]
    shift: dict[float, float]
    volume: dict[float, float]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "units": [
                {"decay_length": length, "shift_at_radius_1": self.shift[length], "l2_at_radius_1": self.volume[length]}
                for length in self.shift
            ],
            "certificates": [
                {"network": name, "decay_length": length, **result.to_dict()}
                for (name, length, _), result in self.found.items()
            ],
        }


def certificates(
    models: Mapping[str, Model],
    images: Tensor,
    labels: Tensor,
    plan: CertificatePlan,
    *,
    chunk_size: int = 1000,
    rows: MutableMapping[Key, list[Row]] | None = None,
    on_image: Callable[[Key], None] = lambda key: None,
) -> Certificates:
    """Certify by plan.

    Args:
        models: By name, images (n, C, H, W) in [0, 1] to logits.
        images: (n, C, H, W).
        labels: (n,) true labels.
        plan: Which noise, and how much of it.
        chunk_size: Noisy images a forward pass.
        rows: What is counted already, as far as it goes; grows with every image.
        on_image: Called after each image with what it was counted for.

    Raises:
        TypeError: As `certify`.
        ValueError: As `certify`; also of rows beyond the images.
    """
    images = check_images(images, (0.0, 1.0))
    rows = {} if rows is None else rows
    for sigma in plan.sigmas:
        _settings(plan, sigma, chunk_size)  # all checked before the first is counted
    shape = tuple(images.shape[1:])
    found: dict[Key, Certification] = {}
    shift: dict[float, float] = {}
    volume: dict[float, float] = {}
    covariances = {}
    for length in plan.decay_lengths:
        length = check_number("decay_lengths", length, above=True)
        covariance = CovarianceFunction.exponential(shape[0], shape[1:], length).to(images.device)
        covariances[length] = covariance
        shift[length], volume[length] = unit_shift(covariance, shape), unit_volume(covariance, shape)
    for key in plan.keys(list(models)):
        name, length, sigma = key
        settings, counted = _settings(plan, sigma, chunk_size), rows.setdefault(key, [])
        if len(counted) > len(images):
            raise ValueError(f"rows: expected at most {len(images)} images, got {len(counted)}")

        def keep(index: int, row: Row, counted: list[Row] = counted, key: Key = key) -> None:
            counted.append(row)
            on_image(key)

        if len(counted) < len(images):
            stream = seeded(plan.seed)
            count_answers(models[name], images, labels, covariances[length], settings, stream, keep, done=len(counted))
        found[key] = certification(counted, labels, covariances[length], shape, settings)
    return Certificates(found, shift, volume)


def _settings(plan: CertificatePlan, sigma: float, chunk_size: int) -> Settings:
    return Settings(sigma, plan.draws, plan.selection, plan.alpha, chunk_size)
