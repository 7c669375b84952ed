"""Images in files, for tests."""

import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sgr_kernels.training.datasets import load

RNG = np.random.default_rng(0)


def write_idx(folder: Path, train: int, test: int) -> None:
    """The sample's first digits as a folder of plain IDX files."""
    folder.mkdir()
    for prefix, images in (("train", load("mnist-sample").train.first(train)), ("t10k", load("mnist-sample").test)):
        chosen = images.first(train if prefix == "train" else test)
        pixels = struct.pack(">4I", 2051, len(chosen), 28, 28) + chosen.images.numpy().tobytes()
        labels = struct.pack(">2I", 2049, len(chosen)) + chosen.labels.byte().numpy().tobytes()
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(pixels)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)


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
