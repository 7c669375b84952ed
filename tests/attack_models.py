"""Small models and a dense covariance for the tests of attacks and evaluation."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """Logits ``W x + b``: every attack has a closed form."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T + self.bias


def linear(classes: int = 4, shape: tuple[int, ...] = (2, 3, 3), seed: int = 0, dtype=torch.float64) -> Linear:
    generator = torch.Generator().manual_seed(seed)
    dimension = torch.Size(shape).numel()
    weight = torch.randn(classes, dimension, generator=generator, dtype=dtype)
    return Linear(weight, 0.1 * torch.randn(classes, generator=generator, dtype=dtype))


def convolutional(seed: int = 0, channels: int = 1, classes: int = 4, size: int = 8) -> nn.Module:
    """Convolution, batch normalisation, dropout: everything with a mode, in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(channels, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Flatten(),
            nn.Linear(6 * (size - 2) ** 2, 16),
            nn.ReLU(),
            nn.Linear(16, classes),
        )


class NormalizingInPlace(nn.Module):
    """A network that normalises what it is given, by default in the caller's own memory."""

    def __init__(self, body: nn.Module, in_place: bool = True) -> None:
        super().__init__()
        self.body, self.in_place = body, in_place

    def forward(self, images: Tensor) -> Tensor:
        if self.in_place:
            return self.body(images.sub_(0.5).div_(0.25))
        return self.body(images.sub(0.5).div(0.25))


def images_like(batch: int, shape: tuple[int, ...] = (2, 3, 3), seed: int = 1, dtype=torch.float64) -> Tensor:
    """Images well inside [0, 1], so that small perturbations are not clipped."""
    generator = torch.Generator().manual_seed(seed)
    return 0.3 + 0.4 * torch.rand(batch, *shape, generator=generator, dtype=dtype)


class DenseCovariance:
    """A covariance given by its matrix over (C, H, W)."""

    def __init__(self, matrix: Tensor, shape: tuple[int, ...]) -> None:
        self.matrix, self.shape = matrix, shape
        self.root = torch.linalg.cholesky(matrix)

    def dense(self) -> Tensor:
        return self.matrix

    def product(self, gradient: Tensor) -> Tensor:
        return (gradient.flatten(1).to(self.matrix) @ self.matrix).reshape(gradient.shape)

    def quadratic_form(self, gradient: Tensor) -> Tensor:
        return (gradient * self.product(gradient)).flatten(1).sum(1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        white = torch.randn(n, len(self.matrix), generator=generator, dtype=self.matrix.dtype)
        return (white @ self.root.T).reshape(n, *self.shape)


def exponential(shape: tuple[int, int, int], decay_length: float, variance: float = 1.0) -> DenseCovariance:
    """``exp(-r / decay_length)`` within a channel, half of it between channels."""
    channels, height, width = shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], 1).double()
    within = torch.exp(-torch.cdist(places, places) / decay_length)
    mixing = torch.full((channels, channels), 0.5, dtype=torch.float64).fill_diagonal_(1)
    return DenseCovariance(variance * torch.kron(mixing, within), shape)
