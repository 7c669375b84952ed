"""Images of one's own: data sets and loaders; what is read, and what is refused."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from sgr_kernels.training.batches import batches_of
from sgr_kernels.training.datasets import load
from sgr_kernels.training.images import DataError, DataSet, ImageSet, images_of
from sgr_kernels.training.loop import Trainer
from sgr_kernels.training.methods import Settings
from sgr_kernels.training.processes import Processes


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
