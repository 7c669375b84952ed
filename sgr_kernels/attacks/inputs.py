"""What every attack does with its arguments: checks, random streams, and the last step, adding a perturbation."""

from __future__ import annotations

import torch
from torch import Tensor

from sgr_kernels.attacks.levels import Bounds, Level
from sgr_kernels.checks import describe, is_whole
from sgr_kernels.toeplitz.constants import recording

DEFAULT_SEED = 20180


def check_images(images: Tensor, bounds: Bounds) -> Tensor:
    """A batch of finite floating-point images inside ``bounds``: those given, clipped where rounding led outside.

    Rounding explains a millionth of the largest bound (resizing and undone normalisations leave 1 + 2.4e-7), or one
    unit in the last place where the images' dtype is coarser.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: a wrong rank, bad bounds, or values that are not finite or out of bounds; values are not looked at
            while a CUDA graph captures.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images: expected a floating-point tensor, got {kind}; divide 8-bit images by 255")
    if images.ndim < 2:
        raise ValueError(f"images: expected a batch (B, C, H, W), got shape {tuple(images.shape)}")
    if bounds is not None:
        if not (
            isinstance(bounds, tuple | list) and len(bounds) == 2 and all(isinstance(b, int | float) for b in bounds)
        ):
            raise TypeError(f"bounds: expected (low, high) or None, got {describe(bounds)}")
        if not bounds[0] < bounds[1]:
            raise ValueError(f"bounds: expected (low, high) with low < high, got {bounds}")
    if images.numel() == 0:
        return images
    if recording():
        return images if bounds is None else images.clamp(*bounds)
    low, high = (float(v) for v in images.detach().aminmax())
    if low != low or high != high:
        raise ValueError("images: expected finite values, got NaN")
    limits = torch.finfo(images.dtype)
    allowed = bounds if bounds is not None else (limits.min, limits.max)
    rounding = 0.0 if bounds is None else max(1e-6, limits.eps) * max(abs(bound) for bound in bounds)
    if low < allowed[0] - rounding or high > allowed[1] + rounding:
        raise ValueError(
            f"images: expected values in [{allowed[0]:.9g}, {allowed[1]:.9g}], got [{low:.9g}, {high:.9g}]; "
            "normalise inside the model, or pass bounds="
        )
    return images.clamp(*allowed) if low < allowed[0] or high > allowed[1] else images


def refuse_while_capturing(name: str) -> None:
    """Raises RuntimeError while a CUDA graph captures: for what a replay would not repeat."""
    if recording():
        raise RuntimeError(f"{name}: this part of an attack takes the host, and cannot be captured by a CUDA graph")


def check_labels(labels: Tensor, batch: int, classes: int) -> None:
    """Expects (batch,) integers in [0, classes).

    Raises:
        TypeError: not integers.
        ValueError: a wrong shape, or a class out of range.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a tensor of class indices, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels: expected integer class indices, got {labels.dtype}")
    if labels.shape != (batch,):
        raise ValueError(f"labels: expected shape ({batch},), got {tuple(labels.shape)}")
    if batch and not recording() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels: expected 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}")


def private_generator(generator: torch.Generator | None) -> torch.Generator:
    """The given generator, or a new one on the CPU with the fixed seed 20180: the global stream is never used."""
    return generator if generator is not None else torch.Generator().manual_seed(DEFAULT_SEED)


def seeded(seed: int) -> torch.Generator:
    """A generator on the CPU with a seed of 64 bits.

    Raises:
        ValueError: not a whole number from 0 to 2**64 - 1.
    """
    if not is_whole(seed, 0) or seed >= 2**64:
        raise ValueError(f"seed: expected a whole number from 0 to 2**64 - 1, got {seed!r}")
    return torch.Generator().manual_seed(int(seed))


def child_generator(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """A generator on ``device`` seeded with one number from ``generator``.

    However much is drawn from the child, the parent has moved on by one number: what a later call draws does not
    depend on when an earlier one could stop.
    """
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    return torch.Generator(device=device).manual_seed(int(seed))


def working_dtype(images: Tensor) -> torch.dtype:
    """Perturbations are computed in float32, or in float64 for float64 images."""
    return torch.promote_types(images.dtype, torch.float32)


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """A (B,) tensor shaped to broadcast over (B, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def norms(delta: Tensor) -> Tensor:
    """L2 norm of each sample, (B,), accumulated in float64 so that a projection can rely on it."""
    return torch.linalg.vector_norm(delta.flatten(1), dim=1, dtype=torch.float64)


def shrink_to_ball(delta: Tensor, eps: Level) -> Tensor:
    """Projects each sample onto the L2 ball of radius ``eps``; an inner one is left as it is."""
    length = norms(delta)
    # One unit in the last place less, so that rounding the product cannot lead outside.
    inside = eps * (1 - torch.finfo(delta.dtype).eps) / length
    factor = torch.where(length > eps, inside, torch.ones_like(length))
    return delta * per_image(factor.to(delta.dtype), delta)


def add_perturbation(images: Tensor, delta: Tensor, bounds: Bounds) -> Tensor:
    """``images + delta`` inside ``bounds``, in the images' dtype, with no pixel moved further than ``delta`` says.

    Where rounding to the images' dtype would overshoot, the pixel is rounded towards the clean image instead, so a
    perturbation inside a norm ball stays inside it in any precision, and a zero one returns the images bit for bit.
    """
    base = images.to(delta.dtype)
    moved = base + delta
    if bounds is not None:
        moved = moved.clamp(*bounds)
    result = moved.to(images.dtype)
    beyond = (result.to(delta.dtype) - base).abs() > delta.abs()
    result = torch.where(beyond, torch.nextafter(result, images), result)
    return torch.where(delta == 0, images, result)
