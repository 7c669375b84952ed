"""What several commands share: argument types, the device, an orderly interrupt."""

from __future__ import annotations

import argparse
import math
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from sgr_kernels.training.datasets import SAMPLE, DataSet, load
from sgr_kernels.training.models import architecture_for


def whole(text: str) -> int:
    """Argument type: an integer >= 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text}")
    return value


def natural(text: str) -> int:
    """Argument type: an integer >= 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 0, got {text}")
    return value


def seed(text: str) -> int:
    """Argument type: a seed of 64 bits."""
    value = natural(text)
    if value >= 2**64:
        raise argparse.ArgumentTypeError(f"expected a whole number below 2**64, got {text}")
    return value


def nonnegative(text: str) -> float:
    """Argument type: a finite number >= 0."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number >= 0, got {text}")
    return value


def positive(text: str) -> float:
    """Argument type: a finite number > 0."""
    value = nonnegative(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text}")
    return value


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add ``--data``."""
    parser.add_argument(
        "--data",
        default=SAMPLE,
        metavar=f"{SAMPLE}|DIR",
        help="the shipped digits, or a folder with MNIST (IDX) or CIFAR-10 (binary version)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: cuda where there is one")


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    """Add ``--batch-size``."""
    parser.add_argument("--batch-size", type=whole, help="images at once; none: 100 on a CPU, 1000 elsewhere")


def batch_size(given: int | None, chosen: torch.device) -> int:
    """The batch size given, or one that suits the device."""
    return given or (100 if chosen.type == "cpu" else 1000)


def device(name: str) -> torch.device:
    """The device of that name, or the best one for ``"auto"``.

    Raises:
        ValueError: if there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
        torch.zeros((), device=chosen).item()  # "meta" makes tensors, but keeps no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return chosen


def load_for(data: str, trained_on: str | None = None, architecture: str | None = None) -> DataSet:
    """Load a data set, checking that it suits a trained network if there is one.

    Raises:
        ValueError: if the network was trained on another kind of images.
    """
    loaded = load(data)
    found = architecture_for(loaded.test.images.shape[1:])
    if architecture is not None and found != architecture:
        raise ValueError(
            f"the checkpoint was trained on {trained_on}, but --data {data} holds {loaded.test.name}: "
            "name the folder of its data set"
        )
    return loaded


def writable(path: str | Path) -> Path:
    """The path of a file to be written, its folder made if need be; asked for before anything is measured.

    Raises:
        OSError: if no file can be written there.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder, not a file to write")
    with tempfile.TemporaryFile(dir=target.parent):
        return target


@contextmanager
def interrupt_between_steps() -> Iterator[Callable[[], bool]]:
    """Turn the first interrupt (Ctrl-C, or SIGTERM) into a request; the next one interrupts at once.

    Yields:
        Whether an interrupt was asked for.
    """
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
