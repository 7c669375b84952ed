"""Arrays of one's own in .npz files: what is read, and what is refused."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from sgr_kernels.training.datasets import load
from sgr_kernels.training.images import DataError
from tests.data_files import as_set, colours


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW"])
def test_arrays_are_read_whatever_their_layout(tmp_path, layout):
    images, labels = colours(), np.arange(30) % 3
    stored = {"NHWC": images, "NCHW": images.transpose(0, 3, 1, 2), "NHW": images[..., 0]}[layout]
    np.savez(tmp_path / "own.npz", images=stored, labels=labels)
    train, test = load(tmp_path / "own.npz")
    assert (len(train), len(test), train.name, train.classes) == (27, 3, "own", ("0", "1", "2"))
    assert train.shape == ((1, 6, 7) if layout == "NHW" else (3, 6, 7))
    expected = images[..., 0][:, None] if layout == "NHW" else images.transpose(0, 3, 1, 2)
    by_pixels = {image.tobytes(): label for image, label in zip(expected, labels)}
    for part in (train, test):
        for image, label in zip(*part.read(torch.arange(len(part)))):
            assert by_pixels.pop(image.numpy().tobytes()) == label
    assert not by_pixels
    again = load(tmp_path / "own.npz")
    assert again.train.digest() == train.digest()
    assert again.train.origin == str(tmp_path / "own.npz")


def test_arrays_may_bring_test_images_and_names_of_classes(tmp_path):
    images, labels = colours(12), np.arange(12) % 2
    content = {"train_images": images, "train_labels": labels[:, None], "classes": np.array(["cat", "dog"])}
    np.savez_compressed(tmp_path / "own.npz", **content, test_images=images[:4], test_labels=labels[:4])
    train, test = load(tmp_path / "own.npz")
    assert (len(train), len(test), test.classes) == (12, 4, ("cat", "dog"))
    assert as_set([test]) < as_set([train])


IMAGES, LABELS = colours(4), np.arange(4) % 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"labels": LABELS}, "lacks the array 'images'"),
        ({"images": IMAGES}, "lacks the array 'labels'"),
        ({"images": IMAGES / 255, "labels": LABELS}, r"'images' must be uint8 of shape .*, got float64"),
        ({"images": IMAGES[0], "labels": LABELS}, "must be whole numbers"),
        ({"images": IMAGES[0, 0], "labels": LABELS}, r"must be uint8 of shape .* got uint8 of \(7, 3\)"),
        ({"images": IMAGES, "labels": LABELS[:3]}, r"shape \(4,\) like the images, got int64 of \(3,\)"),
        ({"images": IMAGES, "labels": LABELS / 2}, "must be whole numbers"),
        ({"images": IMAGES, "labels": LABELS - 1}, r"must lie in 0..0, got -1..0"),
        ({"images": IMAGES, "labels": LABELS, "classes": np.array(["cat"])}, r"must lie in 0..0, got 0..1"),
        ({"images": IMAGES, "labels": LABELS, "classes": np.arange(2)}, "'classes' must be strings"),
        ({"images": IMAGES[:, :3, :3], "labels": LABELS}, "fewer channels than rows and columns"),
        ({"images": IMAGES, "labels": LABELS, "test_images": IMAGES}, "lacks the array 'test_labels'"),
        ({"images": IMAGES, "labels": np.array([{}, 1, 2, 3], dtype=object)}, "pickled objects, which are not read"),
        ({"images": IMAGES, "labels": 3_000_000_000 * LABELS}, r"'labels' must lie in .* got the label 3000000000$"),
        ({"images": IMAGES, "labels": LABELS.astype(np.uint64) * (2**63 + 5)}, "got the label 9223372036854775813"),
        ({"images": IMAGES, "labels": LABELS * (-(2**63))}, "got the label -9223372036854775808"),
        ({"images": IMAGES, "labels": 0 * LABELS}, "must hold images of two or more classes, got the one class 0"),
        ({"images": IMAGES, "labels": 0 * LABELS, "classes": np.array(["cat"])}, "got the one class 'cat'"),
        (
            {"images": IMAGES, "labels": LABELS, "test_images": IMAGES[:, 1:], "test_labels": LABELS},
            r"'test_images' must be 3x6x7 .* like 'images', got 3x5x7",
        ),
        (
            {"images": IMAGES, "labels": LABELS, "test_images": IMAGES[..., 0], "test_labels": LABELS},
            r"'test_images' must be 3x6x7 .* like 'images', got 1x6x7",
        ),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path, content, message):
    np.savez(tmp_path / "own.npz", **content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "own.npz")


def test_damaged_arrays_are_refused_before_they_take_memory(tmp_path):
    path = tmp_path / "own.npz"
    with pytest.raises(DataError, match=r"own.npz does not exist"):
        load(path)
    path.write_bytes(b"no archive at all")
    with pytest.raises(DataError, match=r"is damaged, or no \.npz file"):
        load(path)
    header = io.BytesIO()
    claimed = {"descr": "|u1", "fortran_order": False, "shape": (10**6, 1000, 1000, 3)}
    np.lib.format.write_array_header_1_0(header, claimed)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", header.getvalue() + bytes(1000))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"images.npy names 3000000000000 bytes, it holds 1000"):
            load(path)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()
