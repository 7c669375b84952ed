"""Values of covariance functions that are not running estimates: a formula's, and a data set's."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from sgr_kernels import checks
from sgr_kernels.backends.torch_spectral import compute_dtype
from sgr_kernels.covariance.layout import Layout
from sgr_kernels.functional.operators import binned_covariance
from sgr_kernels.toeplitz.constants import wide_dtype
from sgr_kernels.toeplitz.geometry import bin_count


def second_moment(perturbation: Tensor, layout: Layout) -> Tensor:
    """Second moment of perturbations at each displacement (Eq. 16), in the layout's form."""
    return binned_covariance(perturbation, layout.form, layout.binning, layout.max_displacement)


def exponential(layout: Layout, decay_length: float, cross_channel: float, rounded: bool) -> Tensor:
    """Values of ``exp(-r / decay_length)`` (section 4.3), float64, over the whole range of displacements.

    Raises:
        ValueError: If the decay length or the share between channels is out of range.
    """
    decay_length = checks.number("decay_length", decay_length, "a positive number of pixels", lambda x: x > 0)
    cross_channel = checks.number("cross_channel", cross_channel, "a number in [-1, 1]", lambda x: -1 <= x <= 1)
    size = layout.image_size
    if layout.form == "radial":
        distance = torch.arange(bin_count(size, layout.binning), dtype=torch.float64)
    else:
        first = [1 - n if layout.form == "signed" else 0 for n in size]
        y, x = (torch.arange(a, b, dtype=torch.float64) for a, b in zip(first, size))
        distance = torch.hypot(y[:, None], x[None, :])
        distance = distance.round() if rounded else distance
    mixing = torch.full((layout.channels, layout.channels), cross_channel, dtype=torch.float64)
    return torch.einsum("cd,...->cd...", mixing.fill_diagonal_(1.0), torch.exp(-distance / decay_length))


def moments_of_images(
    images: Tensor, layout: Layout, center: bool, chunk: int, minus: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Second moment and mean image of a data set, or of its differences from another, in chunks, summed in float64.

    Args:
        images: (n, C, H, W) or (n, C, L), floating point or uint8, which is divided by 255.
        layout: Of the second moment.
        center: Subtract the mean image from the images.
        chunk: Images taken at a time.
        minus: Like the images: what is subtracted from them, image by image.
    """
    sets = [images] if minus is None else [images, minus]
    dtypes = [torch.float32 if part.dtype == torch.uint8 else compute_dtype(part.dtype) for part in sets]
    dtype = functools.reduce(torch.promote_types, dtypes)
    wide = wide_dtype(images.device)

    def pixels(part: Tensor) -> Tensor:
        return part.to(dtype) / 255 if part.dtype == torch.uint8 else part.to(dtype)

    def chunks() -> Iterator[Tensor]:
        for first, *others in zip(*(part.split(chunk) for part in sets)):
            yield pixels(first) - pixels(others[0]) if others else pixels(first)

    mean = torch.zeros(images.shape[1:], dtype=wide, device=images.device)
    for part in chunks():
        mean += part.to(wide).sum(0) / images.shape[0]
    total = torch.zeros(layout.values_shape, dtype=wide, device=images.device)
    for part in chunks():
        centred = part - mean.to(dtype) if center else part
        total += second_moment(centred, layout).to(wide) * part.shape[0]
    return (total / images.shape[0]).to(dtype), mean.to(dtype)


def check_data_set(images: Tensor, chunk: int, name: str = "images") -> None:
    """Expect images (n, C, H, W) or (n, C, L), floating point or uint8, at least one, and a number taken at a time.

    Raises:
        TypeError: If they are neither floating point nor uint8.
        ValueError: If their shape does not fit, there are none, or the chunk is not positive.
    """
    if isinstance(images, Tensor) and images.dtype == torch.uint8:
        checks.check_images(name, images[:0].float())
    else:
        checks.check_images(name, images)
    if images.shape[0] == 0:
        raise ValueError(f"{name}: expected at least one image, got none")
    checks.check_count("chunk", chunk)


def check_pairs(clean: Tensor, corrupted: Tensor, chunk: int) -> None:
    """Expect two sets of finite images, alike in shape and device.

    Raises:
        TypeError, ValueError: As of `check_data_set`, or if they are not alike, or hold NaN or infinity.
    """
    for name, images in (("clean", clean), ("corrupted", corrupted)):
        check_data_set(images, chunk, name)
        if images.is_floating_point() and not bool(images.isfinite().all()):
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    if clean.shape != corrupted.shape:
        raise ValueError(f"corrupted: expected the shape of clean, {tuple(clean.shape)}, got {tuple(corrupted.shape)}")
    checks.check_same_device("corrupted", corrupted, "clean", clean)
