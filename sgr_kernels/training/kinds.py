"""What makes a kind of training step, and what such a step changes on the host, where no CUDA graph would replay it."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sgr_kernels.backends.registry import choice
from sgr_kernels.checks import describe

_NUMBERS: frozenset[type] = frozenset({bool, int, float, str, *np.sctypeDict.values()})  # and names
_WATCHED: set[type] = {*_NUMBERS, Tensor, nn.Parameter}  # and subclasses, once they have been seen
_COLLECTIONS = frozenset({list, tuple, dict, OrderedDict, set, deque})
_REGISTERED = frozenset({"_modules", "_parameters", "_buffers"})


def like(leaf: Any) -> Any:
    """What a graph takes for granted of a part of a batch."""
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.stride(), leaf.device, leaf.requires_grad
    return leaf if leaf is None or type(leaf) in _NUMBERS else type(leaf)


def unfit(leaves: list[Any]) -> str | None:
    """Why a batch cannot be copied to where a graph reads it, in words."""
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            return "a batch wants a gradient"
        if leaf is not None and not isinstance(leaf, Tensor) and type(leaf) not in _NUMBERS:
            return f"a batch holds {describe(leaf)}"
    devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor)}
    return f"a batch lies on {' and '.join(sorted(map(str, devices)))}" if len(devices) > 1 else None


def decided(modules: list[nn.Module], criterion: nn.Module) -> Hashable:
    """What the host has decided, and may decide otherwise before the next step, beside the criterion's `kind`.

    Numbers and modes of the model's modules, which of its parameters are trained, where everything lies, precision, and
    the operators' backend.
    """
    found = [value for module in modules for value in vars(module).values() if type(value) in _WATCHED]
    for module in criterion.modules():
        found += [value for value in vars(module).values() if isinstance(value, Tensor)]
    kept = tuple([value if type(value) in _NUMBERS else _address(value) for value in found])
    places = tuple([(_address(p), p.requires_grad) for p in parameters(modules)])
    owners = (*modules, *criterion.modules())
    buffers = tuple([_address(b) for module in owners for b in module._buffers.values() if b is not None])
    device = next((p.device.type for p in parameters(modules)), "cpu")
    autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    precision = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    return kept, places, buffers, autocast, precision, choice()


def parameters(modules: list[nn.Module]) -> dict[nn.Parameter, None]:
    """Those of ``model.parameters()``, in the same order."""
    return dict.fromkeys(p for module in modules for p in module._parameters.values() if p is not None)


def _address(tensor: Tensor) -> int:
    """Where a tensor's values lie; of one that has none, which tensor it is."""
    try:
        return tensor.data_ptr()
    except (RuntimeError, ValueError):
        return id(tensor)


def on_host(model: nn.Module, leaves: list[Any]) -> dict[tuple[str, str], Any]:
    """What a replay would leave as it is: the host's random streams, and what modules keep.

    Of tensors it matters which they are, and what was written into parameters, which an optimizer's numbers decide, and
    into those that lie elsewhere than the batch.
    """
    here = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
    kept: dict[tuple[str, str], Any] = {("", ""): _random_streams()}
    for path, module in model.named_modules():
        for attributes in (vars(module), module._parameters, module._buffers):
            devices = set() if attributes is module._parameters else here
            for name, value in attributes.items():
                kind = type(value)
                if kind in _NUMBERS:
                    kept[path, name] = value
                elif isinstance(value, Tensor):
                    _WATCHED.add(kind)
                    kept[path, name] = _Kept([value], devices)
                elif kind in _COLLECTIONS and value and name not in _REGISTERED:
                    kept[path, name] = _Kept(list(value.values() if issubclass(kind, dict) else value), devices)
    return kept


class _Kept:
    """Tensors, numbers and whatever else a module keeps; equal where they are the same, asked for no value."""

    def __init__(self, values: list[Any], devices: set[str]) -> None:
        self._values = values
        elsewhere = [v for v in values if isinstance(v, Tensor) and v.device.type not in devices]
        self._written = [v._version for v in elsewhere if not v.is_inference()]  # which count no changes

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Kept)
            and self._written == other._written
            and len(self._values) == len(other._values)
            and all(a is b or (type(a) in _NUMBERS and a == b) for a, b in zip(self._values, other._values))
        )


def _random_streams() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - the stream that other people's models draw from
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), name, np.asarray(keys).tobytes(), *rest


def difference(before: dict[tuple[str, str], Any], after: dict[tuple[str, str], Any]) -> str | None:
    """What a step changed on the host, in words."""
    changed = [".".join(filter(None, key)) for key, value in after.items() if key not in before or before[key] != value]
    if changed and not changed[0]:
        return "a step draws random numbers on the host"
    return f"a step changes what modules keep ({changed[0]})" if changed else None
