"""Batches: complete, returned to from any position; the augmentation against a loop over the images."""

from itertools import chain

import pytest
import torch
from torch.nn import functional as F

from sgr_kernels.training.batches import Augmentation, Batches
from sgr_kernels.training.datasets import ImageSet


def numbered(n, channels=1, size=6):
    """Images in which every pixel holds the image's own number."""
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, channels, size, size).contiguous()
    return ImageSet(images, torch.arange(n) % 10, "numbered", tuple("0123456789"))


def numbers(batches):
    return [(images[:, 0, 0, 0] * 255).round().long().tolist() for images, _ in batches]


def test_every_image_comes_once_per_epoch_in_a_new_order():
    batches = Batches(numbered(23), 5, seed=1, shuffle=True)
    assert len(batches) == 5
    first, second = numbers(batches.epoch(0)), numbers(batches.epoch(1))
    assert [len(batch) for batch in first] == [5, 5, 5, 5, 3]
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(23))
    assert first != second != numbers(Batches(numbered(23), 5, seed=2, shuffle=True).epoch(1))
    assert numbers(batches) == first == numbers(batches)


def test_labels_and_pixels_stay_together():
    for images, labels in Batches(numbered(23), 4, shuffle=True):
        assert images.dtype == torch.float32
        assert torch.equal((images[:, 0, 0, 0] * 255).round().long() % 10, labels)


def test_any_position_can_be_returned_to():
    batches = Batches(numbered(23), 5, seed=3, shuffle=True, augmentation=Augmentation(pad=2, flip=True))
    whole = list(batches.epoch(7))
    list(batches.epoch(2))
    for start in range(len(batches) + 1):
        rest = list(batches.epoch(7, start))
        assert len(rest) == len(whole) - start
        for (images, labels), (expected, expected_labels) in zip(rest, whole[start:]):
            assert torch.equal(images, expected)
            assert torch.equal(labels, expected_labels)


def test_unshuffled_batches_keep_the_order_and_the_global_generator():
    before = torch.get_rng_state()
    assert list(chain(*numbers(Batches(numbered(9), 4)))) == list(range(9))
    assert torch.equal(torch.get_rng_state(), before)


def test_every_step_and_epoch_is_augmented_anew():
    images = torch.rand(1, 1, 12, 12).mul(255).byte().expand(30, 1, 12, 12).contiguous()
    data = ImageSet(images, torch.zeros(30, dtype=torch.int64), "copies", ("a",))
    batches = Batches(data, 10, augmentation=Augmentation())
    seen = [crops for epoch in range(2) for crops, _ in batches.epoch(epoch)]
    assert all(not torch.equal(a, b) for k, a in enumerate(seen) for b in seen[:k])


@pytest.mark.parametrize("flip", [False, True])
def test_augmented_images_are_crops_of_the_padded_ones(flip):
    images = torch.rand(64, 2, 7, 5)
    augmentation = Augmentation(pad=3, fill=0.5, flip=flip)
    result = augmentation(images, torch.Generator().manual_seed(0))
    padded = F.pad(images, (3, 3, 3, 3), value=0.5)
    seen = set()
    for image, crop in zip(padded, result):
        candidates = {
            (y, x, mirrored): (image[:, y : y + 7, x : x + 5].flip(-1) if mirrored else image[:, y : y + 7, x : x + 5])
            for y in range(7)
            for x in range(7)
            for mirrored in (False, True)
        }
        matches = [key for key, candidate in candidates.items() if torch.equal(candidate, crop)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {y for y, _, _ in seen} == {x for _, x, _ in seen} == set(range(7))
    assert {mirrored for _, _, mirrored in seen} == ({False, True} if flip else {False})


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="batch_size: expected a whole number >= 1, got 0"):
        Batches(numbered(3), 0)
    with pytest.raises(ValueError, match="seed: expected a whole number >= 0, got -1"):
        Batches(numbered(3), seed=-1)
