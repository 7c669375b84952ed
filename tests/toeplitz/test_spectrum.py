"""Skew-circulant spectra: exact for every size and reach, adjoint to each other, eigenvalues of what they stand for."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from sgr_kernels.toeplitz import embedding, spectrum
from sgr_kernels.toeplitz.geometry import dense_matrix
from sgr_kernels.toeplitz.lanczos import smallest_eigenvalue
from tests.helpers import covariances, dense, table_shape

CPU = torch.device("cpu")
F64 = torch.float64


@pytest.mark.parametrize(("extent", "frequencies"), [(1, 1), (4, 4), (5, 5), (7, 9), (6, 4), (9, 5)])
def test_the_basis_is_orthonormal_on_its_period(extent, frequencies):
    """Any 2F consecutive positions carry an orthonormal basis; fewer are its rows."""
    whole = spectrum.basis(2 * frequencies, frequencies, F64, CPU)
    torch.testing.assert_close(whole @ whole.mT, torch.eye(2 * frequencies, dtype=F64))
    part = spectrum.basis(extent, frequencies, F64, CPU)
    assert part.shape == (extent, 2 * frequencies)
    torch.testing.assert_close(part @ part.mT, torch.eye(extent, dtype=F64))


@pytest.mark.parametrize(("reach", "extent"), list(itertools.combinations_with_replacement(range(1, 9), 2)))
def test_the_fewest_frequencies_and_any_more_are_enough_and_one_less_is_not(reach, extent):
    """A symmetric Toeplitz matrix of short reach is diagonal in the basis: ``T = A diag(Lambda) A^T``."""
    table = torch.randn(1, 1, 1, reach, dtype=F64, generator=torch.Generator().manual_seed(3))
    toeplitz = dense_matrix(table, (1, extent))

    def diagonalized(frequencies: int) -> torch.Tensor:
        a = spectrum.basis(extent, frequencies, F64, CPU)
        values = spectrum.spectrum_from_table(table, (1, frequencies), "even", F64)[0, 0, 0]
        return a @ torch.diag(values.repeat(2)) @ a.mT

    enough = spectrum.frequency_count(extent, reach)
    for more in (0, 1, 5):
        torch.testing.assert_close(diagonalized(enough + more), toeplitz)
    if enough > 1:
        assert not torch.allclose(diagonalized(enough - 1), toeplitz)


def test_the_spectrum_holds_the_eigenvalues_of_the_skew_circulant():
    """``Lambda_k = t_0 + 2 sum_d t_d cos(theta_k d)`` with the odd frequencies ``theta_k = pi (2k+1) / (2F)``."""
    t = np.random.default_rng(0).standard_normal(5)
    n = 5
    skew = np.array([[t[abs(i - j)] if abs(i - j) < n else 0 for j in range(2 * n)] for i in range(2 * n)])
    for i, j in itertools.product(range(2 * n), repeat=2):
        if abs(i - j) > n:  # entries reappear with the opposite sign one period on
            skew[i, j] = -t[2 * n - abs(i - j)]
    values = spectrum.spectrum_from_table(torch.tensor(t).view(1, 1, 1, n), (1, n), "even", F64).flatten()
    direct = [
        t[0] + 2 * sum(t[d] * math.cos(math.pi * (2 * k + 1) / (2 * n) * d) for d in range(1, n)) for k in range(n)
    ]
    np.testing.assert_allclose(values, direct, atol=1e-13)
    np.testing.assert_allclose(np.sort(values.repeat(2)), np.linalg.eigvalsh(skew), atol=1e-12)


@pytest.mark.parametrize("form", ["even", "signed"])
@pytest.mark.parametrize(("size", "reach"), [((4, 5), None), ((3, 6), 2), ((1, 4), None)])
def test_tables_and_cross_spectra_are_adjoint(form, size, reach):
    shape = table_shape(form, size, reach)
    table = covariances(form, 2, size, reach=reach)
    extent = tuple((n + 1) // 2 if form == "signed" else n for n in shape)
    frequencies = spectrum.frequency_counts(size, extent)
    values = spectrum.spectrum_from_table(table, frequencies, form, F64)
    other = torch.randn(values.shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    back = spectrum.table_from_cross_spectrum(other, shape, form)
    torch.testing.assert_close((values * other).sum(), (table * back).sum())


@pytest.mark.parametrize("form", ["even", "signed"])
def test_transposing_a_spectrum_transposes_the_matrix(form):
    table = covariances(form, 2, (3, 4))
    swapped = table.transpose(0, 1).flip(-2, -1) if form == "signed" else table.transpose(0, 1)
    torch.testing.assert_close(dense_matrix(swapped, (3, 4), form), dense_matrix(table, (3, 4), form).T)
    values, transposed = (spectrum.spectrum_from_table(t, (3, 4), form, F64) for t in (table, swapped))
    torch.testing.assert_close(spectrum.transpose(values), transposed)
    torch.testing.assert_close(spectrum.symmetric_part(values), (values + transposed) / 2)


def _symmetric(form: str, channels: int, size: tuple[int, int]) -> torch.Tensor:
    table = covariances(form, channels, size)
    other = table.transpose(0, 1)
    return (table + (other.flip(-2, -1) if form == "signed" else other)) / 2


@pytest.mark.parametrize("form", ["even", "signed"])
@pytest.mark.parametrize(("channels", "size"), [(1, (1, 1)), (1, (5, 4)), (2, (4, 4)), (3, (1, 6)), (2, (5, 1))])
def test_clipping_projects_onto_the_cone(form, channels, size):
    """The nearest semidefinite circulant: semidefinite, unchanged where it already was, and never farther off."""
    table = _symmetric(form, channels, size)
    clipped = embedding.clip(table, size, form)
    sigma = dense(clipped, size, form)
    np.testing.assert_allclose(sigma, sigma.T, atol=1e-12)
    assert np.linalg.eigvalsh(sigma).min() >= -1e-12 * np.abs(sigma).max()
    torch.testing.assert_close(embedding.clip(clipped, size, form), clipped)
    # The projection onto a convex cone is the nearest point: <table - clipped, clipped> = 0 over the whole period.
    weights = torch.ones(clipped.shape[-2:], dtype=F64)
    if form == "even":
        weights[1:] *= 2
        weights[:, 1:] *= 2
    scale = (table**2 * weights).sum()
    assert ((table - clipped) * clipped * weights).sum().abs() <= 1e-12 * scale
    assert (clipped - table).pow(2).mul(weights).sum() <= scale


@pytest.mark.parametrize("form", ["even", "signed"])
def test_the_square_root_filters_white_noise_into_the_covariance(form):
    """Exact, without draws: applied to every unit impulse, the filter's outer product is the dense matrix."""
    channels, size = 2, (3, 4)
    table = embedding.clip(_symmetric(form, channels, size), size, form)
    root = embedding.square_root(table, size, form)
    period = (2 * size[0] - 1, 2 * size[1] - 1)
    impulses = torch.eye(channels * period[0] * period[1], dtype=F64).view(-1, channels, *period)
    fields = torch.einsum("cdkl,ndkl->nckl", root + 0j, torch.fft.rfft2(impulses))
    columns = torch.fft.irfft2(fields, s=period)[..., : size[0], : size[1]].flatten(1)
    torch.testing.assert_close(columns.mT @ columns, dense_matrix(table, size, form))


def test_there_is_no_square_root_of_an_indefinite_table():
    table = torch.tensor([1.0, -0.9, -0.9, -0.9]).view(1, 1, 1, 4)
    assert np.linalg.eigvalsh(dense(table, (1, 4), "even")).min() < 0
    assert embedding.square_root(table, (1, 4), "even") is None


@pytest.mark.parametrize("dimension", [1, 2, 7, 60])
def test_smallest_eigenvalue(dimension):
    generator = torch.Generator().manual_seed(dimension)
    matrix = torch.randn(dimension, dimension, dtype=F64, generator=generator)
    matrix = matrix + matrix.T
    got = smallest_eigenvalue(lambda v: matrix @ v, dimension, CPU)
    assert got == pytest.approx(float(torch.linalg.eigvalsh(matrix)[0]), abs=1e-7 * float(matrix.norm()))


@pytest.mark.parametrize(
    "matrix", [torch.zeros(5, 5, dtype=F64), 3 * torch.eye(6, dtype=F64), torch.ones(8, 8, dtype=F64)]
)
def test_smallest_eigenvalue_of_degenerate_matrices(matrix):
    got = smallest_eigenvalue(lambda v: matrix @ v, len(matrix), CPU)
    assert got == pytest.approx(float(torch.linalg.eigvalsh(matrix)[0]), abs=1e-12)
