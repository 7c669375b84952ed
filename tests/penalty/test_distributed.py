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


def launch(scenario: str, ranks: int, folder: Path, *arguments: str) -> list[int]:
    """Exit codes of the processes of a scenario."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed_worker", scenario, str(folder), *arguments],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(ranks), "GLOO_SOCKET_IFNAME": "lo"},
            cwd=Path(__file__).parents[2],
            stderr=subprocess.DEVNULL if scenario == "killed" else None,
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


@pytest.mark.parametrize(
    ("ranks", "method", "tolerance"),
    [
        (2, "double-backward", 1e-5),
        (2, "forward-mode", 1e-5),
        (4, "double-backward", 1e-5),
        (2, "finite-difference", 1e-2),  # its steps are chosen by each process
    ],
)
def test_gradients_equal_those_of_one_process(tmp_path: Path, ranks: int, method: str, tolerance: float) -> None:
    assert launch("gradients", ranks, tmp_path, method) == [0] * ranks
    expected, loss = alone(method)
    results = [torch.load(tmp_path / f"{method}-{rank}.pt", weights_only=True) for rank in range(ranks)]
    for result in results:
        assert torch.equal(result["values"], results[0]["values"])
        torch.testing.assert_close(result["values"], loss.covariance.values, rtol=1e-5, atol=1e-6)
        for found, wanted in zip(result["gradients"], expected, strict=True):
            assert (found - wanted).norm() <= tolerance * wanted.norm()


def test_uneven_empty_and_nonfinite_batches_enter_by_their_counts(tmp_path: Path) -> None:
    assert launch("uneven", 2, tmp_path) == [0, 0]
    states = [torch.load(tmp_path / f"uneven-{rank}.pt", weights_only=True) for rank in range(2)]
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name])
    batches = [torch.randn(11, 2, *worker.SIZE, generator=torch.Generator().manual_seed(step)) for step in range(3)]
    whole = sgr.CovarianceFunction(2, worker.SIZE, target_variance=1.0)
    for xi in (batches[0], batches[1], batches[2][5:]):  # the first process's share of the third was not finite
        whole.update(xi)
    torch.testing.assert_close(states[0]["values"], whole.values, rtol=1e-5, atol=1e-6)
    assert int(states[0]["skipped"]) == 1
    assert int(states[0]["updates"]) == 3


def test_a_penalty_that_is_not_finite_in_one_process_holds_up_none(tmp_path: Path) -> None:
    assert launch("nonfinite", 2, tmp_path) == [0, 0]
    for method in METHODS:
        first, second = (torch.load(tmp_path / f"{method}-{rank}.pt", weights_only=True) for rank in range(2))
        assert (int(first.pop("nonfinite")), int(second.pop("nonfinite"))) == (1, 0)
        for name, value in first.items():
            assert bool(value.isfinite().all())
            assert torch.equal(value, second[name])


def test_training_resumes_on_another_number_of_processes(tmp_path: Path) -> None:
    net, loss = worker.model(), worker.criterion("double-backward")
    worker.train(net, loss, 0, 1, range(2))
    torch.save({"model": net.state_dict(), "criterion": loss.state_dict()}, tmp_path / "begun.pt")
    assert launch("resume", 2, tmp_path) == [0, 0]
    expected, _ = alone()
    for rank in range(2):
        found = torch.load(tmp_path / f"resumed-{rank}.pt", weights_only=True)["gradients"]
        for mine, wanted in zip(found, expected[2:], strict=True):
            assert (mine - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_killed_process_ends_the_others_with_an_error(tmp_path: Path) -> None:
    survivor, killed = launch("killed", 2, tmp_path)
    assert killed == -9
    assert survivor not in (0, -9)


def test_a_process_group_needs_initialization() -> None:
    with pytest.raises(ValueError, match=r"process_group: torch.distributed is not initialized"):
        sgr.CovarianceFunction(1, (4, 4), process_group=object())
