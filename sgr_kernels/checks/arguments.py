"""Argument checks shared by all operators and backends. They look at shapes, dtypes and devices, never at values."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable

import torch
from torch import Tensor

from sgr_kernels.toeplitz.geometry import FORMS, Size, bin_count

_LARGEST = torch.finfo(torch.float32).max


def describe(value: object) -> str:
    """A tensor's shape and dtype, or another value's type, for error messages."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, Tensor) for item in value):
        return f"{type(value).__name__} of {len(value)} tensors, the first {describe(value[0])}"
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def check_number(name: str, value: object, *, above: bool = False) -> float:
    """A number, finite in single precision, >= 0, or with ``above`` > 0.

    Raises:
        TypeError: not a number.
        ValueError: out of range.
    """
    try:
        if isinstance(value, str | bool):
            raise TypeError("a number in words")
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected a number, got {describe(value)}") from error
    if not 0 <= number <= _LARGEST or (above and number == 0):
        bound = "> 0" if above else ">= 0"
        where = " in single precision" if _LARGEST < number < math.inf else ""
        raise ValueError(f"{name}: expected a finite number {bound}{where}, got {value}")
    return number


def number(name: str, value: object, wanted: str, fits: Callable[[float], bool]) -> float:
    """A number, or what converts to one (a tensor or array of one element), that fits.

    Raises:
        ValueError: If it is none, or does not fit.
    """
    try:
        result = math.nan if isinstance(value, (bool, str)) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        result = math.nan
    if not fits(result):
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")
    return result


def is_whole(value: object, least: int = 1) -> bool:
    """Whether a value is a whole number >= ``least``, Python's or NumPy's; truth values are none."""
    return not isinstance(value, bool) and isinstance(value, numbers.Integral) and int(value) >= least


def check_count(name: str, value: object, least: int = 1) -> None:
    """Expect a whole number >= ``least``."""
    if not is_whole(value, least):
        raise ValueError(f"{name}: expected a whole number >= {least}, got {value!r}")


def check_floating_point(name: str, value: Tensor) -> None:
    """Expect a real floating-point tensor."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        hint = "; divide by 255" if isinstance(value, Tensor) and value.dtype == torch.uint8 else ""
        raise TypeError(f"{name}: expected a real floating-point tensor, got {describe(value)}{hint}")


def check_images(name: str, value: Tensor) -> None:
    """Expect a real floating-point tensor (B, C, H, W) or (B, C, L) with at least one channel and pixel."""
    check_floating_point(name, value)
    if value.dim() not in (3, 4):
        raise ValueError(f"{name}: expected shape (B, C, H, W) or (B, C, L), got {describe(value)}")
    if 0 in value.shape[1:]:
        raise ValueError(f"{name}: expected at least one channel and one pixel, got {describe(value)}")


def image_size(value: Tensor) -> Size:
    """Size (H, W) of checked images; a signal of length L is (1, L)."""
    return (1, value.shape[2]) if value.dim() == 3 else (value.shape[2], value.shape[3])


def as_images(value: Tensor) -> Tensor:
    """View signals (B, C, L) as images (B, C, 1, L)."""
    return value.unsqueeze(2) if value.dim() == 3 else value


def check_form(form: str | None) -> None:
    """Expect the name of a form, or None."""
    if form is not None and form not in FORMS:
        raise ValueError(f"form: expected one of {', '.join(map(repr, FORMS))} or None, got {form!r}")


def covariance_form(covariance: Tensor, form: str | None, name: str = "covariance") -> str:
    """The form of a covariance argument: as named, else radial for rank 3 and even for rank 4."""
    check_form(form)
    check_floating_point(name, covariance)
    rank = 3 if form == "radial" else 4
    if covariance.dim() not in ((3, 4) if form is None else (rank,)):
        expected = "(C, C, K) or (C, C, H, W)" if form is None else f"rank {rank} for form {form!r}"
        raise ValueError(f"{name}: expected {expected}, got {describe(covariance)}")
    return form or ("radial" if covariance.dim() == 3 else "even")


def check_table(name: str, table: Tensor, channels: int, size: Size, form: str, binning: str = "rounded") -> None:
    """Expect a covariance of ``form`` (and ``binning``, if radial) that fits images of ``channels`` and ``size``."""
    if table.shape[0] != channels or table.shape[1] != channels:
        raise ValueError(f"{name}: expected {channels} x {channels} channels, got {describe(table)}")
    if form == "radial":
        full = bin_count(size, binning)
        if not 1 <= table.shape[2] <= full:
            raise ValueError(f"{name}: expected 1 to {full} bins for images of size {size}, got {describe(table)}")
        return
    for axis, extent in zip((2, 3), size):
        length = table.shape[axis]
        limit = extent if form == "even" else 2 * extent - 1
        if not 1 <= length <= limit or (form == "signed" and length % 2 == 0):
            wanted = f"1 to {limit}" if form == "even" else f"an odd number up to {limit}"
            raise ValueError(
                f"{name}: expected {wanted} entries along dimension {axis} for images of size {size}, "
                f"got {describe(table)}"
            )


def check_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Expect two tensors on one device."""
    if value.device != other.device:
        raise ValueError(f"{name}: expected a tensor on {other_name}'s device {other.device}, got {value.device}")


def check_max_displacement(value: int | None) -> None:
    """Expect a non-negative int, or None."""
    if value is not None and not is_whole(value, 0):
        raise ValueError(f"max_displacement: expected a non-negative int or None, got {describe(value)}")


def check_in_graph(name: str, value: Tensor) -> None:
    """Expect a tensor through which autograd can differentiate."""
    if not (isinstance(value, torch.Tensor) and value.requires_grad):
        raise ValueError(f"{name}: expected a tensor that requires grad, got {describe(value)}")
