"""Counters that are a module's state without being buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Counting(nn.Module):
    """A module with counters that move with it and are saved with it.

    They are no buffers, and ``state_dict`` holds copies of them: what averages models (`torch.optim.swa_utils`, EMA)
    would make numbers of them that count nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._counters: dict[str, bool] = {}

    def register_counter(self, name: str, persistent: bool = True) -> None:
        """An attribute, (), int64, zero; saved with the state if ``persistent``."""
        self._counters[name] = persistent
        setattr(self, name, torch.zeros((), dtype=torch.int64))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for name in self._counters:
            setattr(self, name, fn(getattr(self, name)))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, persistent in self._counters.items():
            if persistent:
                destination[prefix + name] = getattr(self, name).clone()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name, persistent in self._counters.items():
            key = prefix + name
            found = state_dict.get(key)
            if isinstance(found, Tensor) and persistent:
                if local_metadata.get("assign_to_params_buffers", False):
                    setattr(self, name, found.clone())
                else:
                    getattr(self, name).copy_(found)
            elif strict and persistent:
                missing_keys.append(key)
            if key in unexpected_keys:
                unexpected_keys.remove(key)
