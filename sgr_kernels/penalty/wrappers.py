"""What models come wrapped in: compilers, distributed training; and what that rules out."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class PenaltyGradientError(RuntimeError):
    """A model does not support the method that was asked for; the message names the remedy."""


def unwrapped(model: Any) -> Any:
    """The module inside DistributedDataParallel: extra passes must not start its gradient reduction again."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def opened(model: Any) -> Any:
    """What ``torch.compile`` was given, a module or a function; anything else as it is."""
    return getattr(model, "_orig_mod", getattr(model, "_torchdynamo_orig_callable", model))


def uncompiled(model: Any) -> Any:
    """The model inside its wrappers. A compiled one supports neither a second backward nor forward mode."""
    return opened(unwrapped(opened(model)))


def is_compiled(model: Any) -> bool:
    """Whether a model is the product of ``torch.compile``, inside DistributedDataParallel or out."""
    return opened(model) is not model or opened(unwrapped(model)) is not unwrapped(model)


def in_eager_mode() -> contextlib.AbstractContextManager[Any]:
    """While active, compiled code runs uncompiled, wherever in a model or a callable it is."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else torch.compiler.set_stance("force_eager")


def has_compiled_part(model: Any) -> bool:
    """Whether a model, or a module that a callable plainly refers to, holds compiled code."""
    return any(
        is_compiled(part) or part._compiled_call_impl is not None
        for module in modules_in(model)
        for part in module.modules()
    )


def modules_in(function: Any) -> list[nn.Module]:
    """The modules that a callable plainly refers to: in its closure, defaults, globals, arguments or attributes."""
    found: dict[nn.Module, None] = {}
    seen: set[int] = set()

    def look(value: Any, depth: int) -> None:
        if isinstance(value, nn.Module):
            found.setdefault(value)
        if isinstance(value, nn.Module) or depth == 0 or id(value) in seen:
            return
        seen.add(id(value))
        for part in _parts(value):
            look(part, depth - 1)

    look(function, 4)
    return list(found)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, types.MethodType):
        return value.__self__, value.__func__
    if isinstance(value, types.FunctionType):
        cells = inspect.getclosurevars(value)
        return *cells.nonlocals.values(), *cells.globals.values(), *(value.__defaults__ or ())
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, dict):
        return value.values()
    return (
        vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, (type, types.ModuleType)) else ()
    )


def is_sharded(model: Any) -> bool:
    """Whether a model holds modules of FSDP, which frees and gathers their parameters around each pass."""
    if not torch.distributed.is_available() or not isinstance(model, nn.Module):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())


def refuse_static_graph(model: Any) -> None:
    """Raise where gradients of the images alone would pass for a whole backward, after which nothing is reduced.

    Raises:
        PenaltyGradientError: If the model is DistributedDataParallel with a static graph.
    """
    if any(isinstance(m, nn.parallel.DistributedDataParallel) and m.static_graph for m in (model, opened(model))):
        raise PenaltyGradientError(
            "model: DistributedDataParallel(static_graph=True) takes the penalty's backward for the step's and would "
            "not reduce the gradients; use static_graph=False"
        )
