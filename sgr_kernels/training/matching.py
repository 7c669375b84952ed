"""Images to test a training on: of its images' shape, and with labels that count its classes, found by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sgr_kernels.training.images import DataError, Images

_FEW = 5  # names of classes that errors list


def matched(images: Images, known: Sequence[str] | None, whose: str) -> Images:
    """Images whose classes are numbered as a training's, by their names.

    Labels stay as they are where one of the two has no names, or, in no folder of images, numbers for names.

    Args:
        images: Of all of the training's classes, or of some.
        known: Names of the training's classes; None: not known.
        whose: Classes these are, for errors.

    Raises:
        DataError: If a class is none of the training's, or somebody's own data set numbers them otherwise.
    """
    found = images.classes
    if found is None or known is None or found == tuple(known):
        return images
    order = {name: number for number, name in enumerate(known)}
    if not set(found) <= set(order):
        if not images.by_name and (_numbers(found) or _numbers(known)):
            return images
        unknown = next(name for name in found if name not in order)
        raise DataError(
            f"data: {images.name} has the class {unknown!r}, which {whose} lacks: {_listed(found)}, "
            f"not {_listed(known)}"
        )
    numbers = [order[name] for name in found]
    return images.renumbered(torch.tensor(numbers), tuple(known))


def alike(test: Images, train: Images) -> Images:
    """Test images, numbered as the training images' classes are.

    Raises:
        DataError: If either are none, they differ in shape, or their classes cannot be `matched`.
    """
    for images in (train, test):
        if not len(images):
            raise DataError(f"data: {images.name} holds no images")
    if test.shape != train.shape:
        found, wanted = ("x".join(map(str, images.shape)) for images in (test, train))
        raise DataError(
            f"data: expected test images like the training images, {wanted} ({train.name}), got {found} ({test.name})"
        )
    return matched(test, train.classes, "the training set")


def _numbers(names: Sequence[str]) -> bool:
    """Whether each name is no more than its number."""
    return all(name == str(number) for number, name in enumerate(names))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return ", ".join(map(repr, names[:_FEW])) + more
