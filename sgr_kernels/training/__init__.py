"""Resumable training by every method of the paper, of its networks or of one's own; needs the extra ``train``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sgr_kernels.training.datasets import load
    from sgr_kernels.training.loop import Trainer
    from sgr_kernels.training.methods import Settings
    from sgr_kernels.training.trained import load_model

__all__ = ["Settings", "Trainer", "load", "load_model"]

# `sgr_kernels.models` lies in this room, and does without the extra.
_HOMES = {"Settings": "methods", "Trainer": "loop", "load": "datasets", "load_model": "trained"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sgr_kernels.training' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sgr_kernels.training.{_HOMES[name]}"), name)
