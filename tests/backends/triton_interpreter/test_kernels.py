"""Every Triton kernel against the dense matrix, over ragged shapes, with uninitialised memory poisoned."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.autograd import gradcheck

import sgr_kernels
from sgr_kernels import functional as sgr
from sgr_kernels.backends import native
from sgr_kernels.backends.triton_spectral import launch
from sgr_kernels.functional import operators
from sgr_kernels.toeplitz.spectrum import frequency_counts, spectrum_from_table
from tests.helpers import (
    PRODUCT_TOLERANCE,
    QUADRATIC_TOLERANCE,
    assert_product_close,
    assert_quadratic_close,
    covariances,
    dense_covariance,
    dense_product,
    gradients,
)

# Up to 32 x 32, in registers.
SMALL = [
    (1, (28, 28), "radial", None),
    (3, (32, 32), "even", None),
    (2, (5, 7), "even", None),
    (4, (17, 9), "even", None),
    (1, (1, 1), "even", None),
    (2, (1, 31), "radial", 6),
    (3, (14, 11), "signed", None),
    (1, (32, 3), "signed", None),
]
FLOAT32 = [
    *SMALL,
    # up to 64 x 64
    (1, (64, 39), "even", None),
    (3, (33, 34), "radial", None),
    (2, (34, 8), "even", 3),
    (1, (1, 50), "even", 12),
    # in three passes
    (1, (1, 90), "radial", None),
    (1, (66, 10), "even", None),
    (3, (5, 66), "even", 9),
    (4, (67, 5), "even", 4),
    (1, (131, 5), "even", 4),
    # in five
    (5, (6, 13), "even", None),
    (5, (12, 13), "signed", None),
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


def _batch(dtype: torch.dtype, *case: object) -> int:
    """Three images for two programs, where a program may have several; one for each elsewhere."""
    return 3 if dtype == torch.float32 and case in SMALL else 2


@PROBLEMS
def test_product_and_quadratic_form(dtype, channels, size, form, reach):
    g = gradients((_batch(dtype, channels, size, form, reach), channels, *size)).float().double()
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


@pytest.mark.parametrize(("channels", "size", "reach"), [(1, (66, 10), None), (3, (5, 70), 9)], ids=str)
def test_frequencies_that_the_compiled_kernels_ask_for(monkeypatch, channels, size, reach):
    """More than are needed, in a spectrum that both read."""
    monkeypatch.setattr(
        operators,
        "frequencies",
        lambda request, displacements: native.transformed(request, frequency_counts(request.size, displacements)),
    )
    g = gradients((2, channels, *size), dtype=torch.float32).requires_grad_()
    f = covariances("even", channels, size, reach=reach).float()
    f = (f + f.transpose(0, 1)) / 2
    v, q = dense_product(g.detach().double(), f.double(), "even")
    form = sgr.covariance_quadratic_form(g, f, backend="triton")
    assert_quadratic_close(form, q, g.detach().double(), v, QUADRATIC_TOLERANCE[torch.float32])
    (slope,) = torch.autograd.grad(form.sum(), g)
    assert_product_close(slope / 2, v, PRODUCT_TOLERANCE[torch.float32])


def _transposed(f: torch.Tensor, form: str) -> torch.Tensor:
    f = f.transpose(0, 1)
    return f.flip(2, 3) if form == "signed" else f


@PROBLEMS
def test_displacement_covariance(dtype, channels, size, form, reach):
    xi = gradients((_batch(dtype, channels, size, form, reach), channels, *size)).float().double()
    exact = dense_covariance(xi, form)
    f = sgr.displacement_covariance(xi.to(dtype), form=form, max_displacement=reach, backend="triton")
    if form == "radial":
        exact = exact[..., : f.shape[2]]
    elif form == "even":
        exact = exact[..., : f.shape[2], : f.shape[3]]
    variance = exact.abs().amax()
    limit = 2e-5 if dtype == torch.float32 else 1e-12
    assert ((f.double() - exact).abs() <= limit * variance).all()


def test_first_derivatives():
    """What is registered for all backends: `tests/operators` has the other forms."""
    g = gradients((1, 2, 2, 3)).requires_grad_()
    f = covariances("signed", 2, (2, 3)).requires_grad_()
    check = functools.partial(gradcheck, fast_mode=True, check_undefined_grad=False)
    for operator in (sgr.covariance_product, sgr.covariance_quadratic_form):
        call = functools.partial(operator, form="signed", backend="triton")
        assert check(call, (g, f))
    estimate = functools.partial(sgr.displacement_covariance, form="signed", backend="triton")
    assert check(estimate, (g,))


@pytest.mark.parametrize("form", ["even", "signed"])
def test_derivatives_of_the_fused_kernels(form):
    """In float32, against those of the PyTorch backend in float64."""
    g, f = gradients((2, 2, 6, 9)).float().double(), covariances(form, 2, (6, 9)).float().double()

    def derivatives(dtype: torch.dtype, backend: str) -> tuple[torch.Tensor, ...]:
        x, t = g.to(dtype).requires_grad_(), f.to(dtype).requires_grad_()
        q = sgr.covariance_quadratic_form(x, t, form=form, backend=backend)
        first = torch.autograd.grad(q.square().sum(), (x, t), create_graph=True)
        second = torch.autograd.grad(sum(d.square().sum() for d in first), (x, t))
        return (*first, *second)

    for value, exact in zip(derivatives(torch.float32, "triton"), derivatives(torch.float64, "torch")):
        assert (value.double() - exact).norm() <= 2e-5 * exact.norm()


# By path: in registers with both parities of rows at once, with one at a time, and in passes. The limits are those of a
# blue gradient; no precision may be as good as the one above it.
@pytest.mark.parametrize("shape", [(3, 3, 12, 11), (3, 1, 34, 7), (2, 5, 6, 5)])
@pytest.mark.parametrize(
    ("precision", "better", "limit", "form_limit"), [("high", 5e-6, 1e-2, 5e-4), ("medium", 1e-3, 6e-2, 5e-3)]
)
def test_lower_precision(shape, precision, better, limit, form_limit):
    g, f = gradients(shape).float(), covariances("even", shape[1], shape[2:], smooth=True).float()
    operators = torch.ops.sgr_kernels
    spectrum = spectrum_from_table(f, shape[2:], "even", torch.float32)
    v, q = dense_product(g, f, "even")
    assert_product_close(operators.triton_product(g, spectrum, precision), v, limit)
    form, symmetric = operators.triton_quadratic_form(g, spectrum, True, precision)
    exact, _ = dense_product(g, (f + f.transpose(0, 1)) / 2, "even")
    assert_product_close(symmetric, exact, limit)
    assert_quadratic_close(form, q, g, exact, form_limit)
    sums = operators.triton_cross_spectrum(g, g, *spectrum.shape[-2:], False, precision)
    exact_sums = operators.torch_cross_spectrum(g.double(), g.double(), *spectrum.shape[-2:], False, "highest")
    assert (sums - exact_sums).norm() <= 2 * form_limit * exact_sums.norm()
    error = symmetric.double() - exact
    assert error.norm() > better * exact.norm()
    with pytest.raises(ValueError, match="precision: expected one of"):
        operators.triton_product(g, spectrum, "low")


LAYOUTS = {
    "channels_last": lambda g: g.contiguous(memory_format=torch.channels_last),
    "sliced": lambda g: torch.cat([g, g], 3).flip(3)[..., 1 : 2 * g.shape[3] : 2],
    "transposed": lambda g: g.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda g: g[:1].expand_as(g),
}


# By path: in registers with both parities of rows at once, with one at a time, in three passes and in five.
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2, 3, 9, 8), "transposed"),
        ((2, 2, 34, 7), "sliced"),
        ((2, 2, 5, 66), "channels_last"),
        ((2, 5, 6, 5), "expanded"),
    ],
)
def test_images_of_any_layout_and_of_float16(shape, layout):
    g = LAYOUTS[layout](gradients(shape).half())
    assert not g.is_contiguous()
    f = covariances("even", shape[1], shape[2:], smooth=True).float()
    spectrum = spectrum_from_table(f, shape[2:], "even", torch.float32)
    operators = torch.ops.sgr_kernels
    exact, q = dense_product(g, f, "even")
    v = operators.triton_product(g, spectrum, "highest")
    assert v.dtype == torch.float16
    assert_product_close(v, exact, 1e-3)  # of float16 itself
    form, _ = operators.triton_quadratic_form(g, spectrum, True, "highest")
    symmetric, _ = dense_product(g, (f + f.transpose(0, 1)) / 2, "even")
    assert_quadratic_close(form, q, g, symmetric, 1e-6)
    sums = operators.triton_cross_spectrum(g, g, *spectrum.shape[-2:], False, "highest")
    exact_sums = operators.torch_cross_spectrum(g.double(), g.double(), *spectrum.shape[-2:], False, "highest")
    assert (sums - exact_sums).norm() <= 1e-5 * exact_sums.norm()


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_bfloat16_images(precision):
    """Only what bfloat16 images themselves, and bfloat16 operands, cannot hold may be lost."""
    g = gradients((3, 2, 9, 8)).bfloat16()
    f = covariances("even", 2, (9, 8), smooth=True).float()
    spectrum = spectrum_from_table(f, (9, 8), "even", torch.float32)
    exact, q = dense_product(g, f, "even")
    form, v = torch.ops.sgr_kernels.triton_quadratic_form(g, spectrum, True, precision)
    assert v.dtype == torch.bfloat16
    assert form.dtype == torch.float32
    symmetric, _ = dense_product(g, (f + f.transpose(0, 1)) / 2, "even")
    assert_product_close(v, symmetric, 8e-3 if precision == "highest" else 6e-2)
    assert_quadratic_close(form, q, g, symmetric, 1e-6 if precision == "highest" else 5e-3)
    assert_product_close(torch.ops.sgr_kernels.triton_product(g, spectrum, precision), exact, 6e-2)


@pytest.mark.parametrize("channels", range(1, 9))
def test_any_number_of_channels(channels):
    size = (1, 6) if channels % 2 else (7, 1)
    g, f = gradients((2, channels, *size)).float(), covariances("radial", channels, size).float()
    exact, _ = dense_product(g, f, "radial")
    assert_product_close(sgr.covariance_product(g, f, backend="triton"), exact, 5e-6)


def test_operators_check_what_memory_safety_needs():
    g, spectrum = torch.zeros(2, 3, 4, 5), torch.zeros(3, 3, 4, 5)
    operators = torch.ops.sgr_kernels
    with pytest.raises(ValueError, match="spectrum: expected"):
        operators.triton_product(g, spectrum[:2], "highest")
    with pytest.raises(ValueError, match="gradient: expected"):
        operators.triton_product(g[0], spectrum, "highest")
    with pytest.raises(ValueError, match="b: expected"):
        operators.triton_cross_spectrum(g, g[:1], 4, 5, False, "highest")


def test_compiled_calls_use_the_operator_as_it_is():
    """The interpreter's kernels cannot be traced: the compiler keeps the operator whole."""

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(g: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        return sgr.covariance_quadratic_form(g * 2, f, backend="triton")

    g, f = gradients((2, 1, 4, 5)), covariances("radial", 1, (4, 5))
    torch.testing.assert_close(step(g, f), 4 * dense_product(g, f, "radial")[1])
    assert "triton" in sgr_kernels.backends.available("cpu")


@pytest.mark.parametrize("size", [(9, 12), (34, 7)])
def test_a_covariance_keeps_its_spectrum_arranged(size, monkeypatch):
    """After each update it is the present one's, and one launch serves a call."""
    made = []
    wrap = launch.wrap_triton
    monkeypatch.setattr(launch, "wrap_triton", lambda kernel: made.append(kernel) or wrap(kernel))
    covariance, g = sgr_kernels.CovarianceFunction(2, size), gradients((3, 2, *size)).float()
    with sgr_kernels.use_backend("triton"):
        for scale in (1.0, 40.0):
            covariance.update(scale * g.flip(0))
            for call in range(2):
                made.clear()
                leaf = g.clone().requires_grad_()
                q = covariance.quadratic_form(leaf)
                assert len(made) == (2 if scale == 1.0 and call == 0 else 1)
                v = covariance.product(g)
                exact = (g.flatten(1).double() @ covariance.dense().double()).view(g.shape)
                assert_product_close(v, exact, 5e-6)
                assert_product_close(torch.autograd.grad(q.sum(), leaf)[0] / 2, exact, 5e-6)
                assert_quadratic_close(q, (exact * g).sum((1, 2, 3)), g, exact, 1e-6)
