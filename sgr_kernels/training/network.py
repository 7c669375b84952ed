"""Where a network comes from: one of the paper's, or what a function in a module or a file returns; and its weights."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import pickle
import shlex
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from sgr_kernels.attacks.guard import preserve
from sgr_kernels.attacks.objective import logits_of
from sgr_kernels.checks import describe
from sgr_kernels.training import checkpoint
from sgr_kernels.training.images import DataError, Images
from sgr_kernels.training.models import ARCHITECTURES, Normalize, carlini_wagner

GIVEN = "given"
"""Stands for a network that was made in Python and cannot be made again from its name."""

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


class NetworkError(ValueError):
    """A network cannot be made, or weights, images or classes do not fit it."""


@dataclass(frozen=True)
class Source:
    """What makes a network, and all that has to be known to make it again.

    Attributes:
        name: ``"mnist"`` or ``"cifar10"`` (`carlini_wagner`), ``"MODULE:CALLABLE"`` or ``"FILE.py:CALLABLE"``; the
            callable returns an ``nn.Module`` from images (B, C, H, W) to logits (B, classes).
        arguments: The callable's keyword arguments, as a JSON object.
        normalize: Means and standard deviations of the images' channels, for a first layer `Normalize`; or None.
    """

    name: str
    arguments: str = "{}"
    normalize: Statistics | None = None

    @property
    def is_code(self) -> bool:
        """Whether making it runs code that is not this package's."""
        return self.name not in (*ARCHITECTURES, GIVEN)

    def maker(self) -> Callable[[], nn.Module]:
        """Import what makes the network; each call of the result makes one anew.

        Raises:
            NetworkError: If there is no such callable, its arguments are no JSON object or do not fit; from the result
                also if the callable fails or returns no module.
        """
        if self.name == GIVEN:
            raise NetworkError("model: this network was made in Python, where it has to be made again")
        arguments = self._arguments()
        if not self.is_code:
            if not set(arguments) <= {"activation", "pooling"}:
                raise NetworkError(f"model_args: {self.name!r} takes activation and pooling, got {self.arguments}")
            return lambda: self._normalized(carlini_wagner(self.name, **arguments))
        function = _imported(self.name)
        try:
            inspect.signature(function).bind(**arguments)
        except TypeError as error:
            raise NetworkError(f"model_args: {self.name}: {error}") from error
        except ValueError:
            pass  # some built-in callables have no signature

        def make() -> nn.Module:
            try:
                made = function(**arguments)
            except Exception as error:
                raise NetworkError(f"model: {self.name} raised {_told(error)}") from error
            if not isinstance(made, nn.Module):
                raise NetworkError(f"model: {self.name} must return an nn.Module, got {describe(made)}")
            return self._normalized(made)

        return make

    def _arguments(self) -> dict[str, Any]:
        try:
            arguments = json.loads(self.arguments)
        except ValueError as error:
            raise NetworkError(f"model_args: expected a JSON object, got {self.arguments!r} ({error})") from error
        if not isinstance(arguments, dict):
            raise NetworkError(f"model_args: expected a JSON object of names and values, got {self.arguments!r}")
        return arguments

    def _normalized(self, network: nn.Module) -> nn.Module:
        if self.normalize is None:
            return network
        return nn.Sequential(OrderedDict(normalize=Normalize(*self.normalize), network=network))

    def options(self) -> str:
        """The commands' options that name it, ready for a shell."""
        words = ["--model", self.name]
        if self.arguments != "{}":
            words += ["--model-args", self.arguments]
        if self.normalize is not None:
            words += ["--normalize", *(",".join(map(repr, row)) for row in self.normalize)]
        return shlex.join(words)


def located(name: str) -> str:
    """A source's name with FILE.py's place in full."""
    place, _, function = name.rpartition(":")
    return f"{Path(place).absolute()}:{function}" if place.endswith(".py") else name


# What a person has asked to be run. A checkpoint names code, but does not decide that it is run: whoever was sent one
# has not asked for it, and `torch.load`'s old ways are not to come back by another door.


def remember(source: Source) -> None:
    """Note that this user has asked for a source's code: networks it makes are made again without being asked for."""
    if source.is_code:
        with suppress(OSError, RuntimeError):  # without a home to write to, it has to be asked for again
            path = _note(source)
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.write_text(f"{source.options()}\n")


def require_asked_for(source: Source) -> None:
    """Expect that this user has asked for a source's code, as it is now, to be run.

    Raises:
        NetworkError: If not; says how.
    """
    asked_for = not source.is_code
    with suppress(RuntimeError):  # a user without a home
        asked_for = asked_for or _note(source).is_file()
    if not asked_for:
        raise NetworkError(
            f"model: the checkpoint's network is made by code that you have not asked for, or that has changed since; "
            f"to run it: {source.options()}"
        )


def _note(source: Source) -> Path:
    place = source.name.rpartition(":")[0]
    content = Path(place).read_bytes() if place.endswith(".py") and Path(place).is_file() else b""
    key = hashlib.sha256(repr((source.name, source.arguments, hashlib.sha256(content).hexdigest())).encode())
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "sgr_kernels" / "networks" / key.hexdigest()[:32]


def _imported(name: str) -> Callable[..., Any]:
    place, colon, attribute = name.rpartition(":")
    if not (colon and place and attribute):
        raise NetworkError(
            f"model: expected MODULE:CALLABLE, FILE.py:CALLABLE or one of {', '.join(ARCHITECTURES)}, got {name!r}"
        )
    module = _file(Path(place)) if place.endswith(".py") else _module(place)
    try:
        found = reduce(getattr, attribute.split("."), module)
    except AttributeError:
        own = [k for k, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        has = f"; it has {', '.join(own[:8])}" if own else ""
        raise NetworkError(f"model: {place} has no {attribute!r}{has}") from None
    if not callable(found):
        raise NetworkError(f"model: {name} must be a callable, got {describe(found)}")
    return found


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise NetworkError(f"model: no module {error.name!r} is installed") from error
        raise NetworkError(f"model: {name} cannot be imported: {_told(error)}") from error
    except Exception as error:
        raise NetworkError(f"model: {name} cannot be imported: {_told(error)}") from error


def _file(path: Path) -> ModuleType:
    """Run a file as a module; what lies beside it can be imported by it."""
    path = path.absolute()
    if not path.is_file():
        raise NetworkError(f"model: there is no file {path}")
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # where pickling and dataclasses look for it
    sys.path.insert(0, str(path.parent))
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise NetworkError(f"model: {path} cannot be imported: {_told(error)}") from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def load_weights(network: nn.Module, path: str | os.PathLike[str], argument: str = "weights") -> None:
    """Put a file's weights into a network, whether or not it begins with `Normalize`.

    Args:
        network: The network.
        path: A ``.safetensors`` file, a state dict that ``torch.load(weights_only=True)`` reads (perhaps within a
            dict, under ``"state_dict"`` or ``"model"``), or a training's checkpoint or folder.
        argument: What errors call it.

    Raises:
        NetworkError: If there is no such file, it holds no state dict, or a tensor is missing, left over, or of
            another shape; the network is then as it was.
    """
    path = Path(path)
    state = _state_dict(path, argument)
    target = network.network if isinstance(network, nn.Sequential) and hasattr(network, "normalize") else network
    assert isinstance(target, nn.Module)
    for prefix in ("module.", "network."):
        if state and all(name.startswith(prefix) for name in state) and not _names(target)[0].startswith(prefix):
            consume_prefix_in_state_dict_if_present(state, prefix)
    own = target.state_dict()
    missing = [name for name in own if name not in state and isinstance(own[name], Tensor)]
    unknown = [name for name in state if name not in own]
    shapes = [
        (name, tuple(value.shape), tuple(own[name].shape))
        for name, value in state.items()
        if name in own and isinstance(own[name], Tensor) and value.shape != own[name].shape
    ]
    if missing or unknown:
        faults = [f"lacks {_few(missing)}"] if missing else []
        faults += [f"has {_few(unknown)}, which the network lacks"] if unknown else []
        raise NetworkError(f"{argument}: {path} {' and '.join(faults)}")
    if shapes:
        name, found, wanted = shapes[0]
        more = f" (and {len(shapes) - 1} more tensors differ)" if len(shapes) > 1 else ""
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
        reason = str(error).strip().split("\n")[0]
        raise NetworkError(
            f"{argument}: {file} is neither safetensors nor a state dict that can be read without running code "
            f"({reason})"
        ) from error
    for name in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise NetworkError(f"{argument}: {file} must hold a state dict, names and tensors, got {describe(state)}")
    return dict(state)


def _names(network: nn.Module) -> list[str]:
    return [*network.state_dict(), ""]


def _few(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def classes_of(network: nn.Module, images: Images, device: torch.device | str = "cpu") -> int:
    """Number of classes of a network's head, found by trying it on an image or two; the network is left as it was.

    Raises:
        NetworkError: If it fails on these images or does not return logits (B, classes).
        DataError: If the images are of more classes.
    """
    try:
        with preserve(network), torch.no_grad():
            classes = logits_of(network, images.example().to(device)).shape[1]
    except Exception as error:
        shape = "x".join(map(str, images.shape))
        reason = str(error).removeprefix("model: ") if isinstance(error, ValueError) else _told(error)
        raise NetworkError(f"model: on images {shape} of {images.name}: {reason}") from error
    if images.classes is not None and len(images.classes) > classes:
        raise DataError(f"data: {images.name} has {len(images.classes)} classes, the network's head {classes}")
    return classes


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
