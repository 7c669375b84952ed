"""Batches whose order and augmentation depend on (seed, epoch, step) alone, so that any position can be returned to."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sgr_kernels.attacks.guard import random_streams
from sgr_kernels.checks import check_count
from sgr_kernels.evaluation.loaders import batches
from sgr_kernels.training.folders import ImageFolder
from sgr_kernels.training.images import DataError, Images, Indexed, Loaded, moved, pixels
from sgr_kernels.training.processes import Processes

_ALONE = Processes()


@dataclass(frozen=True)
class Augmentation:
    """The paper's augmentation (section 4.1): pad, crop at random back to the original size, perhaps mirror.

    Attributes:
        pad: Pixels added on each side.
        fill: Value of the added pixels: 0 for MNIST's black ground, 0.5 (mid-range) for CIFAR-10.
        flip: Whether half of the images are mirrored left to right. A mirrored digit is another picture, so MNIST
            does without.
    """

    pad: int = 4
    fill: float = 0.0
    flip: bool = False

    def __call__(
        self, images: Tensor, generator: torch.Generator, whole: int | None = None, part: slice = slice(None)
    ) -> Tensor:
        """Augment a batch (B, C, H, W) with draws from a CPU generator; the result has the same shape.

        The images may be the given part of a whole batch; they are drawn for as in the whole.
        """
        batch, channels, height, width = images.shape
        drawn = batch if whole is None else whole
        top, left = torch.randint(0, 2 * self.pad + 1, (2, drawn, 1), generator=generator)
        rows = top[part] + torch.arange(height)
        columns = left[part] + torch.arange(width)
        if self.flip:
            mirrored = torch.rand(drawn, 1, generator=generator)[part] < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        padded = F.pad(images, (self.pad,) * 4, value=self.fill)
        device = images.device
        return padded[
            torch.arange(batch, device=device).view(-1, 1, 1, 1),
            torch.arange(channels, device=device).view(1, -1, 1, 1),
            moved(rows, device).view(batch, 1, height, 1),
            moved(columns, device).view(batch, 1, 1, width),
        ]


class Batches:
    """Iterates over images in batches of float32 images in [0, 1].

    ``epoch(e, start)`` is a function of the seed, the epoch and the step, and of nothing that happened before: the
    whole state of a training's position in its data is the pair (epoch, step). Iterating over the object itself gives
    epoch 0, again and again the same.

    Args:
        data: The images.
        batch_size: Images in a batch; an epoch's last batch may hold fewer, unless ``drop_last``.
        device: Where the batches are wanted. What lies in memory is moved there once, as uint8; of an image folder the
            next batch is read while one is in use.
        seed: Seed of order and augmentation, drawn on the CPU whatever the device.
        shuffle: Whether each epoch has an order of its own.
        augmentation: Applied to each batch if given.
        processes: Those that share each batch; this one yields its part, perhaps an empty one.
        drop_last: Whether a last batch that would hold fewer is left out.

    Raises:
        ValueError: If there are no images for a whole batch, and ``drop_last``.
    """

    def __init__(
        self,
        data: Indexed,
        batch_size: int = 128,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        shuffle: bool = False,
        augmentation: Augmentation | None = None,
        processes: Processes = _ALONE,
        drop_last: bool = False,
    ) -> None:
        check_count("batch_size", batch_size)
        if drop_last and len(data) < batch_size:
            raise ValueError(f"drop_last: expected at least a batch of {batch_size} images, got {len(data)}")
        check_count("seed", seed, least=0)
        self.data, self.device = data.to(device), torch.device(device)
        self.batch_size, self.seed, self.shuffle, self.augmentation = batch_size, seed, shuffle, augmentation
        self.processes, self.drop_last = processes, drop_last

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.data) // self.batch_size if self.drop_last else -(-len(self.data) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches ``start``, ``start + 1``, ... of an epoch: images (B, C, H, W) float32 in [0, 1], labels (B,)."""
        order = torch.arange(len(self.data))
        if self.shuffle:
            order = torch.randperm(len(self.data), generator=self._generator(epoch, 0))
        draw = _mixed(self.seed, epoch)

        def read(step: int) -> tuple[Tensor, Tensor]:
            part = self.processes.share(self.count(step))
            return self.data.read(order[step * self.batch_size :][: self.count(step)][part], draw)

        steps = range(start, len(self))
        for step, (images, labels) in zip(steps, _ahead(read, steps) if self._slow else map(read, steps)):
            images, labels = pixels(moved(images, self.device)), moved(labels, self.device)
            if self.augmentation is not None:
                whole, part = self.count(step), self.processes.share(self.count(step))
                images = self.augmentation(images, self._generator(epoch, step + 1), whole, part)
            yield images, labels

    def count(self, step: int) -> int:
        """Images in a step's batch, those of all processes."""
        return min(self.batch_size, len(self.data) - step * self.batch_size)

    @property
    def _slow(self) -> bool:
        """Whether reading takes time that another thread can spend; not where it draws random numbers."""
        return isinstance(self.data, ImageFolder)

    def _generator(self, epoch: int, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(_mixed(self.seed, epoch, stream))


class LoaderBatches:
    """The batches of somebody's ``DataLoader``, the same ones of an epoch whenever they are asked for.

    The loader, its sampler and its transforms draw from random streams of their own, which follow from the seed and
    the epoch; generators that loader and sampler have are seeded for it. To return to a position, the batches before it
    are loaded again.

    Args:
        data: The loader's images.
        device: Where the batches are wanted.
        seed: Of the streams.
        processes: Those that share each batch: each loads all of it, and yields its part.
    """

    def __init__(
        self, data: Loaded, *, device: torch.device | str = "cpu", seed: int = 0, processes: Processes = _ALONE
    ) -> None:
        self.data, self.loader, self.device = data, data.loader, torch.device(device)
        self.seed, self.processes = seed, processes
        self._count = 0

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """As of `Batches`."""
        seed = _mixed(self.seed, epoch)
        streams, loaded = _Streams(seed), enumerate(batches(self.loader, None))
        for owner in (self.loader, getattr(self.loader, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed)
        while True:
            with streams.own():
                found = next(loaded, None)
            if found is None:
                return
            step, (images, labels) = found
            if step >= start:
                self._count = len(labels)
                part = self.processes.share(len(labels))
                yield pixels(moved(images[part], self.device)), moved(labels[part], self.device)

    def count(self, step: int) -> int:
        """Images in the batch that came last, those of all processes."""
        return self._count


def batches_of(data: Images, batch_size: int, **options: Any) -> Batches | LoaderBatches:
    """`Batches` of images that can be asked for one by one; of a loader its own, whose size and order are its own.

    Raises:
        ValueError: As of `Batches`; if ``drop_last`` is asked for of a loader.
    """
    if isinstance(data, Loaded):
        if options.get("drop_last"):
            raise ValueError("drop_last: a DataLoader's batches are its own: give it drop_last=True")
        return LoaderBatches(
            data, **{name: options[name] for name in ("device", "seed", "processes") if name in options}
        )
    assert isinstance(data, Indexed)
    return Batches(data, batch_size, **options)


def promised(batches: Batches | LoaderBatches, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of an epoch from a step on, as many as ``len(batches)`` says: schedules and positions count on it.

    Raises:
        DataError: If a loader yields fewer, or, when the promised ones have been used, one more.
    """
    step = start
    for found in batches.epoch(epoch, start):
        if step == len(batches):
            break
        yield found
        step += 1
    else:
        if step == len(batches):
            return
    loader = getattr(batches, "loader", batches)
    got = f"{step}" if step < len(batches) else "more"
    raise DataError(
        f"data: {type(loader).__name__} of {batches.data.name}: expected {len(batches)} batches an epoch, which its "
        f"len() promises, got {got}"
    )


class _Streams:
    """Global random streams of PyTorch, Python and NumPy, on the CPU, beside those that the process has."""

    def __init__(self, seed: int) -> None:
        self._states = (torch.Generator().manual_seed(seed).get_state(), *_seeded(seed % 2**32))

    @contextmanager
    def own(self) -> Iterator[None]:
        """Draw from these within, and go on where they were the next time."""
        with random_streams():
            torch.default_generator.set_state(self._states[0])
            random.setstate(self._states[1])
            np.random.set_state(self._states[2])  # noqa: NPY002 - the stream that other people's transforms draw from
            yield
            self._states = (
                torch.default_generator.get_state(),
                random.getstate(),
                np.random.get_state(),  # noqa: NPY002 - same
            )


def _seeded(seed: int) -> tuple[Any, Any]:
    return random.Random(seed).getstate(), np.random.RandomState(seed).get_state()


def _mixed(*numbers: int) -> int:
    return int(np.random.SeedSequence(list(numbers)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _ahead(read: Any, steps: range) -> Iterator[Any]:
    """What ``read`` returns of each step; of the next one it is read while one is in use."""
    with ThreadPoolExecutor(1) as pool:
        pending = [pool.submit(read, step) for step in steps[:1]]
        for step in steps[1:]:
            result = pending.pop().result()
            pending.append(pool.submit(read, step))
            yield result
        for last in pending:
            yield last.result()
