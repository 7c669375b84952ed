"""Products through one Fourier transform of the image, which GPUs take large images through: here on a CPU."""

from __future__ import annotations

import pytest
import torch

from sgr_kernels.backends import circulant, torch_spectral
from sgr_kernels.toeplitz.spectrum import frequency_counts, spectrum_from_table
from tests.helpers import assert_product_close, assert_quadratic_close, covariances, dense_product, gradients

LIMITS = {torch.float32: (5e-6, 1e-6), torch.float64: (1e-12, 1e-12)}


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_spectral, "by_circulant", lambda device, size, form: form == "even")
    monkeypatch.setattr(circulant, "_SCRATCH_BYTES", 1 << 14)  # a few images at a time


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(
    ("shape", "reach"),
    [((5, 1, 28, 28), None), ((3, 3, 9, 14), None), ((2, 2, 13, 1), None), ((2, 5, 6, 7), 3), ((3, 2, 11, 20), 4)],
    ids=str,
)
def test_agrees_with_the_dense_matrix(shape: tuple[int, ...], reach: int | None, dtype: torch.dtype) -> None:
    size = (shape[2], shape[3])
    gradient, table = gradients(shape, dtype=dtype), covariances("even", shape[1], size, smooth=True)
    if reach is not None:
        table = table[..., :reach, :reach]
    counts = frequency_counts(size, (table.shape[-2], table.shape[-1]))
    spectrum = spectrum_from_table(table, counts, "even", dtype)
    v, _ = dense_product(gradient, table, "even")
    assert_product_close(torch_spectral.product(gradient, spectrum, "highest"), v, LIMITS[dtype][0])
    v, q = dense_product(gradient, (table + table.transpose(0, 1)) / 2, "even")
    for with_product in (True, False):
        form, product = torch_spectral.quadratic_form(gradient, spectrum, with_product, "highest")
        assert_quadratic_close(form, q, gradient, v, LIMITS[dtype][1])
        if with_product:
            assert_product_close(product, v, LIMITS[dtype][0])


@pytest.mark.parametrize(("size", "reach"), [((7, 5), (7, 5)), ((8, 9), (3, 1)), ((12, 4), (5, 2)), ((1, 6), (1, 6))])
def test_a_table_is_found_again_from_its_spectrum(size: tuple[int, int], reach: tuple[int, int]) -> None:
    table = torch.randn(2, 2, *reach, dtype=torch.float64)
    spectrum = spectrum_from_table(table, frequency_counts(size, reach), "even", torch.float64)
    found = circulant.table_from_spectrum(spectrum, size)
    torch.testing.assert_close(found[..., : reach[0], : reach[1]], table)
    assert found[..., reach[0] :, :].abs().sum() < 1e-12
    assert found[..., reach[1] :].abs().sum() < 1e-12


def test_lengths_are_those_that_transforms_are_fast_for() -> None:
    assert [circulant.smooth_length(n) for n in (1, 11, 447, 1023, 1031)] == [1, 12, 448, 1024, 1050]
