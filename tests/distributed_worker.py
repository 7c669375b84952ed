"""What penalty/test_distributed.py starts: ``python -m tests.distributed_worker FOLDER SCENARIO[:ARGUMENT]...``."""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import sgr_kernels as sgr
from sgr_kernels.penalty.choice import METHODS

STEPS, BATCH, SIZE = 4, 12, (7, 6)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.GELU(), nn.Flatten(), nn.Linear(5 * 5 * 4, 3))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.rand(BATCH, 2, *SIZE, generator=generator), torch.randint(0, 3, (BATCH,), generator=generator)


def criterion(method: str) -> sgr.SGRLoss:
    return sgr.SGRLoss(sgr.CovarianceFunction(2, SIZE, target_variance=1.0), 5.0, method=method)


def train(net: nn.Module, loss: sgr.SGRLoss, rank: int, ranks: int, steps: range) -> list[Tensor]:
    """Gradients of every step; each process has its share of the global batch."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    gradients = []
    for step in steps:
        images, labels = (part.chunk(ranks)[rank] for part in batch(step))
        optimizer.zero_grad()
        loss(net, images, labels).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]).clone())
        optimizer.step()
    return gradients


def scenario_gradients(rank: int, ranks: int, folder: Path, method: str) -> None:
    loss = criterion(method)
    gradients = train(DistributedDataParallel(model()), loss, rank, ranks, range(STEPS))
    torch.save({"gradients": gradients, "values": loss.covariance.values}, folder / f"{method}-{rank}.pt")


def scenario_uneven(rank: int, ranks: int, folder: Path) -> None:
    """Uneven, empty and non-finite batches; every process must end with bitwise the same estimate."""
    covariance = sgr.CovarianceFunction(2, SIZE, target_variance=1.0)
    for step, sizes in enumerate(([7, 4], [11, 0], [5, 6])):
        xi, start = torch.randn(11, 2, *SIZE, generator=torch.Generator().manual_seed(step)), sum(sizes[:rank])
        mine = xi[start : start + sizes[rank]].clone()
        if step == 2 and rank == 0:
            mine[0, 0, 0, 0] = torch.nan
        covariance.update(mine)
    torch.save(covariance.state_dict(), folder / f"uneven-{rank}.pt")


def scenario_nonfinite(rank: int, ranks: int, folder: Path) -> None:
    """The penalty of one process alone is not finite, in one step; all must go on, with the same weights."""
    for method in METHODS:
        net, loss = DistributedDataParallel(model()), criterion(method)
        train(net, loss, rank, ranks, range(1))
        if rank == 0:
            loss.covariance.quadratic_form = lambda g: g.flatten(1).sum(1) * torch.nan
        train(net, loss, rank, ranks, range(1, 2))
        loss.covariance.__dict__.pop("quadratic_form", None)
        train(net, loss, rank, ranks, range(2, STEPS))
        state = {"nonfinite": loss.nonfinite, "values": loss.covariance.values, **net.module.state_dict()}
        torch.save(state, folder / f"nonfinite-{method}-{rank}.pt")


def scenario_resume(rank: int, ranks: int, folder: Path) -> None:
    """Continue, on this number of processes, what another number began."""
    state = torch.load(folder / "begun.pt", weights_only=True)
    net, loss = model(), criterion("double-backward")
    net.load_state_dict(state["model"])
    loss.load_state_dict(state["criterion"])
    gradients = train(DistributedDataParallel(net), loss, rank, ranks, range(2, STEPS))
    torch.save({"gradients": gradients, "values": loss.covariance.values}, folder / f"resumed-{rank}.pt")


def scenario_killed(rank: int, ranks: int, folder: Path) -> None:
    """One process dies in the middle of training; the other must fail, not wait."""
    net, loss = DistributedDataParallel(model()), criterion("double-backward")
    train(net, loss, rank, ranks, range(1))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    train(net, loss, rank, ranks, range(1, STEPS))


def main() -> None:
    folder, *scenarios = sys.argv[1:]
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    for scenario in scenarios:
        name, *rest = scenario.split(":")
        globals()[f"scenario_{name}"](rank, ranks, Path(folder), *rest)
    distributed.barrier()  # who leaves first would break the others' connections
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
