"""``Sigma y = x``: the dense solution in float64, its derivatives, and what a matrix without an inverse is told."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from sgr_kernels import CovarianceFunction
from sgr_kernels import functional as sgr
from sgr_kernels.toeplitz.preconditioner import Preconditioner
from tests.helpers import covariances, dense, gradients, norms

FORMS = ("radial", "even", "signed")
SIZES = [(8, 8), (5, 9), (1, 13), (7, 1)]


def positive(form: str, channels: int, size, reach: int | None = None, seed: int = 2) -> torch.Tensor:
    """A symmetric positive definite covariance: a smooth draw and half as much again on the diagonal as it needs."""
    f = covariances(form, channels, size, seed=seed, reach=reach, smooth=True)
    swapped = f.transpose(0, 1)
    f = (f + (swapped.flip(-2, -1) if form == "signed" else swapped)) / 2
    zero = {"radial": (0,), "even": (0, 0), "signed": tuple(n // 2 for n in f.shape[2:])}[form]
    smallest = torch.linalg.eigvalsh(torch.tensor(dense(f, size, form)))[0]
    f[(..., *zero)] += torch.eye(channels, dtype=f.dtype) * (0.1 - 1.5 * smallest.clamp(max=0))
    return f


def oblique(size, length: float = 12.0, across: float = 1.5) -> torch.Tensor:
    """An exponential that reaches far along one diagonal and little along the other, (1, 1, 2H-1, 2W-1)."""
    y = torch.arange(1 - size[0], size[0]).double()[:, None]
    x = torch.arange(1 - size[1], size[1]).double()[None, :]
    return torch.exp(-torch.hypot((x + y) / length, (x - y) / across) / 2**0.5)[None, None]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_solution_is_the_dense_one(form, size, channels, place):
    f = positive(form, channels, size)
    x = gradients((4, channels, *size))
    exact = torch.linalg.solve(torch.tensor(dense(f, size, form)), x.flatten(1).mT).mT.reshape(x.shape)
    y = sgr.covariance_solve(x.to(place.device), f.to(place.device), form=form, tolerance=1e-10, backend=place.backend)
    assert (norms(y.cpu() - exact) <= 1e-8 * norms(exact)).all()


@pytest.mark.parametrize("reach", [0, 2])
@pytest.mark.parametrize("form", FORMS)
def test_covariances_shorter_than_the_image(form, reach):
    f = positive(form, 2, (6, 9), reach=reach)
    x = gradients((3, 2, 6, 9))
    exact = torch.linalg.solve(torch.tensor(dense(f, (6, 9), form)), x.flatten(1).mT).mT.reshape(x.shape)
    y = sgr.covariance_solve(x, f, form=form, tolerance=1e-10)
    assert (norms(y - exact) <= 1e-8 * norms(exact)).all()


@pytest.mark.parametrize("tolerance", [1e-2, 1e-6])
def test_every_sample_reaches_the_tolerance_and_stops_for_itself(tolerance):
    """Alone or beside a harder one, a sample's solution is the same, and its residual below the tolerance."""
    covariance = CovarianceFunction.exponential(3, 16, 4.0, psd="none").double()
    x = gradients((6, 3, 16, 16))
    x[3] = 0
    x[4] *= 1e-30
    y = sgr.covariance_solve(x, covariance.table, tolerance=tolerance)
    residual = norms(x - sgr.covariance_product(y, covariance.table))
    assert (residual <= 1.001 * tolerance * norms(x)).all()
    assert torch.equal(y[3], torch.zeros_like(y[3]))
    for one in range(6):
        alone = sgr.covariance_solve(x[one : one + 1], covariance.table, tolerance=tolerance)
        torch.testing.assert_close(alone, y[one : one + 1], rtol=1e-9, atol=1e-9 * float(y[one].abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision_is_the_float64_solution_rounded_once(dtype):
    f = positive("radial", 2, (8, 8)).to(dtype)
    x = gradients((3, 2, 8, 8)).to(dtype)
    y = sgr.covariance_solve(x, f, tolerance=1e-8)
    exact = sgr.covariance_solve(x.double(), f.double(), tolerance=1e-8)
    assert y.dtype == dtype
    torch.testing.assert_close(y, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sgr.covariance_solve(x, f, tolerance=1e-8), y)


@pytest.mark.parametrize("zeta", [16.0, 64.0])
def test_single_precision_is_accurate_where_sigma_is_hard_and_images_are_huge(zeta):
    """Rounding in the iterations adds little to that of the result; no matter whether float32 holds the squares."""
    f = CovarianceFunction.exponential(3, 24, zeta, psd="none").table
    x = gradients((6, 3, 24, 24), dtype=torch.float32)
    exact = sgr.covariance_solve(x.double(), f.double(), tolerance=1e-11)
    scales = torch.tensor([1.0, 1e25, 1e-25, 1.0, 1e25, 1e-25])[:, None, None, None]
    y = sgr.covariance_solve(scales * x, f).double() / scales.double()
    assert (norms(y - exact) <= 5e-6 * norms(exact)).all()
    off, rounded = (norms(x.double() - sgr.covariance_product(v, f.double())) for v in (y, exact.float().double()))
    assert (off <= 1e-4 * norms(x) + 2 * rounded).all()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-40, 1e40, 1e160, 1e300])
def test_neither_the_images_scale_nor_the_covariances_matters(scale, backend):
    """Though their squares, and single precision, hold neither."""
    f, x = positive("even", 2, (5, 6)), gradients((3, 2, 5, 6))
    solve = functools.partial(sgr.covariance_solve, tolerance=1e-10, backend=backend)
    y = solve(x, f)
    torch.testing.assert_close(solve(scale * x, f) / scale, y)
    torch.testing.assert_close(solve(x, scale * f) * scale, y)
    mixed = torch.tensor([scale, 0.0, 1.0], dtype=torch.float64)[:, None, None, None]
    torch.testing.assert_close(solve(mixed * x, f), mixed * y, rtol=1e-7, atol=0)


def test_signals_strides_and_empty_batches():
    f = positive("radial", 2, (1, 11))
    x = gradients((2, 2, 1, 11))
    y = sgr.covariance_solve(x, f)
    assert torch.equal(sgr.covariance_solve(x[:, :, 0], f), y[:, :, 0])
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(sgr.covariance_solve(strided, f), y)
    assert sgr.covariance_solve(x[:0], f).shape == (0, 2, 1, 11)


def test_what_is_not_finite_stays_so_and_harms_nobody():
    f = positive("even", 1, (6, 6))
    x = gradients((3, 1, 6, 6))
    expected = sgr.covariance_solve(x, f)
    x[1, 0, 2, 2] = torch.nan
    y = sgr.covariance_solve(x, f)
    assert y[1].isnan().all()
    torch.testing.assert_close(y[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize(("form", "backend"), [("radial", "torch"), ("even", "reference"), ("signed", "auto")])
def test_derivatives_in_both_arguments(form, backend):
    """To second order and in forward mode; only the symmetric part of the covariance counts."""
    f = positive(form, 2, (2, 3))
    f = (f + 0.01 * covariances(form, 2, (2, 3), seed=4)).requires_grad_()
    x = gradients((2, 2, 2, 3), seed=1).requires_grad_()
    solve = functools.partial(sgr.covariance_solve, form=form, tolerance=1e-13, backend=backend)
    gradcheck(solve, (x, f), check_forward_ad=True, fast_mode=True)
    gradgradcheck(solve, (x, f), check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
def test_product_and_solve_undo_each_other_with_their_derivatives(form):
    f = positive(form, 2, (5, 6)).requires_grad_()
    x = gradients((3, 2, 5, 6), seed=1).requires_grad_()
    again = sgr.covariance_product(sgr.covariance_solve(x, f, form=form, tolerance=1e-12), f, form=form)
    torch.testing.assert_close(again, x)
    weights = gradients((3, 2, 5, 6), seed=3)
    by_x, by_f = torch.autograd.grad(again, (x, f), weights)
    torch.testing.assert_close(by_x, weights)
    swapped = by_f.transpose(0, 1)  # the solve's symmetric part cancels; the product has the other, too
    assert float((by_f + (swapped.flip(-2, -1) if form == "signed" else swapped)).abs().max()) < 1e-7


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, as it compiles
def test_compiled_and_transformed_code_may_solve():
    f, x = positive("even", 1, (4, 4)), gradients((2, 1, 4, 4))
    expected = sgr.covariance_solve(x, f)
    gradient = torch.func.grad(lambda x: sgr.covariance_solve(x, f).sum())(x)
    torch.testing.assert_close(gradient, sgr.covariance_solve(torch.ones_like(x), f), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.compile(sgr.covariance_solve, backend="eager")(x, f), expected)


@pytest.mark.parametrize("zeta", [1.0, 4.0, 16.0])
@pytest.mark.parametrize(("channels", "size"), [(1, (28, 28)), (3, (32, 32)), (1, (48, 20))])
def test_exponentials_take_few_iterations(channels, size, zeta):
    covariance = CovarianceFunction.exponential(channels, size, zeta, psd="none").double()
    x = gradients((6, channels, *size))
    sgr.covariance_solve(x, covariance.table, max_iterations=16)


@pytest.mark.parametrize("form", ["even", "signed"])
def test_the_preconditioner_knows_itself(form):
    """Its inverse, its root and its determinant are those of one positive definite matrix."""
    size, channels = (5, 7), 2
    near = Preconditioner(
        positive("even", 2, size) if form == "even" else positive(form, 2, size), size, form, torch.float64
    )
    unit = torch.eye(70, dtype=torch.float64).view(70, channels, *size)
    inverse, root = near.inverse(unit).flatten(1), near.whiten(unit).flatten(1)
    torch.testing.assert_close(inverse, inverse.mT)
    torch.testing.assert_close(root @ root.mT, inverse)  # rows are images: W^T W
    torch.testing.assert_close(near.spread(unit).flatten(1), root.mT)
    assert near.log_determinant == pytest.approx(-float(torch.linalg.slogdet(inverse)[1]))


def test_a_diagonal_covariance_is_its_own_preconditioner():
    f = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)[..., None, None]
    x = gradients((3, 2, 9, 9))
    y = sgr.covariance_solve(x, f, max_iterations=2)
    torch.testing.assert_close(
        y, torch.einsum("cd,bdyx->bcyx", torch.linalg.inv(f[..., 0, 0]), x), rtol=1e-6, atol=1e-6
    )


def test_oblique_covariances_are_solved():
    f, x = oblique((16, 16)), gradients((3, 1, 16, 16))
    y = sgr.covariance_solve(x, f, form="signed", max_iterations=150)
    assert (norms(x - sgr.covariance_product(y, f, form="signed")) <= 1.01e-6 * norms(x)).all()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_indefinite_matrix_is_refused(backend):
    f = CovarianceFunction.exponential(1, 12, 4.0, rounded=True, psd="none").table
    with pytest.raises(ValueError, match=r'covariance: expected a positive definite matrix: .*psd="clip".*with_jitter'):
        sgr.covariance_solve(gradients((3, 1, 12, 12)), f, backend=backend)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_a_matrix_without_positive_variances_is_refused(factor, dtype, backend):
    """A zero one as of an estimate that has seen nothing; a negative one."""
    f = factor * positive("even", 2, (5, 6))
    with pytest.raises(ValueError, match=r"covariance: expected a positive definite matrix: .*with_jitter"):
        sgr.covariance_solve(gradients((3, 2, 5, 6), dtype=dtype), f, backend=backend)


def test_a_singular_matrix_says_how_far_it_came_and_what_helps():
    ones = torch.ones(1, 1, 8, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"covariance: .*(relative residual|fails at row).*jitter"):
        sgr.covariance_solve(gradients((2, 1, 8, 8)), ones)
    hard = CovarianceFunction.exponential(1, 32, 16.0, psd="none").table
    with pytest.raises(
        ValueError, match=r"relative residual of 0?\.?\d.* in 3 iterations, expected 1e-06.*max_iterations"
    ):
        sgr.covariance_solve(gradients((2, 1, 32, 32)), hard, max_iterations=3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tolerance": 0.0}, r"tolerance: expected a number in \(0, 1\), got 0"),
        ({"tolerance": float("nan")}, r"tolerance: expected"),
        ({"max_iterations": 0}, r"max_iterations: expected a whole number >= 1 or None, got 0"),
        ({"max_iterations": 2.5}, r"max_iterations: expected"),
        ({"backend": "cudnn"}, r"backend: expected one of .*got 'cudnn'"),
        ({"form": "signed"}, r"covariance: expected an odd number|covariance: expected rank"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match="covariance: expected finite numbers, got NaN or infinity"):
        sgr.covariance_solve(torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), torch.nan))
    with pytest.raises(ValueError, match=words):
        sgr.covariance_solve(torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4), **options)
    with pytest.raises(TypeError, match="x: expected a real floating-point tensor"):
        sgr.covariance_solve(torch.zeros(1, 1, 4, 4).long(), torch.ones(1, 1, 4, 4))
