"""The gradients of a training step as CUDA graphs, captured once for each kind of step and replayed from then on.

A small network's step is as slow as the host, which launches some hundreds of kernels; a replay launches one graph.
What is captured is forward passes, penalty, the covariance's update and backward; the optimizer, whose learning rate
changes with each step, runs after it as ever. A replay repeats the same kernels on the same memory, and nothing of the
Python that launched them. So all that the host decides about a step makes its kind: shapes, what the cadences ask for,
the strength. Kinds that come up seldom, such as those of a strength that still grows, run eagerly; so do those that
cannot be captured, and a line in the log says why.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, distributed, nn
from torch.autograd.graph import increment_version
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from sgr_kernels.penalty.statistics import Criterion, StepStatistics
from sgr_kernels.training import kinds
from sgr_kernels.training.processes import Processes

logger = logging.getLogger("sgr_kernels")

Parts = Sequence[tuple[Tensor, ...]]
"""Images and labels of each part of a batch."""

_EAGER = 3
"""Steps of a kind before it is captured: what libraries choose and allocate at first use is there then."""
_MOST = 16
"""Kinds that are captured; they share their memory, but for their inputs and the parameters' gradients."""
_REMEMBERED = 64
"""Kinds whose steps are counted."""


class Graph(Protocol):
    """A sequence of kernels that can be launched again."""

    def capture(self, work: Callable[[], Any], generators: Sequence[torch.Generator] = ()) -> None:
        """Record what ``work`` launches, and draws from generators; nothing of it is executed."""

    def replay(self) -> None:
        """Launch it again, on the same memory."""


class CudaGraphs:
    """Makes graphs on a device that share their memory, and so must not run at the same time.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device | str) -> None:
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()
        self.pool: Any = None
        self._graphs: WeakSet[CudaGraph] = WeakSet()

    def __call__(self) -> CudaGraph:
        """A graph that is to be captured."""
        if not self._graphs:  # memory that no graph holds any more is given up, whatever tensors still lie there
            self.renew()
        graph = CudaGraph(self)
        self._graphs.add(graph)
        return graph

    def renew(self) -> None:
        """Give graphs from now on other memory."""
        self.pool = torch.cuda.graph_pool_handle()

    def __reduce__(self) -> tuple[type[CudaGraphs], tuple[torch.device]]:
        """Copies share nothing."""
        return CudaGraphs, (self.stream.device,)


class CudaGraph:
    """A `torch.cuda.CUDAGraph`, after whose failure to capture everything goes on as before.

    Args:
        shared: What it has in common with other graphs.
    """

    def __init__(self, shared: CudaGraphs) -> None:
        self._graph, self._shared = torch.cuda.CUDAGraph(), shared

    def capture(self, work: Callable[[], Any], generators: Sequence[torch.Generator] = ()) -> None:
        """As of `Graph`."""
        # What is left of an earlier backward, in a circle of references, would draw its stream into the capture: of the
        # first call in a process, for one, which lies in a frame that importing PyTorch's compiler has kept.
        gc.collect()
        stream, failures = self._shared.stream, list[BaseException]()
        own = [generator for generator in generators if generator.device.type == "cuda"]
        _register(self._graph, own)
        # A capture that fails leaves its device and stream the current ones.
        with torch.cuda.device(stream.device), torch.cuda.stream(torch.cuda.current_stream(stream.device)):
            try:
                # Other threads may go on allocating, such as those that read images.
                with torch.cuda.graph(self._graph, self._shared.pool, stream, capture_error_mode="thread_local"):
                    try:
                        work()
                    except BaseException as error:  # told when the capture has ended, which may fail because of it
                        failures.append(error)
            except BaseException as error:
                failures.append(error)
                self._abandon(own)
        if failures:
            del failures[1:]
            raise failures.pop()

    def _abandon(self, generators: Sequence[torch.Generator]) -> None:
        """Do what PyTorch leaves undone where a capture cannot be ended, because CUDA has refused something.

        The allocator takes the capture for one that goes on, gives no memory back to the device any more and refuses
        captures into the same memory. So do the generators, which refuse to draw outside of a capture, and graphs that
        were captured before to be replayed, until another capture has ended. (They must not be given other states:
        those graphs draw from the ones they have.)
        """
        stream, pool = self._shared.stream, self._shared.pool
        with suppress(RuntimeError):  # where capturing had not begun, or had ended in the allocator's eyes
            torch._C._cuda_endAllocateToPool(stream.device.index, pool)
            torch._C._cuda_releasePool(stream.device.index, pool)
        self._shared.renew()
        graph = torch.cuda.CUDAGraph()
        _register(graph, generators)
        with suppress(RuntimeError), torch.cuda.graph(graph, None, stream, capture_error_mode="thread_local"):
            torch.zeros((), device=stream.device)

    def replay(self) -> None:
        """As of `Graph`."""
        self._graph.replay()


def _register(graph: torch.cuda.CUDAGraph, generators: Sequence[torch.Generator]) -> None:
    for generator in generators:
        graph.register_generator_state(generator)


def usable(asked: bool | None, device: torch.device, processes: Processes) -> bool:
    """Whether steps are to be captured: as asked, or else wherever they can be.

    Raises:
        ValueError: If they are asked for and cannot be.
    """
    can = device.type == "cuda" and processes.size == 1
    if asked and not can:
        raise ValueError(f"cuda_graphs: expected one process on a CUDA device, got {processes.size} on {device}")
    return can if asked is None else asked


def graphs_on(device: torch.device | str) -> CudaGraphs | None:
    """Makes graphs on a CUDA device; None for other devices, which have none, and for one of several processes."""
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    return None if several or torch.device(device).type != "cuda" else CudaGraphs(device)


class StepGraphs:
    """Computes the gradients of steps, by replaying a graph where there is one.

    In a loop of one's own::

        def gradients(parts):
            for images, labels in parts:
                criterion(model, images, labels).backward()

        step = StepGraphs(model, criterion, gradients, graphs_on(device))
        for images, labels in loader:
            step([(images, labels)])
            optimizer.step()

    What is changed between steps in the model's and the criterion's parameters, buffers, modes and numbers is seen, and
    makes another kind of step. What a step itself changes on the host, a replay leaves out: a kind that draws random
    numbers there, or leaves numbers, lists or tensors other than they were in the model's modules, is not captured;
    other effects of its Python code are not noticed, nor what a ``loss_fn`` or a ``perturbation`` keeps by itself.

    Args:
        model: Whose parameters receive the gradients.
        criterion: That ``compute`` calls.
        compute: Puts the gradients of a step into the parameters; what it writes besides, it writes in place. The
            optimizer's step is none of it.
        new_graph: Makes a graph; None: all steps are eager.

    Attributes:
        reasons: Why some kinds of steps run eagerly.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        compute: Callable[[Any], None],
        new_graph: Callable[[], Graph] | None,
    ) -> None:
        self._model, self._criterion, self._compute, self._new_graph = model, criterion, compute, new_graph
        self._captures: dict[Hashable, _Capture] = {}
        self._refused: set[Hashable] = set()
        self._seen: dict[Hashable, int] = {}
        self.reasons: list[str] = []

    def __call__(self, parts: Any) -> None:
        """The gradients of a step, in the parameters, until the next one; earlier ones are dropped.

        Args:
            parts: What ``compute`` takes: tensors in lists, tuples and dicts, and numbers, which make a kind of step.
        """
        self._criterion.before_step()
        if self._new_graph is None:
            self._eagerly(parts)
            return
        leaves, structure = tree_flatten(parts)
        modules = list(self._model.modules())
        kind = (structure, *map(kinds.like, leaves), self._criterion.kind(), kinds.decided(modules, self._criterion))
        capture = self._captures.get(kind)
        if capture is not None:
            capture.replay(leaves, modules)
        elif kind in self._refused:
            self._eagerly(parts)
        elif len(self._captures) + len(self._refused) >= _MOST:
            self._say(f"there are more than {_MOST} kinds of them")
            self._eagerly(parts)
        else:
            self._watched(kind, parts)

    def _eagerly(self, parts: Any) -> None:
        for parameter in self._model.parameters():
            parameter.grad = None
        self._compute(parts)

    def _watched(self, kind: Hashable, parts: Any) -> None:
        """An eager step, after which its kind perhaps is captured or refused."""
        leaves, steps = tree_leaves(parts), self._criterion.steps
        before = kinds.on_host(self._model, leaves)
        self._eagerly(parts)
        reason = kinds.unfit(leaves) or kinds.difference(before, kinds.on_host(self._model, leaves))
        if self._criterion.steps > steps + 1:
            reason = "the cadences count several calls of the criterion (count_calls) in a step"
        if reason is not None:
            self._refuse(kind, reason)
            return
        count = self._seen.pop(kind, 0) + 1
        self._seen[kind] = count  # the last one is the freshest
        if count >= _EAGER and self._new_graph is not None:
            self._capture(kind, parts, steps, self._new_graph())
        elif len(self._seen) > _REMEMBERED:
            self._seen.pop(next(iter(self._seen)))
            self._say("no two steps are of the same shapes and strength for long")

    def _capture(self, kind: Hashable, parts: Any, steps: int, graph: Graph) -> None:
        """Capture the step that was just made: as it is of the same batch, whatever is kept of one is in place."""
        criterion, parameters = self._criterion, list(self._model.parameters())
        gradients, made, last = [parameter.grad for parameter in parameters], criterion.steps, criterion.remembered
        inputs = tree_map_only(Tensor, Tensor.clone, parts)
        criterion.steps = steps
        torch.clear_autocast_cache()  # of the eager step, where autocast is on around it
        try:
            graph.capture(lambda: self._eagerly(inputs), criterion.generators())
            captured = [parameter.grad for parameter in parameters]
            own = tree_leaves(inputs)
            self._captures[kind] = _Capture(criterion, graph, own, captured, criterion.remembered)
        except Exception as error:  # the same step had just gone well: whatever it is, it is about capturing
            self._refuse(kind, " ".join(str(error).split("\n")[0].split()))
        finally:
            torch.clear_autocast_cache()
            criterion.steps = made
            criterion.remembered = last
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient

    def _refuse(self, kind: Hashable, reason: str) -> None:
        self._refused.add(kind)
        self._say(reason)

    def _say(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)
            logger.warning("CUDA graphs: some steps run eagerly: %s", reason)

    @property
    def captured(self) -> int:
        """Kinds of steps that are replayed."""
        return len(self._captures)

    def forget(self) -> None:
        """Drop all graphs: the tensors that they work on have been replaced."""
        self._captures.clear()
        self._refused.clear()
        self._seen.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Copies begin without graphs."""
        return {**vars(self), "_captures": {}, "_refused": set(), "_seen": {}}


class _Capture:
    """A captured kind of step."""

    def __init__(
        self,
        criterion: Criterion,
        graph: Graph,
        inputs: list[Any],
        gradients: list[Tensor | None],
        statistics: StepStatistics | None,
    ) -> None:
        self._criterion, self._graph = criterion, graph
        self._inputs, self._gradients, self._statistics = inputs, gradients, statistics

    def replay(self, leaves: list[Any], modules: list[nn.Module]) -> None:
        self._criterion.before_replay()
        for mine, other in zip(self._inputs, leaves):
            if isinstance(mine, Tensor):
                mine.copy_(other)
        self._graph.replay()
        for parameter, gradient in zip(kinds.parameters(modules), self._gradients):
            parameter.grad = gradient
        # Kernels that are replayed count no changes, by which it is known what is stale of things derived.
        owners = (*modules, *self._criterion.modules())
        buffers = [b for module in owners for b in module._buffers.values() if b is not None and not b.is_inference()]
        increment_version(buffers)
        self._criterion.after_replay(self._statistics)
