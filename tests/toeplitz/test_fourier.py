"""The basis by FFT against the basis itself."""

from __future__ import annotations

import pytest
import torch

from sgr_kernels.toeplitz import fourier, spectrum

SIZES = [(1, 1), (2, 2), (3, 3), (8, 8), (7, 5), (8, 4), (6, 9), (9, 17), (131, 97), (500, 500)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("extent", "frequencies"), SIZES)
def test_analysis_and_synthesis_are_products_with_the_basis(extent, frequencies, dtype):
    generator = torch.Generator().manual_seed(0)
    basis = spectrum.basis(extent, frequencies, torch.float64, torch.device("cpu"))
    x = torch.randn(2, 3, extent, dtype=dtype, generator=generator)
    z = torch.randn(2, 3, 2 * frequencies, dtype=dtype, generator=generator)
    for got, exact in (
        (fourier.analyze(x, frequencies), x.double() @ basis),
        (fourier.synthesize(z, extent), z.double() @ basis.mT),
    ):
        assert got.dtype == dtype
        # the exact one's own sums have rounding errors as well
        assert (got - exact).norm() <= 16 * torch.finfo(dtype).eps * exact.norm()
