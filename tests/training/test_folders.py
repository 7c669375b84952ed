"""Folders of image files: what is read, and what is refused."""

import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from sgr_kernels.training.batches import Batches
from sgr_kernels.training.datasets import load
from sgr_kernels.training.folders import ImageFolder
from sgr_kernels.training.images import DataError, ImageSet
from sgr_kernels.training.matching import matched
from tests.data_files import RNG, as_set, colours, write_folder


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
