"""Cosine and sine transforms against their sums, written out; by matrices and by FFT."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sgr_kernels.toeplitz import cosines

F64 = torch.float64


@pytest.fixture(params=["matrices", "fft"])
def way(request, monkeypatch) -> str:
    monkeypatch.setattr(cosines, "_FFT_FROM", 1 if request.param == "fft" else 10_000)
    monkeypatch.setattr(cosines, "_FFT_ALWAYS_FROM", 1 if request.param == "fft" else 10_000)
    return request.param


def _drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("part", ["even", "odd"])
@pytest.mark.parametrize(
    ("reach", "frequencies"), [(1, 1), (1, 4), (3, 3), (4, 4), (2, 5), (7, 7), (5, 12), (98, 98), (97, 131)]
)
def test_odd_frequencies(reach, frequencies, part, dim, way):
    """``x_0 + 2 sum_d x_d cos(theta_k d)`` and ``2 sum_d x_d sin(theta_k d)``, and their adjoints."""
    theta = np.pi * (2 * np.arange(frequencies) + 1) / (2 * frequencies)
    angles = np.arange(reach)[:, None] * theta[None, :]
    matrix = 2 * (np.cos(angles) if part == "even" else np.sin(angles))
    matrix[0] /= 2
    x, y = _drawn(2, reach, 3), _drawn(2, frequencies, 3)
    there, back = np.einsum("dk,ndx->nkx", matrix, x), np.einsum("dk,nkx->ndx", matrix, y)
    if dim == -1:
        x, y, there, back = (a.swapaxes(1, 2) for a in (x, y, there, back))
    got = cosines.odd_frequencies(torch.tensor(x), frequencies, part, dim)
    np.testing.assert_allclose(got, there, atol=1e-13 * frequencies)
    np.testing.assert_allclose(
        cosines.odd_displacements(torch.tensor(y), reach, part, dim), back, atol=1e-13 * frequencies
    )


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize(("reach", "extent"), [(1, 1), (1, 3), (4, 4), (3, 7), (50, 50)])
def test_periodic_frequencies(reach, extent, dim, way):
    k, d = np.arange(extent), np.arange(reach)
    matrix = 2 * np.cos(2 * np.pi * d[:, None] * k[None, :] / (2 * extent - 1))
    matrix[0] /= 2
    x = _drawn(2, reach, 3)
    there = np.einsum("dk,ndx->nkx", matrix, x)
    if dim == -1:
        x, there = x.swapaxes(1, 2), there.swapaxes(1, 2)
    got = cosines.periodic_frequencies(torch.tensor(x), extent, dim)
    np.testing.assert_allclose(got, there, atol=1e-12)
    if reach == extent:
        again = cosines.periodic_frequencies(got, extent, dim) / (2 * extent - 1)
        np.testing.assert_allclose(again, x, atol=1e-12)


@pytest.mark.parametrize("part", ["even", "odd"])
def test_fourier_transforms_are_differentiable_twice(part, way):
    x = torch.tensor(_drawn(4, 5)).requires_grad_()
    for f in (lambda t: cosines.odd_frequencies(t, 6, part, -1), lambda t: cosines.odd_displacements(t, 4, part, -1)):
        assert torch.autograd.gradcheck(f, (x,))
        assert torch.autograd.gradcheck(lambda t, f=f: torch.func.jvp(f, (t,), (t,))[1], (x,))


def test_large_planes_are_transformed_one_by_one_to_the_same(monkeypatch):
    x = torch.tensor(_drawn(2, 3, 8, 9))
    whole = cosines.plane_by_plane(torch.fft.fft2, x)
    monkeypatch.setattr(cosines, "_LARGE_PLANE", 1)
    torch.testing.assert_close(cosines.plane_by_plane(torch.fft.fft2, x), whole)
