"""Data files: the standard layouts are read, and every file that is not what its name says is refused."""

import gzip
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from sgr_kernels.training import datasets
from sgr_kernels.training.datasets import DataError, ImageSet, load

RNG = np.random.default_rng(0)


def idx_bytes(array, magic=None):
    magic = 0x0800 + array.ndim if magic is None else magic
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()


def write_mnist(folder, train=12, test=5, compress=True, separator="-"):
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for prefix, n in (("train", train), ("t10k", test)):
        images = RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = RNG.integers(0, 10, n, dtype=np.uint8)
        arrays[prefix] = images, labels
        for kind, array in (("images", images), ("labels", labels)):
            name = f"{prefix}-{kind}{separator}idx{array.ndim}-ubyte"
            content = idx_bytes(array)
            if compress:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)
    return arrays


def write_cifar10(folder, count=7):
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]
    records = {}
    for name in names:
        record = RNG.integers(0, 256, (count, 3073), dtype=np.uint8)
        record[:, 0] %= 10
        record.tofile(folder / name)
        records[name] = record
    return records


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize(("subfolder", "separator"), [(".", "-"), ("MNIST/raw", "-"), (".", ".")])
def test_mnist_is_read_bit_for_bit(tmp_path, compress, subfolder, separator):
    arrays = write_mnist(tmp_path / subfolder, compress=compress, separator=separator)
    for got, prefix in zip(load(tmp_path), ("train", "t10k")):
        images, labels = arrays[prefix]
        assert got.images.shape == (len(images), 1, 28, 28)
        assert np.array_equal(got.images[:, 0].numpy(), images)
        assert np.array_equal(got.labels.numpy(), labels)
        assert got.name == "mnist"


@pytest.mark.parametrize("subfolder", [".", "cifar-10-batches-bin"])
def test_cifar10_is_read_bit_for_bit(tmp_path, subfolder):
    records = write_cifar10(tmp_path / subfolder)
    data = load(tmp_path)
    train = np.concatenate([records[f"data_batch_{k}.bin"] for k in range(1, 6)])
    for got, expected in ((data.train, train), (data.test, records["test_batch.bin"])):
        assert np.array_equal(got.images.numpy(), expected[:, 1:].reshape(-1, 3, 32, 32))
        assert np.array_equal(got.labels.numpy(), expected[:, 0])


def test_sample_is_balanced_and_complete():
    train, test = load("mnist-sample")
    assert train.images.shape == (5000, 1, 28, 28)
    assert test.images.shape == (1000, 1, 28, 28)
    assert train.labels.bincount().min() >= 450
    assert test.labels.bincount().min() >= 85
    assert sum(f.stat().st_size for f in datasets.SAMPLE_FOLDER.iterdir()) < 1_500_000


@pytest.mark.data
def test_sample_is_cut_from_mnist():
    if "SGR_DATA" not in os.environ:
        pytest.skip("SGR_DATA is not set: the full MNIST is not here")
    full, sample = load(Path(os.environ["SGR_DATA"]) / "mnist"), load("mnist-sample")
    assert torch.equal(full.train.images[::12], sample.train.images)
    assert torch.equal(full.train.labels[::12], sample.train.labels)
    assert torch.equal(full.test.images[::10], sample.test.images)
    assert torch.equal(full.test.labels[::10], sample.test.labels)


IMAGES = np.zeros((12, 28, 28), np.uint8)
LABELS = np.zeros(12, np.uint8)
HUGE = struct.pack(">4I", 0x0803, 2**31, 28, 28)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("images", b"", "truncated: expected a header of 16 bytes, got 0"),
        ("images", idx_bytes(IMAGES)[:9], "header of 16 bytes, got 9"),
        ("images", idx_bytes(LABELS), "header of 16 bytes|magic number 2051, got 2049"),
        ("images", idx_bytes(IMAGES, magic=0x0D03), "magic number 2051, got 3331"),
        ("images", idx_bytes(np.zeros((12, 32, 32), np.uint8)), r"size \(28, 28\), got \(32, 32\)"),
        (
            "images",
            idx_bytes(IMAGES)[:-1],
            "which take 9424 bytes; it holds at most 9423|expected 9424 bytes, got 9423",
        ),
        ("images", idx_bytes(IMAGES) + b"x", "longer than the 9424 bytes"),
        ("images", HUGE, "its header names 2147483648 entries"),
        ("images", idx_bytes(IMAGES[:0]), "holds no entries"),
        ("images", idx_bytes(IMAGES[:11]), "holds 11 images but .* 12 labels"),
        ("labels", idx_bytes(LABELS + 10), r"labels of mnist must lie in 0..9, got 10..10"),
        ("labels", idx_bytes(IMAGES), "magic number 2049, got 2051"),
    ],
)
def test_bad_idx_files_are_refused(tmp_path, compress, kind, content, message):
    write_mnist(tmp_path, compress=compress)
    rank = {"images": 3, "labels": 1}[kind]
    path = tmp_path / f"train-{kind}-idx{rank}-ubyte{'.gz' if compress else ''}"
    path.write_bytes(gzip.compress(content) if compress else content)
    with pytest.raises(DataError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(("kind", "item"), [("images", 784), ("labels", 1)])
def test_a_gzip_bomb_is_refused_before_it_takes_memory(tmp_path, kind, item):
    """A million blank digits in less than a megabyte."""
    write_mnist(tmp_path)
    rank = {"images": 3, "labels": 1}[kind]
    header = struct.pack(">4I", 0x0803, 10**6, 28, 28) if kind == "images" else struct.pack(">2I", 0x0801, 10**9)
    path = tmp_path / f"train-{kind}-idx{rank}-ubyte.gz"
    path.write_bytes(gzip.compress(header, 1) + gzip.compress(bytes(10**6 * item // 10), 1) * 10)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"names \d+ entries"):
            load(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_damaged_gzip_is_refused(tmp_path):
    write_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(DataError, match="damaged or truncated gzip"):
        load(tmp_path)
    path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])  # a byte of the checksum or length
    with pytest.raises(DataError, match="damaged or truncated gzip"):
        load(tmp_path)


def test_gzip_bytes_under_a_plain_name_are_read(tmp_path):
    write_mnist(tmp_path)
    for path in tmp_path.iterdir():
        path.rename(path.with_suffix(""))
    assert len(load(tmp_path).train) == 12


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("data_batch_3.bin", 3073 * 6, "equally many images, got .7, 7, 6, 7, 7."),
        ("data_batch_1.bin", 3073 * 7 - 1, "records of 3073 bytes, got 21510 bytes"),
        ("test_batch.bin", 0, "1 to 10000 records"),
        ("data_batch_5.bin", 3073 * 10_001, "1 to 10000 records"),
    ],
)
def test_cifar10_files_of_a_wrong_size_are_refused(tmp_path, name, size, message):
    write_cifar10(tmp_path)
    os.truncate(tmp_path / name, size)
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_cifar10_labels_out_of_range_are_refused(tmp_path):
    records = write_cifar10(tmp_path)["data_batch_2.bin"]
    records[3, 0] = 77
    records.tofile(tmp_path / "data_batch_2.bin")
    with pytest.raises(DataError, match=r"labels of cifar10 must lie in 0..9, got 0..77"):
        load(tmp_path)


def test_missing_files_are_named(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="lacks train-labels-idx1-ubyte"):
        load(tmp_path)
    write_cifar10(tmp_path / "c")
    (tmp_path / "c" / "data_batch_4.bin").unlink()
    with pytest.raises(DataError, match=r"lacks data_batch_4.bin"):
        load(tmp_path / "c")


def test_folders_without_one_data_set_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds neither MNIST .* nor CIFAR-10"):
        load(tmp_path)
    with pytest.raises(DataError, match="is no folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataError, match="pickles, which are not read"):
        load(tmp_path)
    write_mnist(tmp_path)
    write_cifar10(tmp_path / "cifar-10-batches-bin")
    with pytest.raises(DataError, match="both MNIST and CIFAR-10"):
        load(tmp_path)


def test_pixel_variance_is_the_mean_diagonal_of_the_data_covariance():
    images = torch.randint(0, 256, (50, 3, 4, 5), dtype=torch.uint8)
    data = ImageSet(images, torch.zeros(50, dtype=torch.int64), "noise", ("a",))
    flat = images.double().flatten(1).numpy() / 255
    assert data.pixel_variance() == pytest.approx(np.trace(np.cov(flat.T, bias=True)) / 60, rel=1e-12)


def test_digest_tells_data_apart():
    data = load("mnist-sample").test
    assert data.digest() == load("mnist-sample").test.digest()
    assert data.digest() != data.first(999).digest()
    changed = data.images.clone()
    changed[5, 0, 3, 3] ^= 1
    assert data.digest() != ImageSet(changed, data.labels, data.name, data.classes).digest()


def test_image_sets_are_checked():
    images, labels = torch.zeros(3, 1, 28, 28, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(DataError, match="images must be uint8"):
        ImageSet(images.float(), labels, "x", ("a",))
    with pytest.raises(DataError, match="labels must be int64"):
        ImageSet(images, labels[:2], "x", ("a",))
    with pytest.raises(DataError, match=r"must lie in 0..0, got -1..0"):
        ImageSet(images, torch.tensor([0, -1, 0]), "x", ("a",))
