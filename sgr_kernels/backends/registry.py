"""Which backend serves a call: one record each, and the rule that chooses."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import torch

from sgr_kernels.backends.crossovers import dense_up_to
from sgr_kernels.toeplitz.geometry import Size

logger = logging.getLogger("sgr_kernels")


@dataclass(frozen=True)
class Request:
    """What a call needs: the operator, and the problem it is applied to."""

    operator: str
    device: torch.device
    dtype: torch.dtype
    batch: int
    channels: int
    size: Size
    form: str


@dataclass(frozen=True)
class Backend:
    """A way to compute the operators.

    ``can_run`` returns None, or the reason why this backend cannot serve a request; ``by_name_only`` whether
    ``"auto"`` must not choose it although it can.
    """

    name: str
    can_run: Callable[[Request], str | None]
    by_name_only: Callable[[Request], bool] = lambda request: False


DENSE = "reference"
"""The backend that forms Sigma: ``"auto"`` takes it for tiny images, by measured crossovers."""

_registered: dict[str, Backend] = {}
_logged: set[tuple[object, ...]] = set()
_choice = os.environ.get("SGR_BACKEND") or "auto"


def register(backend: Backend) -> None:
    """Add a backend; `choose` tries them in the order of their registration."""
    _registered[backend.name] = backend


def names() -> list[str]:
    """All names that a ``backend`` argument accepts."""
    return ["auto", *_registered]


def _check_name(name: str, source: str) -> None:
    if name != "auto" and name not in _registered:
        raise ValueError(f"{source}: expected one of {', '.join(map(repr, names()))}, got {name!r}")


def available(device: torch.device | str = "cpu") -> list[str]:
    """Names of the backends that can multiply an ordinary float32 image batch on ``device``, fastest first.

    None can where this torch sees no CUDA device and ``device`` is one.
    """
    request = Request("product", torch.device(device), torch.float32, 1, 1, (28, 28), "even")
    if request.device.type == "cuda" and not torch.cuda.is_available():
        return []
    return [b.name for b in _registered.values() if b.can_run(request) is None]


def choice() -> str:
    """What serves calls that leave ``backend="auto"``: a backend's name, or ``"auto"``."""
    return _choice


def choose(name: str, request: Request) -> str:
    """Resolve a ``backend`` argument to the name of a backend that can run.

    Raises:
        ValueError: If the name is unknown.
        RuntimeError: If a backend was asked for by name that cannot serve the request; the message says why.
    """
    source = "backend"
    if name == "auto":
        name, source = _choice, "use_backend() or SGR_BACKEND"
    _check_name(name, source)
    if name != "auto":
        reason = _registered[name].can_run(request)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot run {request.operator}: {reason}")
        return name
    for backend in _registered.values():
        if not backend.by_name_only(request) and backend.can_run(request) is None:
            name = DENSE if _dense_is_faster(backend.name, request) else backend.name
            if not torch.compiler.is_compiling():
                _log_once(name, request)
            return name
    raise RuntimeError(f"no backend can run {request.operator} on {request.device}")


def _dense_is_faster(backend: str, request: Request) -> bool:
    dimension = request.channels * request.size[0] * request.size[1]
    return (
        dimension <= dense_up_to(request.device.type, backend, request.operator)
        and _registered[DENSE].can_run(request) is None
    )


def _log_once(name: str, request: Request) -> None:
    if not logger.isEnabledFor(logging.DEBUG):
        return
    shape_class = (request.operator, request.device.type, request.dtype, request.channels, request.size, request.form)
    if shape_class not in _logged:
        _logged.add(shape_class)
        logger.debug("%s: backend %r for %s", request.operator, name, request)


class use_backend:
    """Choose the backend of every call that leaves ``backend="auto"``.

    Takes effect at once, for the whole process; as a context manager, until the end of its block.

    Args:
        name: ``"auto"``, ``"reference"``, ``"torch"``, ``"native"`` or ``"triton"``.

    Raises:
        ValueError: If the name is unknown.
    """

    def __init__(self, name: str) -> None:
        global _choice
        _check_name(name, "name")
        self._name = name
        self._previous, _choice = _choice, name

    def __enter__(self) -> None:
        """Make the choice again, for a block that is entered later or once more."""
        global _choice
        _choice = self._name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the choice that was in force before."""
        global _choice
        _choice = self._previous
