"""A dense float64 oracle in NumPy, dumb on purpose: the definitions, written out. For tests and for readers.

Shares no code with the rest of the package. Cost grows with the square of the number of pixels.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def _pixels(size: tuple[int, int]) -> list[tuple[int, int]]:
    return [(y, x) for y in range(size[0]) for x in range(size[1])]


def _entry(covariance: Array, dy: int, dx: int, form: str) -> Array | float:
    """The (C, C) block at displacement (dy, dx), zero beyond the covariance's reach."""
    if form == "radial":
        k = round(math.hypot(dy, dx))
        return covariance[:, :, k] if k < covariance.shape[2] else 0.0
    if form == "even":
        inside = abs(dy) < covariance.shape[2] and abs(dx) < covariance.shape[3]
        return covariance[:, :, abs(dy), abs(dx)] if inside else 0.0
    y, x = dy + covariance.shape[2] // 2, dx + covariance.shape[3] // 2
    inside = 0 <= y < covariance.shape[2] and 0 <= x < covariance.shape[3]
    return covariance[:, :, y, x] if inside else 0.0


def dense(covariance: ArrayLike, size: tuple[int, int], form: str) -> Array:
    """The matrix ``Sigma[(c, i), (c', j)] = f[c, c', displacement from i to j]``, (C*H*W, C*H*W)."""
    f = np.asarray(covariance, dtype=np.float64)
    channels, pixels = f.shape[0], _pixels(size)
    sigma = np.zeros((channels, len(pixels), channels, len(pixels)))
    for i, (yi, xi) in enumerate(pixels):
        for j, (yj, xj) in enumerate(pixels):
            sigma[:, i, :, j] = _entry(f, yj - yi, xj - xi, form)
    return sigma.reshape(channels * len(pixels), channels * len(pixels))


def product(gradient: ArrayLike, covariance: ArrayLike, form: str) -> Array:
    """``v_b = Sigma g_b`` for g (B, C, H, W)."""
    g = np.asarray(gradient, dtype=np.float64)
    sigma = dense(covariance, g.shape[2:], form)
    return np.stack([sigma @ image.ravel() for image in g]).reshape(g.shape) if len(g) else g


def quadratic_form(gradient: ArrayLike, covariance: ArrayLike, form: str) -> Array:
    """``q_b = g_b^T Sigma g_b``, (B,)."""
    g = np.asarray(gradient, dtype=np.float64)
    return (product(g, covariance, form) * g).sum((1, 2, 3))


def displacement_covariance(perturbation: ArrayLike, form: str = "radial") -> Array:
    """Mean over samples and ordered pixel pairs at each displacement of ``xi[c, i] xi[c', j]`` (Eq. 16)."""
    xi = np.asarray(perturbation, dtype=np.float64)
    samples, channels, height, width = xi.shape
    shape: tuple[int, ...] = (round(math.hypot(height - 1, width - 1)) + 1,)
    if form != "radial":
        shape = (height, width) if form == "even" else (2 * height - 1, 2 * width - 1)
    sums, counts = np.zeros((*shape, channels, channels)), np.zeros(shape, dtype=np.int64)
    pixels = _pixels((height, width))
    for yi, xi_ in pixels:
        for yj, xj in pixels:
            dy, dx = yj - yi, xj - xi_
            cell: tuple[int, ...] = (round(math.hypot(dy, dx)),)
            if form != "radial":
                cell = (abs(dy), abs(dx)) if form == "even" else (dy + height - 1, dx + width - 1)
            counts[cell] += 1
            sums[cell] += xi[:, :, yi, xi_].T @ xi[:, :, yj, xj]
    return np.moveaxis(sums / (samples * counts[..., None, None]), (-2, -1), (0, 1))
