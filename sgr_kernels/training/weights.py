"""A network's weights from a file."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from sgr_kernels.checks import describe
from sgr_kernels.models import NetworkError
from sgr_kernels.training import checkpoint
from sgr_kernels.training.callables import told

# Of DataParallel, torch.compile, `Normalize`'s neighbour, and of trainings that keep their network under a name.
_PREFIXES = ("module.", "_orig_mod.", "network.", "model.")
_NAMES = ("state_dict", "model_state_dict", "model")  # under which files keep a state dict


def load_weights(network: nn.Module, path: str | os.PathLike[str], argument: str = "weights") -> None:
    """Put a file's weights into a network, whether or not it begins with `Normalize`.

    Args:
        network: The network.
        path: A ``.safetensors`` file, a state dict that ``torch.load(weights_only=True)`` reads (perhaps within a
            dict, under ``"state_dict"``, ``"model_state_dict"`` or ``"model"``), or a training's checkpoint or folder.
            All its names may begin with ``"module."``, ``"_orig_mod."``, ``"network."`` or ``"model."``.
        argument: What errors call it.

    Raises:
        NetworkError: If there is no such file, it holds no state dict, or a tensor is missing, left over, of another
            shape or of another kind of numbers; the network is then as it was.
    """
    path = Path(path)
    state = _state_dict(path, argument)
    target = network.network if isinstance(network, nn.Sequential) and hasattr(network, "normalize") else network
    assert isinstance(target, nn.Module)
    own = target.state_dict()
    while state.keys() != own.keys():
        prefix = next((p for p in _PREFIXES if state and all(name.startswith(p) for name in state)), None)
        if prefix is None or all(name.startswith(prefix) for name in own):
            break
        consume_prefix_in_state_dict_if_present(state, prefix)
    missing = [name for name in own if name not in state and isinstance(own[name], Tensor)]
    unknown = [name for name in state if name not in own]
    pairs = [(name, value, own[name]) for name, value in state.items() if isinstance(own.get(name), Tensor)]
    unlike = [(name, _shown(value), _shown(wanted)) for name, value, wanted in pairs if not _alike(value, wanted)]
    if missing or unknown:
        faults = [f"lacks {_few(missing)}"] if missing else []
        faults += [f"has {_few(unknown)}, which the network lacks"] if unknown else []
        raise NetworkError(f"{argument}: {path} {' and '.join(faults)}")
    if unlike:
        name, found, wanted = unlike[0]
        more = f" (and {len(unlike) - 1} more tensors differ)" if len(unlike) > 1 else ""
        raise NetworkError(f"{argument}: {path} has {name!r} of shape {found}, the network {wanted}{more}")
    target.load_state_dict(state)


def _state_dict(path: Path, argument: str) -> dict[str, Tensor]:
    file = checkpoint.checkpoint_file(path)
    if not file.is_file():
        raise NetworkError(f"{argument}: there is no file {file}")
    with file.open("rb") as stream:
        is_safetensors = stream.read(9)[8:] == b"{"  # the length of a JSON header, and the header
    state: Any
    try:
        if not is_safetensors:
            state = torch.load(file, map_location="cpu", weights_only=True)
        elif checkpoint.is_checkpoint(file):
            state = checkpoint.network_weights(checkpoint.load(file))
        else:
            state = load_file(file)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError) as error:
        reason = (
            "it holds more than tensors, or is damaged" if isinstance(error, pickle.UnpicklingError) else told(error)
        )
        raise NetworkError(
            f"{argument}: {file} is neither safetensors nor a state dict that can be read without running code "
            f"({reason})"
        ) from error
    while isinstance(state, Mapping) and any(isinstance(state.get(name), Mapping) for name in _NAMES):
        state = next(state[name] for name in _NAMES if isinstance(state.get(name), Mapping))
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise NetworkError(f"{argument}: {file} must hold a state dict, names and tensors, got {describe(state)}")
    return dict(state)


def _alike(value: Tensor, wanted: Tensor) -> bool:
    """Whether numbers can be copied without loss of more than precision."""
    kinds = ((x.is_floating_point(), x.is_complex(), x.dtype == torch.bool) for x in (value, wanted))
    return value.shape == wanted.shape and len(set(kinds)) == 1 and _plain(value)


def _plain(value: Tensor) -> bool:
    return value.layout is torch.strided and not value.is_meta and not value.is_quantized


def _shown(value: Tensor) -> str:
    kind = "" if _plain(value) else "without numbers, " if value.is_meta else "sparse or quantized, "
    return f"{tuple(value.shape)} ({kind}{str(value.dtype).removeprefix('torch.')})"


def _few(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
