"""Data sets by name: MNIST (IDX), CIFAR-10 (binary), .npz, folders of images; no pickle, sizes checked beforehand."""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import BufferedIOBase
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sgr_kernels.training.arrays import load_npz
from sgr_kernels.training.folders import load_folder
from sgr_kernels.training.images import DataError, DataSet, ImageSet

SAMPLE = "mnist-sample"
SAMPLE_FOLDER = Path(__file__).parent / "data"
FOLDER = "imagefolder"

_OTHERS = f"; {FOLDER}:DIR has a folder of images for each class, FILE.npz has arrays"

DIGITS = tuple("0123456789")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_IDX_UINT8 = 0x0800  # the magic number's upper part: element type uint8; the lowest byte is the rank
_DEFLATE_MAX_RATIO = 1032  # no deflate stream expands further, which bounds what a gzip header may claim
_MOST_ENTRIES = 300_000  # of an IDX file: more than any set of digits has, and what a small gzip file may expand to
_CIFAR_RECORD = 1 + 3 * 32 * 32
_CIFAR_RECORDS_PER_FILE = 10_000


def load(data: str | os.PathLike[str], *, image_size: tuple[int, int] | None = None) -> DataSet:
    """Load the data set of a name.

    ``"mnist-sample"`` is shipped with the package. A folder may hold the four MNIST IDX files (plain or gzipped; also
    in its subfolder ``MNIST/raw``) or the six CIFAR-10 binary files (also in its subfolder ``cifar-10-batches-bin``).
    ``FILE.npz`` holds arrays (`sgr_kernels.training.arrays`), ``imagefolder:DIR`` a folder of PNG and JPEG files for
    each class (`sgr_kernels.training.folders`), which are read when they are needed.

    Args:
        data: The name.
        image_size: (H, W) to bring an image folder's images to; None: they have one size.

    Raises:
        DataError: if nothing, or more than one data set, is found, or a file is not what its name says.
    """
    name = str(data)
    kind, _, place = name.partition(":")
    if kind == FOLDER and place:
        folder = Path(place).absolute()
        return DataSet(*(replace(part, origin=f"{FOLDER}:{folder}") for part in load_folder(folder, image_size)))
    if image_size is not None:
        raise DataError(f"image_size: an option of data {FOLDER}:DIR, got {name!r}, whose images are of one size")
    if name == SAMPLE:
        return DataSet(*(replace(part, origin=SAMPLE) for part in load_mnist(SAMPLE_FOLDER, name=SAMPLE)))
    found = load_npz(name) if name.endswith(".npz") else _load_directory(Path(name))
    return DataSet(*(replace(part, origin=str(Path(name).absolute())) for part in found))


def _load_directory(folder: Path) -> DataSet:
    """MNIST or CIFAR-10, whichever is there."""
    if not folder.is_dir():
        raise DataError(f"data must be {SAMPLE!r} or a folder, got {str(folder)!r}, which is no folder{_OTHERS}")
    mnist = [f for f in (folder, folder / "MNIST" / "raw") if _find_idx(f, "t10k", "images") is not None]
    cifar = [f for f in (folder, folder / "cifar-10-batches-bin") if (f / "test_batch.bin").is_file()]
    if mnist and cifar:
        raise DataError(f"data folder {folder} holds both MNIST and CIFAR-10: name the subfolder to use")
    if mnist:
        return load_mnist(mnist[0])
    if cifar:
        return load_cifar10(cifar[0])
    if (folder / "cifar-10-batches-py").is_dir() or (folder / "test_batch").is_file():
        raise DataError(f"data folder {folder} holds CIFAR-10 as pickles, which are not read: use its binary version")
    raise DataError(
        f"data folder {folder} holds neither MNIST (t10k-images-idx3-ubyte, .gz or plain, and its three companions) "
        f"nor CIFAR-10 (test_batch.bin, data_batch_1.bin .. data_batch_5.bin){_OTHERS}"
    )


def load_mnist(folder: str | os.PathLike[str], *, name: str = "mnist") -> DataSet:
    """Read the four IDX files of MNIST, or of a set in its format such as Fashion-MNIST; images (n, 1, 28, 28).

    Raises:
        DataError: if a file is missing, truncated, too long, or not what its name says.
    """

    def split(prefix: str) -> ImageSet:
        images_file, labels_file = (_require_idx(Path(folder), prefix, kind) for kind in ("images", "labels"))
        images, labels = _read_idx(images_file, (28, 28)), _read_idx(labels_file, ())
        if len(images) != len(labels):
            raise DataError(
                f"{images_file.name} holds {len(images)} images but {labels_file.name} {len(labels)} labels"
            )
        return ImageSet(images[:, None], labels.long(), name, DIGITS)

    return DataSet(split("train"), split("t10k"))


def load_cifar10(folder: str | os.PathLike[str]) -> DataSet:
    """Read the six files of CIFAR-10's binary version; images (n, 3, 32, 32), channels red, green, blue.

    Raises:
        DataError: if a file is missing, no whole number of records, longer than 10,000 records, or if the five
            training files differ in size.
    """
    folder = Path(folder)
    batches = [folder / f"data_batch_{k}.bin" for k in range(1, 6)]
    counts = [_cifar_records(path) for path in batches]
    if len(set(counts)) > 1:
        raise DataError(f"the five training files in {folder} must hold equally many images, got {counts}: truncated?")
    return DataSet(_read_cifar(batches, counts[0]), _read_cifar([folder / "test_batch.bin"]))


def _find_idx(folder: Path, prefix: str, kind: str) -> Path | None:
    rank = {"images": 3, "labels": 1}[kind]
    names = (f"{prefix}-{kind}{separator}idx{rank}-ubyte{end}" for end in ("", ".gz") for separator in "-.")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _require_idx(folder: Path, prefix: str, kind: str) -> Path:
    path = _find_idx(folder, prefix, kind)
    if path is None:
        rank = {"images": 3, "labels": 1}[kind]
        raise DataError(f"{folder} lacks {prefix}-{kind}-idx{rank}-ubyte (.gz or plain)")
    return path


@contextmanager
def _open_maybe_gzip(path: Path) -> Iterator[tuple[BufferedIOBase, int]]:
    """Open a file for reading; yields (stream, most bytes it can hold)."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not compressed:
            yield file, size
            return
        try:
            with gzip.GzipFile(fileobj=file) as stream:
                yield stream, size * _DEFLATE_MAX_RATIO
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path} is a damaged or truncated gzip file: {error}") from error


def _read_idx(path: Path, item: tuple[int, ...]) -> Tensor:
    """Read an IDX file of uint8 entries of shape ``item``: a tensor (n, *item)."""
    header = struct.Struct(f">{2 + len(item)}I")
    expected = _IDX_UINT8 + 1 + len(item)
    with _open_maybe_gzip(path) as (stream, limit):
        head = stream.read(header.size)
        if len(head) < header.size:
            raise DataError(f"{path} is truncated: expected a header of {header.size} bytes, got {len(head)}")
        magic, count, *dimensions = header.unpack(head)
        if magic != expected:
            raise DataError(f"{path} must begin with the magic number {expected}, got {magic}: another kind of file?")
        if tuple(dimensions) != item:
            raise DataError(f"{path} must hold entries of size {item}, got {tuple(dimensions)}")
        if count == 0:
            raise DataError(f"{path} holds no entries")
        if count > _MOST_ENTRIES:
            raise DataError(f"{path}: its header names {count} entries, more than the {_MOST_ENTRIES} that are read")
        size = header.size + count * int(np.prod(item, dtype=np.int64))
        if size > limit:
            raise DataError(
                f"{path} is truncated: its header names {count} entries, which take {size} bytes; "
                f"it holds at most {limit}"
            )
        values = np.empty((count, *item), np.uint8)
        filled, view = 0, values.data.cast("B")
        while filled < values.nbytes:
            got = stream.readinto(view[filled:])
            if not got:
                raise DataError(f"{path} is truncated: expected {size} bytes, got {header.size + filled}")
            filled += got
        if stream.read(1):  # for gzip this also verifies the checksum
            raise DataError(f"{path} is longer than the {size} bytes its header names")
    return torch.from_numpy(values)


def _cifar_records(path: Path) -> int:
    if not path.is_file():
        raise DataError(f"{path.parent} lacks {path.name}")
    size = path.stat().st_size
    count, rest = divmod(size, _CIFAR_RECORD)
    if rest or not 0 < count <= _CIFAR_RECORDS_PER_FILE:
        raise DataError(
            f"{path} must hold 1 to {_CIFAR_RECORDS_PER_FILE} records of {_CIFAR_RECORD} bytes, got {size} bytes"
        )
    return count


def _read_cifar(paths: list[Path], count: int | None = None) -> ImageSet:
    """Read files of ``count`` records each (None: as many as the one file holds)."""
    if count is None:
        count = _cifar_records(paths[0])
    images = torch.empty(len(paths) * count, 3, 32, 32, dtype=torch.uint8)
    labels = torch.empty(len(paths) * count, dtype=torch.int64)
    for k, path in enumerate(paths):
        records = np.fromfile(path, np.uint8, count * _CIFAR_RECORD).reshape(count, _CIFAR_RECORD)
        part = slice(k * count, (k + 1) * count)
        labels[part] = torch.from_numpy(records[:, 0])
        images[part] = torch.from_numpy(records[:, 1:]).view(count, 3, 32, 32)
    return ImageSet(images, labels, "cifar10", CIFAR10_CLASSES)
