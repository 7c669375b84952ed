"""The common corruptions of Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions
and Perturbations" (2019), as the package imagecorruptions makes them.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgr_kernels.attacks.inputs import check_images
from sgr_kernels.checks import check_count

KINDS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
    "speckle_noise",
    "gaussian_blur",
    "spatter",
    "saturate",
)
"""All kinds of corruption, in the package's order."""

SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST = 32
"""Pixels on a side that the package asks for at least."""

_PACKAGE = "imagecorruptions"
_CHANNELS = (1, 3)
_GREEN = 1  # of the three, the closest to brightness
_lock = threading.Lock()  # a call seeds the stream that it draws from


class CorruptionUnavailable(ValueError):
    """A kind of corruption that the packages installed here cannot make."""


def corrupt(images: Tensor, kind: str, severity: int, *, seed: int = 0, first: int = 0) -> Tensor:
    """Corrupted images, in steps of 1/255 as the corruptions are defined on bytes.

    Strengths are the package's, meant for photographs of 224 pixels: on images of 32 they are much harsher than
    CIFAR-10-C's. Images smaller than 32 pixels on a side are continued by their edges to 32, corrupted, and cropped
    back. Grey ones are corrupted as colours, of which the green is kept. Each image has random numbers of its own, the
    same ones at every severity; global random streams are neither read nor moved.

    Args:
        images: (B, C, H, W) with C 1 or 3, floating point in [0, 1]; rounded to bytes first.
        kind: One of `KINDS`.
        severity: 1 to 5.
        seed: Of the random numbers.
        first: Number of the batch's first image: image k draws what follows from seed, kind and ``first + k``, so that
            batches of any size give the same.

    Returns:
        (B, C, H, W), in the images' dtype, on their device.

    Raises:
        ModuleNotFoundError: Without the package; says how to install it.
        TypeError: Images that are not floating point.
        ValueError: An unknown kind, a severity, seed or number out of range, images of another shape or range, or a
            kind that the packages installed here cannot make (`CorruptionUnavailable`), named with the reason.
    """
    (kind,), (severity,) = check_kinds([kind]), check_severities([severity])
    check_count("seed", seed, 0)
    check_count("first", first, 0)
    images = check_images(images, (0.0, 1.0))
    if images.ndim != 4 or images.shape[1] not in _CHANNELS or 0 in images.shape[2:]:
        raise ValueError(f"images: expected shape (B, C, H, W) with C 1 or 3, got {tuple(images.shape)}")
    make = _maker(kind)
    colours = images.expand(-1, 3, -1, -1).detach().permute(0, 2, 3, 1)
    pixels = (colours.double() * 255).round().to(torch.uint8).cpu().numpy()
    entropy = [seed, KINDS.index(kind)]
    found = [make(_padded(picture), severity, [*entropy, first + k]) for k, picture in enumerate(pixels)]
    height, width = images.shape[2:]
    top, left = _margin(height), _margin(width)
    corrupted = np.stack(found) if found else np.zeros((0, height, width, 3), np.uint8)
    corrupted = np.ascontiguousarray(corrupted[:, top : top + height, left : left + width].transpose(0, 3, 1, 2))
    result = torch.from_numpy(corrupted if images.shape[1] == 3 else corrupted[:, _GREEN : _GREEN + 1].copy())
    return (result.to(images.device).to(torch.float64 if images.dtype == torch.float64 else torch.float32) / 255).to(
        images.dtype
    )


def check_kinds(kinds: Sequence[str] | None) -> list[str]:
    """The kinds named, None for all.

    Raises:
        ValueError: An unknown one, one twice, or none.
    """
    if kinds is None:
        return list(KINDS)
    names = [kinds] if isinstance(kinds, str) else list(kinds)
    for name in names:
        if name not in KINDS:
            raise ValueError(f"kinds: expected some of {', '.join(KINDS)}, got {name!r}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"kinds: expected at least one, and each of them once, got {names}")
    return names


def check_severities(severities: Sequence[int]) -> list[int]:
    """The severities given.

    Raises:
        ValueError: One that is no whole number from 1 to 5, one twice, or none.
    """
    given = list(severities)
    if not given or any(type(value) is not int or value not in SEVERITIES for value in given):
        raise ValueError(f"severities: expected whole numbers from 1 to 5, got {given}")
    if len(set(given)) < len(given):
        raise ValueError(f"severities: expected each of them once, got {given}")
    return given


def require_package() -> None:
    """Expect that the package is installed.

    Raises:
        ModuleNotFoundError: If not; says how to install it.
    """
    _source()


def _margin(side: int) -> int:
    return max(0, SMALLEST - side) // 2


def _padded(picture: np.ndarray) -> np.ndarray:
    short = [max(0, SMALLEST - side) for side in picture.shape[:2]]
    if not any(short):
        return picture
    return np.pad(picture, [*((gap // 2, gap - gap // 2) for gap in short), (0, 0)], mode="edge")


def _maker(kind: str) -> Callable[[np.ndarray, int, list[int]], np.ndarray]:
    """Bytes (H, W, 3), severity and what to seed with, to bytes."""
    from PIL import Image

    library = _library()

    def make(picture: np.ndarray, severity: int, entropy: list[int]) -> np.ndarray:
        with _lock, warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            seeds = np.random.SeedSequence(entropy).generate_state(4)
            library.np.random.seed(seeds)
            try:
                values = np.asarray(getattr(library, kind)(Image.fromarray(picture), severity))
            except Exception as error:  # anything: it is another package's code, with other versions than it knew
                raise CorruptionUnavailable(
                    f"kinds: {kind!r} cannot be made by the packages installed here "
                    f"({type(error).__name__}: {' '.join(str(error).split())})"
                ) from error
            if values.shape != picture.shape:
                raise CorruptionUnavailable(
                    f"kinds: {kind!r} cannot be made by the packages installed here (it makes {values.shape} of an "
                    f"image {picture.shape})"
                )
            # Where no drop falls, spatter divides zero by zero; the picture stays as it was there.
            return np.where(np.isfinite(values), values, picture).astype(np.uint8)

    return make


def _source() -> Path:
    try:
        found = importlib.util.find_spec(_PACKAGE)
    except ValueError:  # a module without a specification stands in its place
        found = None
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"{_PACKAGE} is not installed: pip install 'sgr_kernels[corruptions]'", name=_PACKAGE)
    return Path(found.origin).with_name("corruptions.py")


@functools.cache
def _library() -> Any:
    """The package's functions, in a copy of the module that is ours alone: what is exchanged in it, nobody else sees.

    Exchanged are names that the packages it builds on have dropped since, and the sources of its random numbers.
    """
    path = _source()
    spec = importlib.util.spec_from_file_location(f"sgr_kernels._{_PACKAGE}", path)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)

    def resource_filename(package: str, name: str) -> str:
        return str(path.parent / name)

    with _standing_in("pkg_resources", resource_filename=resource_filename), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    gaussian, skimage, numpy = module.gaussian, module.sk, _Numpy()

    def blurred(image: np.ndarray, *arguments: Any, multichannel: bool = False, **options: Any) -> np.ndarray:
        return gaussian(image, *arguments, channel_axis=-1 if multichannel else None, **options)

    def random_noise(image: np.ndarray, **options: Any) -> np.ndarray:
        return skimage.util.random_noise(image, rng=int(numpy.random.randint(2**31)), **options)

    module.np, module.gaussian, module.resource_filename = numpy, blurred, resource_filename
    module.sk = SimpleNamespace(color=skimage.color, util=SimpleNamespace(random_noise=random_noise))
    module.print = lambda *words: None  # what it says of small images is no news
    return module


class _Numpy:
    """NumPy, with a name that it had, and a random stream in the place of the global one."""

    float_ = np.float64

    def __init__(self) -> None:
        self.random = np.random.RandomState(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


@contextmanager
def _standing_in(name: str, **contents: Any) -> Iterator[None]:
    """A module of that name with these contents, where there is none."""
    if name in sys.modules:
        yield
        return
    module = ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]
