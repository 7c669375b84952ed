"""The processes of one training, as ``torchrun`` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TIME_LIMIT = timedelta(minutes=10)


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is; one alone needs no ``torch.distributed``.

    Attributes:
        rank: From 0.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """Sum over all processes; every one must ask."""
        if self.size > 1:
            values = values.clone()
            distributed.all_reduce(values)
        return values

    def any(self, answer: bool, device: torch.device) -> bool:
        """Whether the answer is yes in any process; every one must ask."""
        return answer if self.size == 1 else bool(self.total(torch.tensor([float(answer)], device=device)))

    def share(self, count: int) -> slice:
        """This process's part of ``count`` samples in a row; parts differ by at most one, and may be empty."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)


def launched() -> bool:
    """Whether ``torchrun``, or something with its environment variables, started this as one of several processes."""
    return all(name in os.environ for name in _ENVIRONMENT) and int(os.environ["WORLD_SIZE"]) > 1


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process on its machine, where the device is just "cuda"; others as they are."""
    if str(device) == "cuda" and launched():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", os.environ["RANK"])))
    return device


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Be one of the processes that the environment tells of; alone where it tells of none.

    An error leaves the group at once, without a word to the others: their next exchange fails instead of waiting.
    """
    if not launched():
        yield Processes()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIME_LIMIT)
    yield Processes(distributed.get_rank(), distributed.get_world_size())
    distributed.barrier()  # who leaves first would break the others' connections
    distributed.destroy_process_group()
