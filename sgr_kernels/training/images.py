"""What trainings and evaluations read images from: in memory, in files, or through anybody's Dataset or DataLoader."""

from __future__ import annotations

import hashlib
import operator
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sgr_kernels.attacks.guard import random_streams
from sgr_kernels.checks import describe
from sgr_kernels.evaluation.loaders import batches

_CHUNK = 256
_VARIANCE_IMAGES = 2048  # what the variance of images that do not lie in memory is estimated from
_LOOKED_AT = 8  # items, spread over somebody's data set, that have to be images in [0, 1]


class DataError(ValueError):
    """Data are missing, truncated, mislabelled or of another kind than their name says."""


def pixels(images: Tensor) -> Tensor:
    """Images as float32 in [0, 1]: bytes are divided by 255, floating-point values stay as they are."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images.float()


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, without waiting for what a GPU is still at."""
    if device.type != "cuda" or not tensor.is_cpu:
        return tensor.to(device)
    if not tensor.is_pinned():  # by hand, as pin_memory() cannot write into an expanded tensor's memory
        tensor = torch.empty_like(tensor, pin_memory=True).copy_(tensor)
    return tensor.to(device, non_blocking=True)


class Images(ABC):
    """Labelled images.

    Attributes:
        name: What the images are, for example ``"mnist"``.
        classes: One name per class; None where they are not known.
        origin: What `sgr_kernels.training.datasets.load` reads them from again; None where they come from Python.
        by_name: Whether labels follow from nothing but the names of the classes.
    """

    name: str
    classes: tuple[str, ...] | None
    origin: str | None = None
    by_name: ClassVar[bool] = False

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of an image, (C, H, W)."""

    @abstractmethod
    def example(self) -> Tensor:
        """An image or two (n, C, H, W), float32 in [0, 1], to try a network on."""

    @abstractmethod
    def pixel_variance(self) -> float:
        """Mean over pixel positions of the centred variance over the images, pixel values in [0, 1].

        This is the average diagonal entry of the data's covariance matrix, the unit in which the penalty's strength
        reads as a noise-to-signal ratio (section 3.3 of the paper). Images that do not lie in memory are not all read
        for it: 2,048 of them, spread evenly, decide.
        """

    @abstractmethod
    def some(self, count: int) -> Tensor:
        """So many images (n, C, H, W), or all where there are fewer, float32 in [0, 1], the same each time."""

    def renumbered(self, numbers: Tensor, classes: tuple[str, ...]) -> Images:
        """The same of other classes, of which each label k becomes the label ``numbers[k]``.

        Raises:
            DataError: If labels are somebody's own.
        """
        for own, number in enumerate(numbers.tolist()):
            if own != number:
                raise DataError(
                    f"data: {self.name} gives the class {classes[number]!r} the label {own}, the training {number}: "
                    "number the classes of both alike"
                )
        return self

    def digest(self) -> str:
        """Hex digits to tell whether a training continues on the data it began with."""
        return hashlib.sha256(repr((self.name, len(self), self.shape)).encode()).hexdigest()[:16]


class Indexed(Images):
    """Images of which any can be asked for."""

    @abstractmethod
    def read(self, index: Tensor, draw: int = 0) -> tuple[Tensor, Tensor]:
        """Images (n, C, H, W), uint8 or floating point in [0, 1], and labels (n,), int64.

        Args:
            index: Of the images, (n,), int64.
            draw: What is random in the reading follows from it and from an image's index alone.

        Raises:
            DataError: If an image cannot be read, or is not what the others are.
        """

    @abstractmethod
    def part(self, part: slice) -> Indexed:
        """Those of a slice."""

    def first(self, count: int | None) -> Any:
        """The first ``count`` images (all of them for None or a larger count)."""
        return self.part(slice(count))

    def to(self, device: torch.device | str) -> Indexed:
        """The same; on the device if they lie in memory."""
        return self

    def example(self) -> Tensor:
        """The first two."""
        return pixels(self.read(torch.arange(min(2, len(self))))[0])

    def some(self, count: int) -> Tensor:
        """As of all `Images`, spread evenly."""
        return torch.cat([pixels(self.read(part)[0]) for part in self._spread(count).split(_CHUNK)])

    def pixel_variance(self) -> float:
        """As of all `Images`."""
        return variance(self.read(part)[0] for part in self._spread(_VARIANCE_IMAGES).split(_CHUNK))

    def _spread(self, count: int) -> Tensor:
        return torch.linspace(0, len(self) - 1, min(len(self), count)).round().long()


def variance(parts: Any) -> float:
    """Mean over pixel positions of the variance over the images of all parts, summed in float64."""
    n, total, squares = 0, torch.zeros(()), torch.zeros(())
    for images in parts:
        values = pixels(images).double()
        n, total, squares = n + len(values), total + values.sum(0), squares + values.square().sum(0)
    return float((squares / n - (total / n).square()).mean())


@dataclass(frozen=True)
class ImageSet(Indexed):
    """Labelled images in memory.

    Attributes:
        images: (n, C, H, W), uint8.
        labels: (n,), int64, each below ``len(classes)``.
        name: What the images are, for example ``"mnist"``.
        classes: One name per class.
        origin: What they were read from.
    """

    images: Tensor
    labels: Tensor
    name: str
    classes: tuple[str, ...]
    origin: str | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise DataError(
                f"images must be uint8 of shape (n, C, H, W), got {self.images.dtype} of {tuple(self.images.shape)}"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise DataError(
                f"labels must be int64 of shape ({len(self.images)},) like the images, "
                f"got {self.labels.dtype} of {tuple(self.labels.shape)}"
            )
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise DataError(
                f"labels of {self.name} must lie in 0..{len(self.classes) - 1}, "
                f"got {int(self.labels.min())}..{int(self.labels.max())}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return tuple(self.images.shape[1:])

    def read(self, index: Tensor, draw: int = 0) -> tuple[Tensor, Tensor]:
        """As of all `Indexed` images."""
        index = moved(index, self.images.device)
        return self.images[index], self.labels[index]

    def part(self, part: slice) -> ImageSet:
        """Those of a slice."""
        return replace(self, images=self.images[part], labels=self.labels[part])

    def renumbered(self, numbers: Tensor, classes: tuple[str, ...]) -> ImageSet:
        """As of all `Images`."""
        return replace(self, labels=numbers.to(self.labels.device)[self.labels], classes=classes)

    def to(self, device: torch.device | str) -> ImageSet:
        """The same on a device, still as uint8."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def pixel_variance(self) -> float:
        """As of all `Images`, exactly and of all of them."""
        total = torch.zeros(self.images.shape[1:], dtype=torch.int64)
        squares = torch.zeros_like(total)
        for chunk in self.images.split(4096):
            total += chunk.sum(0, dtype=torch.int64)
            squares += chunk.to(torch.int32).square_().sum(0, dtype=torch.int64)
        n = len(self)
        variance = squares.double() / n - (total.double() / n).square()
        return float(variance.mean()) / 255**2

    def digest(self) -> str:
        """Hex digest of pixels and labels."""
        state = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        for part in (self.images, self.labels):
            state.update(part.contiguous().numpy().data)
        return state.hexdigest()[:16]


class Items(Indexed):
    """The items (image, label, ...) of any map-style ``Dataset``.

    Images are tensors (C, H, W), uint8 or in [0, 1]. Random transforms draw from streams of their own, which follow
    from the training's seed, the epoch and the item, so that a resumed training sees what it would have seen.

    Args:
        dataset: Anything with ``__len__`` and ``__getitem__``.
        name: None: its type's name.
        classes: None: its own ``classes`` if it has any.
        chosen: Indices of those that are meant; None: all, of which a few are looked at.

    Raises:
        DataError: If there are none, or those looked at are no images in [0, 1] with labels.
    """

    def __init__(
        self,
        dataset: Any,
        name: str | None = None,
        classes: Sequence[str] | None = None,
        chosen: range | None = None,
    ) -> None:
        self.dataset, self.name = dataset, name or type(dataset).__name__
        self.classes = _classes(dataset, classes)
        self.chosen = range(len(dataset)) if chosen is None else chosen
        if not self.chosen:
            raise DataError(f"{self.name} holds no images")
        self._shape = tuple(self._item(0, 0)[0].shape)
        if chosen is None:
            _require_pixels(self.name, self.read(self._spread(_LOOKED_AT))[0])

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first item."""
        return self._shape

    def part(self, part: slice) -> Items:
        """Those of a slice."""
        return Items(self.dataset, self.name, self.classes, self.chosen[part])

    def read(self, index: Tensor, draw: int = 0) -> tuple[Tensor, Tensor]:
        """As of all `Indexed` images."""
        with random_streams():
            items = [self._item(int(k), draw) for k in index]
        for image, _ in items:
            if image.shape != self._shape:
                raise DataError(f"{self.name}: an image has shape {tuple(image.shape)}, the first one {self._shape}")
        images = torch.stack([image for image, _ in items]) if items else torch.zeros(0, *self._shape)
        return images, torch.tensor([label for _, label in items], dtype=torch.int64)

    def _item(self, index: int, draw: int) -> tuple[Tensor, int]:
        with random_streams():
            seed = np.random.SeedSequence([draw, index]).generate_state(1)[0]
            random.seed(int(seed))
            np.random.seed(seed)  # noqa: NPY002 - the streams that other people's transforms draw from
            torch.default_generator.manual_seed(int(seed))
            item = self.dataset[self.chosen[index]]
        if not (isinstance(item, Sequence) and len(item) >= 2 and isinstance(item[0], Tensor) and item[0].dim() == 3):
            raise DataError(
                f"{self.name}: expected items that begin with an image (C, H, W), as a tensor, and a label, "
                f"got {describe(item)}"
            )
        return item[0], _label(self.name, item[1])


class Loaded(Images):
    """The batches (images, labels, ...) of any ``DataLoader``, in its own order and with its own transforms.

    Attributes:
        loader: Yields images (B, C, H, W) in [0, 1] and labels (B,); an epoch has ``len(loader)`` batches.

    Raises:
        DataError: If it does not know how many batches it has, or the first one is of no images in [0, 1].
    """

    def __init__(self, loader: Any, name: str | None = None, classes: Sequence[str] | None = None) -> None:
        dataset = getattr(loader, "dataset", loader)
        try:
            len(loader)
        except TypeError as error:
            name = type(loader).__name__
            raise DataError(f"{name}: expected a loader that knows how many batches it has (__len__)") from error
        if getattr(loader, "persistent_workers", False):
            raise DataError(
                "persistent_workers: expected False, as such workers keep random streams to which a resumed training "
                "cannot return"
            )
        self.loader, self.name = loader, name or type(dataset).__name__
        self.classes = _classes(dataset, classes)
        with random_streams():
            images, _ = next(batches(loader, None))
        _require_pixels(self.name, images)
        self._first = pixels(images[:2])
        self._count = len(dataset) if isinstance(dataset, Sized) else len(loader)

    def __len__(self) -> int:
        return self._count

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first image."""
        return tuple(self._first.shape[1:])

    def example(self) -> Tensor:
        """The first two."""
        return self._first

    def some(self, count: int) -> Tensor:
        """As of all `Images`, of the first batches, which are the same each time if the loader's are."""
        with random_streams():
            return torch.cat([pixels(images) for images in self._first_batches(count)])[:count]

    def pixel_variance(self) -> float:
        """As of all `Images`; of the first batches."""
        with random_streams():
            return variance(self._first_batches(_VARIANCE_IMAGES))

    def _first_batches(self, count: int) -> Any:
        seen = 0
        for images, _ in batches(self.loader, torch.device("cpu")):
            yield images
            seen += len(images)
            if seen >= count:
                return


class DataSet(NamedTuple):
    """A training and a test set of the same kind."""

    train: Any
    test: Any


def images_of(data: Any) -> Images:
    """Images as they are, and anybody's ``Dataset`` or ``DataLoader`` as `Images`.

    Raises:
        DataError: If it is none of these, or holds nothing, or no images in [0, 1] with labels.
    """
    if isinstance(data, Images):
        return data
    if isinstance(data, DataLoader):
        return Loaded(data)
    if isinstance(data, Sized) and hasattr(data, "__getitem__"):
        return Items(data)
    raise DataError(f"data: expected images, a Dataset with __len__ or a DataLoader, got {describe(data)}")


def _classes(dataset: Any, given: Sequence[str] | None) -> tuple[str, ...] | None:
    names = getattr(dataset, "classes", None) if given is None else given
    return None if names is None else tuple(map(str, names))


def _require_pixels(name: str, images: Tensor) -> None:
    """Expect bytes, or floating-point values in [0, 1] up to the rounding that attacks accept."""
    if images.dtype in (torch.uint8, torch.bool):
        return
    if not images.is_floating_point():
        raise DataError(
            f"data: {name}: expected images that are uint8 or floating point, got {images.dtype}; "
            "for values from 0 to 255: .to(torch.uint8)"
        )
    low, high = (float(value) for value in images.aminmax())
    rounding = max(1e-6, torch.finfo(images.dtype).eps)
    if not (-rounding <= low and high <= 1 + rounding):
        remedy = "divide by 255" if low >= 0 and high <= 255 else "normalise inside the network"
        raise DataError(f"data: {name}: expected images in [0, 1], got values from {low:.4g} to {high:.4g}; {remedy}")


def _label(name: str, value: Any) -> int:
    """A whole number, also from a tensor or an array of one element."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    try:
        return operator.index(bool(value) if isinstance(value, np.bool_) else value)
    except TypeError as error:
        raise DataError(f"data: {name}: expected labels that are whole numbers, got {describe(value)}") from error
