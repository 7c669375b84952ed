"""The paper's networks (section 7.4), Carlini and Wagner's convolutional classifiers; first layers of a network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sgr_kernels.checks import check_floating_point

__all__ = ["CarliniWagner", "Normalize", "Standardize", "architecture_for", "carlini_wagner"]

_GREY_LEVEL = 1 / 255

# image shape (C, H, W); feature maps of the four convolutions; units of the three dense layers
ARCHITECTURES = {
    "mnist": ((1, 28, 28), (32, 32, 64, 64), (200, 200, 10)),
    "cifar10": ((3, 32, 32), (64, 64, 128, 128), (256, 256, 10)),
}


class Standardize(nn.Module):
    """Brings each image to zero mean and unit variance over all its pixels and channels.

    As the network's first layer it lets attacks and penalties live in pixel space. An image whose standard deviation
    is below one grey level (1/255) is divided by a grey level, so that a constant image gives zeros and finite
    derivatives of every order.
    """

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        centred = images - images.mean(dim=(1, 2, 3), keepdim=True)
        variance = centred.square().mean(dim=(1, 2, 3), keepdim=True)
        return centred / variance.clamp_min(_GREY_LEVEL**2).sqrt()


class Normalize(nn.Module):
    """``(x - mean) / std`` in each channel.

    As a network's first layer it lets attacks and penalties live in pixel space, images in [0, 1].

    Args:
        mean: One number, or one for each channel.
        std: The same, each > 0.

    Raises:
        ValueError: If a number is not finite, a deviation is not positive, or there are not as many as means.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            row = torch.as_tensor(values, dtype=torch.float32).reshape(-1, 1, 1)
            # They are settings, not weights: a state dict of the network alone is enough.
            self.register_buffer(name, row, persistent=False)
        sound = self.mean.isfinite().all() and self.std.isfinite().all() and (self.std > 0).all()
        if not sound or len({len(self.mean), len(self.std)} - {1}) > 1:
            raise ValueError(
                f"normalize: expected means and positive deviations, one or one for each channel, got {mean} and {std}"
            )

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W).

        Raises:
            ValueError: If there are means for another number of channels.
        """
        if max(len(self.mean), len(self.std)) not in (1, images.shape[1]):
            raise ValueError(f"normalize: {len(self.mean)} means, but images of {images.shape[1]} channels")
        return (images - self.mean.to(images)) / self.std.to(images)

    def extra_repr(self) -> str:
        """Settings."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


class CarliniWagner(nn.Module):
    """Two blocks of two 3x3 convolutions and a 2x2 max-pooling, then three dense layers; ReLU throughout.

    Takes images (B, C, H, W) in pixel space [0, 1], returns logits (B, classes).

    Args:
        image_shape: (C, H, W).
        filters: Feature maps of the four valid convolutions.
        units: Units of the three dense layers; the last are the classes.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], filters: tuple[int, int, int, int], units: tuple[int, int, int]
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.image_shape = image_shape
        first, second, third, fourth = filters
        self.standardize = Standardize()
        self.features = nn.Sequential(
            nn.Conv2d(channels, first, 3),
            nn.ReLU(),
            nn.Conv2d(first, second, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(second, third, 3),
            nn.ReLU(),
            nn.Conv2d(third, fourth, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        flat = fourth * _after_features(height) * _after_features(width)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(flat, units[0]),
            nn.ReLU(),
            nn.Linear(units[0], units[1]),
            nn.ReLU(),
            nn.Linear(units[1], units[2]),
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> logits (B, classes)."""
        if images.dim() != 4 or tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(f"images must be (B, {', '.join(map(str, self.image_shape))}), got {tuple(images.shape)}")
        check_floating_point("images", images)
        return self.classifier(self.features(self.standardize(images)))


def carlini_wagner(architecture: str) -> CarliniWagner:
    """A freshly initialised Carlini-Wagner network.

    Args:
        architecture: ``"mnist"`` (1x28x28, 10 classes) or ``"cifar10"`` (3x32x32, 10 classes).

    Raises:
        ValueError: for another architecture.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
    return CarliniWagner(*ARCHITECTURES[architecture])


def architecture_for(image_shape: torch.Size | tuple[int, ...]) -> str:
    """The architecture made for images of shape (C, H, W).

    Raises:
        ValueError: if there is none.
    """
    for name, (shape, _, _) in ARCHITECTURES.items():
        if tuple(image_shape) == shape:
            return name
    shapes = " or ".join("x".join(map(str, shape)) for shape, _, _ in ARCHITECTURES.values())
    raise ValueError(
        f"images must be {shapes} for a Carlini-Wagner network, got {'x'.join(map(str, image_shape))}; "
        "model (--model) names a network of your own"
    )


def _after_features(pixels: int) -> int:
    """Pixels left along an axis: each block loses 4 to its two valid convolutions and halves the rest."""
    for _ in range(2):
        pixels = (pixels - 4) // 2
    return pixels
