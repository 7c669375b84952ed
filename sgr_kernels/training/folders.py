"""Folders of images, ``DIR/CLASS/*.png`` or ``.jpg``, decoded when they are needed.

Pillow decodes them, with which torchvision's ``ImageFolder`` does, too: pixels are the same with it and without.
``DIR/train`` and ``DIR/test`` (or ``val``) hold folders of classes, or ``DIR`` itself does: then a tenth of its images,
in a fixed random order, is what is tested on. All are grey where all files are, else red, green and blue; transparency
is left out. Only the headers are read before the first batch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgr_kernels.training.arrays import shuffled, split
from sgr_kernels.training.images import DataError, DataSet, Indexed

_ENDINGS = (".png", ".jpg", ".jpeg")
_FORMATS = ("PNG", "JPEG")  # no other decoder of Pillow's is run
_GREY, _COLOUR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_TEST = ("test", "val", "valid", "validation")
_AT_ONCE = 1024  # files that wait for a thread
_THREADS = min(8, os.cpu_count() or 1)  # decoding leaves Python's lock


@dataclass(frozen=True)
class ImageFolder(Indexed):
    """Images in files.

    Attributes:
        files: Paths.
        labels: (n,), int64.
        name: The folder's.
        classes: Names of the classes' folders.
        size: (H, W) of all images.
        grey: Whether they have one channel, not three.
        fit: Whether they are brought to the size: scaled until they cover it, and cropped about their centre.
        origin: What they were read from.
    """

    files: tuple[str, ...]
    labels: Tensor
    name: str
    classes: tuple[str, ...]
    size: tuple[int, int]
    grey: bool
    fit: bool
    origin: str | None = None

    def __len__(self) -> int:
        return len(self.files)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return (1 if self.grey else 3, *self.size)

    def part(self, part: slice) -> ImageFolder:
        """Those of a slice."""
        return replace(self, files=self.files[part], labels=self.labels[part])

    def read(self, index: Tensor, draw: int = 0) -> tuple[Tensor, Tensor]:
        """As of all `Indexed` images; uint8."""
        chosen = [self.files[k] for k in index.tolist()]
        images = np.empty((len(chosen), *self.shape), np.uint8)

        def fill(k: int) -> None:
            values = self._decoded(chosen[k])
            images[k] = values if self.grey else values.transpose(2, 0, 1)

        for _ in _in_threads(fill, range(len(chosen))):
            pass
        return torch.from_numpy(images), self.labels[index]

    def _decoded(self, path: str) -> np.ndarray:
        from PIL import ImageOps

        with _opened(path) as image:
            values = image.convert("L" if self.grey else "RGB")
            if self.fit:
                values = ImageOps.fit(values, self.size[::-1])
        if values.size != self.size[::-1]:
            raise DataError(f"{path} is {_words(values.size[::-1])} pixels now, and was {_words(self.size)}")
        return np.asarray(values)

    def digest(self) -> str:
        """Hex digest of the files' names within their folders and of their lengths; their pixels are not read."""
        state = hashlib.sha256(repr(self.shape).encode())
        for path, label in zip(self.files, self.labels.tolist()):
            state.update(f"{os.path.basename(path)} {os.path.getsize(path)} {label}\n".encode())
        return state.hexdigest()[:16]


def load_folder(folder: str | os.PathLike[str], image_size: tuple[int, int] | None = None) -> DataSet:
    """Find a folder's classes and images, and look at every image's header.

    Args:
        folder: Of the classes, or of ``train`` and ``test``.
        image_size: (H, W) to bring all images to; None: all have one size.

    Raises:
        DataError: if there is no such folder, fewer than two classes, a class without images, an image that cannot be
            read, or, without an image size, images of several sizes.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"data folder {root} does not exist")
    test = next((root / name for name in _TEST if (root / name).is_dir()), None)
    if not (root / "train").is_dir():
        return split(_folder(root, root.name, _classes(root), image_size, None))
    if test is None:
        raise DataError(f"data folder {root} has a folder 'train', but none of {', '.join(map(repr, _TEST))}")
    classes = _classes(root / "train")
    unknown = [name for name in _classes(test, least=1) if name not in classes]
    if unknown:
        raise DataError(f"data folder {test} has the class {unknown[0]!r}, which {root / 'train'} lacks")
    train = _folder(root / "train", root.name, classes, image_size, None)
    return DataSet(train, _folder(test, root.name, classes, image_size, train))


def _classes(folder: Path, least: int = 2) -> tuple[str, ...]:
    found = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(found) < least:
        raise DataError(
            f"data folder {folder} must hold a folder of images for each of two or more classes, got "
            f"{f'the one class {found[0]!r}' if found else 'none'}"
        )
    return tuple(found)


def _folder(
    folder: Path, name: str, classes: tuple[str, ...], image_size: tuple[int, int] | None, like: ImageFolder | None
) -> ImageFolder:
    files: list[str] = []
    labels: list[int] = []
    for label, kind in enumerate(classes):
        found = sorted(str(path) for path in (folder / kind).rglob("[!.]*") if path.suffix.lower() in _ENDINGS)
        if not found and like is None:
            raise DataError(f"data folder {folder / kind} holds no PNG or JPEG images")
        files += found
        labels += [label] * len(found)
    if not files:
        raise DataError(f"data folder {folder} holds no PNG or JPEG images")
    sizes, grey = _headers(files)
    size = image_size or (sizes[0] if like is None else like.size)
    if image_size is None:
        for path, found_size in zip(files, sizes):
            if found_size != size:
                raise DataError(
                    f"{path} is {_words(found_size)} pixels, {files[0]} {_words(size)}: "
                    f"image_size (--image-size) brings all images to one size"
                )
    order = shuffled(len(files))
    grey = grey if like is None else like.grey
    chosen = tuple(files[k] for k in order.tolist())
    return ImageFolder(chosen, torch.tensor(labels)[order], name, classes, size, grey, fit=image_size is not None)


def _headers(files: list[str]) -> tuple[list[tuple[int, int]], bool]:
    """Size (H, W) of each image, and whether all are grey."""

    def header(path: str) -> tuple[tuple[int, int], str]:
        with _opened(path) as image:
            if image.mode not in (*_GREY, *_COLOUR):
                raise DataError(f"{path} has pixels of kind {image.mode!r}: save it with 8 bits a channel")
            return image.size[::-1], image.mode

    found = list(_in_threads(header, files))
    return [size for size, _ in found], all(mode in _GREY for _, mode in found)


def _in_threads(function: Callable[[Any], Any], arguments: Sequence[Any]) -> Iterator[Any]:
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(arguments), _AT_ONCE):
            yield from pool.map(function, arguments[start : start + _AT_ONCE])


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    from PIL import Image

    try:
        with Image.open(path, formats=_FORMATS) as image:
            yield image
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as a PNG or JPEG image: {error}") from error


def _words(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
