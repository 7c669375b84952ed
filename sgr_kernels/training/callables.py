"""Code that is not this package's: a callable in a module, or in a file with what lies beside it."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from sgr_kernels.checks import describe
from sgr_kernels.models import ARCHITECTURES, NetworkError

# Modules that lie beside files which were run, by folder: of several folders each has its own of a name.
_NEIGHBOURS: dict[Path, dict[str, ModuleType]] = {}


def place_of(name: str) -> Path | None:
    """FILE.py of ``"FILE.py:CALLABLE"``; None for other names."""
    place = name.rpartition(":")[0]
    return Path(place) if place.endswith(".py") else None


def imported(name: str) -> Callable[..., Any]:
    """What ``"MODULE:CALLABLE"`` or ``"FILE.py:CALLABLE"`` names.

    Raises:
        NetworkError: If there is none, or importing it fails.
    """
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
    if isinstance(found, nn.Module):
        raise NetworkError(f"model: {name} must be a callable that returns an nn.Module, got a {type(found).__name__}")
    if not callable(found):
        raise NetworkError(f"model: {name} must be a callable, got {describe(found)}")
    return found


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            file = Path(*name.split(".")).with_suffix(".py")
            hint = f"; a file is named as {file}:CALLABLE" if file.is_file() else ""
            raise NetworkError(f"model: no module {error.name!r} is installed{hint}") from error
        raise NetworkError(f"model: {name} cannot be imported: {told(error)}") from error
    except (Exception, SystemExit) as error:
        raise NetworkError(f"model: {name} cannot be imported: {told(error)}") from error


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
    try:
        with with_neighbours(path):
            specification.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise NetworkError(f"model: {path} cannot be imported: {told(error)}") from error
    return module


@contextmanager
def with_neighbours(file: Path | None) -> Iterator[None]:
    """What lies beside a file can be imported within, whatever has the same name beside another one; None: nothing."""
    if file is None:
        yield
        return
    folder = file.absolute().parent
    for others in _NEIGHBOURS.values():
        for name, module in others.items():
            root = folder / name.partition(".")[0]
            if sys.modules.get(name) is module and (root.is_dir() or root.with_suffix(".py").is_file()):
                del sys.modules[name]
    sys.modules.update(_NEIGHBOURS.get(folder, {}))
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        found = {name: module for name, module in list(sys.modules.items()) if _lies_in(folder, name)}
        _NEIGHBOURS.setdefault(folder, {}).update(found)


def _lies_in(folder: Path, name: str) -> bool:
    """Whether a module, or the package that it belongs to, lies in a folder itself, not below it."""
    root = sys.modules.get(name.partition(".")[0])
    file, package = getattr(root, "__file__", None), getattr(root, "__path__", None)
    if root is None or root.__name__ == "__main__" or (file is None and not package):
        return False
    place = Path(next(iter(package))) if package else Path(str(file))
    return place.parent == folder


def told(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
