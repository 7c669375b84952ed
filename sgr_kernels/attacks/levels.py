"""Perturbation strengths: one number or a list of them, and what an attack says of itself to those who sweep them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from sgr_kernels.checks import check_number
from sgr_kernels.checks.caller import warn_caller
from sgr_kernels.toeplitz.constants import at_hand

Level = float | Tensor
"""A strength; perhaps a tensor (), whose value is not asked for where that takes waiting."""
Eps = Level | Sequence[float]
Bounds = tuple[float, float] | None
F = TypeVar("F", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Traits:
    """What a sweep over strengths has to know of an attack.

    Attributes:
        labels: "own" if the attack is meant to start from the model's own prediction (no label leaking), "true" if
            it is meant to be given the true labels.
    """

    labels: Literal["own", "true"]


_TRAITS: dict[Callable[..., Tensor], Traits] = {}


def takes_many_eps(labels: Literal["own", "true"]) -> Callable[[F], F]:
    """Marks an attack whose ``eps`` may be a list, with results equal to those of separate calls."""

    def mark(attack: F) -> F:
        _TRAITS[attack] = Traits(labels)
        return attack

    return mark


def traits_of(attack: Callable[..., Any]) -> Traits | None:
    """The traits of an attack of this package, looked up through ``functools.partial``; None for any other callable."""
    while isinstance(attack, functools.partial):
        attack = attack.func
    try:
        return _TRAITS.get(attack)
    except TypeError:  # an unhashable callable object is nobody we know
        return None


def check_eps(eps: Eps, bounds: Bounds = None) -> list[float]:
    """The strengths as a list of finite numbers >= 0.

    Args:
        eps: a number or a sequence of numbers.
        bounds: for strengths in pixel units, the range of the pixels: more than the whole range draws a warning.

    Raises:
        TypeError: a strength is not a number.
        ValueError: a strength is negative, infinite or NaN, or the list is empty.
    """
    levels = [check_number("eps", level) for level in _as_iterable(eps)]
    if not levels:
        raise ValueError("eps: expected at least one strength, got an empty list")
    if bounds is not None and max(levels) > (bounds[1] - bounds[0]) * (1 + 1e-6):
        warn_caller(
            f"eps: {max(levels)} is more than the whole range {bounds} of the pixels; eps is in the images' own units, "
            "for instance 8/255"
        )
    return levels


def levels_of(eps: Eps, bounds: Bounds = None) -> Sequence[Level]:
    """As `check_eps`; but a tensor () whose value is not at hand is taken as it is."""
    return [eps] if isinstance(eps, Tensor) and eps.dim() == 0 and not at_hand(eps) else check_eps(eps, bounds)


def one_or_stacked(results: list[Tensor], eps: Eps) -> Tensor:
    """A single result for a single strength, (len(eps), B, ...) for a list."""
    return torch.stack(results) if _as_iterable(eps) is eps else results[0]


def _as_iterable(eps: Eps) -> Iterable[float]:
    """Numbers, zero-dimensional tensors, and what is neither number nor list become a list of one."""
    return cast(Sequence[float], eps) if isinstance(eps, Iterable) and not _is_one(eps) else [cast(float, eps)]


def _is_one(eps: object) -> bool:
    return isinstance(eps, str | Mapping) or getattr(eps, "ndim", 1) == 0
