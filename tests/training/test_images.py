"""Images of one's own: arrays, folders, data sets and loaders; what is read, and what is refused."""

import io
import os
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from sgr_kernels.training.batches import Batches, batches_of
from sgr_kernels.training.datasets import load
from sgr_kernels.training.folders import ImageFolder
from sgr_kernels.training.images import DataError, DataSet, ImageSet, images_of
from sgr_kernels.training.loop import Trainer
from sgr_kernels.training.matching import matched
from sgr_kernels.training.methods import Settings
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


def test_parts_of_a_data_set_are_not_taken_for_classes(tmp_path):
    layouts = {"upper": ("Train", "Test"), "other words": ("training", "testing", "a"), "one": ("VAL",)}
    for name, parts in layouts.items():
        for part in parts:
            write_folder(tmp_path / name / part, colours(4))
        with pytest.raises(DataError, match=f"has the folder '{sorted(parts)[0 if name != 'other words' else 1]}'"):
            load(f"imagefolder:{tmp_path / name}")
    write_folder(tmp_path / "loose", colours(4), ("training", "validation"))
    with pytest.raises(DataError, match=r"folder 'training', .* the parts are 'train' and one of 'test', "):
        load(f"imagefolder:{tmp_path / 'loose'}")
    write_folder(tmp_path / "vehicles", colours(6), ("Bus", "Car", "Train"))
    assert load(f"imagefolder:{tmp_path / 'vehicles'}").train.classes == ("Bus", "Car", "Train")


def test_folders_within_count_and_hidden_ones_do_not(tmp_path):
    write_folder(tmp_path, colours(4))
    write_folder(tmp_path / "cat", colours(2), ("indoors/old", "outdoors"))
    write_folder(tmp_path / "dog", colours(4), (".ipynb_checkpoints", ".git/objects"))
    write_folder(tmp_path / ".thumbnails", colours(4))
    (tmp_path / "dog" / "album.png").mkdir()
    data = load(f"imagefolder:{tmp_path}")
    assert len(data.train) + len(data.test) == 6
    assert torch.cat([part.labels for part in data]).bincount().tolist() == [4, 2]


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_images_are_turned_as_their_exif_data_say(tmp_path, ending):
    """Each orientation of one picture is a file of its own; seen upright, all are that picture."""
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        tall = orientation > 4
        image = np.kron(RNG.integers(0, 256, (3, 2) if tall else (2, 3)), np.ones((8, 8))).astype(np.uint8)
        for kind in ("a", "b"):
            write_folder(tmp_path / kind, [image], (f"{orientation}",), ending, exif=exif)
    data = load(f"imagefolder:{tmp_path}")
    assert data.train.shape == (1, 16, 24)
    for part in data:
        for path, image in zip(part.files, part.read(torch.arange(len(part)))[0]):
            assert np.array_equal(image[0], np.asarray(ImageOps.exif_transpose(Image.open(path))))
    small = load(f"imagefolder:{tmp_path}", image_size=(8, 12)).train
    assert small.read(torch.arange(2))[0].shape == (2, 1, 8, 12)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_data_turn_nothing(tmp_path):
    write_folder(tmp_path, colours(4)[..., 0].copy(), ending="jpg", exif=b"Exif\0\0II*\0 no such thing")
    assert load(f"imagefolder:{tmp_path}").train.shape == (1, 6, 7)


def test_file_names_may_be_of_any_bytes(tmp_path):
    root = tmp_path / os.fsdecode(b"pets \xff")
    write_folder(root, colours(6), ("cat", os.fsdecode(b"dog \xfe")))
    (root / "cat" / "0000.png").rename(root / "cat" / os.fsdecode(b"\xff\xfe.png"))
    train = load(f"imagefolder:{root}").train
    assert len(train.digest()) == 16
    assert train.name.encode()
    assert len(as_set([train])) == 5


def test_other_sizes_to_test_on_are_told_from_those_trained_on(tmp_path):
    write_folder(tmp_path / "train", colours(4))
    write_folder(tmp_path / "test", colours(4, 5))
    with pytest.raises(DataError, match=r"test/.*png is 5 x 7 pixels, .*/train/.*png 6 x 7: "):
        load(f"imagefolder:{tmp_path}")


def test_classes_are_matched_by_name(tmp_path):
    """Of a folder, whose labels follow from the names alone, and of named arrays; numbers for names say nothing."""
    write_folder(tmp_path / "pets", colours(6), ("cat", "dog", "emu"))
    folder = load(f"imagefolder:{tmp_path / 'pets'}").train
    names = [path.split("/")[-2] for path in folder.files]
    known = ("emu", "cow", "cat", "dog")
    found = matched(folder, known, "the training")
    assert found.classes == known
    assert [known[k] for k in found.labels.tolist()] == names
    assert [known[k] for k in found.read(torch.arange(len(names)))[1].tolist()] == names
    with pytest.raises(DataError, match=r"pets has the class 'emu', which .* lacks: 'cat', 'dog', 'emu', not "):
        matched(folder, ("cat", "dog", "elk"), "the training")
    with pytest.raises(DataError, match="pets has the class 'cat', which the training lacks"):
        matched(folder, ("0", "1", "2"), "the training")
    images, labels = torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 2, 1])
    named = ImageSet(images, labels, "named", ("dog", "cat", "emu"))
    assert matched(named, known, "the training").labels.tolist() == [3, 0, 2]
    numbered = ImageSet(images, labels, "numbered", ("0", "1", "2"))
    assert matched(numbered, known, "the training") is numbered
    assert matched(named, ("0", "1", "2"), "the training") is named
    assert matched(named, None, "the training") is named
    assert matched(numbered, ("0", "1", "10", "2"), "the training").labels.tolist() == [0, 3, 1]


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
        return (noise + k) / 13, k % 2, "more"


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


GREY, ZERO = torch.rand(1, 4, 5), torch.zeros(1, 4, 5)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([(ZERO, 0), (255 * (GREY + 1) / 2, 1)], r"list: expected images in \[0, 1\], got values from 0 to .*255"),
        ([(GREY - 3, 0)], r"list: expected images in \[0, 1\], got values from -.* normalise inside the network"),
        ([(GREY * torch.nan, 0)], "got values from nan to nan"),
        ([((255 * GREY).int(), 0)], r"list: expected images that are uint8 or .* got torch.int32; .*to\(torch.uint8\)"),
        ([(GREY, 0.7)], "list: expected labels that are whole numbers, got float 0.7"),
        ([(GREY, torch.tensor(0.75))], "list: expected labels that are whole numbers, got float 0.75"),
        ([(GREY, "cat")], "list: expected labels that are whole numbers, got str 'cat'"),
        ([(GREY, torch.tensor([0.0, 1.0]))], r"list: expected labels that are whole numbers, got \(2,\) torch.float32"),
        ([(GREY, torch.tensor([0, 1]))], r"list: expected labels that are whole numbers, got \(2,\) torch.int64"),
    ],
)
def test_items_that_are_no_images_with_labels_are_refused(items, message):
    with pytest.raises(DataError, match=message):
        images_of(items)
    if "labels" not in message:
        with pytest.raises(DataError, match=message):
            images_of(DataLoader(items, batch_size=2))


def test_labels_may_be_whole_numbers_of_any_type():
    labels = [3, True, np.int32(2), np.uint8(1), np.bool_(True), torch.tensor(5), torch.tensor([4]), torch.tensor(True)]
    items = images_of([(GREY, label) for label in labels])
    assert items.read(torch.arange(8))[1].tolist() == [3, 1, 2, 1, 1, 5, 4, 1]


def test_images_are_floating_point_of_any_precision_bytes_or_bits():
    for image in (GREY, GREY.half(), GREY.double() * (1 + 2.4e-7), (255 * GREY).byte(), GREY > 0.5):
        assert images_of([(image, 0)]).example().dtype == torch.float32


def test_items_of_another_shape_are_named():
    with pytest.raises(DataError, match=r"an image has shape \(1, 5, 5\), the first one \(1, 4, 5\)"):
        images_of([(torch.rand(1, 4, 5), 0), (torch.rand(1, 5, 5), 1)])


class Promising(IterableDataset):
    """Says another number of images than it has."""

    def __init__(self, says, has):
        self.says, self.has = says, has

    def __len__(self):
        return self.says

    def __iter__(self):
        return iter([(GREY, k % 2) for k in range(self.has)])


def trained(train, test, **options):
    network = nn.Sequential(nn.Flatten(), nn.Linear(20, 2))
    trainer = Trainer(Settings("given", method="clean", augment=False), (train, test), model=network)
    trainer.run(2, progress=False, **options)
    return trainer


PAIRS = [(GREY, k % 2) for k in range(4)]


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
@pytest.mark.parametrize(("has", "got", "epochs"), [(5, "3", 0), (13, "more", 1)])
def test_a_loader_keeps_its_promise(tmp_path, has, got, epochs):
    loader = DataLoader(Promising(8, has), batch_size=2)
    done = []
    with pytest.raises(DataError, match=f"DataLoader of Promising: expected 4 batches an epoch, .* got {got}$"):
        trained(loader, PAIRS, on_epoch=done.append)
    assert len(done) == epochs


def test_a_loader_that_keeps_its_promise_is_trained_on():
    assert len(trained(DataLoader(Promising(7, 7), batch_size=2), DataLoader(PAIRS, batch_size=3)).history) == 2


class Named(list):
    """Items of classes that have names."""

    def __init__(self, items, classes):
        super().__init__(items)
        self.classes = classes


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (PAIRS, [(GREY[:, 1:], 0)], r"expected test images like the training images, 1x4x5 \(list\), got 1x3x5"),
        (PAIRS, DataLoader([(GREY.expand(3, 4, 5), 0)]), r"1x4x5 \(list\), got 3x4x5 \(list\)"),
        (
            Named(PAIRS, ["cat", "dog"]),
            Named(PAIRS, ["dog", "emu"]),
            "Named has the class 'emu', which",
        ),
        (
            Named(PAIRS, ["cat", "dog"]),
            Named(PAIRS, ["dog"]),
            "gives the class 'dog' the label 0, the training 1",
        ),
    ],
)
def test_other_images_to_test_than_to_train_are_refused(train, test, message):
    with pytest.raises(DataError, match=message):
        trained(train, test)


def test_no_images_in_memory_are_refused():
    digits = load("mnist-sample")
    with pytest.raises(DataError, match="data: mnist-sample holds no images"):
        Trainer(Settings("mnist"), DataSet(digits.train.first(0), digits.test))
    with pytest.raises(DataError, match="data: mnist-sample holds no images"):
        Trainer(Settings("mnist"), DataSet(digits.train.first(4), digits.test.first(0)))


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
