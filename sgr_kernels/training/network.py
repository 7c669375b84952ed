"""Where a network comes from: one of the paper's, or what a callable in a module or a file returns."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shlex
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sgr_kernels.attacks.guard import preserve
from sgr_kernels.attacks.objective import logits_of
from sgr_kernels.checks import describe
from sgr_kernels.models import ARCHITECTURES, NetworkError, Normalize, carlini_wagner
from sgr_kernels.training.callables import imported, place_of, told, with_neighbours
from sgr_kernels.training.images import DataError, Images

GIVEN = "given"
"""Stands for a network that was made in Python and cannot be made again from its name."""

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


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
        function = imported(self.name)
        try:
            inspect.signature(function).bind(**arguments)
        except TypeError as error:
            raise NetworkError(f"model_args: {self.name}: {error}") from error
        except ValueError:
            pass  # some built-in callables have no signature

        def make() -> nn.Module:
            try:
                with with_neighbours(place_of(self.name)):
                    made = function(**arguments)
            except (Exception, SystemExit) as error:
                raise NetworkError(f"model: {self.name} raised {told(error)}") from error
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
    place = place_of(name)
    return name if place is None else f"{place.absolute()}:{name.rpartition(':')[2]}"


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
    place = place_of(source.name)
    content = b"" if place is None or not place.is_file() else place.read_bytes()
    key = hashlib.sha256(repr((source.name, source.arguments, hashlib.sha256(content).hexdigest())).encode())
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "sgr_kernels" / "networks" / key.hexdigest()[:32]


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
        reason = str(error).removeprefix("model: ") if isinstance(error, ValueError) else told(error)
        raise NetworkError(f"model: on images {shape} of {images.name}: {reason}") from error
    if images.classes is not None and len(images.classes) > classes:
        raise DataError(f"data: {images.name} has {len(images.classes)} classes, the network's head {classes}")
    return classes
