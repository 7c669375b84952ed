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

from sgr_kernels.training.datasets import FOLDER, SAMPLE
from sgr_kernels.training.records import require_folder


def whole(text: str) -> int:
    """Argument type: an integer >= 1."""
    return _integer(text, 1)


def natural(text: str) -> int:
    """Argument type: an integer >= 0."""
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected a whole number >= {least}, got {text}")
    return value


def seed(text: str) -> int:
    """Argument type: a seed of 64 bits."""
    value = natural(text)
    if value >= 2**64:
        raise argparse.ArgumentTypeError(f"expected a whole number below 2**64, got {text}")
    return value


def nonnegative(text: str) -> float:
    """Argument type: a finite number >= 0, or a fraction such as 1/8."""
    above, stroke, below = text.partition("/")
    try:
        value = float(above) / float(below) if stroke and float(below) else float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number >= 0, got {text}")
    return value


def positive(text: str) -> float:
    """Argument type: a finite number > 0."""
    value = nonnegative(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text}")
    return value


def image_size(text: str) -> tuple[int, int]:
    """Argument type: a side, or rows x columns, in pixels."""
    sides = text.lower().split("x")
    try:
        sizes = [whole(side) for side in sides]
    except argparse.ArgumentTypeError:
        sizes = []
    if len(sizes) not in (1, 2):
        raise argparse.ArgumentTypeError(f"expected a number of pixels or ROWSxCOLUMNS, got {text}")
    return sizes[0], sizes[-1]


def add_data(parser: argparse.ArgumentParser, default: str | None = SAMPLE) -> None:
    """Add ``--data`` and ``--image-size``."""
    parser.add_argument(
        "--data",
        default=default,
        metavar=f"{SAMPLE}|DIR|FILE.npz|{FOLDER}:DIR",
        help="the shipped digits, a folder with MNIST (IDX) or CIFAR-10 (binary version), arrays images and labels, or "
        "a folder with a folder of PNG and JPEG files for each class"
        + ("" if default else "; none: what the network was trained on"),
    )
    parser.add_argument(
        "--image-size",
        type=image_size,
        metavar="N|ROWSxCOLUMNS",
        help="bring an image folder's images to this size, scaled to cover it and cropped; none: they have one",
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


def writable(path: str | Path) -> Path:
    """The path of a file to be written, its folder made if need be; asked for before anything is measured.

    Raises:
        OSError: if no file can be written there.
    """
    target = Path(path)
    require_folder(target.parent)
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
