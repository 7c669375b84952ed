"""What must hold for every gradient and covariance: drawn by hypothesis, for every backend."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given

from sgr_kernels import functional as sgr
from tests.helpers import covariances, gradients

FORMS = st.sampled_from(["radial", "even", "signed"])
SEEDS = st.integers(0, 2**31)


@st.composite
def problems(draw: st.DrawFn) -> tuple:
    """Two batches of gradients, a covariance and its form."""
    batch, channels = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    size = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    form, seed = draw(FORMS), draw(SEEDS)
    reach = draw(st.none() | st.integers(0, 6))
    a, b = (gradients((batch, channels, *size), seed=seed + n) for n in (0, 1))
    return a, b, covariances(form, channels, size, seed, reach, draw(st.booleans())), form


def _on(place, problem: tuple) -> tuple:
    *tensors, form = problem
    return *(tensor.to(place.device) for tensor in tensors), form


def _transposed(f: torch.Tensor, form: str) -> torch.Tensor:
    swapped = f.transpose(0, 1)
    return swapped.flip(-2, -1) if form == "signed" else swapped


def _close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * max(1.0, float(b.abs().max())))


@given(problem=problems())
def test_adjoint(place, problem):
    """``<a, Sigma b> = <Sigma^T a, b>``."""
    a, b, f, form = _on(place, problem)
    v = sgr.covariance_product(b, f, form=form, backend=place.backend)
    w = sgr.covariance_product(a, _transposed(f, form), form=form, backend=place.backend)
    _close((a * v).sum(), (w * b).sum())


@given(problem=problems(), s=st.floats(-3, 3), t=st.floats(-3, 3))
def test_linear_in_both_arguments(place, problem, s, t):
    a, b, f, form = _on(place, problem)

    def product(g: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
        return sgr.covariance_product(g, covariance, form=form, backend=place.backend)

    _close(product(s * a + t * b, f), s * product(a, f) + t * product(b, f))
    other = f.flip(0)
    _close(product(a, s * f + t * other), s * product(a, f) + t * product(a, other))


@given(problem=problems())
def test_quadratic_form_is_the_inner_product_and_obeys_the_parallelogram_law(place, problem):
    a, b, f, form = _on(place, problem)

    def q(g: torch.Tensor) -> torch.Tensor:
        return sgr.covariance_quadratic_form(g, f, form=form, backend=place.backend)

    v = sgr.covariance_product(a, f, form=form, backend=place.backend)
    _close(q(a), (a * v).sum((1, 2, 3)))
    _close(q(a + b) + q(a - b), 2 * q(a) + 2 * q(b))
    transposed = sgr.covariance_quadratic_form(a, _transposed(f, form), form=form, backend=place.backend)
    _close(transposed, q(a))


@given(problem=problems(), seed=SEEDS)
def test_channels_may_be_permuted(place, problem, seed):
    a, _, f, form = _on(place, problem)
    order = torch.randperm(a.shape[1], generator=torch.Generator().manual_seed(seed)).to(place.device)
    v = sgr.covariance_product(a, f, form=form, backend=place.backend)
    permuted = sgr.covariance_product(a[:, order], f[order][:, order], form=form, backend=place.backend)
    _close(permuted, v[:, order])
    estimate = sgr.displacement_covariance(a, form=form, backend=place.backend)
    permuted = sgr.displacement_covariance(a[:, order], form=form, backend=place.backend)
    _close(permuted, estimate[order][:, order])


@given(problem=problems(), axis=st.sampled_from([(2,), (3,), (2, 3)]))
def test_images_may_be_reflected(place, problem, axis):
    """Displacements change sign: radial and even covariances do not see it, signed ones are reflected."""
    a, _, f, form = _on(place, problem)
    reflected = f.flip(axis) if form == "signed" else f
    v = sgr.covariance_product(a, f, form=form, backend=place.backend)
    _close(sgr.covariance_product(a.flip(axis), reflected, form=form, backend=place.backend), v.flip(axis))
    estimate = sgr.displacement_covariance(a, form=form, backend=place.backend)
    mirrored = sgr.displacement_covariance(a.flip(axis), form=form, backend=place.backend)
    _close(mirrored, estimate.flip(axis) if form == "signed" else estimate)


@given(problem=problems())
def test_axes_may_be_exchanged(place, problem):
    a, _, f, form = _on(place, problem)
    exchanged = f if form == "radial" else f.mT
    v = sgr.covariance_product(a, f, form=form, backend=place.backend)
    _close(sgr.covariance_product(a.mT, exchanged, form=form, backend=place.backend), v.mT)


@given(problem=problems())
def test_estimates_are_symmetric_and_hold_the_mean_square(place, problem):
    a, _, _, form = _on(place, problem)
    estimate = sgr.displacement_covariance(a, form=form, backend=place.backend)
    _close(estimate, _transposed(estimate, form))
    zero = (..., *((n // 2 if form == "signed" else 0) for n in estimate.shape[2:]))
    _close(estimate[zero], torch.einsum("bcyx,bdyx->cd", a, a) / a[:, 0].numel())


@given(problem=problems())
def test_the_three_forms_are_one_family(place, problem):
    """A radial covariance is an even one, and an even one a signed one."""
    a, _, f, form = _on(place, problem)
    if form == "signed":
        return
    v = sgr.covariance_product(a, f, form=form, backend=place.backend)
    if form == "radial":
        y, x = torch.meshgrid(*(torch.arange(min(n, f.shape[2])) for n in a.shape[2:]), indexing="ij")
        k = torch.hypot(y.double(), x.double()).round().long()
        f = torch.nn.functional.pad(f, (0, 20))[:, :, k]
        _close(sgr.covariance_product(a, f, backend=place.backend), v)
    y, x = (torch.arange(1 - n, n).abs() for n in f.shape[2:])
    signed = f[:, :, y[:, None], x[None, :]]
    _close(sgr.covariance_product(a, signed, form="signed", backend=place.backend), v)
