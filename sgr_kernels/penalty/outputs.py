"""Tensors inside whatever a model returns: tuples, dicts, named tuples, dataclasses, registered containers."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same structure with each tensor replaced."""

    def replaced(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
            return leaf
        other = copy.copy(leaf)
        for field in dataclasses.fields(leaf):
            object.__setattr__(other, field.name, map_tensors(function, getattr(leaf, field.name)))
        return other

    return tree_map(replaced, value)


def detached(value: Any) -> Any:
    """The same with tensors that have no graph."""
    return map_tensors(Tensor.detach, value)
