"""The gradients of a training step as CUDA graphs, captured once for each kind of step and replayed from then on.

A small network's step is as slow as the host, which launches some hundreds of kernels; a replay launches one graph.
What is captured is forward passes, penalty, the covariance's update and backward; the optimizer, whose learning rate
changes with each step, runs after it as ever. A replay repeats the same kernels on the same memory, and nothing of the
Python that launched them. So all that the host decides about a step makes its kind: shapes, what the cadences ask for,
the strength. Kinds that come up seldom, such as those of a strength that still grows, run eagerly; so do those that
cannot be captured, and a line in the log says why.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from sgr_kernels.penalty.statistics import Criterion, StepStatistics
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


class CudaGraph:
    """A `torch.cuda.CUDAGraph`, after whose failure to capture everything goes on as before.

    Args:
        stream: To capture on.
        pool: Whose memory it shares with other graphs, which must not run at the same time.
    """

    def __init__(self, stream: torch.cuda.Stream, pool: Any) -> None:
        self._graph, self._stream, self._pool = torch.cuda.CUDAGraph(), stream, pool

    def capture(self, work: Callable[[], Any], generators: Sequence[torch.Generator] = ()) -> None:
        """As of `Graph`."""
        device = self._stream.device
        own = [generator for generator in generators if generator.device.type == "cuda"]
        for generator in own:
            self._graph.register_generator_state(generator)
        # A capture that fails leaves its stream the current one, and the states of generators to captures alone.
        before = [(g, g.clone_state()) for g in (torch.cuda.default_generators[device.index], *own)]
        current = torch.cuda.current_stream(device)
        try:
            # Other threads may go on allocating, such as those that read images.
            with torch.cuda.graph(self._graph, self._pool, self._stream, capture_error_mode="thread_local"):
                work()
        except BaseException:
            torch.cuda.set_stream(current)
            for generator, state in before:
                generator.graphsafe_set_state(state)
            raise

    def replay(self) -> None:
        """As of `Graph`."""
        self._graph.replay()


def usable(asked: bool | None, device: torch.device, processes: Processes) -> bool:
    """Whether steps are to be captured: as asked, or else wherever they can be.

    Raises:
        ValueError: If they are asked for and cannot be.
    """
    can = device.type == "cuda" and processes.size == 1
    if asked and not can:
        raise ValueError(f"cuda_graphs: expected one process on a CUDA device, got {processes.size} on {device}")
    return can if asked is None else asked


def graphs_on(device: torch.device | str) -> Callable[[], CudaGraph] | None:
    """Makes graphs on a CUDA device that share their memory; None for other devices, which have none."""
    if torch.device(device).type != "cuda":
        return None
    with torch.cuda.device(device):
        stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    return lambda: CudaGraph(stream, pool)


class StepGraphs:
    """Computes the gradients of steps, by replaying a graph where there is one.

    In a loop of one's own::

        def gradients(parts):
            optimizer.zero_grad()
            for images, labels in parts:
                criterion(model, images, labels).backward()

        step = StepGraphs(model, criterion, gradients, graphs_on(device))
        for images, labels in loader:
            step([(images, labels)])
            optimizer.step()

    Args:
        model: Whose parameters receive the gradients. What it does besides on the host, a replay leaves out: a kind of
            step that draws random numbers there, or counts in its modules' attributes, is not captured; other effects
            of its Python code are not noticed.
        criterion: That ``compute`` calls.
        compute: Puts the gradients of a step into the parameters, dropping earlier ones; what it writes besides, it
            writes in place.
        new_graph: Makes a graph; None: all steps are eager.

    Attributes:
        reasons: Why some kinds of steps run eagerly.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        compute: Callable[[Parts], None],
        new_graph: Callable[[], Graph] | None,
    ) -> None:
        self._model, self._criterion, self._compute, self._new_graph = model, criterion, compute, new_graph
        self._captures: dict[Hashable, _Capture] = {}
        self._refused: set[Hashable] = set()
        self._seen: dict[Hashable, int] = {}
        self.reasons: list[str] = []

    def __call__(self, parts: Parts) -> None:
        """The gradients of a step, in the parameters."""
        if self._new_graph is None:
            self._compute(parts)
            return
        self._criterion.before_step()
        kind = (self._criterion.kind(), *(_like(tensor) for part in parts for tensor in part))
        capture = self._captures.get(kind)
        if capture is not None:
            capture.replay(parts)
        elif kind in self._refused or len(self._captures) + len(self._refused) == _MOST:
            self._compute(parts)
        else:
            self._watched(kind, parts)

    def _watched(self, kind: Hashable, parts: Parts) -> None:
        """An eager step, after which its kind perhaps is captured or refused."""
        steps, before = self._criterion.steps, _on_host(self._model)
        self._compute(parts)
        changed = _difference(before, _on_host(self._model))
        if changed is not None:
            self._refuse(kind, changed)
            return
        count = self._seen.pop(kind, 0) + 1
        self._seen[kind] = count  # the last one is the freshest
        if count >= _EAGER and self._new_graph is not None:
            self._capture(kind, parts, steps, self._new_graph())
        elif len(self._seen) > _REMEMBERED:
            self._seen.pop(next(iter(self._seen)))
            self._say("no two steps are of the same shapes and strength for long")

    def _capture(self, kind: Hashable, parts: Parts, steps: int, graph: Graph) -> None:
        """Capture the step that was just made: as it is of the same batch, whatever is kept of one is in place."""
        criterion, parameters = self._criterion, list(self._model.parameters())
        gradients, made, last = [parameter.grad for parameter in parameters], criterion.steps, criterion.remembered
        inputs = [tuple(tensor.clone() for tensor in part) for part in parts]
        criterion.steps = steps
        try:
            graph.capture(lambda: self._compute(inputs), criterion.generators())
            captured = [parameter.grad for parameter in parameters]
            self._captures[kind] = _Capture(self._model, criterion, graph, inputs, captured, criterion.remembered)
        except Exception as error:  # the same step had just gone well: whatever it is, it is about capturing
            self._refuse(kind, " ".join(str(error).split("\n")[0].split()))
        finally:
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


class _Capture:
    """A captured kind of step."""

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        graph: Graph,
        inputs: Parts,
        gradients: list[Tensor | None],
        statistics: StepStatistics | None,
    ) -> None:
        self._model, self._criterion, self._graph = model, criterion, graph
        self._inputs, self._gradients, self._statistics = inputs, gradients, statistics

    def replay(self, parts: Parts) -> None:
        self._criterion.before_replay()
        for own, given in zip(self._inputs, parts):
            for mine, other in zip(own, given):
                mine.copy_(other)
        self._graph.replay()
        for parameter, gradient in zip(self._model.parameters(), self._gradients):
            parameter.grad = gradient
        # Kernels that are replayed count no changes, by which it is known what is stale of things derived.
        increment_version([b for m in (self._model, self._criterion) for b in m.buffers() if not b.is_inference()])
        self._criterion.after_replay(self._statistics)


def _like(tensor: Tensor) -> Hashable:
    return tuple(tensor.shape), tensor.dtype, tensor.stride()


def _on_host(model: nn.Module) -> dict[str, Any]:
    """What a replay would leave as it is: the host's random streams, and numbers that modules keep."""
    numbers = {
        f"{path}.{name}".lstrip("."): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str))
    }
    return {"": _random_streams(), **numbers}


def _random_streams() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - the stream that other people's models draw from
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), name, np.asarray(keys).tobytes(), *rest


def _difference(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """What a step changed on the host, in words."""
    changed = [name for name, value in after.items() if name not in before or before[name] != value]
    if not changed:
        return None
    return f"a step counts on the host ({changed[0]})" if changed[0] else "a step draws random numbers on the host"
