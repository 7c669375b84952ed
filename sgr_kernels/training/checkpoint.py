"""Checkpoints: one safetensors file, tensors in its body and everything else as JSON in its header; no pickle."""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

FORMAT = "sgr_kernels.checkpoint"
VERSION = 1

CHECKPOINT_FILE = "checkpoint.safetensors"

_TENSOR, _ITEMS, _TUPLE = "__tensor__", "__items__", "__tuple__"


class CheckpointError(ValueError):
    """A checkpoint is damaged, from a newer version, or belongs to another model or training."""


class TrainingError(RuntimeError):
    """Training cannot go on, for example because the loss is no longer finite."""


def save(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write a state atomically: afterwards the file holds the old state or the new one, never a part.

    Args:
        path: Where to; its folder must exist.
        state: Nested dicts (keys: strings or numbers), lists and tuples of tensors, numbers, strings, booleans, None.
    """
    tensors: dict[str, Tensor] = {}
    tree = _flatten(state, "", tensors)
    metadata = {"format": FORMAT, "version": str(VERSION), "tree": json.dumps(tree)}
    write_atomically(path, serialize(tensors, metadata))


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what ``save`` wrote; tensors lie on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is no checkpoint, damaged, or written by a newer version of this package.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{path} is a safetensors file but no checkpoint of sgr_kernels")
            version = int(metadata["version"])
            if version > VERSION:
                raise CheckpointError(
                    f"{path} has checkpoint version {version}, this sgr_kernels reads up to {VERSION}: upgrade it"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            tree = _unflatten(json.loads(metadata["tree"]), tensors)
            if not isinstance(tree, dict):
                raise TypeError(f"its tree is a {type(tree).__name__}")
            return tree
    except CheckpointError:
        raise
    except (SafetensorError, LookupError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint: {error}") from error


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a safetensors file is a checkpoint.

    Raises:
        SafetensorError: if it is no safetensors file.
    """
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("format") == FORMAT


def checkpoint_file(path: str | os.PathLike[str]) -> Path:
    """The checkpoint meant by a path: the file itself, or the one in a training's folder."""
    path = Path(path)
    return path / CHECKPOINT_FILE if path.is_dir() else path


def network_weights(state: dict[str, Any]) -> dict[str, Tensor]:
    """The trained network's state dict: the running average of weights if one was kept.

    Raises:
        CheckpointError: if there is none.
    """
    average = state.get("average")
    weights = state.get("model") if average is None else average
    if not isinstance(weights, dict):
        raise CheckpointError(f"the checkpoint's model: expected names and tensors, got {_brief(weights)}")
    if average is None:
        return weights
    prefix = "module."  # of `torch.optim.swa_utils.AveragedModel`, which counts its updates as well
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace a file by way of a temporary one beside it, flushed to disk before it takes the name."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    _clean(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def load_module(module: torch.nn.Module, state: dict[str, Any], what: str) -> None:
    """``module.load_state_dict(state)`` with errors that say which tensor differs and how.

    Raises:
        CheckpointError: if a tensor is missing, left over or of another shape or dtype.
    """
    require_like(state, dict(module.state_dict()), what)
    module.load_state_dict(state)


def require_like(found: Any, expected: Any, what: str = "") -> None:
    """Expect a nested state built as another: the same names, the same kinds of values, tensors of the same form.

    Where the other has a type, any value of that type will do.

    Raises:
        CheckpointError: at the first difference, with its place in the checkpoint.
    """
    if isinstance(expected, type):
        if not isinstance(found, expected):
            raise CheckpointError(f"the checkpoint's {what}: expected a {expected.__name__}, got {_brief(found)}")
    elif isinstance(expected, Tensor):
        if not isinstance(found, Tensor):
            raise CheckpointError(f"the checkpoint's {what}: expected a tensor, got {type(found).__name__}")
        if found.shape != expected.shape:
            owner, _, name = what.partition(".")
            raise CheckpointError(
                f"the checkpoint's {owner} has {name!r} of shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
            )
        if found.dtype != expected.dtype:
            raise CheckpointError(f"the checkpoint's {what}: expected {expected.dtype}, got {found.dtype}")
    elif isinstance(expected, dict):
        whose = f"the checkpoint's {what}" if what else "the checkpoint"
        if not isinstance(found, dict):
            raise CheckpointError(f"{whose}: expected names and values, got {type(found).__name__}")
        unknown = [name for name in found if name not in expected]
        for name, value in expected.items():
            if name not in found:
                raise CheckpointError(f"{whose} lacks {name!r}")
            require_like(found[name], value, f"{what}.{name}" if what else str(name))
        if unknown:
            raise CheckpointError(f"{whose} has {unknown[0]!r}, which is unknown here")
    elif isinstance(expected, list | tuple):
        if not isinstance(found, list | tuple) or len(found) != len(expected):
            raise CheckpointError(f"the checkpoint's {what}: expected {len(expected)} values, got {_brief(found)}")
        for index, (value, like) in enumerate(zip(found, expected)):
            require_like(value, like, f"{what}.{index}")
    elif type(found) is not type(expected) and not (type(expected) is float and type(found) is int):
        raise CheckpointError(f"the checkpoint's {what}: expected {_brief(expected)} or the like, got {_brief(found)}")


def rng_state(device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """State of torch's default generators on the CPU and on a CUDA device in use."""
    state = {"cpu": torch.get_rng_state()}
    if torch.device(device).type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(state: dict[str, Tensor], device: torch.device | str = "cpu") -> None:
    """Put the default generators back to a state from ``rng_state``."""
    try:
        torch.set_rng_state(state["cpu"])
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint's rng.cpu is no generator's state: {error}") from error
    if "cuda" in state and torch.device(device).type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def _clean(path: Path) -> None:
    """Remove the temporary files that killed processes left beside a file."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):
        process = leftover.name.rpartition(".")[2]
        if process.isascii() and process.isdecimal() and not Path("/proc", process).exists():
            leftover.unlink(missing_ok=True)


def _brief(value: Any) -> str:
    text = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for a nested value; its tensors go into ``tensors`` under their path."""
    if isinstance(value, Tensor):
        # Copies, because safetensors refuses tensors that share memory.
        name = path if path not in tensors else f"{path}#{len(tensors)}"
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}
    if isinstance(value, dict):
        items = {key: _flatten(entry, f"{path}.{key}" if path else str(key), tensors) for key, entry in value.items()}
        if all(isinstance(key, str) and not key.startswith("__") for key in items):
            return items
        return {_ITEMS: [[key, entry] for key, entry in items.items()]}  # JSON's own keys are strings only
    if isinstance(value, list | tuple):
        entries = [_flatten(entry, f"{path}.{index}", tensors) for index, entry in enumerate(value)]
        return {_TUPLE: entries} if isinstance(value, tuple) else entries
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__} (at {path!r})")


def _unflatten(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_unflatten(entry, tensors) for entry in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        return tensors[tree[_TENSOR]]
    if _ITEMS in tree:
        return {key: _unflatten(entry, tensors) for key, entry in tree[_ITEMS]}
    if _TUPLE in tree:
        return tuple(_unflatten(entry, tensors) for entry in tree[_TUPLE])
    return {key: _unflatten(entry, tensors) for key, entry in tree.items()}
