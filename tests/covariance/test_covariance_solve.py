"""What covariances solve: inverses, Mahalanobis lengths, determinants, and the jitter that makes them possible."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from sgr_kernels import CovarianceFunction, FullCovariance, IdentityCovariance
from sgr_kernels.covariance import Covariance, function
from tests.helpers import gradients, norms


class Plain(Covariance):
    """A user's own, that knows its matrix and nothing else."""

    def dense(self) -> torch.Tensor:
        """Twice the identity and ones."""
        return 2 * torch.eye(12) + torch.ones(12, 12)


def full() -> FullCovariance:
    covariance = FullCovariance(2, (2, 3), target_variance=0.5)
    covariance.update(gradients((40, 2, 2, 3), dtype=torch.float32))
    return covariance


COVARIANCES = {
    "even": lambda: CovarianceFunction.exponential(2, (2, 3), 2.0),
    "offset": lambda: CovarianceFunction.exponential(2, (2, 3), 2.0, binning="offset"),
    "larger": lambda: CovarianceFunction.exponential(2, (9, 12), 2.0, target_variance=0.3),
    "signal": lambda: CovarianceFunction.exponential(2, (6,), 2.0),
    "full": full,
    "identity": lambda: IdentityCovariance(0.25, (2, 2, 3)),
    "own": Plain,
}


@pytest.mark.parametrize("name", COVARIANCES)
def test_solve_length_and_determinant_are_those_of_the_dense_matrix(name):
    covariance = COVARIANCES[name]()
    shape = getattr(covariance, "shape", None) or (2, 2, 3)
    sigma = covariance.dense().double()
    x = gradients((4, math.prod(shape), 1, 1))[:, :, 0, 0].view(4, *shape)
    exact = torch.linalg.solve(sigma, x.flatten(1).mT).mT
    y = covariance.solve(x, tolerance=1e-10)
    assert y.shape == x.shape
    assert y.dtype == torch.float64
    torch.testing.assert_close(y.flatten(1), exact, rtol=1e-6, atol=1e-6)
    length = (x.flatten(1) * exact).sum(1).sqrt()
    torch.testing.assert_close(covariance.mahalanobis(x), length, rtol=1e-6, atol=0)
    assert covariance.mahalanobis(x.float()).dtype == torch.float32
    value, error = covariance.log_determinant()
    assert value == pytest.approx(float(torch.linalg.slogdet(sigma)[1]), rel=1e-5, abs=1e-5)
    assert error == 0


@pytest.mark.parametrize("name", COVARIANCES)
def test_solutions_and_lengths_are_differentiable(name):
    covariance = COVARIANCES[name]().double()
    shape = getattr(covariance, "shape", None) or (2, 2, 3)
    if math.prod(shape) > 20:
        return
    x = gradients((2, math.prod(shape), 1, 1)).view(2, *shape).requires_grad_()
    gradcheck(lambda x: covariance.solve(x, tolerance=1e-12), (x,))
    gradcheck(lambda x: covariance.mahalanobis(x, tolerance=1e-12), (x,))
    zero = torch.zeros_like(x, requires_grad=True)
    length = covariance.mahalanobis(zero)
    assert torch.equal(length, torch.zeros(2, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(length.sum(), zero)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("name", COVARIANCES)
@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_lengths_are_in_proportion_at_any_scale(name, scale):
    covariance = COVARIANCES[name]()
    shape = getattr(covariance, "shape", None) or (2, 2, 3)
    x = gradients((2, math.prod(shape), 1, 1)).view(2, *shape).requires_grad_()
    length = covariance.mahalanobis(x)
    found = covariance.mahalanobis(scale * x)
    torch.testing.assert_close(found / scale, length)
    (expected,) = torch.autograd.grad(length.sum(), x)
    (gradient,) = torch.autograd.grad((found / scale).sum(), x)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e200])
def test_the_determinant_of_a_covariance_of_any_scale(scale, monkeypatch):
    monkeypatch.setattr(function, "_DENSE_UP_TO", 0)
    values = CovarianceFunction.exponential(2, (9, 12), 2.0).table.double()
    value, error = CovarianceFunction.from_values(values, (9, 12)).log_determinant()
    scaled = CovarianceFunction.from_values(scale * values, (9, 12)).log_determinant()
    assert scaled.value == pytest.approx(value + 216 * math.log(scale), rel=1e-6)
    assert scaled.standard_error == pytest.approx(error, rel=1e-3)


def test_a_running_estimate_solves_with_what_it_holds_now():
    """Also in the backward of a solution of before."""
    covariance = CovarianceFunction(1, 8, binning="even").double()
    covariance.update(gradients((50, 1, 8, 8)))
    x = gradients((2, 1, 8, 8), seed=1).requires_grad_()
    covariance = covariance.with_jitter(0.1)
    covariance.frozen = False
    before = covariance.solve(x, tolerance=1e-10)
    sigma = covariance.dense()
    covariance.update(3 * gradients((50, 1, 8, 8), seed=2))
    (by_x,) = torch.autograd.grad(before, x, x.detach())
    torch.testing.assert_close((by_x.flatten(1) @ sigma), x.detach().flatten(1), rtol=1e-6, atol=1e-6)
    after = covariance.solve(x.detach(), tolerance=1e-10)
    torch.testing.assert_close(after.flatten(1) @ covariance.dense(), x.detach().flatten(1), rtol=1e-6, atol=1e-6)


def test_draws_have_the_mean_square_length_of_their_dimension():
    """``E[x^T Sigma^-1 x] = D`` for ``x ~ N(0, Sigma)``, and its standard deviation is ``sqrt(2 D)``."""
    covariance = CovarianceFunction.exponential(3, 16, 4.0)
    square = covariance.mahalanobis(covariance.sample(200, torch.Generator().manual_seed(0))).double().square()
    assert float(square.mean()) == pytest.approx(768, abs=4 * (2 * 768 / 200) ** 0.5)
    assert 0.8 < float(square.std()) / (2 * 768) ** 0.5 < 1.2


@pytest.mark.parametrize("binning", ["even", "offset", "linear"])
@pytest.mark.parametrize("zeta", [1.0, 8.0])
def test_stochastic_determinants_agree_with_exact_ones(binning, zeta, monkeypatch):
    """Within four standard errors, which are small beside the number of unknowns."""
    covariance = CovarianceFunction.exponential(2, (20, 16), zeta, binning=binning, psd="none")
    exact, zero = covariance.log_determinant()
    assert zero == 0
    monkeypatch.setattr(function, "_DENSE_UP_TO", 0)
    found = covariance.log_determinant(generator=torch.Generator().manual_seed(1))
    assert 0 < found.standard_error < 0.01 * 640
    assert abs(found.value - exact) < 4 * found.standard_error
    assert covariance.log_determinant() == covariance.log_determinant()
    with pytest.raises(ValueError, match="probes: expected a whole number >= 2, got 1"):
        covariance.log_determinant(probes=1)


def test_jitter_makes_a_semidefinite_covariance_definite():
    clipped = CovarianceFunction(1, 16)
    clipped.update(torch.ones(1, 1, 16, 16))
    x = gradients((2, 1, 16, 16), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"covariance: .*jitter"):
        clipped.solve(x)
    mended = clipped.with_jitter(1e-2)
    variance = float(clipped.dense().diagonal().mean())
    torch.testing.assert_close(mended.dense(), clipped.dense() + 0.01 * variance * torch.eye(256))
    assert mended.frozen
    y = mended.solve(x)
    assert (norms(mended.product(y.double()) - x) <= 1e-4 * norms(x)).all()
    with pytest.raises(ValueError, match="share: expected a positive number, got 0"):
        clipped.with_jitter(0)
    with pytest.raises(ValueError, match="covariance: expected a positive mean variance, got 0"):
        CovarianceFunction(1, 16).with_jitter(1e-2)


@pytest.mark.parametrize("name", ["full", "identity", "even", "zero"])
def test_what_has_no_inverse_says_so(name):
    singular = {
        "full": FullCovariance(2, (2, 3)),
        "identity": IdentityCovariance(0.0, (2, 2, 3)),
        "even": CovarianceFunction.from_values(torch.ones(2, 2, 2, 3), (2, 3), psd="none"),
        "zero": CovarianceFunction(2, (2, 3)),
    }[name]
    for ask in (lambda: singular.solve(torch.randn(2, 2, 2, 3)), singular.log_determinant):
        with pytest.raises(ValueError, match="covariance: expected a positive definite matrix"):
            ask()


@pytest.mark.parametrize("name", ["full", "identity", "even", "own"])
def test_bad_arguments_are_named(name):
    covariance = COVARIANCES[name]()
    with pytest.raises(ValueError, match=r"^x: expected .*\(1, 2, 5, 5\)"):
        covariance.solve(torch.zeros(1, 2, 5, 5))
    if name != "own":
        with pytest.raises(ValueError, match=r"^delta: expected .*\(1, 2, 5, 5\)"):
            covariance.mahalanobis(torch.zeros(1, 2, 5, 5))
    with pytest.raises(TypeError, match="delta: expected a real floating-point tensor"):
        covariance.mahalanobis(torch.zeros(1, 2, 2, 3).long())
    with pytest.raises(ValueError, match="tolerance: expected a number"):
        covariance.solve(torch.zeros(1, 2, 2, 3), tolerance=2.0)
