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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import _unsafe_preserve_version_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# What returns a value or a shape that follows from values; what moves host memory to a device.
_WAITING = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "_unique2", "lift_fresh")


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
        # Any tensor: not all schemas tell what is written, batch_norm's for one.
        for tensor in _tensors((args, kwargs)):
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


class _NoHost(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        if any(tensor.is_cpu for tensor in _tensors((args, kwargs, results))):
            raise CaptureError(f"tensors of the host are copied, which waits, or read as they are now: {function}")
        return results


@contextlib.contextmanager
def capturing_on_meta() -> Iterator[None]:
    """While active, a graph captures for tensors on the meta device, and no tensor may be on the host."""
    with _emulated(), _NoHost():
        yield


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


class _Stream:
    def __init__(self) -> None:
        self.device = torch.device("cpu", 1)


class Generator:
    """A CUDA generator's state: where it stands, and whether it draws for a capture."""

    device = torch.device("cuda", 1)

    def __init__(self) -> None:
        self.state = {"offset": 0, "capturing": False}

    def clone_state(self) -> dict[str, Any]:
        return dict(self.state)

    def graphsafe_set_state(self, state: dict[str, Any]) -> None:
        self.state = state


class LeftBehind:
    """What PyTorch keeps of captures, beside their kernels, and leaves as it is where one fails.

    After PyTorch's CUDAGraph.cpp, CUDAGeneratorImpl.cpp (before captures had states of their own, which is the harder
    case) and CUDACachingAllocator.cpp.

    Attributes:
        refused: Set by what CUDA refuses while it captures: such a capture cannot be ended.
        underway: Pools into whose memory something is captured.
        users: Graphs of each pool.
        outlived: Pools where tensors lie that nobody has dropped.
        generator: The default one.
    """

    def __init__(self, monkeypatch: Any) -> None:
        self.refused = False
        self.underway: list[int] = []
        self.users: dict[int, int] = {}
        self.outlived: set[int] = set()
        self.generator = Generator()
        self.device, self.streams, self._handles = 0, {0: _Stream(), 1: _Stream()}, 0
        patches = {
            "CUDAGraph": lambda: _Bookkeeping(self),
            "Stream": _Stream,
            "synchronize": lambda: None,
            "empty_cache": self._empty_cache,
            "graph_pool_handle": self._handle,
            "current_stream": lambda device=None: self.streams[self.device if device is None else device.index],
            "set_stream": self._set_stream,
            "stream": self._stream,
            "device": self._device,
        }
        for name, value in patches.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "default_generators", (None, self.generator), raising=False)
        for name, value in (
            ("_host_emptyCache", lambda: None),
            ("_cuda_endAllocateToPool", lambda device, pool: self._end(pool)),
            ("_cuda_releasePool", lambda device, pool: self._release(pool)),
        ):
            monkeypatch.setattr(torch._C, name, value, raising=False)

    def _handle(self) -> int:
        self._handles += 1
        return self._handles

    def _empty_cache(self) -> None:
        if not self.underway:
            self.users = {pool: users for pool, users in self.users.items() if users or pool in self.outlived}

    def _set_stream(self, stream: _Stream) -> None:
        self.device = 1
        self.streams[1] = stream

    @contextlib.contextmanager
    def _stream(self, stream: _Stream) -> Iterator[None]:
        device, before = self.device, self.streams[1]
        self._set_stream(stream)
        yield  # not undone by an exception: `torch.cuda.graph` then does not get there
        self.streams[1], self.device = before, device

    @contextlib.contextmanager
    def _device(self, device: Any) -> Iterator[None]:
        before = self.device
        self.device = 1
        try:
            yield
        finally:
            self.device = before

    def begin(self, pool: int) -> None:
        if self.users.get(pool, 1) <= 0:
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
        self.users[pool] = self.users.get(pool, 0) + 1
        if pool in self.underway:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.underway.append(pool)

    def _end(self, pool: int) -> None:
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def _release(self, pool: int) -> None:
        self.users[pool] -= 1


class _Bookkeeping:
    """A `torch.cuda.CUDAGraph` of no kernels, which draws four random numbers of each generator."""

    def __init__(self, cuda: LeftBehind) -> None:
        self._cuda, self._ended, self._generators = cuda, False, [cuda.generator]

    def register_generator_state(self, generator: Generator) -> None:
        self._generators.append(generator)

    def capture_begin(self, pool: int | None = None, **options: Any) -> None:
        self._pool = self._cuda._handle() if pool is None else pool
        self._states = [generator.state for generator in self._generators]
        for state in self._states:
            state["capturing"] = True
        self._cuda.begin(self._pool)

    def capture_end(self) -> None:
        if self._cuda.refused:
            self._cuda.refused = False
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self._cuda._end(self._pool)
        for state in self._states:
            state["capturing"] = False
        self._ended = True

    def replay(self) -> None:
        for state in self._states:
            if state["capturing"]:
                raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
            state["offset"] += 4

    def __del__(self) -> None:
        if self._ended:
            self._cuda._release(self._pool)
