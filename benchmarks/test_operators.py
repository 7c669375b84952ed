"""The operators under pytest-benchmark, a group for each shape and operation; ``operators`` is the full sweep."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from benchmarks import providers
from benchmarks.peers import Unsupported
from benchmarks.providers import Provider
from benchmarks.shapes import OPERATIONS, Exact, Problem
from benchmarks.timing import interleave, paired_ratio, timer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROBLEMS = [Problem(128, 1, 28, 28), Problem(128, 3, 32, 32), Problem(256, 3, 64, 64)]
PROVIDERS = providers.all_providers(DEVICE)


@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda p: p.name)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_operator(benchmark, problem: Problem, operation: str, provider: Provider) -> None:
    benchmark.group = f"{problem} {operation}"
    images = problem.images(DEVICE)
    try:
        run = provider.build(problem, operation, DEVICE)
    except Unsupported as reason:
        pytest.skip(str(reason))

    def call() -> tuple[torch.Tensor, ...]:
        outputs = run(images)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return outputs

    outputs = benchmark.pedantic(call, rounds=7, warmup_rounds=2)
    if provider.kind != "bound":
        error = Exact(problem, images, problem.covariance(DEVICE).table).error(operation, outputs)
        benchmark.extra_info["error"] = error
        assert provider.correct(error)


def faster(problem: Problem, ours: tuple[str, str], peer: tuple[str, str]) -> dict[str, float]:
    """How much faster a provider's operation is than another's, of one run on a CPU."""
    device = torch.device("cpu")
    images = problem.images(device)
    runs = {
        side: providers.named([name], device)[0].build(problem, operation, device)
        for side, (name, operation) in (("ours", ours), ("peer", peer))
    }
    samples = interleave({side: timer(run, images) for side, run in runs.items()}, budget=4.0)
    return paired_ratio(samples["peer"], samples["ours"])


def median_in_a_block(name: str, operation: str, problem: Problem) -> float:
    """Median seconds of a provider called again and again, as a training loop finds its caches."""
    device = torch.device("cpu")
    run, images = providers.named([name], device)[0].build(problem, operation, device), problem.images(device)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        run(images)
        times.append(time.perf_counter() - start)
    return statistics.median(times[5:])


def test_value_and_gradient_in_pytorch_take_a_third_of_the_dense_product(benchmark) -> None:
    """Sigma is built beforehand; the dense side computes v and q once and no gradient of its own."""
    problem = Problem(128, 3, 32, 32)

    def ratio() -> float:
        return median_in_a_block("dense", "v+q", problem) / median_in_a_block("sgr torch", "forward+backward", problem)

    found = benchmark.pedantic(ratio, rounds=1)
    benchmark.extra_info["dense / torch backend"] = found
    assert found >= 3
