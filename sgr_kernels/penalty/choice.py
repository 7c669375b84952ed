"""Which way to the penalty's gradient a model gets: the one asked for, or the first that proves right (`proof`)."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo

from sgr_kernels.penalty.proof import WAYS, prove
from sgr_kernels.penalty.trial import Trial
from sgr_kernels.penalty.way import Way
from sgr_kernels.penalty.wrappers import PenaltyGradientError, has_compiled_part, is_compiled, modules_in, uncompiled

logger = logging.getLogger("sgr_kernels")

METHODS = tuple(WAYS)
AUTO = "auto"

COST = {"double-backward": "about 2", "forward-mode": "3 to 4", "finite-difference": "about 2"}
"""Of a step in plain ones, for the log."""


class Ways:
    """The ways that were tried, by model as it is: what it holds, trains and computes in; functions by their code.

    Copies and pickles begin empty, so that what they serve is tried, too.
    """

    def __init__(self) -> None:
        self._tried: weakref.WeakKeyDictionary[Any, dict[Any, Way]] = weakref.WeakKeyDictionary()

    def get(self, model: Any, options: Any) -> Way | None:
        """The way that was tried on a model as it is, with given options."""
        key = _key(model)
        return self._tried.get(key[0], {}).get((*key[1:], options))

    def keep(self, model: Any, options: Any, way: Way) -> None:
        """Remember it."""
        key = _key(model)
        self._tried.setdefault(key[0], {})[(*key[1:], options)] = way

    def __reduce__(self) -> tuple[type[Ways], tuple[()]]:
        """Empty."""
        return Ways, ()


def _key(model: Any) -> tuple[Any, ...]:
    """A module, the code that calls it, and what of its state decides whether a way is right."""
    model = uncompiled(model)
    modules = [model] if isinstance(model, nn.Module) else modules_in(model)
    state = tuple(
        (
            module.training,
            type(module),
            *((p.dtype, p.requires_grad) for p in module._parameters.values() if p is not None),
        )
        for each in modules
        for module in each.modules()
    )
    code = None if isinstance(model, nn.Module) else getattr(model, "__code__", type(model))
    others = tuple(id(module) for module in modules[1:])
    return (modules[0] if modules else _NOBODY), code, others, state


class _Nobody:
    """Stands for the module of a callable in which none is seen."""


_NOBODY = _Nobody()


def is_traceable(method: str) -> bool:
    """Whether a compiler of the whole step may trace a method's passes."""
    return method != AUTO and WAYS[method]().traceable


@_disable_dynamo
def choose(method: str, trial: Trial) -> Way:
    """The way of a name, or the first that the model supports; tried, which waits for the device.

    Raises:
        PenaltyGradientError: If the model does not support it; names those that it does support.
    """
    names = (method,) if method != AUTO else _preference(trial.model)
    failures: dict[str, str] = {}
    for name in names:
        try:
            way = prove(name, trial)
        except PenaltyGradientError as error:
            failures[name] = str(error)
            continue
        if method == AUTO:
            why = "".join(f"; not {other!r}: {reason}" for other, reason in failures.items())
            logger.info("SGRLoss: method %r, a step costs %s plain ones%s", name, COST[name], why)
        return way
    raise PenaltyGradientError(f"{'; '.join(failures.values())}; {_remedy(failures, trial)}")


def _preference(model: Any) -> tuple[str, ...]:
    """Cheapest first; of a compiled model what keeps it compiled."""
    compiled = is_compiled(model) or has_compiled_part(model)
    return METHODS if not compiled else ("finite-difference", "double-backward", "forward-mode")


def _remedy(failures: dict[str, str], trial: Trial) -> str:
    """The methods that work, tried."""
    working = []
    for name in METHODS:
        if name not in failures:
            try:
                prove(name, trial)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                continue
            working.append(repr(name))
    return f"use method={' or '.join(working)}" if working else "no method works on this model"
