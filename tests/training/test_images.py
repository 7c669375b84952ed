"""Images of one's own: arrays, folders, data sets and loaders; what is read, and what is refused."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from sgr_kernels.training.batches import Batches, batches_of
from sgr_kernels.training.datasets import load
from sgr_kernels.training.folders import ImageFolder
from sgr_kernels.training.images import DataError, ImageSet, images_of
from sgr_kernels.training.processes import Processes

RNG = np.random.default_rng(0)


def colours(n=30, height=6, width=7):
    return RNG.integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def write_folder(folder, images, classes=("cat", "dog"), ending="png", **options):
    """The images, class by turn, as files."""
    for k, image in enumerate(images):
        path = folder / classes[k % len(classes)] / f"{k:04}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, **options)
    return folder


def as_set(images):
    return {image.numpy().tobytes() for part in images for image in part.read(torch.arange(len(part)))[0]}


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


def test_a_folder_of_images_is_read_bit_for_bit(tmp_path):
    images = colours(20)
    write_folder(tmp_path / "pets", images)
    train, test = load(f"imagefolder:{tmp_path / 'pets'}")
    assert isinstance(train, ImageFolder)
    assert (len(train), len(test), train.classes, train.shape) == (18, 2, ("cat", "dog"), (3, 6, 7))
    by_pixels = {image.tobytes(): k % 2 for k, image in enumerate(images.transpose(0, 3, 1, 2))}
    for part in (train, test):
        for image, label in zip(*part.read(torch.arange(len(part)))):
            assert by_pixels.pop(image.numpy().tobytes()) == label
    assert not by_pixels
    in_memory = ImageSet(*train.read(torch.arange(18)), "same", train.classes)
    assert train.pixel_variance() == pytest.approx(in_memory.pixel_variance(), rel=1e-6)
    mine, wanted = (Batches(part, 5, seed=1, shuffle=True) for part in (train, in_memory))
    for (a, b), (c, d) in zip(mine.epoch(2, 1), wanted.epoch(2, 1), strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


def test_a_folder_may_have_its_own_test_images(tmp_path):
    write_folder(tmp_path / "train", colours(9), ("a", "b", "c"))
    write_folder(tmp_path / "val", colours(4)[..., 0].copy(), ("b", "c"))  # grey files among coloured ones
    train, test = load(f"imagefolder:{tmp_path}")
    assert (len(train), len(test)) == (9, 4)
    assert train.classes == test.classes == ("a", "b", "c")
    assert sorted(test.labels.tolist()) == [1, 1, 2, 2]
    assert test.read(torch.arange(2))[0].shape == (2, 3, 6, 7)


def test_grey_folders_have_one_channel(tmp_path):
    write_folder(tmp_path, colours(6)[..., 0].copy())
    assert load(f"imagefolder:{tmp_path}").train.shape == (1, 6, 7)


def test_images_of_several_sizes_are_brought_to_one(tmp_path):
    flat = np.full((4, 12, 24, 3), 77, np.uint8)
    write_folder(tmp_path, [*flat, np.full((30, 8, 3), 77, np.uint8)], ending="jpg", quality=95)
    with pytest.raises(DataError, match=r"0004.jpg is 30 x 8 pixels, .*0000.jpg 12 x 24: .*--image-size"):
        load(f"imagefolder:{tmp_path}")
    train, test = load(f"imagefolder:{tmp_path}", image_size=(5, 9))
    for part in (train, test):
        values = part.read(torch.arange(len(part)))[0]
        assert values.shape[1:] == (3, 5, 9)
        assert int((values.int() - 77).abs().max()) <= 2
    with pytest.raises(DataError, match="image_size: an option of data imagefolder:DIR"):
        load("mnist-sample", image_size=(5, 9))


def test_resizing_keeps_the_middle_and_the_proportions(tmp_path):
    """The left half is black, the right half white; from a wide image the sides are cropped."""
    image = np.zeros((10, 40), np.uint8)
    image[:, 20:] = 255
    write_folder(tmp_path, [image, image, image])
    values = load(f"imagefolder:{tmp_path}", image_size=(10, 10)).train.read(torch.arange(1))[0][0, 0]
    assert int(values[:, :4].max()) == 0
    assert int(values[:, 6:].min()) == 255


def test_folders_that_are_no_data_set_are_refused(tmp_path):
    def refused(message):
        with pytest.raises(DataError, match=message):
            load(f"imagefolder:{tmp_path}")

    with pytest.raises(DataError, match="nowhere does not exist"):
        load(f"imagefolder:{tmp_path / 'nowhere'}")
    refused("two or more classes, got none")
    write_folder(tmp_path, colours(2), ("cat",))
    refused("two or more classes, got the one class 'cat'")
    (tmp_path / "dog").mkdir()
    refused(r"dog holds no PNG or JPEG images")
    write_folder(tmp_path, colours(2))
    content = (tmp_path / "dog" / "0001.png").read_bytes()
    (tmp_path / "dog" / "9.png").write_bytes(b"no picture")
    refused(r"dog/9.png cannot be read as a PNG or JPEG image")
    (tmp_path / "dog" / "9.png").write_bytes(content[: len(content) // 2])  # its header is whole
    data = load(f"imagefolder:{tmp_path}")
    with pytest.raises(DataError, match=r"dog/9.png cannot be read as a PNG or JPEG image"):
        as_set(data)
    Image.fromarray(np.zeros((6, 7), np.uint16)).save(tmp_path / "dog" / "9.png")
    refused(r"dog/9.png has pixels of kind 'I;16': save it with 8 bits a channel")
    (tmp_path / "dog" / "9.png").unlink()
    write_folder(tmp_path / "train", colours(4))
    refused("has a folder 'train', but none of 'test'")
    write_folder(tmp_path / "test", colours(4), ("cat", "cow"))
    refused("test has the class 'cow', which .*train lacks")


def test_a_folder_streams(tmp_path, monkeypatch):
    """Before the first batch only headers are read; then no more images than a batch and the next one."""
    write_folder(tmp_path, colours(40))
    decoded = []
    decode = ImageFolder._decoded
    monkeypatch.setattr(ImageFolder, "_decoded", lambda self, path: decoded.append(path) or decode(self, path))
    train = load(f"imagefolder:{tmp_path}").train
    batches = Batches(train, 4).epoch(0)
    assert not decoded
    for step in range(3):
        next(batches)
        assert 4 * (step + 1) <= len(decoded) <= 4 * (step + 2)
    batches.close()


class Noisy:
    """A data set whose items are drawn anew each time, as random transforms do."""

    classes = ("a", "b")

    def __len__(self):
        return 11

    def __getitem__(self, k):
        noise = torch.rand(1, 4, 5) + float(np.random.rand())  # noqa: NPY002 - as other people's transforms do
        return noise + k, k % 2, "more"


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for p, q in zip(a, b) for x, y in zip(p, q))


@pytest.mark.parametrize("as_loader", [False, True, "with a generator"])
def test_anybodys_data_sets_and_loaders_can_be_returned_to(as_loader):
    generator = torch.Generator() if as_loader == "with a generator" else None
    data = DataLoader(Noisy(), batch_size=3, shuffle=True, generator=generator) if as_loader else Noisy()
    images = images_of(data)
    assert (len(images), images.shape, images.classes, images.name) == (11, (1, 4, 5), ("a", "b"), "Noisy")
    batches = batches_of(images, 3, seed=4, shuffle=True)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002 - same
    whole = list(batches.epoch(1))
    assert len(batches) == len(whole) == 4
    torch.rand(3)
    assert same(list(batches.epoch(1, 2)), whole[2:])
    assert same(list(batches.epoch(1)), whole)
    assert not same(list(batches.epoch(0)), whole)
    torch.set_rng_state(before[0])
    list(batches.epoch(2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002 - same
    parts = [batches_of(images, 3, seed=4, shuffle=True, processes=Processes(rank, 2)) for rank in range(2)]
    joined = [tuple(map(torch.cat, zip(*step))) for step in zip(*(part.epoch(1) for part in parts))]
    assert same(joined, whole)
    assert batches.count(0) == 3 or as_loader


def test_variances_of_what_is_not_in_memory():
    values = torch.rand(50, 2, 3, 4)
    wanted = pytest.approx(float(values.double().var(0, correction=0).mean()), rel=1e-5)
    dataset = TensorDataset(values, torch.zeros(50, dtype=torch.int64))
    assert images_of(dataset).pixel_variance() == wanted
    assert images_of(DataLoader(dataset, batch_size=7)).pixel_variance() == wanted


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "expected images, a Dataset with __len__ or a DataLoader, got int"),
        ([], "list holds no images"),
        (DataLoader(Noisy(), num_workers=1, persistent_workers=True), "persistent_workers: expected False"),
        ([("picture", 1)], "expected items that begin with an image .* got tuple"),
        ([(torch.rand(4, 5), 1)], "expected items that begin with an image"),
    ],
)
def test_what_is_no_data_set_is_refused(data, message):
    with pytest.raises(DataError, match=message):
        images_of(data)


def test_items_of_another_shape_are_named():
    mixed = images_of([(torch.rand(1, 4, 5), 0), (torch.rand(1, 5, 5), 1)])
    with pytest.raises(DataError, match=r"an image has shape \(1, 5, 5\), the first one \(1, 4, 5\)"):
        mixed.read(torch.arange(2))


def test_some_images_are_pixels_and_the_same_each_time():
    values = torch.arange(40, dtype=torch.uint8).view(10, 1, 2, 2)
    labels = torch.zeros(10, dtype=torch.int64)
    expected = values.float() / 255
    pairs = TensorDataset(expected, labels)
    in_memory = ImageSet(values, labels, "numbers", ("zero",))
    for images in (in_memory, images_of(pairs), images_of(DataLoader(pairs, batch_size=3))):
        assert torch.equal(images.some(100), expected)
        few = images.some(4)
        assert torch.equal(few, images.some(4))
        assert few.shape == (4, 1, 2, 2)
    # Images that can be asked for are spread over all of them.
    assert torch.equal(in_memory.some(4), expected[[0, 3, 6, 9]])
