"""Several processes on one machine (gloo): the same gradients and estimates as one process on the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

import sgr_kernels as sgr
from sgr_kernels.penalty.choice import METHODS
from tests import distributed_worker as worker

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")

TIME_LIMIT = 150  # a deadlock is a failure


def launch(ranks: int, folder: Path, *scenarios: str) -> list[int]:
    """Exit codes of the processes that go through scenarios, one after the other."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed_worker", str(folder), *scenarios],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(ranks), "GLOO_SOCKET_IFNAME": "lo"},
            cwd=Path(__file__).parents[2],
            stderr=subprocess.DEVNULL if "killed" in scenarios else None,
        )
        for rank in range(ranks)
    ]
    try:
        return [process.wait(TIME_LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()


def alone(method: str = "double-backward", steps: int = worker.STEPS) -> tuple[list[torch.Tensor], sgr.SGRLoss]:
    loss = worker.criterion(method)
    return worker.train(worker.model(), loss, 0, 1, range(steps)), loss


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave that go through all scenarios: to start them takes longer than those do."""
    folder = tmp_path_factory.mktemp("two")
    net, loss = worker.model(), worker.criterion("double-backward")
    worker.train(net, loss, 0, 1, range(2))
    torch.save({"model": net.state_dict(), "criterion": loss.state_dict()}, folder / "begun.pt")
    gradients = [f"gradients:{method}" for method in METHODS]
    assert launch(2, folder, *gradients, "uneven", "nonfinite", "resume") == [0, 0]
    return folder


@pytest.mark.parametrize(
    ("method", "tolerance"),
    [
        ("double-backward", 1e-5),
        ("forward-mode", 1e-5),
        ("finite-difference", 1e-2),  # its steps are chosen by each process
    ],
)
def test_gradients_equal_those_of_one_process(two: Path, method: str, tolerance: float) -> None:
    check_gradients(two, 2, method, tolerance)


def test_gradients_of_three_processes_equal_those_of_one(tmp_path: Path) -> None:
    assert launch(3, tmp_path, "gradients:double-backward") == [0, 0, 0]
    check_gradients(tmp_path, 3, "double-backward", 1e-5)


def check_gradients(folder: Path, ranks: int, method: str, tolerance: float) -> None:
    expected, loss = alone(method)
    results = [torch.load(folder / f"{method}-{rank}.pt", weights_only=True) for rank in range(ranks)]
    for result in results:
        assert torch.equal(result["values"], results[0]["values"])
        torch.testing.assert_close(result["values"], loss.covariance.values, rtol=1e-5, atol=1e-6)
        for found, wanted in zip(result["gradients"], expected, strict=True):
            assert (found - wanted).norm() <= tolerance * wanted.norm()


def test_uneven_empty_and_nonfinite_batches_enter_by_their_counts(two: Path) -> None:
    states = [torch.load(two / f"uneven-{rank}.pt", weights_only=True) for rank in range(2)]
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name])
    batches = [torch.randn(11, 2, *worker.SIZE, generator=torch.Generator().manual_seed(step)) for step in range(3)]
    whole = sgr.CovarianceFunction(2, worker.SIZE, target_variance=1.0)
    for xi in (batches[0], batches[1], batches[2][5:]):  # the first process's share of the third was not finite
        whole.update(xi)
    torch.testing.assert_close(states[0]["values"], whole.values, rtol=1e-5, atol=1e-6)
    assert int(states[0]["skipped"]) == 1
    assert int(states[0]["updates"]) == 3


def test_a_penalty_that_is_not_finite_in_one_process_holds_up_none(two: Path) -> None:
    for method in METHODS:
        first, second = (torch.load(two / f"nonfinite-{method}-{rank}.pt", weights_only=True) for rank in range(2))
        assert (int(first.pop("nonfinite")), int(second.pop("nonfinite"))) == (1, 0)
        for name, value in first.items():
            assert bool(value.isfinite().all())
            assert torch.equal(value, second[name])


def test_training_resumes_on_another_number_of_processes(two: Path) -> None:
    expected, _ = alone()
    for rank in range(2):
        found = torch.load(two / f"resumed-{rank}.pt", weights_only=True)["gradients"]
        for mine, wanted in zip(found, expected[2:], strict=True):
            assert (mine - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_killed_process_ends_the_others_with_an_error(tmp_path: Path) -> None:
    survivor, killed = launch(2, tmp_path, "killed")
    assert killed == -9
    assert survivor not in (0, -9)


def test_a_process_group_needs_initialization() -> None:
    with pytest.raises(ValueError, match=r"process_group: torch.distributed is not initialized"):
        sgr.CovarianceFunction(1, (4, 4), process_group=object())
