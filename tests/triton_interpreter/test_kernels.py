"""Every Triton kernel against the dense matrix, over ragged shapes, with uninitialised memory poisoned."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from sgr_kernels import functional as sgr
from sgr_kernels.backends import torch_spectral
from tests.helpers import (
    PRODUCT_TOLERANCE,
    QUADRATIC_TOLERANCE,
    assert_product_close,
    assert_quadratic_close,
    covariances,
    dense_covariance,
    dense_product,
    gradients,
    norms,
)

FLOAT32 = [
    # in registers, up to 32 x 32
    (1, (28, 28), "radial", None),
    (3, (32, 32), "even", None),
    (2, (5, 7), "even", None),
    (4, (17, 9), "even", None),
    (1, (1, 1), "even", None),
    (2, (1, 31), "radial", 6),
    (3, (14, 11), "signed", None),
    (1, (32, 3), "signed", None),
    # up to 64 x 64
    (1, (64, 39), "even", None),
    (3, (33, 34), "radial", None),
    (2, (34, 8), "even", 3),
    (1, (1, 50), "even", 12),
    # in passes
    (1, (1, 90), "radial", None),
    (1, (66, 10), "even", None),
    (5, (6, 13), "even", None),
    (4, (7, 6), "signed", None),
    (1, (35, 12), "signed", None),
]
FLOAT64 = [
    (1, (1, 1), "even", None),
    (3, (12, 9), "even", None),
    (2, (9, 34), "radial", 5),
    (2, (8, 7), "signed", None),
]


def _identity(case: tuple) -> str:
    channels, size, form, reach = case
    return f"{channels}x{size[0]}x{size[1]}-{form}" + ("" if reach is None else f"-reach{reach}")


CASES = [(torch.float32, *case) for case in FLOAT32] + [(torch.float64, *case) for case in FLOAT64]
PROBLEMS = pytest.mark.parametrize(
    ("dtype", "channels", "size", "form", "reach"), CASES, ids=[f"{str(c[0])[6:]}-{_identity(c[1:])}" for c in CASES]
)


@PROBLEMS
def test_product_and_quadratic_form(dtype, channels, size, form, reach):
    g = gradients((3, channels, *size)).float().double()
    f = covariances(form, channels, size, reach=reach).float().double()
    v, q = dense_product(g, f, form)
    symmetric_v, _ = dense_product(g, (f + _transposed(f, form)) / 2, form)
    assert_product_close(
        sgr.covariance_product(g.to(dtype), f.to(dtype), form=form, backend="triton"), v, PRODUCT_TOLERANCE[dtype]
    )
    leaf = g.to(dtype).requires_grad_()
    form_with_product = sgr.covariance_quadratic_form(leaf, f.to(dtype), form=form, backend="triton")
    assert_quadratic_close(form_with_product, q, g, symmetric_v, QUADRATIC_TOLERANCE[dtype])
    (slope,) = torch.autograd.grad(form_with_product.sum(), leaf)
    assert_product_close(slope / 2, symmetric_v, PRODUCT_TOLERANCE[dtype])
    form_alone = sgr.covariance_quadratic_form(g.to(dtype), f.to(dtype), form=form, backend="triton")
    assert_quadratic_close(form_alone, q, g, symmetric_v, QUADRATIC_TOLERANCE[dtype])


def _transposed(f: torch.Tensor, form: str) -> torch.Tensor:
    f = f.transpose(0, 1)
    return f.flip(2, 3) if form == "signed" else f


@PROBLEMS
def test_displacement_covariance(dtype, channels, size, form, reach):
    xi = gradients((3, channels, *size)).float().double()
    exact = dense_covariance(xi, form)
    f = sgr.displacement_covariance(xi.to(dtype), form=form, max_displacement=reach, backend="triton")
    if form == "radial":
        exact = exact[..., : f.shape[2]]
    elif form == "even":
        exact = exact[..., : f.shape[2], : f.shape[3]]
    variance = exact.abs().amax()
    limit = 2e-5 if dtype == torch.float32 else 1e-12
    assert ((f.double() - exact).abs() <= limit * variance).all()
