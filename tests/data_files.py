"""Folders of image files for tests of commands."""

import struct
from pathlib import Path

from sgr_kernels.training.datasets import load


def write_idx(folder: Path, train: int, test: int) -> None:
    """The sample's first digits as a folder of plain IDX files."""
    folder.mkdir()
    for prefix, images in (("train", load("mnist-sample").train.first(train)), ("t10k", load("mnist-sample").test)):
        chosen = images.first(train if prefix == "train" else test)
        pixels = struct.pack(">4I", 2051, len(chosen), 28, 28) + chosen.images.numpy().tobytes()
        labels = struct.pack(">2I", 2049, len(chosen)) + chosen.labels.byte().numpy().tobytes()
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(pixels)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
