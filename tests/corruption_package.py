"""A stand-in for the package imagecorruptions, as old as it: it asks for names that its surroundings have dropped."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

INSTALLED = importlib.util.find_spec("imagecorruptions") is not None
needs_package = pytest.mark.skipif(
    not INSTALLED, reason="needs imagecorruptions: pip install 'sgr_kernels[corruptions]'"
)

SOURCE = """
import types
import numpy as np
from pkg_resources import resource_filename

np_generator = np.random.default_rng
sk = types.SimpleNamespace(
    color=None,
    util=types.SimpleNamespace(
        random_noise=lambda image, mode, amount, rng:
            np.where(np_generator(rng).random(image.shape) < amount, 1.0, image)
    ),
)

def gaussian(image, sigma, channel_axis):
    assert channel_axis == -1
    return (image + np.roll(image, 1, 0) + np.roll(image, -1, 0)) / 3

def brightness(x, severity=1):
    return np.clip(np.array(x) / 255. + 0.1 * severity, 0, 1) * 255

def contrast(x, severity=1):
    x = np.array(x) / 255.
    means = x.mean(axis=(0, 1), keepdims=True)
    return ((x - means) * (1 - 0.15 * severity) + means) * 255

def gaussian_noise(x, severity=1):
    x = np.array(x) / 255.
    return np.clip(x + np.random.normal(size=x.shape, scale=0.05 * severity), 0, 1) * 255

def fog(x, severity=1):
    x = np.array(x).astype(np.float_) / 255.
    return np.clip(x + 0.1 * severity * np.random.uniform(size=(1, 1, 1)), 0, 1) * 255

def impulse_noise(x, severity=1):
    return sk.util.random_noise(np.array(x) / 255., mode='s&p', amount=0.1 * severity) * 255

def gaussian_blur(x, severity=1):
    return gaussian(np.array(x) / 255., sigma=severity, multichannel=True) * 255

def jpeg_compression(x, severity=1):
    print('what it says')
    return np.array(x) // (8 * severity) * (8 * severity)

def spatter(x, severity=1):
    nothing = np.full(np.array(x).shape, np.nan)
    nothing[0] = 0
    return nothing

def frost(x, severity=1):
    return open(resource_filename(__name__, './frost/frost1.png'))

def snow(x, severity=1):
    return np.array(x)[1:]
"""


@contextmanager
def stand_in(folder: Path) -> Iterator[None]:
    """The stand-in on the path, and no trace of it afterwards."""
    package = folder / "imagecorruptions"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('is never imported as a package')\n")
    (package / "corruptions.py").write_text(SOURCE)
    library = importlib.import_module("sgr_kernels.evaluation.corrupt")._library
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "imagecorruptions"}
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    library.cache_clear()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.update(kept)
        importlib.invalidate_caches()
        library.cache_clear()
