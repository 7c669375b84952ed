"""Optimizers, their options and learning rates: what each takes, and what it keeps of its steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

SCHEDULES = ("constant", "cosine")
_MEANS = ("foreach", "fused")
"""Options of how it is computed, not of what."""


@dataclass(frozen=True)
class Kind:
    """An optimizer.

    Attributes:
        make: The class.
        options: Its own ones beside learning rate and weight decay, and their values where none are given.
        moments: What it keeps of a parameter, once it has made a step, by the options it has.
    """

    make: Callable[..., Optimizer]
    options: dict[str, Any]
    moments: Callable[[dict[str, Any], Tensor], dict[str, Tensor]]


def _adams(options: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
    return {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}


def _momentum(options: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
    return {"momentum_buffer": parameter} if options["momentum"] else {}


OPTIMIZERS = {
    "adam": Kind(Adam, {"betas": (0.9, 0.999)}, _adams),
    "adamw": Kind(AdamW, {"betas": (0.9, 0.999)}, _adams),
    "sgd": Kind(SGD, {"momentum": 0.9, "nesterov": False}, _momentum),
}


def options_of(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's options, those given and the rest as they are where none are given.

    Raises:
        ValueError: For an unknown optimizer, an option of another one, or values out of range.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {name!r}")
    own = OPTIMIZERS[name].options
    named = {option: value for option, value in given.items() if value is not None}
    for option in named:
        if option not in own:
            owners = " and ".join(other for other, kind in OPTIMIZERS.items() if option in kind.options)
            raise ValueError(f"{option}: an option of {owners}; optimizer {name} takes {' and '.join(own)}")
    options = {**own, **named}
    for value in options.get("betas", ()):
        if not 0 <= value < 1:
            raise ValueError(f"betas: expected two numbers in [0, 1), got {options['betas']}")
    if not 0 <= options.get("momentum", 0) < 1:
        raise ValueError(f"momentum: expected a number in [0, 1), got {options['momentum']}")
    if options.get("nesterov") and not options["momentum"]:
        raise ValueError("nesterov: needs a momentum above 0")
    return options


def build(
    name: str, parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float, given: dict[str, Any]
) -> Optimizer:
    """An optimizer of what can be trained among the parameters; on a CUDA device one kernel for many of them."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    fused = True if all(parameter.is_cuda for parameter in trained) else None
    options = options_of(name, given)
    return OPTIMIZERS[name].make(trained, lr=learning_rate, weight_decay=weight_decay, fused=fused, **options)


def moved(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state as another, on another device perhaps, goes on with it: computed in its own way."""
    groups = state.get("param_groups")
    own = [{name: group[name] for name in _MEANS if name in group} for group in optimizer.param_groups]
    if not isinstance(groups, list) or len(groups) != len(own) or not all(isinstance(g, dict) for g in groups):
        return state
    return {**state, "param_groups": [{**group, **means} for group, means in zip(groups, own)]}


def moments(name: str, parameters: Iterable[nn.Parameter], given: dict[str, Any]) -> dict[int, dict[str, Tensor]]:
    """What an optimizer keeps of parameters after a step, by their numbers; none where it keeps nothing."""
    options = options_of(name, given)
    kept = (OPTIMIZERS[name].moments(options, parameter) for parameter in parameters if parameter.requires_grad)
    return {index: found for index, found in enumerate(kept) if found}


def learning_rate(peak: float, schedule: str, warmup: int, step: int, steps: int) -> float:
    """The rate of a step.

    Args:
        peak: The largest.
        schedule: ``"constant"``, or ``"cosine"``: along half a cosine from the peak, after the warm-up, to 0.
        warmup: Steps over which it grows linearly from ``peak / warmup`` to the peak.
        step: From 0.
        steps: Of the whole training.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    return peak * (1 + math.cos(math.pi * ((step - warmup) / max(1, steps - warmup)))) / 2
