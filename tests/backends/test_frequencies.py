"""How many frequencies: the fewest that are exact, or on GPUs the next that have Fourier transforms."""

from __future__ import annotations

import copy

import pytest
import torch

import sgr_kernels as sgr
from sgr_kernels import backends
from sgr_kernels.backends import native
from sgr_kernels.functional import operators
from sgr_kernels.toeplitz.spectrum import frequency_counts
from tests.helpers import covariances, dense, gradients

F32, F64 = torch.float32, torch.float64


def request_for(size, channels=3, dtype=F32, form="even", device="cuda"):
    return backends.Request("product", torch.device(device), dtype, 8, channels, size, form)


@pytest.fixture
def gpu(monkeypatch):
    """As where there is a GPU of 227 KiB of shared memory, with compiled kernels."""
    monkeypatch.setattr(native, "_can_run", lambda request: None)
    monkeypatch.setattr(native, "_shared_memory", lambda device: 227 << 10)


@pytest.fixture
def more(monkeypatch):
    """More frequencies than needed, from now on."""

    def wanted(request, displacements):
        rows, columns = frequency_counts(request.size, displacements)
        return rows + 3, columns + 2

    return lambda: monkeypatch.setattr(operators, "frequencies", wanted)


@pytest.mark.parametrize(
    ("size", "displacements", "expected"),
    [
        ((65, 100), (65, 100), (80, 112)),
        ((224, 224), (224, 224), (224, 224)),
        ((257, 961), (257, 961), (320, 1024)),
        ((28, 224), (28, 224), (32, 224)),
        ((1, 500), (1, 500), (32, 512)),
        ((100, 100), (6, 6), (64, 64)),
        ((2000, 70), (9, 70), (1024, 80)),
        ((64, 64), (64, 64), (64, 64)),
        ((33, 50), (33, 50), (33, 50)),
        ((1025, 70), (1025, 70), (1025, 70)),
    ],
)
def test_large_images_on_gpus_take_what_has_transforms(gpu, size, displacements, expected):
    assert native.frequencies(request_for(size), displacements) == expected


@pytest.mark.parametrize(
    "request_",
    [
        request_for((100, 70), device="cpu"),
        request_for((100, 70), channels=4),
        request_for((100, 70), dtype=F64),
        request_for((100, 70), form="signed"),
    ],
    ids=str,
)
def test_others_take_the_fewest(gpu, request_):
    assert native.frequencies(request_, (100, 70)) == (100, 70)


def test_where_no_kernels_run_they_are_the_fewest(monkeypatch):
    monkeypatch.setattr(native, "_can_run", lambda request: "no kernels")
    assert native.frequencies(request_for((100, 70)), (100, 70)) == (100, 70)


@pytest.mark.parametrize("form", ["radial", "even", "signed"])
def test_operators_and_their_derivatives_do_not_depend_on_the_number(more, form):
    f = covariances(form, 2, (4, 5)).requires_grad_()
    g = gradients((2, 2, 4, 5)).requires_grad_()

    def results():
        v = sgr.functional.covariance_product(g, f, form=form)
        q = sgr.functional.covariance_quadratic_form(g, f, form=form)
        estimate = sgr.functional.displacement_covariance(g, form=form)
        total = (v.square().sum() + q.square().sum()) * estimate.square().sum()
        first = torch.autograd.grad(total, (g, f), create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), (g, f))
        return [v, q, estimate, *first, *second]

    before = results()
    more()
    for a, b in zip(before, results()):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_solving_does_not_depend_on_the_number(more):
    table = covariances("even", 1, (6, 7), smooth=True)
    table[:, :, 0, 0] += 1
    g = gradients((2, 1, 6, 7))
    wide = sgr.functional.covariance_solve(g, table)
    more()
    torch.testing.assert_close(sgr.functional.covariance_solve(g, table), wide)
    narrow = sgr.functional.covariance_solve(g.float(), table.float())
    torch.testing.assert_close(narrow, wide.float(), rtol=1e-4, atol=1e-4)


def test_a_covariance_that_moves_takes_the_number_of_its_device(more):
    """Its state knows nothing of it, and copies made before keep working."""
    covariance = sgr.CovarianceFunction(2, (5, 6), target_variance=0.5)
    g = gradients((3, 2, 5, 6), dtype=F32)
    covariance.update(g)
    state, before, old = copy.deepcopy(covariance.state_dict()), covariance.product(g), copy.deepcopy(covariance)
    assert covariance.spectrum.shape == (2, 2, 5, 6)
    more()
    covariance.to("cpu")  # for once another device
    assert covariance.spectrum.shape == (2, 2, 8, 8)
    assert {name: value.shape for name, value in covariance.state_dict().items()} == {
        name: value.shape for name, value in state.items()
    }
    torch.testing.assert_close(covariance.product(g), before)
    torch.testing.assert_close(old.product(g), before)
    for other in (old, sgr.CovarianceFunction(2, (5, 6), target_variance=0.5)):
        other.load_state_dict(state)
        assert other.spectrum.shape == (2, 2, 8, 8)
        torch.testing.assert_close(other.product(g), before)
    sigma = torch.tensor(dense(covariance.table.double(), (5, 6), "even"))
    torch.testing.assert_close(covariance.dense().double(), sigma)


def test_updates_rewrite_the_spectrum_in_place_whatever_its_number(more):
    more()
    covariance = sgr.CovarianceFunction(1, (5, 6))
    spectrum = covariance.spectrum
    covariance.update(gradients((3, 1, 5, 6), dtype=F32))
    assert covariance.spectrum is spectrum
    assert spectrum.any()
