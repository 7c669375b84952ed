"""What evaluations read: batches of images and labels from anybody's loader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from sgr_kernels.attacks.guard import plain, random_streams

Loader = Iterable[Sequence[Tensor]]


def batches(loader: Loader, device: torch.device | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of each batch, outside any graph, on the device; empty batches are left out.

    What a batch holds beyond its first two entries is ignored.

    Raises:
        TypeError: a batch that does not begin with two tensors.
        ValueError: no image in the whole loader.
    """
    found = False
    for batch in loader:
        if not (isinstance(batch, Sequence) and len(batch) >= 2 and all(isinstance(t, Tensor) for t in batch[:2])):
            raise TypeError(f"loader: expected batches that begin with tensors (images, labels), got {_kind(batch)}")
        images, labels = batch[:2]
        if len(images):
            found = True
            yield plain(images).to(device), plain(labels).to(device)
    if not found:
        raise ValueError("loader: expected at least one image, got none")


def first_images(loader: Loader, count: int | None, device: torch.device | None) -> tuple[Tensor, Tensor]:
    """The first images and labels, at most ``count``, or all; the global random streams are left as they were.

    Raises:
        TypeError, ValueError: as ``batches``.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    found = 0
    with random_streams():
        for images, labels in batches(loader, device):
            taken = len(images) if count is None else min(len(images), count - found)
            parts.append((images[:taken], labels[:taken]))
            found += taken
            if found == count:
                break
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def _kind(batch: object) -> str:
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return f"({', '.join(type(entry).__name__ for entry in batch)})"
    return type(batch).__name__
