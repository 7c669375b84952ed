"""The paper's networks (section 7.4): Carlini and Wagner's convolutional classifiers; first layers; smooth networks."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgr_kernels.checks import check_floating_point, describe

T = TypeVar("T")

logger = logging.getLogger("sgr_kernels")

__all__ = ["CarliniWagner", "Normalize", "Standardize", "architecture_for", "carlini_wagner", "smooth"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
}
POOLINGS: dict[str, Callable[[int], nn.Module]] = {"max": nn.MaxPool2d, "average": nn.AvgPool2d}

_GREY_LEVEL = 1 / 255

# image shape (C, H, W); feature maps of the four convolutions; units of the three dense layers
ARCHITECTURES = {
    "mnist": ((1, 28, 28), (32, 32, 64, 64), (200, 200, 10)),
    "cifar10": ((3, 32, 32), (64, 64, 128, 128), (256, 256, 10)),
}


class NetworkError(ValueError):
    """A network cannot be made, or weights, images or classes do not fit it."""


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
    """Two blocks of two 3x3 convolutions and a 2x2 pooling, then three dense layers.

    The paper's have ReLU and max-pooling. With a smooth activation and average pooling the input gradient is
    continuous, which is what a penalty on it asks for.

    Takes images (B, C, H, W) in pixel space [0, 1], returns logits (B, classes).

    Args:
        image_shape: (C, H, W).
        filters: Feature maps of the four valid convolutions.
        units: Units of the three dense layers; the last are the classes.
        activation: A name in `ACTIVATIONS`.
        pooling: ``"max"`` or ``"average"``.

    Raises:
        ValueError: For another activation or pooling.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        filters: tuple[int, int, int, int],
        units: tuple[int, int, int],
        activation: str = "relu",
        pooling: str = "max",
    ) -> None:
        super().__init__()
        act, pool = _named("activation", activation, ACTIVATIONS), _named("pooling", pooling, POOLINGS)
        channels, height, width = image_shape
        self.image_shape = image_shape
        first, second, third, fourth = filters
        self.standardize = Standardize()
        self.features = nn.Sequential(
            nn.Conv2d(channels, first, 3),
            act(),
            nn.Conv2d(first, second, 3),
            act(),
            pool(2),
            nn.Conv2d(second, third, 3),
            act(),
            nn.Conv2d(third, fourth, 3),
            act(),
            pool(2),
        )
        flat = fourth * _after_features(height) * _after_features(width)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(flat, units[0]),
            act(),
            nn.Linear(units[0], units[1]),
            act(),
            nn.Linear(units[1], units[2]),
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> logits (B, classes)."""
        if images.dim() != 4 or tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(f"images must be (B, {', '.join(map(str, self.image_shape))}), got {tuple(images.shape)}")
        check_floating_point("images", images)
        return self.classifier(self.features(self.standardize(images)))


def carlini_wagner(architecture: str, activation: str = "relu", pooling: str = "max") -> CarliniWagner:
    """A freshly initialised Carlini-Wagner network.

    Args:
        architecture: ``"mnist"`` (1x28x28, 10 classes) or ``"cifar10"`` (3x32x32, 10 classes).
        activation: ``"relu"``, ``"gelu"``, ``"silu"`` or ``"softplus"``.
        pooling: ``"max"`` or ``"average"``.

    Raises:
        ValueError: for another architecture, activation or pooling.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
    return CarliniWagner(*ARCHITECTURES[architecture], activation, pooling)


def smooth(model: nn.Module, activation: str = "gelu") -> nn.Module:
    """A copy of a network whose activations and poolings are differentiable, to be trained from scratch.

    ReLU and its relatives (ReLU6, LeakyReLU, PReLU, ELU, Hardswish, Hardtanh and so on) become the activation,
    Hardsigmoid a sigmoid, and max-pooling average pooling of the same windows. Only modules are seen: what a
    ``forward`` calls by itself (``F.relu(x)``) stays, and so does max-pooling with a dilation or indices, a fractional
    one, or of a class of your own. The log says what was exchanged, and warns of poolings that were not.

    Args:
        model: Any network; it stays as it is. Weights are copied, but those of a trained network fit no longer.
        activation: ``"gelu"``, ``"silu"`` or ``"softplus"``.

    Raises:
        TypeError: If the network is no module.
        ValueError: For another activation; if there is nothing to exchange.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {describe(model)}")
    act = _named("activation", activation, {name: make for name, make in ACTIVATIONS.items() if name != "relu"})
    changed: Counter[str] = Counter()
    left: Counter[str] = Counter()

    def exchanged(module: nn.Module) -> nn.Module:
        other = _smooth_counterpart(module, act)
        if isinstance(other, _STAY_KINKED):
            left[type(other).__name__] += 1
        if other is not module:
            changed[f"{type(module).__name__} by {type(other).__name__}"] += 1
            return other
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = exchanged(child).train(child.training)
        if getattr(module, "activation", None) in (F.relu, torch.relu):  # of PyTorch's transformer layers
            changed[f"relu by {type(act()).__name__}"] += 1
            module.activation = act()
        if hasattr(module, "activation_relu_or_gelu"):
            setattr(module, "activation_relu_or_gelu", 0)  # noqa: B010 -- their fast path knows no others
        return module

    result = exchanged(copy.deepcopy(model))
    if not changed:
        raise ValueError(
            "model: no ReLU, no relative of it and no max-pooling among its modules; functions that a forward calls "
            "(F.relu) have to be exchanged by hand"
        )
    logger.info("smooth: replaced %s", ", ".join(f"{count} {what}" for what, count in changed.items()))
    if left:
        logger.warning("smooth: left as they are: %s", ", ".join(f"{count} {what}" for what, count in left.items()))
    return result


_KINKED = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU),
    *(nn.Hardswish, nn.Hardtanh, nn.Threshold, nn.Softshrink, nn.Hardshrink),
)
_MAX_POOLINGS: dict[type[nn.Module], Any] = {
    nn.MaxPool1d: nn.AvgPool1d,
    nn.MaxPool2d: nn.AvgPool2d,
    nn.MaxPool3d: nn.AvgPool3d,
}
_ADAPTIVE: dict[type[nn.Module], Any] = {
    nn.AdaptiveMaxPool1d: nn.AdaptiveAvgPool1d,
    nn.AdaptiveMaxPool2d: nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool3d: nn.AdaptiveAvgPool3d,
}
_STAY_KINKED = (*_MAX_POOLINGS, *_ADAPTIVE, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)
"""What may be left when all that can be is exchanged."""


def _smooth_counterpart(module: Any, activation: Callable[[], nn.Module]) -> nn.Module:
    if isinstance(module, nn.Hardsigmoid):
        return nn.Sigmoid()
    if isinstance(module, _KINKED):
        return activation()
    for pooling, average in _MAX_POOLINGS.items():
        if type(module) is pooling:
            if any(d != 1 for d in _each(module.dilation)) or module.return_indices:
                return module
            shape = (module.kernel_size, module.stride, module.padding, module.ceil_mode)
            return average(*shape, count_include_pad=False)
    for pooling, average in _ADAPTIVE.items():
        if type(module) is pooling and not module.return_indices:
            return average(module.output_size)
    return module


def _each(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _named(argument: str, name: str, table: dict[str, T]) -> T:
    if name not in table:
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, table))}, got {name!r}")
    return table[name]


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
