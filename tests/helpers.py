"""Drawn gradients and covariances, a vectorised dense oracle, and the error measures of the tolerances.

Nothing here uses the package: the oracle is written in NumPy, from the definitions.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Size = tuple[int, int]

COLOURS = ("white", "pink", "blue")
PRODUCT_TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12}
QUADRATIC_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def noise(colour: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Noise of unit variance with a flat spectrum, one that falls as 1/f, or one that rises as f squared."""
    white = rng.standard_normal(shape)
    frequency = np.hypot(np.fft.fftfreq(shape[-2])[:, None], np.fft.rfftfreq(shape[-1])[None, :])
    gain = {"white": 1 + 0 * frequency, "pink": 1 / (frequency + 1 / max(shape)), "blue": frequency**2 + 1e-6}[colour]
    field = np.fft.irfft2(np.fft.rfft2(white) * gain, s=shape[-2:])
    return field / np.sqrt((field**2).mean())


def gradients(
    shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> Tensor:
    """A batch (B, C, H, W) that goes through the colours."""
    rng = np.random.default_rng(seed)
    images = [noise(COLOURS[b % 3], shape[1:], rng) for b in range(shape[0])]
    return torch.tensor(np.array(images).reshape(shape), dtype=dtype, device=device)


def bins(size: Size) -> int:
    """Number of bins of rounded distance that reach across an image."""
    return round(math.hypot(size[0] - 1, size[1] - 1)) + 1


def table_shape(form: str, size: Size, reach: int | None = None) -> tuple[int, ...]:
    """Trailing shape of a covariance of full range, or of displacements up to ``reach``."""
    height, width = (n if reach is None else min(n, reach + 1) for n in size)
    if form == "radial":
        return (bins(size) if reach is None else min(bins(size), reach + 1),)
    return (height, width) if form == "even" else (2 * height - 1, 2 * width - 1)


def covariances(
    form: str, channels: int, size: Size, seed: int = 0, reach: int | None = None, smooth: bool = False
) -> Tensor:
    """A drawn covariance, float64: not symmetric, and either of random entries or of exponential decay."""
    rng = np.random.default_rng(seed)
    shape = table_shape(form, size, reach)
    if not smooth:
        return torch.tensor(rng.standard_normal((channels, channels, *shape)))
    offsets = [np.arange(n) - (n // 2 if form == "signed" else 0) for n in shape]
    distance = np.sqrt(sum(axis.astype(float) ** 2 for axis in np.meshgrid(*offsets, indexing="ij")))
    mixing = 0.5 * rng.random((channels, channels)) + np.eye(channels)
    return torch.tensor(np.einsum("cd,...->cd...", mixing, np.exp(-distance / rng.uniform(1, 8))))


def _cells(form: str, size: Size) -> NDArray[np.int64]:
    """For every ordered pair of pixels, the flat index of its cell in a covariance of full range, (P, P)."""
    height, width = size
    y, x = np.divmod(np.arange(height * width), width)
    dy, dx = y[None, :] - y[:, None], x[None, :] - x[:, None]
    if form == "radial":
        return np.rint(np.sqrt(dy**2 + dx**2)).astype(np.int64)
    if form == "even":
        return abs(dy) * width + abs(dx)
    return (dy + height - 1) * (2 * width - 1) + dx + width - 1


def dense(covariance: Tensor, size: Size, form: str) -> Array:
    """The matrix ``Sigma[(c, i), (c', j)] = f[c, c', displacement from i to j]``, zero beyond the covariance."""
    f = covariance.detach().cpu().double().numpy()
    missing = [full - have for full, have in zip(table_shape(form, size), f.shape[2:])]
    padding = [(n // 2, n // 2) if form == "signed" else (0, n) for n in missing]
    full = np.pad(f, [(0, 0), (0, 0), *padding])
    blocks = full.reshape(*f.shape[:2], -1)[:, :, _cells(form, size)]
    dimension = f.shape[0] * size[0] * size[1]
    return blocks.transpose(0, 2, 1, 3).reshape(dimension, dimension)


def dense_product(gradient: Tensor, covariance: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """``v = Sigma g`` and ``q = g^T Sigma g`` in float64."""
    g = gradient.detach().cpu().double().numpy()
    v = (g.reshape(len(g), -1) @ dense(covariance, g.shape[2:], form).T).reshape(g.shape)
    return torch.tensor(v), torch.tensor((v * g).sum((1, 2, 3)))


def convolved(gradient: Tensor, table: Tensor) -> Tensor:
    """``v = Sigma g`` for an even table of full range, by Fourier transforms: for images too large to be dense."""
    g = gradient.detach().cpu().double().numpy()
    t = table.detach().cpu().double().numpy()
    height, width = g.shape[2:]
    rows, columns = abs(np.arange(1 - height, height)), abs(np.arange(1 - width, width))
    kernel = np.roll(t[:, :, rows[:, None], columns[None, :]], (1 - height, 1 - width), (2, 3))
    period = (2 * height - 1, 2 * width - 1)
    product = np.einsum("cdkl,bdkl->bckl", np.fft.rfft2(kernel), np.fft.rfft2(g, s=period))
    return torch.tensor(np.fft.irfft2(product, s=period)[:, :, :height, :width])


def dense_covariance(perturbation: Tensor, form: str) -> Tensor:
    """Mean over samples and ordered pixel pairs at each displacement of ``xi[c, i] xi[c', j]``, float64."""
    xi = perturbation.detach().cpu().double().numpy()
    samples, channels, height, width = xi.shape
    shape, cells = table_shape(form, (height, width)), _cells(form, (height, width)).ravel()
    flat = xi.reshape(samples, channels, -1)
    counts = np.bincount(cells, minlength=math.prod(shape))
    means = [
        np.bincount(cells, (flat[:, c].T @ flat[:, d]).ravel(), len(counts)) / (counts * samples)
        for c in range(channels)
        for d in range(channels)
    ]
    return torch.tensor(np.array(means).reshape(channels, channels, *shape))


def norms(images: Tensor) -> Tensor:
    """Norm of each sample, float64."""
    return images.detach().cpu().double().flatten(1).norm(dim=1)


def assert_product_close(v: Tensor, exact: Tensor, tolerance: float) -> None:
    """Expect ``||dv|| <= tolerance ||v||`` for every sample."""
    error = norms(v.detach().cpu().double() - exact)
    assert v.shape == exact.shape
    assert (error <= tolerance * norms(exact)).all(), f"relative errors {error / norms(exact)}, limit {tolerance}"


def assert_quadratic_close(q: Tensor, exact: Tensor, gradient: Tensor, v: Tensor, tolerance: float) -> None:
    """Expect ``|dq| <= tolerance ||g|| ||v||`` for every sample; q itself may cancel."""
    error = (q.detach().cpu().double() - exact).abs()
    scale = norms(gradient) * norms(v)
    assert q.shape == exact.shape
    assert (error <= tolerance * scale).all(), f"relative errors {error / scale}, limit {tolerance}"


def assert_covariance_close(f: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Expect a radial estimate within 1e-6 f(0) for the lower half of the bins, and 2e-5 f(0) for all."""
    unit = 1 if dtype == torch.float32 else 1e-6
    error = (f.detach().cpu().double() - exact).abs().amax((0, 1))
    variance = exact[..., 0].diagonal().mean()
    assert f.shape == exact.shape
    assert (error <= 2e-5 * unit * variance).all(), f"errors {error / variance}"
    lower = error[: (len(error) + 1) // 2]
    assert (lower <= 1e-6 * unit * variance).all(), f"errors of the lower half {lower / variance}"
