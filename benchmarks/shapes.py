"""The problems that the operators are measured on: shapes, covariances, inputs, and the exact answers."""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

import sgr_kernels as sgr
from sgr_kernels.toeplitz.geometry import bin_count, radial_from_even

OPERATIONS = {
    "q": "g -> q = g^T Sigma g",
    "v+q": "g -> q and v = Sigma g",
    "forward+backward": "q and its gradient in g, by autograd",
    "accumulation": "g -> covariance function of the displacement",
}
_CHECKED_SAMPLES = 6
"""Of a batch, how many products are compared with float64: two of each colour."""


@dataclass(frozen=True)
class Problem:
    """A batch of images and a rounded exponential covariance, decay length 8, cross-channel share one half."""

    batch: int
    channels: int
    height: int
    width: int
    max_displacement: int | None = None

    def __str__(self) -> str:
        truncated = "" if self.max_displacement is None else f" R={self.max_displacement}"
        return f"({self.batch},{self.channels},{self.height},{self.width}){truncated}"

    @staticmethod
    def parse(text: str) -> Problem:
        """A problem from ``B,C,H,W`` or ``B,C,H,W,R``."""
        numbers = [int(n) for n in text.split(",")]
        if len(numbers) not in (4, 5) or min(numbers) < 1:
            raise argparse.ArgumentTypeError(f"expected B,C,H,W[,R], positive integers, got {text!r}")
        return Problem(*numbers)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width

    @property
    def dimension(self) -> int:
        """Rows of Sigma."""
        return self.channels * self.height * self.width

    @property
    def bytes(self) -> int:
        """Of a float32 batch."""
        return 4 * self.batch * self.dimension

    @property
    def bins(self) -> int:
        """Radial bins of the covariance."""
        full = bin_count(self.size)
        return full if self.max_displacement is None else min(full, self.max_displacement + 1)

    def covariance(self, device: torch.device) -> sgr.CovarianceFunction:
        """Frozen, and not clipped: a projection would fill the range of a truncated one."""
        covariance = sgr.CovarianceFunction.exponential(
            self.channels, self.size, 8.0, rounded=True, psd="none", max_displacement=self.max_displacement
        )
        return covariance.to(device)

    def images(self, device: torch.device) -> Tensor:
        """Noise (B, C, H, W) of unit variance, image by image white, 1/f and blue."""
        generator = torch.Generator().manual_seed(0)
        white = torch.randn(self.batch, self.channels, *self.size, generator=generator)
        y, x = torch.fft.fftfreq(self.height)[:, None], torch.fft.rfftfreq(self.width)[None, :]
        frequency = torch.hypot(y, x)
        gains = (None, 1 / (frequency + 1 / max(self.size)), frequency**2 + 1e-6)
        for colour, gain in enumerate(gains):
            if gain is not None and self.batch > colour:
                part = torch.fft.irfft2(torch.fft.rfft2(white[colour::3]) * gain, s=self.size)
                white[colour::3] = part / part.square().mean().sqrt()
        return white.to(device)


SERIES = {
    "shapes": [
        Problem(128, 1, 28, 28),
        Problem(1024, 1, 28, 28),
        Problem(128, 3, 32, 32),
        Problem(1024, 3, 32, 32),
        Problem(256, 3, 64, 64),
        Problem(64, 3, 224, 224),
        Problem(8, 3, 512, 512),
    ],
    "truncated": [
        Problem(*shape, reach) for shape in ((256, 3, 64, 64), (64, 3, 224, 224), (8, 3, 512, 512)) for reach in (8, 16)
    ],
    "tiny": [
        Problem(128, channels, n, n)
        for channels, sizes in ((1, (2, 4, 6, 8, 10, 12, 16)), (3, (2, 4, 6, 8)))
        for n in sizes
    ],
    "N": [Problem(max(1, 2**20 // n**2), 1, n, n) for n in (8, 16, 28, 32, 64, 128, 224, 256, 512)],
    "C": [Problem(64, channels, 32, 32) for channels in (1, 2, 3, 4, 8, 16)],
    "B": [Problem(batch, 3, 32, 32) for batch in (1, 4, 16, 64, 256, 1024, 4096)],
}
"""What is measured; N, C and B are the scaling series: size at about a million pixels, channels, batch. ``tiny`` is
where forming Sigma may win (``crossovers``)."""
SERIES_OPERATIONS = {
    "shapes": list(OPERATIONS),
    "truncated": ["v+q", "accumulation"],
    "tiny": ["q", "forward+backward", "accumulation"],
}
"""Operations of a series; of the others ``v+q`` alone."""


class Exact:
    """Float64 answers for a problem by an FFT of its own, and the errors of others against them.

    Errors are relative, a sample at a time: ``|dv| / |v|`` and ``|dq| / (|g| |v|)``; those of a covariance function are
    relative to its variance: ``f`` in the lower half of the bins, ``tail`` in all (the last ones hold few pairs).
    """

    def __init__(self, problem: Problem, images: Tensor, table: Tensor) -> None:
        self.problem, self.images = problem, images
        self.table = table.double()

    @functools.cached_property
    def product(self) -> tuple[Tensor, Tensor, Tensor]:
        """Products v and forms q of the first samples, and ``|g| |v|``."""
        g = self.images[:_CHECKED_SAMPLES].double()
        period = [power_of_two(extent + reach - 1) for extent, reach in zip(g.shape[2:], self.table.shape[2:])]
        kernel = torch.fft.rfft2(periodic(self.table, period)).real
        mixed = torch.einsum("cdkl,ndkl->nckl", kernel.to(torch.complex128), torch.fft.rfft2(g, s=period))
        v = torch.fft.irfft2(mixed, s=period)[..., : g.shape[2], : g.shape[3]]
        return v, (v * g).sum((1, 2, 3)), norms(g) * norms(v)

    @functools.cached_property
    def estimate(self) -> Tensor:
        """Covariance function of the whole batch."""
        reach = self.table.shape[2:]
        period = [power_of_two(extent + r - 1) for extent, r in zip(self.problem.size, reach)]
        power: Tensor | float = 0.0
        for part in self.images.split(max(1, 2**22 // self.problem.dimension)):
            z = torch.fft.rfft2(part.double(), s=period)
            power = power + torch.einsum("nckl,ndkl->cdkl", z.conj(), z)
        assert isinstance(power, Tensor)
        sums = folded(torch.fft.irfft2(power, s=period), (reach[0], reach[1]))
        return radial_from_even(sums, self.problem.size, self.problem.bins) / self.problem.batch

    def error(self, operation: str, outputs: tuple[Tensor, ...]) -> dict[str, float]:
        """Largest errors of an operation's outputs, by name."""
        if operation == "accumulation":
            variance = self.estimate[..., 0].diagonal().mean()
            error = (outputs[0].double() - self.estimate).abs().amax((0, 1)) / variance
            return {"f": float(error[: (len(error) + 1) // 2].max()), "tail": float(error.max())}
        v, q, scale = self.product
        samples = slice(_CHECKED_SAMPLES)
        errors = {"q": float(((outputs[0][samples].double() - q).abs() / scale).max())}
        if len(outputs) > 1:
            half = 0.5 if operation == "forward+backward" else 1.0
            difference = half * outputs[1][samples].double() - v
            errors["v"] = float((norms(difference) / norms(v)).max())
        return errors


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def norms(images: Tensor) -> Tensor:
    """Norm of each sample."""
    return images.flatten(1).norm(dim=1)


def periodic(table: Tensor, period: list[int]) -> Tensor:
    """An even table (C, C, h, w) as a periodic one, (C, C, *period), zero at the displacements in between."""
    h, w = table.shape[2:]
    result = table.new_zeros(*table.shape[:2], *period)
    result[..., :h, :w] = table
    if h > 1:
        result[..., 1 - h :, :w] = table[..., 1:, :].flip(-2)
    if w > 1:
        result[..., 1 - w :] = result[..., 1:w].flip(-1)
    return result


def folded(sums: Tensor, reach: tuple[int, int]) -> Tensor:
    """Adjoint of `periodic`: the sums at displacements (dy, dx) of either sign, added up over the signs."""
    h, w = reach
    rows = sums[..., :h, :].clone()
    if h > 1:
        rows[..., 1:, :] += sums[..., 1 - h :, :].flip(-2)
    table = rows[..., :w].clone()
    if w > 1:
        table[..., 1:] += rows[..., 1 - w :].flip(-1)
    return table
