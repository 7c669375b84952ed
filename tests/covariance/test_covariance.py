"""Running estimates: what enters them, how they are scaled, and what becomes of their state."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from sgr_kernels import CovarianceFunction, FullCovariance, IdentityCovariance, use_backend
from sgr_kernels.covariance import Covariance
from tests.helpers import dense_covariance, gradients, norms

SIZE = (5, 6)
BINNINGS = ("rounded", "linear", "even", "offset")
FORMS = {"rounded": "radial", "even": "even", "offset": "signed"}


def _batches(count: int, channels: int = 2, size=SIZE, dtype=torch.float64) -> list[torch.Tensor]:
    return [gradients((4 + n, channels, *size), seed=n, dtype=dtype) + 0.1 * n for n in range(count)]


def _estimates(**options) -> list[Covariance]:
    functions = [CovarianceFunction(2, SIZE, binning=b, **options) for b in BINNINGS]
    return [*functions, FullCovariance(2, SIZE, **options)]


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.75, 1.0])
@pytest.mark.parametrize("binning", FORMS)
def test_the_running_average_by_hand(binning, decay):
    """``S = (1 - beta) S + beta Cov`` (Eq. 14), from the first batch on."""
    covariance = CovarianceFunction(2, SIZE, decay=decay, binning=binning, psd="none").double()
    expected = mean = None
    for n, xi in enumerate(_batches(4)):
        covariance.update(xi)
        moment = dense_covariance(xi, FORMS[binning])
        expected = moment if expected is None else (1 - decay) * expected + decay * moment
        mean = xi.mean(0) if mean is None else (1 - decay) * mean + decay * xi.mean(0)
        torch.testing.assert_close(covariance.values, expected)
        torch.testing.assert_close(covariance.mean, mean)
        assert (int(covariance.updates), int(covariance.skipped)) == (n + 1, 0)


def test_the_full_matrix_is_the_raw_second_moment():
    """``Cov = 1/m sum xi xi^T`` (Eq. 15), not centred; flattened samples are the same samples."""
    xi = _batches(1)[0]
    covariance, flat = FullCovariance(2, SIZE).double(), FullCovariance(2, SIZE).double()
    covariance.update(xi)
    flat.update(xi.flatten(1))
    expected = sum(torch.outer(x, x) for x in xi.flatten(1)) / len(xi)
    torch.testing.assert_close(covariance.values, expected)
    assert torch.equal(flat.values, covariance.values)
    assert torch.equal(flat.mean, covariance.mean)
    torch.testing.assert_close(flat.product(xi.flatten(1)), covariance.product(xi).flatten(1))


@pytest.mark.parametrize("binning", BINNINGS)
def test_binning_averages_the_full_matrix(binning):
    """Every function of displacement has the full matrix's mean over each displacement, and its mean diagonal."""
    xi = _batches(1)[0]
    full = FullCovariance(2, SIZE).double()
    structured = CovarianceFunction(2, SIZE, binning=binning, psd="none").double()
    full.update(xi)
    structured.update(xi)
    torch.testing.assert_close(structured.dense().diagonal().mean(), full.dense().diagonal().mean())
    torch.testing.assert_close(structured.dense().sum(), full.dense().sum())


@pytest.mark.parametrize("target", [0.25, 1.0, 7.0])
@pytest.mark.parametrize("psd", ["clip", "none"])
@pytest.mark.parametrize("binning", BINNINGS)
def test_the_target_variance_is_the_mean_diagonal_entry(binning, psd, target):
    covariance = CovarianceFunction(2, SIZE, binning=binning, psd=psd, target_variance=target).double()
    for xi in _batches(2):
        covariance.update(1e-3 * xi)
        assert float(covariance.dense().diagonal().mean()) == pytest.approx(target, rel=1e-12)
    raw = CovarianceFunction(2, SIZE, binning=binning, psd=psd).double()
    for xi in _batches(2):
        raw.update(1e-3 * xi)
    torch.testing.assert_close(covariance.values, raw.values)
    # the mean perturbation is of the same scale: its square over Sigma's diagonal is that of the raw estimate
    ratio = covariance.scaled_mean().square().sum() / covariance.mean.square().sum()
    if psd == "none":
        torch.testing.assert_close(ratio * raw.dense().diagonal().mean(), torch.tensor(target, dtype=torch.float64))


def test_the_full_matrix_has_the_target_variance_too():
    covariance = FullCovariance(2, SIZE, target_variance=3.0).double()
    covariance.update(_batches(1)[0])
    assert float(covariance.dense().diagonal().mean()) == pytest.approx(3.0)


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-30, 1e-20])
def test_a_vanishing_estimate_gives_a_vanishing_penalty(magnitude):
    """Zero, or so small that its square has no inverse in float32."""
    for covariance in _estimates(target_variance=1.0):
        covariance.update(magnitude * gradients((3, 2, *SIZE), dtype=torch.float32))
        q = covariance.quadratic_form(torch.ones(2, 2, *SIZE))
        assert torch.equal(q, torch.zeros(2)), covariance
        assert not covariance.scaled_mean().any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_batch_that_is_not_finite_does_not_enter(bad):
    for covariance in _estimates(target_variance=1.0):
        first, second = _batches(2, dtype=torch.float32)
        covariance.update(first)
        before = {name: buffer.clone() for name, buffer in covariance.named_buffers()}
        poisoned = first.clone()
        poisoned[1, 1, 2, 3] = bad
        covariance.update(poisoned)
        for name, buffer in covariance.named_buffers():
            if name != "skipped":
                assert torch.equal(buffer, before[name]), name
        assert (int(covariance.skipped), int(covariance.updates)) == (1, 1)
        with pytest.warns(RuntimeWarning, match="1 batches with non-finite perturbations"):
            covariance.warn_if_skipped()
        covariance.warn_if_skipped()  # said once
        covariance.update(second)
        assert int(covariance.updates) == 2
        assert covariance.dense().isfinite().all()


def test_a_first_batch_that_is_not_finite_leaves_the_estimate_empty():
    covariance = CovarianceFunction(2, SIZE)
    covariance.update(torch.full((2, 2, *SIZE), torch.nan))
    xi = _batches(1, dtype=torch.float32)[0]
    covariance.update(xi)
    fresh = CovarianceFunction(2, SIZE)
    fresh.update(xi)
    assert torch.equal(covariance.values, fresh.values)


def test_an_empty_batch_is_ignored():
    for covariance in _estimates():
        covariance.update(torch.zeros(0, 2, *SIZE))
        assert (int(covariance.updates), int(covariance.skipped)) == (0, 0)
        assert covariance.product(torch.zeros(0, 2, *SIZE)).shape == (0, 2, *SIZE)
        assert covariance.quadratic_form(torch.zeros(0, 2, *SIZE)).shape == (0,)


def test_product_and_quadratic_form_are_those_of_the_dense_matrix():
    g = gradients((3, 2, *SIZE))
    covariances = [c.double() for c in _estimates(target_variance=2.0)]
    for covariance in covariances:
        covariance.update(_batches(1)[0])
    for covariance in [*covariances, IdentityCovariance(0.3, (2, *SIZE))]:
        sigma = covariance.dense().double()
        v = (g.flatten(1) @ sigma.T).view(g.shape)
        torch.testing.assert_close(covariance.product(g), v, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(covariance.quadratic_form(g), (v * g).sum((1, 2, 3)), rtol=1e-7, atol=1e-8)


def test_every_backend_serves_covariance_functions(place):
    for binning in BINNINGS:
        covariance = CovarianceFunction(2, SIZE, binning=binning).double()
        covariance.update(_batches(1)[0])
        sigma = covariance.dense()
        covariance, g = covariance.to(place.device), gradients((3, 2, *SIZE), device=place.device)
        with use_backend(place.backend):
            v, q = covariance.product(g).cpu().flatten(1), covariance.quadratic_form(g).cpu()
            covariance.update(g)
        torch.testing.assert_close(v, g.cpu().flatten(1) @ sigma.T)
        torch.testing.assert_close(q, (v * g.cpu().flatten(1)).sum(1))
        assert int(covariance.updates) == 2


def test_products_are_differentiable_and_updates_are_not():
    for covariance in [*_estimates(), IdentityCovariance(2.0)]:
        covariance = covariance.double()
        g = gradients((2, 2, *SIZE)).requires_grad_()
        if not covariance.frozen:
            covariance.update(g)
            assert not covariance.values.requires_grad
        (by_g,) = torch.autograd.grad(covariance.quadratic_form(g).sum(), g, create_graph=True)
        torch.testing.assert_close(by_g, 2 * covariance.product(g))
        assert by_g.requires_grad


def test_a_graph_outlives_the_next_update():
    """The backward of a step uses the covariance of that step, even after another update."""
    for covariance in _estimates():
        first, second = _batches(2, dtype=torch.float32)
        covariance.update(first)
        g = gradients((2, 2, *SIZE), dtype=torch.float32).requires_grad_()
        expected = 2 * covariance.product(g.detach())
        q = covariance.quadratic_form(g).sum()
        v = covariance.product(g)
        covariance.update(100 * second)
        (by_g,) = torch.autograd.grad(q, g, retain_graph=True)
        torch.testing.assert_close(by_g, expected)
        (by_g,) = torch.autograd.grad(v, g, g.detach())
        torch.testing.assert_close(by_g, expected / 2)


def test_low_precision_gradients_and_perturbations():
    for covariance in [*_estimates(), IdentityCovariance()]:
        if not covariance.frozen:
            covariance.update(_batches(1)[0].bfloat16())
        g = gradients((2, 2, *SIZE)).bfloat16()
        assert covariance.product(g).dtype == torch.bfloat16
        assert covariance.quadratic_form(g).dtype == torch.float32
        wide = covariance.quadratic_form(g.double())
        assert wide.dtype == torch.float64
        torch.testing.assert_close(covariance.quadratic_form(g).double(), wide, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_perturbations_of_low_precision_are_widened_before_they_are_summed(dtype, autocast):
    """Their moment and mean are those of the same numbers in float64, up to float32's rounding."""
    xi = (50 * gradients((64, 2, *SIZE), dtype=torch.float32) + 100).to(dtype)
    for covariance, wide in zip(_estimates(), _estimates()):
        wide.double().update(xi.double())
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            covariance.update(xi)
        torch.testing.assert_close(covariance.values.double(), wide.values, rtol=2e-6, atol=2e-6 * 12_500)
        torch.testing.assert_close(covariance.mean.double(), wide.mean, rtol=2e-6, atol=1e-4)
    frozen, wide = (CovarianceFunction.from_images(x, center=False) for x in (xi, xi.double()))
    torch.testing.assert_close(frozen.values.double(), wide.values, rtol=2e-6, atol=2e-6 * 12_500)
    torch.testing.assert_close(frozen.mean.double(), wide.mean, rtol=2e-6, atol=1e-4)


def test_state_dict_restores_everything():
    for options in ({}, {"target_variance": 2.0}):
        for trained, fresh in zip(_estimates(**options), _estimates(**options)):
            for xi in _batches(2, dtype=torch.float32):
                trained.update(xi)
            trained.update(torch.full((1, 2, *SIZE), torch.nan))
            fresh.load_state_dict(trained.state_dict())
            for (name, mine), (_, theirs) in zip(fresh.named_buffers(), trained.named_buffers()):
                torch.testing.assert_close(mine, theirs, msg=name)
            assert torch.equal(fresh.dense(), trained.dense())
            # and the next update continues from there
            xi = _batches(3, dtype=torch.float32)[2]
            trained.update(xi)
            fresh.update(xi)
            assert torch.equal(fresh.values, trained.values)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_are_independent(clone):
    for covariance in _estimates():
        first, second = _batches(2, dtype=torch.float32)
        covariance.update(first)
        before = covariance.values.clone()
        other = clone(covariance)
        assert torch.equal(other.dense(), covariance.dense())
        other.update(second)
        assert torch.equal(covariance.values, before)
        assert not torch.equal(other.values, before)


@pytest.mark.parametrize("convert", [torch.nn.Module.half, torch.nn.Module.bfloat16, lambda m: m.to(torch.float16)])
def test_the_state_never_falls_below_float32(convert):
    for covariance in _estimates():
        covariance.update(_batches(1, dtype=torch.float32)[0])
        before = covariance.dense()
        convert(torch.nn.Sequential(covariance))
        assert {b.dtype for b in covariance.buffers()} <= {torch.float32, torch.int64}
        assert torch.equal(covariance.dense(), before)
        assert covariance.updates.dtype == torch.int64


def test_a_low_precision_default_dtype_does_not_reach_the_state():
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        covariances = [*_estimates(), CovarianceFunction.exponential(1, 6, 2.0)]
    finally:
        torch.set_default_dtype(previous)
    for covariance in covariances:
        assert {b.dtype for b in covariance.buffers()} <= {torch.float32, torch.int64}
    assert float(covariances[-1].values[0, 0, 0, 1]) == pytest.approx(torch.e**-0.5, rel=1e-7)


def test_loading_by_assignment_keeps_float32():
    for trained, fresh in zip(_estimates(), _estimates()):
        trained.update(_batches(1, dtype=torch.float32)[0])
        state = {k: v.half() if v.is_floating_point() else v for k, v in trained.state_dict().items()}
        fresh.load_state_dict(state, assign=True)
        assert {b.dtype for b in fresh.buffers()} <= {torch.float32, torch.int64}
        torch.testing.assert_close(fresh.dense(), trained.dense(), rtol=1e-2, atol=1e-2)


def test_a_converted_covariance_is_as_accurate_as_its_new_dtype():
    """The product and the dense matrix stay one and the same."""
    g = gradients((2, 2, *SIZE))
    for covariance in _estimates():
        covariance.update(_batches(1, dtype=torch.float32)[0])
        covariance.double()
        expected = g.flatten(1) @ covariance.dense().T
        error = norms(covariance.product(g).flatten(1) - expected) / norms(expected)
        assert (error < 1e-13).all(), covariance


def test_frozen_covariances_take_no_updates():
    xi = _batches(1, dtype=torch.float32)[0]
    covariance = CovarianceFunction(2, SIZE)
    covariance.update(xi)
    assert covariance.freeze() is covariance
    for frozen in (covariance, IdentityCovariance(), CovarianceFunction.exponential(2, SIZE, 2.0)):
        with pytest.raises(RuntimeError, match="frozen"):
            frozen.update(xi)


@pytest.mark.parametrize("binning", BINNINGS)
def test_signals(binning):
    """A signal (B, C, L) is an image of one row."""
    xi = gradients((4, 2, 1, 9), dtype=torch.float64)
    signal, image = (CovarianceFunction(2, size, binning=binning).double() for size in ((9,), (1, 9)))
    signal.update(xi[:, :, 0])
    image.update(xi)
    assert torch.equal(signal.dense(), image.dense())
    assert signal.mean.shape == (2, 9)
    g = gradients((3, 2, 1, 9), seed=1)
    assert torch.equal(signal.product(g[:, :, 0]), image.product(g)[:, :, 0])
    torch.testing.assert_close(signal.quadratic_form(g[:, :, 0]), image.quadratic_form(g))
    assert signal.sample(3).shape == (3, 2, 9)
    assert signal.resize((5,)).mean.shape == (2, 5)


def test_vectors_need_no_image():
    covariance = FullCovariance(7, ()).double()
    xi = torch.randn(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    covariance.update(xi)
    torch.testing.assert_close(covariance.dense(), xi.T @ xi / 50)
    torch.testing.assert_close(covariance.quadratic_form(xi), (xi @ covariance.dense() * xi).sum(1))
    assert covariance.sample(4).shape == (4, 7)


def test_the_identity_is_the_gradient_norm():
    g = gradients((3, 2, *SIZE))
    identity = IdentityCovariance(0.7, (2, *SIZE))
    torch.testing.assert_close(identity.quadratic_form(g), 0.7 * g.flatten(1).square().sum(1))
    torch.testing.assert_close(identity.product(g), 0.7 * g)
    torch.testing.assert_close(identity.dense(), 0.7 * torch.eye(60))
    draws = identity.sample(4000, torch.Generator().manual_seed(0))
    assert float(draws.square().mean()) == pytest.approx(0.7, rel=0.01)
    assert not IdentityCovariance(0.0).quadratic_form(g).any()


def test_updates_under_inference_mode_do_not_spoil_training():
    for covariance in _estimates():
        with torch.inference_mode():
            covariance.update(_batches(1, dtype=torch.float32)[0])
            covariance.quadratic_form(torch.ones(1, 2, *SIZE))
        g = torch.ones(1, 2, *SIZE, requires_grad=True)
        covariance.update(_batches(2, dtype=torch.float32)[1])
        covariance.quadratic_form(g).sum().backward()
        assert g.grad is not None
