"""Data sets in ``.npz`` files: arrays ``images``, ``labels``, perhaps ``test_images``, ``test_labels``; no pickle.

Images are uint8, (N, H, W, C), (N, C, H, W) or (N, H, W); labels are whole numbers from 0 to 999,999, (N,) or (N, 1),
two or more; names of classes may come as an array ``classes`` of strings. ``train_images`` and ``train_labels`` are
other names of the first two. Test images are of the same size and channels; without any, a tenth of the set, in a fixed
random order, is what it is tested on.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sgr_kernels.training.images import DataError, DataSet, ImageSet

_DEFLATE_MAX_RATIO = 1032  # no deflate stream expands further
_MOST_CLASSES = 1_000_000  # more than networks have; their names are held in memory, whatever the images


def load_npz(path: str | os.PathLike[str]) -> DataSet:
    """Read a ``.npz`` file.

    Raises:
        DataError: if there is no such file, an array is missing, of another kind, shape or range than the module says,
            truncated, or holds pickled objects.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"data file {path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_sizes(path, archive)
        with np.load(path, allow_pickle=False) as arrays:
            train, test = (_split(path, arrays, names) for names in (("", "train_"), ("test_",)))
            names = _class_names(path, arrays)
    except DataError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise DataError(f"data file {path} is damaged, or no .npz file without pickles: {error}") from error
    if train is None:
        raise DataError(f"data file {path} lacks the array 'images'; it must hold 'images' and 'labels'")
    labels = np.concatenate([train[1], *([] if test is None else [test[1]])])
    kinds = names or np.unique(labels).tolist()
    names = names or tuple(map(str, range(int(labels.max()) + 1)))
    images = _image_set(path, *train, names)
    tested = None if test is None else _image_set(path, *test, names)
    if len(kinds) < 2:
        raise DataError(f"data file {path} must hold images of two or more classes, got the one class {kinds[0]!r}")
    if tested is None:
        return split(images)
    if tested.shape != images.shape:
        found, wanted = ("x".join(map(str, part.shape)) for part in (tested, images))
        raise DataError(f"data file {path}: 'test_images' must be {wanted} (C x H x W) like 'images', got {found}")
    return DataSet(images, tested)


def split(whole: Any) -> DataSet:
    """The last tenth of images, in no particular order, as test images.

    Raises:
        DataError: if there are fewer than two.
    """
    if len(whole) < 2:
        raise DataError(f"{whole.name} holds {len(whole)} images, too few to test on some of them")
    train = len(whole) - max(1, len(whole) // 10)
    return DataSet(whole.part(slice(train)), whole.part(slice(train, None)))


def shuffled(count: int) -> torch.Tensor:
    """A fixed random order, so that any first few images are of all classes."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def _check_sizes(path: Path, archive: zipfile.ZipFile) -> None:
    """Expect of each array that it is as large as its header says, before memory is allocated for it."""
    for entry in archive.infolist():
        if not entry.filename.endswith(".npy"):
            raise DataError(f"data file {path}: {entry.filename} is no array")
        with archive.open(entry) as file:
            version = np.lib.format.read_magic(file)
            reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = reader(file)
            size = int(np.prod(shape, dtype=object)) * dtype.itemsize
            held = min(entry.file_size - file.tell(), entry.compress_size * _DEFLATE_MAX_RATIO)
        if dtype.hasobject:
            raise DataError(f"data file {path}: {entry.filename} holds pickled objects, which are not read")
        if size > held:
            raise DataError(
                f"data file {path} is truncated: the header of {entry.filename} names {size} bytes, it holds {held}"
            )


def _split(path: Path, arrays: Any, prefixes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray] | None:
    prefix = next((prefix for prefix in prefixes if f"{prefix}images" in arrays), None)
    if prefix is None:
        return None
    if f"{prefix}labels" not in arrays:
        raise DataError(f"data file {path} lacks the array '{prefix}labels'")
    images, labels = arrays[f"{prefix}images"], arrays[f"{prefix}labels"]
    where = f"data file {path}: '{prefix}images'"
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        raise DataError(
            f"{where} must be uint8 of shape (N, H, W, C) or (N, C, H, W), got {images.dtype} of {images.shape}"
        )
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise DataError(
            f"data file {path}: '{prefix}labels' must be whole numbers of shape ({len(images)},) like the images, "
            f"got {labels.dtype} of {labels.shape}"
        )
    for extreme in (int(labels.min()), int(labels.max())):
        if not abs(extreme) < _MOST_CLASSES:
            raise DataError(
                f"data file {path}: '{prefix}labels' must lie in 0..{_MOST_CLASSES - 1}, got the label {extreme}"
            )
    return _channels_first(where, images), labels.astype(np.int64)


def _channels_first(where: str, images: np.ndarray) -> np.ndarray:
    """(N, C, H, W): channels are fewer than rows and columns."""
    if images.ndim == 3:
        return images[:, None]
    _, first, rows, last = images.shape
    leads, trails = first < min(rows, last), last < min(first, rows)
    if leads == trails:
        raise DataError(
            f"{where} must have fewer channels than rows and columns, which tells (N, C, H, W) from (N, H, W, C), "
            f"got {images.shape}"
        )
    return images if leads else images.transpose(0, 3, 1, 2)


def _class_names(path: Path, arrays: Any) -> tuple[str, ...] | None:
    if "classes" not in arrays:
        return None
    names = arrays["classes"]
    if names.dtype.kind != "U" or names.ndim != 1:
        raise DataError(f"data file {path}: 'classes' must be strings in one row, got {names.dtype} of {names.shape}")
    return tuple(names.tolist())


def _image_set(path: Path, images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> ImageSet:
    order = shuffled(len(labels)).numpy()
    return ImageSet(
        torch.from_numpy(np.ascontiguousarray(images[order])),
        torch.from_numpy(labels[order]),
        path.stem,
        classes,
    )
