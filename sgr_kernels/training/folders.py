"""Folders of images, ``DIR/CLASS/*.png`` or ``.jpg``, decoded when they are needed.

Pillow decodes them, with which torchvision's ``ImageFolder`` does, too: pixels are the same with it and without, but
that images are turned as EXIF data before their pixels say. Folders within those of the classes count, hidden ones do
not. ``DIR/train`` and ``DIR/test`` (or ``val``) hold folders of classes, or ``DIR`` itself does: then a tenth of its
images, in a fixed random order, is what is tested on. All are grey where all files are, else red, green and blue;
transparency is left out. Only the headers are read before the first batch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sgr_kernels.training.arrays import shuffled, split
from sgr_kernels.training.images import DataError, DataSet, Indexed

_ENDINGS = (".png", ".jpg", ".jpeg")
_FORMATS = ("PNG", "JPEG")  # no other decoder of Pillow's is run
_GREY, _COLOUR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_TEST = ("test", "val", "valid", "validation")
_PARTS = ("train", "training", *_TEST, "testing")  # of a data set, in any case: hardly names of classes
_ORIENTATION = 0x0112  # EXIF's tag, and what undoes each of its values, as Pillow calls it
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
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
        size: (H, W) of all images, as they are meant to be seen.
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
    by_name: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.files)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return (1 if self.grey else 3, *self.size)

    def part(self, part: slice) -> ImageFolder:
        """Those of a slice."""
        return replace(self, files=self.files[part], labels=self.labels[part])

    def renumbered(self, numbers: Tensor, classes: tuple[str, ...]) -> ImageFolder:
        """As of all `Images`."""
        return replace(self, labels=numbers[self.labels], classes=classes)

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
            turn = _turn(image)
            values = image.convert("L" if self.grey else "RGB")
            values = values if turn is None else values.transpose(turn)
            if self.fit:
                values = ImageOps.fit(values, self.size[::-1])
        if values.size != self.size[::-1]:
            raise DataError(f"{path} is {_words(values.size[::-1])} pixels now, and was {_words(self.size)}")
        return np.asarray(values)

    def digest(self) -> str:
        """Hex digest of the files' names within their folders and of their lengths; their pixels are not read."""
        state = hashlib.sha256(repr(self.shape).encode())
        for path, label in zip(self.files, self.labels.tolist()):
            state.update(os.fsencode(f"{os.path.basename(path)} {os.path.getsize(path)} {label}\n"))
        return state.hexdigest()[:16]


def load_folder(folder: str | os.PathLike[str], image_size: tuple[int, int] | None = None) -> DataSet:
    """Find a folder's classes and images, and look at every image's header.

    Args:
        folder: Of the classes, or of ``train`` and ``test``.
        image_size: (H, W) to bring all images to; None: all have one size.

    Raises:
        DataError: if there is no such folder, fewer than two classes, a class that seems to be a part of the data set
            or is without images, an image that cannot be read, or, without an image size, images of several sizes.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"data folder {root} does not exist")
    name = os.fsencode(root.name).decode(errors="replace")  # can be printed, whatever bytes it has
    test = next((root / name for name in _TEST if (root / name).is_dir()), None)
    if not (root / "train").is_dir():
        _require_no_parts(root)
        return split(_folder(root, name, _classes(root), image_size, None))
    if test is None:
        raise DataError(f"data folder {root} has a folder 'train', but none of {', '.join(map(repr, _TEST))}")
    classes = _classes(root / "train")
    unknown = [name for name in _classes(test, least=1) if name not in classes]
    if unknown:
        raise DataError(f"data folder {test} has the class {unknown[0]!r}, which {root / 'train'} lacks")
    train = _folder(root / "train", name, classes, image_size, None)
    return DataSet(train, _folder(test, name, classes, image_size, train))


def _folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _require_no_parts(root: Path) -> None:
    """Expect folders of classes, not of parts: such have the names of parts only, or hold folders and no images."""
    found = _folders(root)
    parts = [name for name in found if name.casefold() in _PARTS]
    for name in parts:
        loose = any(path.suffix.lower() in _ENDINGS for path in (root / name).iterdir() if not path.is_dir())
        if parts == found or (_folders(root / name) and not loose):
            raise DataError(
                f"data folder {root} has the folder {name!r}, by its name a part of the data and no class: the parts "
                f"are 'train' and one of {', '.join(map(repr, _TEST))}, written so"
            )


def _classes(folder: Path, least: int = 2) -> tuple[str, ...]:
    found = _folders(folder)
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
        found = sorted(_images(str(folder / kind))) if (folder / kind).is_dir() else []
        if not found and like is None:
            raise DataError(f"data folder {folder / kind} holds no PNG or JPEG images")
        files += found
        labels += [label] * len(found)
    if not files:
        raise DataError(f"data folder {folder} holds no PNG or JPEG images")
    sizes, grey = _headers(files)
    size = image_size or (sizes[0] if like is None else like.size)
    if image_size is None:
        first = files[0] if like is None else like.files[0]
        for path, found_size in zip(files, sizes):
            if found_size != size:
                raise DataError(
                    f"{path} is {_words(found_size)} pixels, {first} {_words(size)}: "
                    f"image_size (--image-size) brings all images to one size"
                )
    order = shuffled(len(files))
    grey = grey if like is None else like.grey
    chosen = tuple(files[k] for k in order.tolist())
    return ImageFolder(chosen, torch.tensor(labels)[order], name, classes, size, grey, fit=image_size is not None)


def _images(folder: str) -> Iterator[str]:
    """Paths of the images in a folder and in those within it; hidden ones and links to folders are left out."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error

    for place, within, files in os.walk(folder, onerror=refuse):
        within[:] = [name for name in within if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in _ENDINGS:
                yield os.path.join(place, name)


def _headers(files: list[str]) -> tuple[list[tuple[int, int]], bool]:
    """Size (H, W) of each image, and whether all are grey."""

    def header(path: str) -> tuple[tuple[int, int], str]:
        with _opened(path) as image:
            if image.mode not in (*_GREY, *_COLOUR):
                raise DataError(f"{path} has pixels of kind {image.mode!r}: save it with 8 bits a channel")
            rows, columns = image.size[::-1]
            swapped = getattr(_turn(image), "name", "") in ("TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
            return (columns, rows) if swapped else (rows, columns), image.mode

    found = list(_in_threads(header, files))
    return [size for size, _ in found], all(mode in _GREY for _, mode in found)


def _in_threads(function: Callable[[Any], Any], arguments: Sequence[Any]) -> Iterator[Any]:
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(arguments), _AT_ONCE):
            yield from pool.map(function, arguments[start : start + _AT_ONCE])


def _turn(image: Any) -> Any:
    """What turns an image the way that its EXIF data say; None: nothing does."""
    from PIL import Image

    with suppress(Exception):  # of damaged EXIF data, which do not damage an image
        # Pillow's own method for PNG would decode the pixels to look behind them.
        return Image.Transpose[_TURNS[Image.Image.getexif(image)[_ORIENTATION]]]
    return None


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
