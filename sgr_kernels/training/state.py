"""What a checkpoint of a training must hold; looked at before anything is taken over: files get edited and mixed up."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sgr_kernels.models import ARCHITECTURES
from sgr_kernels.training import optimizers
from sgr_kernels.training.checkpoint import CheckpointError, require_like
from sgr_kernels.training.images import Images
from sgr_kernels.training.methods import Settings, settings_from_dict

_OUTLINE = {
    "settings": dict,
    "data": {"name": "", "digest": "", "origin": object, "shape": object, "classes": object},
    "model": dict,
    "average": object,
    "criterion": dict,
    "optimizer": dict,
    "rng": dict,
    "position": {"epoch": 0, "step": 0},
    "epochs": object,
    "totals": Tensor,
    "seconds": 0.0,
    "history": list,
}
# Older files lack these.
_LATER: dict[str, Any] = {"epochs": None, "average": None}
_LATER_DATA = {"origin": None, "shape": None, "classes": None}

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
    data = state.get("data")
    later = {"data": {**_LATER_DATA, **data}} if isinstance(data, dict) else {}
    require_like({**_LATER, **state, **later}, _OUTLINE)
    names = later["data"]["classes"]
    many = len(names) if isinstance(names, list) else 0
    for name, like in (("origin", ""), ("shape", [0, 0, 0]), ("classes", [""] * many)):
        if later["data"][name] is not None:
            require_like(later["data"][name], like, f"data.{name}")
    try:
        return settings_from_dict(state["settings"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's settings: {' '.join(str(error).split())}") from error


def data_of(images: Images) -> dict[str, Any]:
    """What a checkpoint says of the images trained on."""
    return {
        "name": images.name,
        "digest": images.digest(),
        "origin": images.origin,
        "shape": list(images.shape),
        "classes": None if images.classes is None else list(images.classes),
    }


def require_sound(
    state: dict[str, Any],
    settings: Settings,
    model: nn.Module,
    average: nn.Module | None,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
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
        moments = optimizers.moments(settings.optimizer, model.parameters(), settings.optimizer_options)
        found = state["optimizer"].get("state")
        if settings.architecture not in ARCHITECTURES and isinstance(found, dict) and found:
            # A network of one's own may have parameters that no loss depends on, and an optimizer keeps none of them.
            moments = {index: kept for index, kept in moments.items() if index in found}
    groups = optimizer.state_dict()["param_groups"]
    expected = {
        "model": dict(model.state_dict()),
        "average": None if average is None else dict(average.state_dict()),
        "criterion": dict(criterion.state_dict()),
        "optimizer": {"state": moments, "param_groups": groups},
        "rng": {"cpu": torch.get_rng_state(), **({"cuda": Tensor} if "cuda" in state["rng"] else {})},
        "totals": torch.zeros(6, dtype=torch.float64),
        "history": [_RECORD] * epoch,
    }
    require_like({name: {**_LATER, **state}[name] for name in expected}, expected)
    for own, found in zip(groups, state["optimizer"]["param_groups"]):
        for name in own.keys() - {"lr"}:  # which the schedule sets at each step
            if _as_list(found[name]) != _as_list(own[name]):
                raise CheckpointError(
                    f"the checkpoint's optimizer.param_groups.{name}: expected {own[name]}, got {found[name]}"
                )


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
