"""A CUDA graph's stand-in on the CPU: what is captured is a list of operators on fixed tensors, without the Python
that called them.

As on a device, capturing computes nothing that lasts: what it writes into tensors from outside, and draws at random, is
taken back. Asking for a value while capturing is an error. A replay runs the operators again on the same tensors, which
count no changes by it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import _unsafe_preserve_version_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What returns a value or a shape that follows from values; what moves host memory to a device.
_WAITING = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "_unique2", "lift_fresh")

_capturing = False


class CaptureError(RuntimeError):
    """What CUDA answers with an error while it captures."""


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    """Where its storage lies; zeros that autograd makes have none."""
    return 0 if tensor._is_zerotensor() else tensor.untyped_storage().data_ptr()


def _is_view(schema: Any) -> bool:
    """Whether the operator only looks at a tensor in another way."""
    return any(result.alias_info is not None and not result.alias_info.is_write for result in schema.returns)


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []
        self.own: set[int] = set()
        self.outside: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = function._schema
        if schema.name.partition("::")[2] in _WAITING:
            raise CaptureError(f"operation not permitted when stream is capturing: {schema.name}")
        for tensor in _tensors(
            (args, kwargs)
        ):  # any of them: not all schemas tell what is written, batch_norm's for one
            if _address(tensor) not in self.own and _address(tensor) not in self.outside:
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self.outside[_address(tensor)] = whole, whole.clone()
        known = {_address(t) for t in _tensors((args, kwargs))}
        results = function(*args, **kwargs)
        fresh = [t for t in _tensors(results) if _address(t) not in known]
        self.own.update(map(_address, fresh))
        if fresh or not _is_view(schema):
            self.calls.append((function, args, kwargs, results))
        return results

    def take_back(self) -> None:
        for whole, before in self.outside.values():
            whole.copy_(before)


class EmulatedGraph:
    """Captures on the CPU what a CUDA graph would; of `sgr_kernels.training.cuda_graphs.Graph`'s kind."""

    def __init__(self) -> None:
        self._tape = _Tape()
        self.replays = 0

    def capture(self, work: Callable[[], None], generators: Sequence[torch.Generator] = ()) -> None:
        """Record what ``work`` calls."""
        streams = [(generator, generator.get_state()) for generator in (torch.default_generator, *generators)]
        try:
            with _emulated(), self._tape:
                work()
        finally:
            with torch.no_grad():
                self._tape.take_back()
            for generator, state in streams:
                generator.set_state(state)

    @torch.no_grad()
    def replay(self) -> None:
        """Call it again."""
        self.replays += 1
        below = torch._C._AutoDispatchBelowAutograd()
        for function, args, kwargs, results in self._tape.calls:
            with _unsafe_preserve_version_counter(tuple(_tensors((args, kwargs, results)))):
                again = function(*args, **kwargs)
                for recorded, value in zip(_tensors(results), _tensors(again)):
                    if _address(value) != _address(recorded):
                        recorded.copy_(value)
        del below


@contextlib.contextmanager
def _emulated() -> Iterator[None]:
    """What asks PyTorch whether a graph captures, or whether a mode looks on, hears that a graph does."""
    depth, capturing = torch._C._len_torch_dispatch_stack, torch.cuda.is_current_stream_capturing
    initialized = torch.cuda.is_initialized
    torch._C._len_torch_dispatch_stack = lambda: depth() - 1
    torch.cuda.is_current_stream_capturing = torch.cuda.is_initialized = lambda: True
    try:
        yield
    finally:
        torch._C._len_torch_dispatch_stack = depth
        torch.cuda.is_current_stream_capturing, torch.cuda.is_initialized = capturing, initialized
