"""A CUDA graph's stand-in on the CPU: what is captured is a list of operators on fixed tensors, without the Python
that called them.

As on a device, capturing computes nothing that lasts: what it writes into tensors from outside, and draws at random, is
taken back, and what it has made itself holds nothing before a replay. Asking for a value while capturing is an error. A
replay runs the operators again on the same memory, whatever lies there by then, which counts no changes by it; what
later graphs have made is lost, as it may lie where an earlier one works.

`LeftBehind` models what PyTorch keeps of captures itself: the generator's state, the allocator's pools, streams.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import _unsafe_preserve_version_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

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


def _whole(tensor: Tensor) -> Tensor:
    """The bytes of its storage."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _is_view(schema: Any) -> bool:
    """Whether the operator only looks at a tensor in another way."""
    return any(result.alias_info is not None and not result.alias_info.is_write for result in schema.returns)


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []
        self.own: dict[int, Tensor] = {}
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
                self.outside[_address(tensor)] = _whole(tensor), _whole(tensor).clone()
        known = {_address(t) for t in _tensors((args, kwargs))}
        results = function(*args, **kwargs)
        fresh = [t for t in _tensors(results) if _address(t) not in known]
        self.own.update({_address(t): t.detach() for t in fresh})
        if fresh or not _is_view(schema):
            # Other tensors on the same memory, so that a parameter that is given other memory is not followed.
            self.calls.append((function, *tree_map_only(Tensor, Tensor.detach, (args, kwargs, results))))
        return results

    def take_back(self) -> None:
        for whole, before in self.outside.values():
            whole.copy_(before)

    @torch.no_grad()
    def lose(self) -> None:
        """Overwrite what was made here: floating-point numbers are NaN then."""
        for address, tensor in self.own.items():
            if address:
                _whole(tensor).fill_(255)


class EmulatedGraph:
    """Captures on the CPU what a CUDA graph would; of `sgr_kernels.training.cuda_graphs.Graph`'s kind.

    Args:
        pool: The graphs that share its memory.
    """

    def __init__(self, pool: list[EmulatedGraph] | None = None) -> None:
        self._tape = _Tape()
        self._pool = [] if pool is None else pool
        self._pool.append(self)
        self.replays = 0

    def capture(self, work: Callable[[], None]) -> None:
        """Record what ``work`` calls."""
        random = torch.get_rng_state()
        try:
            with _emulated(), self._tape:
                work()
        finally:
            with torch.no_grad():
                self._tape.take_back()
            torch.set_rng_state(random)
            self._tape.lose()

    @torch.no_grad()
    def replay(self) -> None:
        """Call it again."""
        self.replays += 1
        for later in self._pool[self._pool.index(self) + 1 :]:
            later._tape.lose()
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
