"""Batches whose order and augmentation depend on (seed, epoch, step) alone, so that any position can be returned to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sgr_kernels.attacks.inputs import check_count
from sgr_kernels.training.datasets import ImageSet
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
        index = (
            torch.arange(batch).view(-1, 1, 1, 1),
            torch.arange(channels).view(1, -1, 1, 1),
            rows.view(batch, 1, height, 1),
            columns.view(batch, 1, 1, width),
        )
        return padded[tuple(i.to(images.device) for i in index)]


class Batches:
    """Iterates over an image set in batches of float32 images in [0, 1].

    ``epoch(e, start)`` is a function of the seed, the epoch and the step, and of nothing that happened before: the
    whole state of a training's position in its data is the pair (epoch, step). Iterating over the object itself gives
    epoch 0, again and again the same.

    Args:
        data: The images.
        batch_size: Images in a batch; an epoch's last batch may hold fewer.
        device: Where the batches are wanted. The images are moved there once, as uint8.
        seed: Seed of order and augmentation, drawn on the CPU whatever the device.
        shuffle: Whether each epoch has an order of its own.
        augmentation: Applied to each batch if given.
        processes: Those that share each batch; this one yields its part, perhaps an empty one.
    """

    def __init__(
        self,
        data: ImageSet,
        batch_size: int = 128,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        shuffle: bool = False,
        augmentation: Augmentation | None = None,
        processes: Processes = _ALONE,
    ) -> None:
        check_count("batch_size", batch_size)
        check_count("seed", seed, least=0)
        self.images = data.images.to(device)
        self.labels = data.labels.to(device)
        self.batch_size, self.seed, self.shuffle, self.augmentation = batch_size, seed, shuffle, augmentation
        self.processes = processes

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches ``start``, ``start + 1``, ... of an epoch: images (B, C, H, W) float32 in [0, 1], labels (B,)."""
        order = torch.arange(len(self.labels))
        if self.shuffle:
            order = torch.randperm(len(self.labels), generator=self._generator(epoch, 0))
        for step in range(start, len(self)):
            whole, part = self.count(step), self.processes.share(self.count(step))
            chosen = order[step * self.batch_size :][:whole][part].to(self.images.device)
            images = self.images[chosen].float().div_(255)
            if self.augmentation is not None:
                images = self.augmentation(images, self._generator(epoch, step + 1), whole, part)
            yield images, self.labels[chosen]

    def count(self, step: int) -> int:
        """Images in a step's batch, those of all processes."""
        return min(self.batch_size, len(self.labels) - step * self.batch_size)

    def _generator(self, epoch: int, stream: int) -> torch.Generator:
        mixed = np.random.SeedSequence([self.seed, epoch, stream]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(mixed >> np.uint64(1)))
