"""The contract of the operators, for every backend: agreement with the dense matrix, whatever the input looks like."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from sgr_kernels import functional as sgr
from sgr_kernels.backends import oracle
from sgr_kernels.toeplitz import cosines
from tests.conftest import DEVICES, KNOWN_BACKENDS, Place, unavailable
from tests.helpers import (
    PRODUCT_TOLERANCE,
    QUADRATIC_TOLERANCE,
    assert_covariance_close,
    assert_product_close,
    assert_quadratic_close,
    bins,
    convolved,
    covariances,
    dense,
    dense_covariance,
    dense_product,
    gradients,
    norms,
    table_shape,
)

FORMS = ("radial", "even", "signed")
DTYPES = (torch.float32, torch.float64)
LOW_PRECISION = (torch.bfloat16, torch.float16)
LARGEST_DIMENSION = 1700
CORNERS = [(1, 1, 1), (8, 1, 1), (1, 1, 40), (1, 40, 1), (3, 1, 2), (1, 40, 40), (2, 29, 28), (3, 23, 24), (1, 39, 40)]


@dataclass(frozen=True)
class Case:
    """A drawn problem."""

    shape: tuple[int, int, int]
    form: str
    reach: int | None
    smooth: bool
    seed: int

    def __str__(self) -> str:
        kind = "smooth" if self.smooth else "random"
        size = "x".join(map(str, self.shape))
        return f"{self.seed}-{size}-{self.form}-{kind}" + ("" if self.reach is None else f"-reach{self.reach}")


def _draw_cases(count: int) -> list[Case]:
    rng = np.random.default_rng(7)
    cases = []
    while len(cases) < count:
        shape = (int(rng.integers(1, 9)), int(rng.integers(1, 41)), int(rng.integers(1, 41)))
        if len(cases) < len(CORNERS):
            shape = CORNERS[len(cases)]
        if np.prod(shape) <= LARGEST_DIMENSION:
            reach = None if rng.random() < 0.7 else int(rng.integers(0, max(shape[1:])))
            cases.append(Case(shape, FORMS[len(cases) % 3], reach, bool(rng.random() < 0.5), len(cases)))
    return cases


CASES = _draw_cases(210)


@functools.lru_cache(maxsize=8)
def _problem(case: Case) -> tuple[torch.Tensor, ...]:
    """Gradient and covariance with entries that float32 holds, and the exact product and quadratic form."""
    gradient = gradients((3, *case.shape), case.seed).float().double()
    covariance = covariances(case.form, case.shape[0], case.shape[1:], case.seed, case.reach, case.smooth)
    covariance = covariance.float().double()
    return gradient, covariance, *dense_product(gradient, covariance, case.form)


@functools.lru_cache(maxsize=8)
def _exact_covariance(shape: tuple[int, ...], seed: int, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    perturbation = gradients(shape, seed).float().double()
    return perturbation, dense_covariance(perturbation, form)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", KNOWN_BACKENDS)
def test_backend_is_covered(backend, device):
    """One line for every backend that this run leaves out, with the reason."""
    reason = unavailable(backend, device)
    if reason is not None:
        pytest.skip(f"not tested on {device}: {reason}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("channels", "size"), [(1, (1, 1)), (2, (3, 4)), (1, (5, 2)), (3, (1, 6))])
def test_the_two_oracles_agree(form, channels, size):
    """Explicit loops and vectorised NumPy, written apart."""
    f = covariances(form, channels, size, seed=3)
    np.testing.assert_array_equal(oracle.dense(f, size, form), dense(f, size, form))
    short = covariances(form, channels, size, seed=3, reach=1)
    np.testing.assert_array_equal(oracle.dense(short, size, form), dense(short, size, form))
    xi = gradients((2, channels, *size))
    np.testing.assert_allclose(oracle.displacement_covariance(xi, form), dense_covariance(xi, form), atol=1e-14)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_product_and_quadratic_form_agree_with_the_dense_matrix(case, place):
    g, f, exact_v, exact_q = (tensor.to(place.device) for tensor in _problem(case))
    exact_v, exact_q = exact_v.cpu(), exact_q.cpu()
    for dtype in DTYPES:
        arguments = (g.to(dtype), f.to(dtype))
        v = sgr.covariance_product(*arguments, form=case.form, backend=place.backend)
        q = sgr.covariance_quadratic_form(*arguments, form=case.form, backend=place.backend)
        assert v.dtype == q.dtype == dtype
        assert_product_close(v, exact_v, PRODUCT_TOLERANCE[dtype])
        assert_quadratic_close(q, exact_q, g, exact_v, QUADRATIC_TOLERANCE[dtype])


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_displacement_covariance_agrees_with_the_mean_over_pairs(case, place):
    form = FORMS[case.seed // 3 % 3]
    xi, exact = _exact_covariance((3, *case.shape), case.seed, form)
    for dtype in DTYPES:
        f = sgr.displacement_covariance(xi.to(place.device, dtype), form=form, backend=place.backend)
        assert f.dtype == dtype
        if form == "radial":
            assert_covariance_close(f, exact, dtype)
        else:  # A table's corner cells hold one pair only: measured against the sums' own accuracy.
            limit = 2e-5 if dtype == torch.float32 else 2e-11
            error = (f.cpu().double() - exact).abs().amax()
            assert f.shape == exact.shape
            assert error <= limit * float((xi**2).mean()) * max(1, np.prod(case.shape[1:]) / 64)


@pytest.mark.parametrize("case", [c for c in CASES if c.form != "radial"][::6], ids=str)
def test_the_algorithm_through_fourier_transforms_is_the_same(case, monkeypatch):
    """Every size, form and reach by FFT, which on its own begins with long axes."""
    monkeypatch.setattr(cosines, "_FFT_ALWAYS_FROM", 1)
    place = Place("torch", torch.device("cpu"))
    test_product_and_quadratic_form_agree_with_the_dense_matrix(case, place)
    test_displacement_covariance_agrees_with_the_mean_over_pairs(case, place)


@pytest.mark.parametrize("shape", [(2, 1, 5003), (1, 4096, 3), (1, 2, 1009)])
def test_long_axes(shape):
    """By whatever backend is chosen for them."""
    test_large_images(shape, Place("auto", torch.device("cpu")))


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 129, 100), (3, 224, 224), (2, 1, 3072), (1, 2, 1009)])
def test_large_images(shape, kernels):
    """Beyond what is formed densely: against Fourier transforms of the padded images."""
    g = gradients((3, *shape), dtype=torch.float32)
    f = covariances("even", shape[0], shape[1:], smooth=True).float()
    exact = convolved(g, f)
    v = sgr.covariance_product(g.to(kernels.device), f.to(kernels.device), backend=kernels.backend)
    q = sgr.covariance_quadratic_form(g.to(kernels.device), f.to(kernels.device), backend=kernels.backend)
    assert_product_close(v, exact, PRODUCT_TOLERANCE[torch.float32])
    assert_quadratic_close(q, (exact * g).sum((1, 2, 3)), g, exact, QUADRATIC_TOLERANCE[torch.float32])
    # the estimate is the adjoint of the product: <g, Sigma g> = <f, sums over pairs>
    estimate = sgr.displacement_covariance(g.to(kernels.device), form="even", backend=kernels.backend).cpu().double()
    dy, dx = (torch.arange(n) for n in shape[1:])
    counts = (shape[1] - dy)[:, None] * (shape[2] - dx) * (1 + (dy > 0))[:, None] * (1 + (dx > 0)[None])
    total = (estimate * counts * f.double()).sum() * len(g)
    assert abs(float(total - (exact * g).sum())) <= 1e-5 * float((norms(g) * norms(exact)).sum())


@pytest.mark.parametrize("form", ["even", "signed"])
@pytest.mark.parametrize("size", [(20, 23), (9, 8), (2, 31), (31, 2), (1, 40)], ids=str)
def test_the_longest_displacements_of_large_images_are_exact(form, size, place, monkeypatch):
    """Float32 transforms leave 3e-5 f(0) in a corner of 512 x 512 that has four pairs; float64 sums do not."""
    monkeypatch.setattr(sgr.operators, "_LARGE", 0)
    xi = gradients((3, 2, *size)).float()
    exact = dense_covariance(xi, form)
    shape, leaf = tuple(exact.shape[2:]), xi.to(place.device, copy=True).requires_grad_()
    table = sgr.operators.correlate(leaf, leaf, shape, form, backend=place.backend).cpu()
    counts = [
        extent - abs(np.arange(1 - extent, extent)) if form == "signed" else (extent - d) * (1 + (d > 0))
        for extent in size
        for d in [np.arange(extent)]
    ]
    error = (table.detach() / (3 * torch.tensor(np.outer(*counts))) - exact).abs() / exact.abs().amax()
    assert error.max() < 1e-5
    if min(size) > 1:
        corners = error[..., [0, -1], :][..., [0, -1]] if form == "signed" else error[..., -1, -1]
        assert corners.max() < 1e-12
    weight = torch.rand(table.shape, dtype=table.dtype)
    (slope,) = torch.autograd.grad((table * weight).sum(), leaf)
    wide = xi.double().requires_grad_()
    (exact_slope,) = torch.autograd.grad(
        (sgr.operators.correlate(wide, wide, shape, form, "torch") * weight).sum(), wide
    )
    assert_product_close(slope, exact_slope, PRODUCT_TOLERANCE[torch.float32])


def test_covariance_of_large_images_is_accurate_to_the_last_bin(kernels):
    xi = gradients((2, 1, 384, 400), dtype=torch.float32)
    exact = sgr.displacement_covariance(xi.double(), backend="torch")
    f = sgr.displacement_covariance(xi.to(kernels.device), backend=kernels.backend)
    assert_covariance_close(f, exact, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reach", [0, 1, 4, 30])
def test_short_displacements_are_those_of_the_full_range(form, reach, place):
    xi = gradients((4, 2, 9, 7), device=place.device)
    full = sgr.displacement_covariance(xi, form=form, backend=place.backend)
    short = sgr.displacement_covariance(xi, form=form, max_displacement=reach, backend=place.backend)
    assert short.shape[2:] == table_shape(form, (9, 7), reach)
    inside = tuple(
        slice((a - b) // 2, (a + b) // 2) if form == "signed" else slice(0, b)
        for a, b in zip(full.shape[2:], short.shape[2:])
    )
    torch.testing.assert_close(short, full[(..., *inside)], rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_a_truncated_covariance_is_zero_beyond_its_reach(form, place):
    g, size = gradients((2, 2, 11, 8), device=place.device), (11, 8)
    for reach in (0, 2, 7):
        short = covariances(form, 2, size, reach=reach).to(place.device)
        v = sgr.covariance_product(g, short, form=form, backend=place.backend)
        assert_product_close(v, dense_product(g, short, form)[0], 1e-12)


def test_the_full_range_of_radial_bins_is_the_rounded_diagonal():
    assert bins((28, 28)) == 39
    assert bins((32, 32)) == 45
    for size in ((28, 28), (32, 32)):
        assert sgr.displacement_covariance(torch.ones(1, 1, *size)).shape[2] == bins(size)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("form", FORMS)
def test_low_precision_is_rounded_once_at_the_end(dtype, form, place):
    """Inputs are exact, accumulation is float32: the output's own rounding is all that is lost."""
    g = gradients((3, 2, 13, 16)).to(dtype)
    f = covariances(form, 2, (13, 16), smooth=True).float()
    exact_v, exact_q = dense_product(g, f, form)
    v = sgr.covariance_product(g.to(place.device), f.to(place.device), form=form, backend=place.backend)
    q = sgr.covariance_quadratic_form(g.to(place.device), f.to(place.device), form=form, backend=place.backend)
    assert (v.dtype, q.dtype) == (dtype, torch.float32)
    assert_product_close(v, exact_v, torch.finfo(dtype).eps / 2 + PRODUCT_TOLERANCE[torch.float32])
    assert_quadratic_close(q, exact_q, g, exact_v, QUADRATIC_TOLERANCE[torch.float32])
    estimate = sgr.displacement_covariance(g.to(place.device), backend=place.backend)
    assert estimate.dtype == torch.float32
    assert_covariance_close(estimate, dense_covariance(g, "radial"), torch.float32)


@pytest.mark.parametrize("dtype", [*LOW_PRECISION, torch.float32, torch.float64])
def test_a_covariance_of_another_dtype_than_the_gradient(dtype, place):
    g = gradients((3, 2, 6, 9), dtype=torch.float32)
    f = covariances("radial", 2, (6, 9)).to(dtype)
    v = sgr.covariance_product(g.to(place.device), f.to(place.device), backend=place.backend)
    assert v.dtype == torch.float32
    assert_product_close(v, dense_product(g, f, "radial")[0], 5e-6)


def _layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same images in other memory layouts."""
    wide = torch.full((x.shape[0], x.shape[1] + 2, x.shape[2] + 3, 2 * x.shape[3] + 1), torch.nan).to(x)
    sliced = wide[:, 1:-1, 2:-1, 1::2]
    sliced.copy_(x)
    return {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "sliced": sliced,
        "transposed": x.mT.contiguous().mT,
        "batch last": x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "flipped batch": x.flip(0)[torch.arange(x.shape[0] - 1, -1, -1)],
        "offset": torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(x.shape),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_memory_layout_does_not_matter(dtype, place):
    x = gradients((4, 3, 5, 8), dtype=dtype, device=place.device)
    f = covariances("radial", 3, (5, 8)).to(place.device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    product, quadratic = PRODUCT_TOLERANCE[wide], QUADRATIC_TOLERANCE[wide]
    v, q, estimate = (
        sgr.covariance_product(x, f, backend=place.backend),
        sgr.covariance_quadratic_form(x, f, backend=place.backend),
        sgr.displacement_covariance(x, backend=place.backend),
    )
    for name, layout in _layouts(x).items():
        assert torch.equal(layout, x), name
        # Libraries sum in another order for other strides, and in another on other processors.
        got = sgr.covariance_product(layout, f, backend=place.backend)
        assert_product_close(got, v.cpu().double(), torch.finfo(dtype).eps + product)
        got = sgr.covariance_quadratic_form(layout, f, backend=place.backend)
        assert_quadratic_close(got, q.cpu().double(), x, v, quadratic)
        got = sgr.displacement_covariance(layout, backend=place.backend)
        assert_covariance_close(got, estimate.cpu().double(), wide)


def test_expanded_gradients_and_covariances_have_stride_zero(place):
    f = covariances("even", 2, (4, 6)).to(place.device)
    one = gradients((1, 2, 4, 6), device=place.device)
    v = sgr.covariance_product(one.expand(5, -1, -1, -1), f, backend=place.backend)
    torch.testing.assert_close(v, sgr.covariance_product(one, f, backend=place.backend).expand(5, -1, -1, -1))
    constant = torch.tensor(2.0, dtype=torch.float64, device=place.device).expand(3, 2, 4, 6)
    q = sgr.covariance_quadratic_form(constant, f, backend=place.backend)
    torch.testing.assert_close(q.cpu(), dense_product(constant, f, "even")[1])
    flat = torch.tensor(0.5, dtype=torch.float64, device=place.device).expand(2, 2, 4, 6)
    v = sgr.covariance_product(one, flat, backend=place.backend)
    torch.testing.assert_close(v.cpu(), dense_product(one, flat, "even")[0])


@pytest.mark.parametrize("size", [(3, 4), (1, 800)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_empty_batches(form, size, place):
    g = torch.empty(0, 2, *size, device=place.device)
    f = covariances(form, 2, size).float().to(place.device)
    assert sgr.covariance_product(g, f, form=form, backend=place.backend).shape == g.shape
    assert sgr.covariance_quadratic_form(g, f, form=form, backend=place.backend).shape == (0,)
    estimate = sgr.displacement_covariance(g, form=form, backend=place.backend)
    assert torch.equal(estimate, torch.zeros_like(f))


@pytest.mark.parametrize("form", FORMS)
def test_signals_are_images_of_one_row(form, place):
    signal = gradients((3, 2, 1, 17), device=place.device)[:, :, 0]
    f = covariances(form, 2, (1, 17)).to(place.device)
    image = signal[:, :, None]
    v = sgr.covariance_product(signal, f, form=form, backend=place.backend)
    assert v.shape == signal.shape
    torch.testing.assert_close(v, sgr.covariance_product(image, f, form=form, backend=place.backend)[:, :, 0])
    exact_v, exact_q = dense_product(image, f, form)
    assert_product_close(v, exact_v[:, :, 0], 1e-12)
    q = sgr.covariance_quadratic_form(signal, f, form=form, backend=place.backend)
    assert_quadratic_close(q, exact_q, image, exact_v, 1e-12)
    estimate = sgr.displacement_covariance(signal, form=form, backend=place.backend)
    torch.testing.assert_close(estimate.cpu(), dense_covariance(image, form))


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_tiny_and_huge_gradients_keep_relative_accuracy(scale, place):
    g = gradients((3, 2, 16, 15), dtype=torch.float32) * scale
    f = covariances("radial", 2, (16, 15), smooth=True).float()
    exact_v, exact_q = dense_product(g, f, "radial")
    v = sgr.covariance_product(g.to(place.device), f.to(place.device), backend=place.backend)
    q = sgr.covariance_quadratic_form(g.to(place.device), f.to(place.device), backend=place.backend)
    assert_product_close(v, exact_v, 5e-6)
    assert_quadratic_close(q, exact_q, g, exact_v, 1e-6)
    estimate = sgr.displacement_covariance(g.to(place.device), backend=place.backend)
    assert_covariance_close(estimate, dense_covariance(g, "radial"), torch.float32)


def test_zero_and_subnormal_gradients(place):
    f = covariances("radial", 2, (9, 8), smooth=True).float().to(place.device)
    zero = torch.zeros(2, 2, 9, 8, device=place.device)
    assert not sgr.covariance_product(zero, f, backend=place.backend).any()
    assert not sgr.covariance_quadratic_form(zero, f, backend=place.backend).any()
    assert not sgr.displacement_covariance(zero, backend=place.backend).any()
    tiny = torch.finfo(torch.float32).tiny
    g = (gradients((3, 2, 9, 8)) * tiny / 64).float()
    v = sgr.covariance_product(g.to(place.device), f, backend=place.backend).cpu().double()
    assert (v - dense_product(g, f, "radial")[0]).abs().max() <= tiny
    q = sgr.covariance_quadratic_form(g.to(place.device), f, backend=place.backend)
    assert (q.abs() <= tiny).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("channels", [1, 3, 6])
def test_non_finite_values_stay_in_their_sample(bad, channels, place):
    g = gradients((5, channels, 6, 7), dtype=torch.float32, device=place.device)
    f = covariances("radial", channels, (6, 7)).float().to(place.device)
    clean_v = sgr.covariance_product(g, f, backend=place.backend)
    clean_q = sgr.covariance_quadratic_form(g, f, backend=place.backend)
    g[2, 0, 3, 3] = bad
    v = sgr.covariance_product(g, f, backend=place.backend)
    q = sgr.covariance_quadratic_form(g, f, backend=place.backend)
    assert not v[2].isfinite().any()
    assert not q[2].isfinite()
    others = [0, 1, 3, 4]
    torch.testing.assert_close(v[others], clean_v[others], rtol=0, atol=1e-5)
    torch.testing.assert_close(q[others], clean_q[others], rtol=0, atol=1e-3)
    assert not sgr.displacement_covariance(g, backend=place.backend)[0, 0, 0].isfinite()


def test_nan_in_the_covariance_reaches_every_sample(place):
    f = covariances("radial", 1, (4, 4)).to(place.device)
    f[0, 0, 2] = torch.nan
    v = sgr.covariance_product(gradients((3, 1, 4, 4), device=place.device), f, backend=place.backend)
    assert v.isnan().flatten(1).any(1).all()


def test_results_repeat_bit_for_bit(place):
    g = gradients((9, 3, 17, 12), dtype=torch.float32, device=place.device)
    f = covariances("radial", 3, (17, 12)).float().to(place.device)
    for operator in (sgr.covariance_product, sgr.covariance_quadratic_form):
        assert torch.equal(operator(g, f, backend=place.backend), operator(g, f, backend=place.backend))
    first, second = (sgr.displacement_covariance(g, backend=place.backend) for _ in range(2))
    assert torch.equal(first, second)


def test_a_batch_longer_than_one_chunk_agrees_with_its_samples(place):
    g = gradients((700, 1, 6, 5), dtype=torch.float64, device=place.device)
    f = covariances("radial", 1, (6, 5)).to(place.device)
    exact_v, exact_q = dense_product(g, f, "radial")
    assert_product_close(sgr.covariance_product(g, f, backend=place.backend), exact_v, 1e-12)
    q = sgr.covariance_quadratic_form(g, f, backend=place.backend)
    assert_quadratic_close(q, exact_q, g, exact_v, 1e-12)
    estimate = sgr.displacement_covariance(g, backend=place.backend)
    assert_covariance_close(estimate, dense_covariance(g, "radial"), torch.float64)
