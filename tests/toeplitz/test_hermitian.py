"""Jacobi rotations against LAPACK, also where eigenvalues meet, vanish, or differ by many orders."""

import pytest
import torch

from sgr_kernels.toeplitz import embedding, hermitian
from tests.helpers import covariances

F64, C128 = torch.float64, torch.complex128


def matrices(count: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    a = torch.randn(50, count, count, dtype=dtype, generator=generator)
    a = a + a.mH
    a[0], a[1], a[2] = 0, torch.eye(count), 1
    a[3] = a[3] * 1e-300
    a[4] = a[4] * 1e150
    a[5] = torch.diag(10.0 ** -torch.arange(0, 2 * count, 2)).to(dtype)
    a[6] = a[6, :, :1] @ a[6, :, :1].mH
    a[7] = torch.eye(count) + 1e-14 * a[7]
    return a


@pytest.mark.parametrize("dtype", [F64, C128], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 9, 16])
def test_decomposes_every_matrix(count, dtype):
    a = matrices(count, dtype)
    values, vectors = hermitian.eigh(a)
    size = a.abs().amax((1, 2)).clamp(min=1e-290)
    assert values.dtype == F64
    assert ((values.sort().values - torch.linalg.eigvalsh(a)).abs().amax(1) <= 1e-13 * size).all()
    assert (vectors.mH @ vectors - torch.eye(count)).abs().max() < 1e-13
    assert (((vectors * values[:, None, :]) @ vectors.mH - a).abs().amax((1, 2)) <= 1e-13 * size + 1e-307).all()


def test_nan_stays_with_its_matrix():
    a = matrices(3, F64)
    a[9, 1, 1] = torch.nan
    values, _ = hermitian.eigh(a)
    assert values[9].isnan().any()
    assert values[:9].isfinite().all()


@pytest.mark.parametrize("form", ["even", "signed"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_clipping_is_the_same_while_a_graph_records(form, channels, monkeypatch):
    table = covariances(form, channels, (5, 4))
    other = table.transpose(0, 1)
    table = table + (other.flip(-2, -1) if form == "signed" else other)
    expected = embedding.clip(table, (5, 4), form)
    monkeypatch.setattr(embedding, "recording", lambda: True)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    torch.testing.assert_close(embedding.clip(table, (5, 4), form), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_positive_part_of_every_matrix(count, monkeypatch):
    """The nearest semidefinite matrix: eigenvalues below zero become zero, also where eigenvalues meet or nearly do."""
    generator = torch.Generator().manual_seed(1)
    a = torch.cat([matrices(count, F64), -matrices(count, F64)])
    rotation = torch.linalg.qr(torch.randn(count, count, dtype=F64, generator=generator)).Q
    spectra = torch.tensor([[1, 1, -1], [1, -1, -1], [0, 0, 1], [0, 0, -1], [1, 1e-9, -1e-9], [2, 2, 2 + 1e-13]])
    special = rotation @ torch.diag_embed(spectra.to(F64)[:, :count]) @ rotation.mT
    a = torch.cat([a, special, 1e-200 * special, torch.full((1, count, count), 1e-320, dtype=F64)])
    monkeypatch.setattr(hermitian, "_CHUNK", 50)
    got = hermitian.unpack(hermitian.positive_part(hermitian.pack(a.permute(1, 2, 0)))).permute(2, 0, 1)
    values, vectors = torch.linalg.eigh(a)
    expected = (vectors * values.clamp(min=0)[:, None, :]) @ vectors.mT
    size = a.abs().amax((1, 2))
    assert ((got - expected).abs().amax((1, 2)) <= 1e-14 * size + 1e-307).all()
    assert (torch.linalg.eigvalsh(got)[:, 0] >= -1e-15 * size - 1e-307).all()


def test_there_is_no_formula_from_order_four_on():
    assert hermitian.positive_part(hermitian.pack(torch.eye(4, dtype=F64))) is None


def test_nan_stays_with_its_positive_part():
    a = matrices(3, F64)
    a[9, 1, 1] = torch.nan
    got = hermitian.positive_part(hermitian.pack(a.permute(1, 2, 0)))
    assert got[:, 9].isnan().all()
    assert got[:, :9].isfinite().all()
