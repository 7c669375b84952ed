"""Gaussian random fields: draw one, hide it under white noise, estimate its decay length and take the noise off."""

from __future__ import annotations

import math

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

import sgr_kernels as sgr

NOISE = 0.5  # variance of the white noise; the field's is 1


def of_signal(size: int, decay_length: float) -> sgr.CovarianceFunction:
    return sgr.CovarianceFunction.exponential(1, size, decay_length).double()


def of_observation(size: int, decay_length: float) -> sgr.CovarianceFunction:
    """Of a field and the noise upon it: Sigma + NOISE I."""
    return of_signal(size, decay_length).with_jitter(NOISE)


def log_likelihood(observed: Tensor, decay_length: float, probes: int) -> tuple[float, float]:
    """Of a field of that decay length under the noise, and its standard error: the determinant is an estimate."""
    covariance = of_observation(observed.shape[-1], decay_length)
    determinant = covariance.log_determinant(probes=probes)
    square = float(covariance.mahalanobis(observed)) ** 2
    value = -(square + determinant.value + observed.numel() * math.log(2 * math.pi)) / 2
    return value, determinant.standard_error / 2


def run(picture: str | None = None, fast: bool = False) -> dict[str, float]:
    """The decay length found, and errors before and after; draws them where a picture is asked for."""
    size, truth, probes = (24, 3.0, 8) if fast else (160, 12.0, 32)
    generator = torch.Generator().manual_seed(0)
    field = of_signal(size, truth).sample(1, generator)
    observed = field + math.sqrt(NOISE) * torch.randn(field.shape, generator=generator, dtype=torch.float64)
    lengths = [truth * 2 ** (k / 4) for k in range(-5, 6)]
    likelihood = [log_likelihood(observed, length, probes) for length in lengths]
    best = lengths[max(range(len(lengths)), key=lambda k: likelihood[k][0])]
    # The field's mean given what is observed: Sigma (Sigma + NOISE I)^-1 y, two operators and no matrix.
    estimate = of_signal(size, best).product(of_observation(size, best).solve(observed))
    errors = [float((image - field).square().mean()) for image in (observed, estimate)]
    if picture:
        figure = Figure((10, 2.8), layout="constrained")
        *maps, lines = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.4))
        titles = ("a field", f"observed, error {errors[0]:.2f}", f"estimate, error {errors[1]:.2f}")
        for axes, title, image in zip(maps, titles, (field, observed, estimate)):
            colors = colormaps["viridis"].resampled(10)
            axes.imshow(image[0, 0].numpy(), cmap=colors, vmin=-2.5, vmax=2.5, interpolation="nearest")
            axes.set(title=title, xticks=[], yticks=[])
        highest = max(value for value, _ in likelihood)
        values, errors_of = [v - highest for v, _ in likelihood], [2 * error for _, error in likelihood]
        lines.errorbar(lengths, values, errors_of, fmt="o-", capsize=3, color="tab:blue")
        lines.axvline(truth, color="0.5", linestyle=":")
        lines.set(title="log-likelihood below the best", xlabel="decay length tried [pixels]; dotted: the true one")
        figure.savefig(picture, dpi=72)
    return {"decay_length": best, "truth": truth, "error_before": errors[0], "error_after": errors[1]}


if __name__ == "__main__":
    print(run("random_fields.png"))
