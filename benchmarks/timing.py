"""How time is taken: providers in turn, round after round, so that drifts of the machine hit all alike.

On CPUs a sample is the mean of a few calls by ``perf_counter``. On GPUs it is the mean over one replay of a CUDA graph,
between two device events; the graph goes through so many copies of the input that they overflow the L2 cache. What
cannot be captured is launched eagerly, and its row says so.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sgr_kernels.training.cuda_graphs import CudaGraph, graphs_on

Run = Callable[[Tensor], tuple[Tensor, ...]]
Samples = dict[str, list[float]]

_SAMPLE_SECONDS = 2e-3
"""A sample shorter than this is stretched by repetition."""
_GRAPH_CALLS = 256
_MINIMUM_ROUNDS = 5
_MAXIMUM_ROUNDS = 60


class Timer(Protocol):
    """Takes one sample at a time."""

    method: str

    def sample(self) -> float:
        """Seconds a call."""
        ...


class CpuTimer:
    """Mean of a few calls by the wall clock."""

    method = "perf_counter"

    def __init__(self, run: Run, images: Tensor) -> None:
        self.run, self.images = run, images
        self.calls = 1
        self.calls = repetitions(min(self.sample() for _ in range(2)))

    def sample(self) -> float:
        """Seconds a call; short ones find the caches as they leave them themselves, not as their neighbour did."""
        if self.calls > 1:
            self.run(self.images)
        start = time.perf_counter()
        for _ in range(self.calls):
            self.run(self.images)
        return (time.perf_counter() - start) / self.calls


class CudaTimer:
    """Device time of a call, by events around the replay of a CUDA graph."""

    def __init__(self, run: Run, images: Tensor) -> None:
        cache = torch.cuda.get_device_properties(images.device).L2_cache_size
        copies = min(_GRAPH_CALLS, 2 + 2 * cache // max(1, images.numel() * images.element_size()))
        self.inputs = [images.clone() for _ in range(copies)]
        self.run = run
        self.graph: CudaGraph | None = None
        self.replays = 1
        self.method = "CUDA graph"
        try:
            self._capture()
        except RuntimeError as error:
            self.graph = None
            self.method = f"eager launches ({str(error).splitlines()[0]})"
            torch.cuda.synchronize()
        self.replays = repetitions(min(self.sample() for _ in range(2)) * len(self.inputs))

    def _capture(self) -> None:
        for _ in range(3):
            self.run(self.inputs[0])
        new_graph = graphs_on(self.inputs[0].device)
        assert new_graph is not None
        graph = new_graph()
        graph.capture(lambda: [self.run(images) for images in self.inputs])
        self.graph = graph

    def _once(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        for images in self.inputs:
            self.run(images)

    def sample(self) -> float:
        """Seconds a call."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(self.replays):
            self._once()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / (self.replays * len(self.inputs))


def repetitions(seconds: float) -> int:
    """How often to repeat what takes so long, to make a sample."""
    return max(1, min(1000, math.ceil(_SAMPLE_SECONDS / max(seconds, 1e-9))))


def timer(run: Run, images: Tensor) -> Timer:
    """A warmed-up timer for the device that the images are on."""
    return CudaTimer(run, images) if images.is_cuda else CpuTimer(run, images)


def interleave(timers: Mapping[str, Timer], budget: float) -> Samples:
    """Samples of all timers in turn, at least five each, then as many rounds as the budget of seconds allows.

    Each round has an order of its own, so that nobody always finds the caches as the same neighbour leaves them. A slow
    timer leaves the rounds when it has had its share of the budget, so that it does not starve the others.
    """
    order = random.Random(0)
    samples: Samples = {name: [] for name in timers}
    spent = dict.fromkeys(timers, 0.0)
    share = budget / max(1, len(timers))
    for round_ in range(_MAXIMUM_ROUNDS):
        staying = [n for n in timers if round_ < _MINIMUM_ROUNDS or spent[n] < share]
        if round_ >= _MINIMUM_ROUNDS and (not staying or sum(spent.values()) > budget):
            break
        for name in order.sample(staying, len(staying)):
            start = time.perf_counter()
            samples[name].append(timers[name].sample())
            spent[name] += time.perf_counter() - start
    return samples


def summary(samples: list[float]) -> dict[str, Any]:
    """Median in milliseconds with the 20th and 80th percentile."""
    low, high = np.quantile(samples, [0.2, 0.8])
    return {
        "milliseconds": 1e3 * statistics.median(samples),
        "p20": 1e3 * float(low),
        "p80": 1e3 * float(high),
        "rounds": len(samples),
    }


def paired_ratio(numerator: list[float], denominator: list[float], draws: int = 2000) -> dict[str, float]:
    """Ratio of the medians over the rounds that both took part in, with its 95 % bootstrap interval over rounds."""
    rounds = min(len(numerator), len(denominator))
    a, b = np.array(numerator[:rounds]), np.array(denominator[:rounds])
    chosen = np.random.default_rng(0).integers(0, rounds, (draws, rounds))
    ratios = np.median(a[chosen], 1) / np.median(b[chosen], 1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return {"ratio": float(np.median(a) / np.median(b)), "low": float(low), "high": float(high)}
