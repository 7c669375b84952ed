"""The samples that the penalty's gradient is taken of: chosen by what they carry of the penalty.

The input gradient of every sample comes with the plain backward, and with it each sample's omega_b. A few samples
carry most of their sum, because ``g_b`` is proportional to ``1 - phi_y``. So k of B are drawn with inclusion
probabilities ``pi_b = min(1, c (omega_b^POWER + FLOOR mean))``, ``sum_b pi_b = k``, and weigh ``1 / pi_b``: the sum of
``grad omega_b / pi_b`` over the drawn ones has the mean ``sum_b grad omega_b``, whatever the pi are (Horvitz and
Thompson 1952).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sgr_kernels.toeplitz.constants import wide_dtype

SAMPLINGS = ("importance", "uniform")

POWER = 0.75
"""Of omega in the sizes. The norm of its gradient in the parameters goes like omega to the 0.87 to 0.95 (MNIST's
network after one, two, four epochs); this power had the least variance of 0.5, 0.75 and 1, close to that of the norms.
"""

FLOOR = 0.03
"""Of the mean size: a sample's weight is at most about ``(1 + FLOOR) / FLOOR`` times that of a uniform draw."""

_GOLDEN = 0.6180339887498949  # multiples of it are spread evenly over the unit interval, however many are taken


def offset(draws: Tensor) -> Tensor:
    """A number in [0, 1) for the n-th draw, (); those of successive draws are spread evenly."""
    return torch.frac((draws + 1).to(wide_dtype(draws.device)) * _GOLDEN)


def draw(omegas: Tensor, count: int, offset: Tensor, uniformly: bool) -> tuple[Tensor, Tensor]:
    """Systematic sampling of ``count`` samples: one is drawn where the running sum of pi passes an integer plus offset.

    Of samples with an omega that is not finite none is drawn. No value is asked of the device.

    Args:
        omegas: (B,).
        count: k, 1 to B.
        offset: In [0, 1), ().
        uniformly: Whether all have the same chance.

    Returns:
        Indices (k,) in ascending order, and the weights ``1 / (B pi_b)`` of their omegas in the mean's estimate, (k,);
        a weight of zero where fewer samples than k could be drawn.
    """
    size = proxy(omegas)
    chances = inclusion(torch.where(size > 0, 1.0, size) if uniformly else size, count)
    total = chances.cumsum(0)
    points = torch.arange(count, device=total.device, dtype=total.dtype) + offset.to(total.device)
    # Where fewer could be drawn, a sample that could fills the place: one that is not finite would, times zero, be NaN.
    drawn = points < total[-1]
    chosen = torch.where(drawn, torch.searchsorted(total, points, right=True), chances.argmax()).clamp(
        max=len(total) - 1
    )
    chance = chances[chosen]
    drawn = drawn & (chance > 0)
    return chosen, torch.where(drawn, 1 / torch.where(drawn, chance, 1), 0) / len(total)


def proxy(omegas: Tensor) -> Tensor:
    """About proportional to the norm of each omega's gradient, (B,); zero only where omega is not finite."""
    finite = omegas.isfinite()
    size = torch.where(finite, omegas.detach().abs(), 0).to(wide_dtype(omegas.device)) ** POWER
    mean = size.sum() / finite.sum().clamp(min=1)
    size = torch.where(mean > 0, size / torch.where(mean > 0, mean, 1) + FLOOR, 1.0)
    return torch.where(finite, size, 0.0)


def inclusion(size: Tensor, count: int) -> Tensor:
    """``min(1, c size_b)`` with the c that makes their sum ``count``, or the number of positive sizes if less."""
    ordered, _ = size.sort(descending=True)
    rest = ordered.flip(0).cumsum(0).flip(0)  # the sum without the t largest
    capped = torch.arange(len(size), device=size.device)
    factors = torch.where(rest > 0, (count - capped) / torch.where(rest > 0, rest, 1), torch.inf)
    # The fewest that need the cap: the largest of the others stays below one.
    enough = factors * ordered <= 1
    first = enough.to(torch.int8).argmax()
    factor = torch.where(enough.any(), factors.gather(0, first.view(1)).squeeze(0), torch.inf)
    return torch.where(size > 0, (size * factor).clamp(max=1.0), 0.0)
