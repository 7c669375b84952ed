"""What a checkpoint of a training must hold; looked at before anything is taken over: files get edited and mixed up."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sgr_kernels.training.checkpoint import CheckpointError, require_like
from sgr_kernels.training.methods import Settings, settings_from_dict

_OUTLINE = {
    "settings": dict,
    "data": {"name": "", "digest": ""},
    "model": dict,
    "criterion": dict,
    "optimizer": dict,
    "rng": dict,
    "position": {"epoch": 0, "step": 0},
    "epochs": object,
    "totals": Tensor,
    "seconds": 0.0,
    "history": list,
}
_RECORD = {
    "epoch": 0,
    "loss": 0.0,
    "cross_entropy": 0.0,
    "penalty": 0.0,
    "train_accuracy": 0.0,
    "test_accuracy": 0.0,
    "seconds": 0.0,
}


def settings_of(state: dict[str, Any]) -> Settings:
    """The settings in a checkpoint that has everything a training's has.

    Raises:
        CheckpointError: if something is missing or of another kind, or the settings are none.
    """
    require_like({"epochs": None, **state}, _OUTLINE)  # older files lack the number of epochs
    try:
        return settings_from_dict(state["settings"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's settings: {' '.join(str(error).split())}") from error


def require_sound(
    state: dict[str, Any], model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, steps: int
) -> None:
    """Expect a state that a training of these, with so many steps in an epoch, could have come to.

    Raises:
        CheckpointError: where it could not.
    """
    epoch, step, history = state["position"]["epoch"], state["position"]["step"], state["history"]
    if epoch < 0 or not 0 <= step < steps:
        raise CheckpointError(
            f"the checkpoint's position: expected an epoch >= 0 and a step of {steps}, got epoch {epoch}, step {step}"
        )
    if len(history) != epoch:
        raise CheckpointError(f"the checkpoint's history: expected {epoch} records, got {len(history)}")
    epochs = state.get("epochs")
    if not (epochs is None or (type(epochs) is int and epochs >= 1)):
        raise CheckpointError(f"the checkpoint's epochs: expected a number >= 1, got {epochs!r}")
    if not 0 <= state["seconds"] < math.inf:
        raise CheckpointError(f"the checkpoint's seconds: expected a number >= 0, got {state['seconds']}")
    moments = {}
    if epoch or step:
        moments = {
            index: {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
            for index, parameter in enumerate(model.parameters())
        }
    groups = optimizer.state_dict()["param_groups"]
    expected = {
        "model": dict(model.state_dict()),
        "criterion": dict(criterion.state_dict()),
        "optimizer": {"state": moments, "param_groups": groups},
        "rng": {"cpu": torch.get_rng_state(), **({"cuda": Tensor} if "cuda" in state["rng"] else {})},
        "totals": torch.zeros(6, dtype=torch.float64),
        "history": [_RECORD] * epoch,
    }
    require_like({name: state[name] for name in expected}, expected)
    for own, found in zip(groups, state["optimizer"]["param_groups"]):
        for name in own.keys() - {"lr"}:  # which the schedule sets at each step
            if _as_list(found[name]) != _as_list(own[name]):
                raise CheckpointError(
                    f"the checkpoint's optimizer.param_groups.{name}: expected {own[name]}, got {found[name]}"
                )


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
