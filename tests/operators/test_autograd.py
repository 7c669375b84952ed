"""Derivatives of the operators, to second order, in every argument and in every mode."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from sgr_kernels import functional as sgr
from tests.helpers import covariances, dense_product, gradients

FORMS = ("radial", "even", "signed")
SIZE = (2, 3)
DIMENSION = 12  # of two channels


def _arguments(form, place, reach=None, channels=2) -> tuple[Tensor, Tensor]:
    g = gradients((2, channels, *SIZE), seed=1, device=place.device)
    f = covariances(form, channels, SIZE, seed=2, reach=reach).to(place.device)
    return g.requires_grad_(), f.requires_grad_()


OPERATORS = {"product": sgr.covariance_product, "quadratic_form": sgr.covariance_quadratic_form}


def _operator(name: str, form: str, place):
    return functools.partial(OPERATORS[name], form=form, backend=place.backend)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPERATORS)
def test_first_derivatives(name, form, place):
    """Reverse and forward mode against finite differences, mapped ones too; the covariance is not symmetric."""
    gradcheck(
        _operator(name, form, place),
        _arguments(form, place),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPERATORS)
def test_second_derivatives(name, form, place):
    """Reverse over reverse, and forward over reverse."""
    gradgradcheck(
        _operator(name, form, place),
        _arguments(form, place),
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
        check_batched_grad=True,
    )


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("gradient", "covariance"), [(True, False), (False, True)])
def test_derivatives_in_one_argument_alone(name, gradient, covariance, place):
    g, f = _arguments("radial", place, reach=2)
    g, f = g.detach().requires_grad_(gradient), f.detach().requires_grad_(covariance)
    gradcheck(_operator(name, "radial", place), (g, f), check_forward_ad=True)
    if name == "quadratic_form" or not gradient:  # the product is linear: no second derivative to ask for
        gradgradcheck(lambda *args: _operator(name, "radial", place)(*args) ** 2, (g, f), check_fwd_over_rev=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reach", [None, 1])
def test_derivatives_of_the_displacement_covariance(form, reach, place):
    xi, _ = _arguments("radial", place)
    estimate = functools.partial(sgr.displacement_covariance, form=form, max_displacement=reach, backend=place.backend)
    gradcheck(estimate, (xi,), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    gradgradcheck(estimate, (xi,), check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("channels", [1, 5])
def test_derivatives_for_one_and_for_many_channels(channels, place):
    arguments = _arguments("even", place, channels=channels)
    gradcheck(_operator("quadratic_form", "even", place), arguments, check_forward_ad=True)
    gradcheck(_operator("product", "even", place), arguments, check_forward_ad=True)


def test_signals_are_differentiable(place):
    g = gradients((2, 2, 1, 6), device=place.device)[:, :, 0].requires_grad_()
    f = covariances("radial", 2, (1, 6)).to(place.device).requires_grad_()
    gradcheck(functools.partial(sgr.covariance_product, backend=place.backend), (g, f), check_forward_ad=True)
    gradcheck(functools.partial(sgr.covariance_quadratic_form, backend=place.backend), (g, f), check_forward_ad=True)
    gradcheck(functools.partial(sgr.displacement_covariance, backend=place.backend), (g,), check_forward_ad=True)


@pytest.mark.parametrize("form", FORMS)
def test_product_and_estimate_are_an_adjoint_pair(form, place):
    """``<a, product(f, b)> = <f, correlate(a, b)>``: the covariance's gradient is a correlation."""
    b, f = _arguments(form, place)
    a = gradients((2, 2, *SIZE), seed=5, device=place.device)
    v = sgr.covariance_product(b, f, form=form, backend=place.backend)
    (by_f,) = torch.autograd.grad(v, f, a, retain_graph=True)
    (by_b,) = torch.autograd.grad(v, b, a)
    torch.testing.assert_close((by_f * f).sum(), (a * v).sum())
    torch.testing.assert_close((by_b * b).sum(), (a * v).sum())
    transposed = f.detach().transpose(0, 1)
    if form == "signed":
        transposed = transposed.flip(-2, -1)
    torch.testing.assert_close(by_b, sgr.covariance_product(a, transposed, form=form, backend=place.backend))


@pytest.mark.parametrize("form", FORMS)
def test_the_quadratic_form_depends_on_the_symmetric_part_alone(form, place):
    g, f = _arguments(form, place)
    transposed = f.detach().transpose(0, 1)
    transposed = (transposed.flip(-2, -1) if form == "signed" else transposed).contiguous().requires_grad_()
    q, q_t = (sgr.covariance_quadratic_form(g, t, form=form, backend=place.backend) for t in (f, transposed))
    torch.testing.assert_close(q, q_t)
    weights = torch.tensor([0.3, -2.0], dtype=torch.float64, device=place.device)
    (by_f,) = torch.autograd.grad(q, f, weights)
    symmetric = by_f.transpose(0, 1).flip(-2, -1) if form == "signed" else by_f.transpose(0, 1)
    torch.testing.assert_close(by_f, symmetric)


def test_the_gradient_of_the_quadratic_form_is_twice_the_product(place):
    g, f = _arguments("radial", place)
    weights = torch.tensor([1.5, -0.5], dtype=torch.float64, device=place.device)
    q = sgr.covariance_quadratic_form(g, f, backend=place.backend)
    (by_g,) = torch.autograd.grad(q, g, weights)
    f_symmetric = (f + f.transpose(0, 1)).detach() / 2
    exact, _ = dense_product(g, f_symmetric, "radial")
    torch.testing.assert_close(by_g.cpu(), 2 * weights.cpu()[:, None, None, None] * exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_have_their_arguments_dtypes(dtype, place):
    """Summed in float32 or better, and rounded once: also for bins that gather many displacements."""
    g = gradients((2, 2, 16, 16), device=place.device).to(dtype).requires_grad_()
    f = covariances("radial", 2, (16, 16), smooth=True).to(place.device, dtype).requires_grad_()
    g64, f64 = (t.detach().double().requires_grad_() for t in (g, f))
    rounding = torch.finfo(dtype).eps
    for operator in (sgr.covariance_product, sgr.covariance_quadratic_form):
        value = operator(g, f, backend=place.backend)
        weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value)
        got = torch.autograd.grad(value, (g, f), weights)
        exact = torch.autograd.grad(operator(g64, f64, backend=place.backend), (g64, f64), weights.double())
        for part, wide, argument in zip(got, exact, (g, f)):
            assert part.dtype == argument.dtype
            error = (part.double() - wide).flatten(1).norm(dim=1)
            # one rounding of the result, one of the product that the forward kept
            assert (error <= (2 * rounding + 1e-5) * wide.flatten(1).norm(dim=1)).all()
    # Every bin of the covariance's gradient on its own: none is a sum of rounded terms.
    (by_f,) = torch.autograd.grad(sgr.covariance_quadratic_form(g.detach(), f, backend=place.backend).sum(), f)
    (exact,) = torch.autograd.grad(sgr.covariance_quadratic_form(g64, f64, backend=place.backend).sum(), f64)
    torch.testing.assert_close(by_f.double(), exact, rtol=rounding, atol=1e-5 * float(exact.abs().max()))


def test_gradients_through_expanded_and_sliced_tensors(place):
    f = covariances("radial", 2, SIZE).to(place.device)
    leaf = gradients((1, 2, 4, 6), device=place.device).requires_grad_()

    def operator(x: Tensor) -> Tensor:
        layout = x[:, :, ::2, 1::2].expand(3, -1, -1, -1)
        return sgr.covariance_quadratic_form(layout, f, backend=place.backend)

    gradcheck(operator, (leaf,), check_forward_ad=True)
    gradgradcheck(operator, (leaf,))
    v = sgr.covariance_product(leaf[:, :, ::2, ::2], f, backend=place.backend)
    v.sum().backward()  # an incoming gradient of stride zero
    ones = torch.ones(1, 2, *SIZE, dtype=torch.float64)
    exact, _ = dense_product(ones, f.transpose(0, 1), "radial")
    torch.testing.assert_close(leaf.grad[:, :, ::2, ::2].cpu(), exact)


def test_function_transforms(place):
    """``torch.func``: gradients, Hessians, Jacobians and per-sample gradients by ``vmap``."""
    g, f = (t.detach() for t in _arguments("radial", place))
    symmetric = (f + f.transpose(0, 1)) / 2

    def q(image: Tensor, covariance: Tensor) -> Tensor:
        return sgr.covariance_quadratic_form(image[None], covariance, backend=place.backend)[0]

    per_sample = torch.func.vmap(torch.func.grad(q), (0, None))(g, f)
    torch.testing.assert_close(per_sample.cpu(), 2 * dense_product(g, symmetric, "radial")[0])
    hessian = torch.func.hessian(q)(g[0], f).reshape(DIMENSION, DIMENSION)
    product = sgr.covariance_product(
        torch.eye(DIMENSION).to(g).view(DIMENSION, 2, *SIZE), symmetric, backend="reference"
    )
    torch.testing.assert_close(hessian, 2 * product.view(DIMENSION, DIMENSION))
    torch.testing.assert_close(torch.func.jacrev(q, 1)(g[0], f), torch.func.jacfwd(q, 1)(g[0], f))
    _, tangent = torch.func.jvp(lambda x: sgr.covariance_product(x, f, backend=place.backend), (g,), (g,))
    torch.testing.assert_close(tangent, sgr.covariance_product(g, f, backend=place.backend))


@pytest.mark.parametrize(
    "mapped", [(0, None), (2, None), (4, None), (-2, None), (None, 0), (None, 3), (0, 0), (1, 2), (3, 1)]
)
def test_vmap_over_either_argument(mapped, place):
    g = torch.stack([gradients((2, 2, *SIZE), seed=s, device=place.device) for s in range(3)], mapped[0] or 0)
    f = torch.stack([covariances("radial", 2, SIZE, seed=s).to(place.device) for s in range(3)], mapped[1] or 0)
    g = g if mapped[0] is not None else g[0]
    f = f if mapped[1] is not None else f[0]
    for operator in (sgr.covariance_product, sgr.covariance_quadratic_form):
        apply = functools.partial(operator, backend=place.backend)
        result = torch.func.vmap(apply, mapped)(g, f)
        for i in range(3):
            gi = g if mapped[0] is None else g.select(mapped[0], i)
            fi = f if mapped[1] is None else f.select(mapped[1], i)
            torch.testing.assert_close(result[i], apply(gi, fi))
    if mapped[1] is None:
        estimate = functools.partial(sgr.displacement_covariance, backend=place.backend)
        estimates = torch.func.vmap(estimate, mapped[0])(g)
        torch.testing.assert_close(estimates[1], estimate(g.select(mapped[0], 1)))


@pytest.mark.parametrize("mapped", [(0, None), (1, 0), (None, 2)])
def test_vmap_over_no_items(mapped, place):
    """The shapes of any other number of items, and gradients that are zero."""
    g, f = _arguments("radial", place)
    none = [
        t if d is None else t.detach().unsqueeze(d).narrow(d, 0, 0).requires_grad_() for t, d in zip((g, f), mapped)
    ]
    for operator in (sgr.covariance_product, sgr.covariance_quadratic_form):
        apply = functools.partial(operator, backend=place.backend)
        result = torch.func.vmap(apply, mapped)(*none)
        assert result.shape == (0, *apply(g, f).shape)
        for part in torch.autograd.grad(result.sum(), none):
            assert not part.any()
    estimate = functools.partial(sgr.displacement_covariance, backend=place.backend)
    assert torch.func.vmap(estimate)(g.detach()[None][:0]).shape == (0, *estimate(g).shape)


def test_the_registered_operators_carry_tangents():
    """Called directly under forward-mode AD they differentiate, and do not drop the tangent."""
    g = gradients((2, 2, *SIZE))
    spectrum = torch.randn(2, 2, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(g, torch.ones_like(g))
        v = torch.ops.sgr_kernels.torch_product(dual, spectrum, "highest")
        tangent = forward_ad.unpack_dual(v).tangent
        q, _ = torch.ops.sgr_kernels.torch_quadratic_form(dual, spectrum, False, "highest")
        q_tangent = forward_ad.unpack_dual(q).tangent
    expected = torch.ops.sgr_kernels.torch_product(torch.ones_like(g), spectrum, "highest")
    torch.testing.assert_close(tangent, expected)
    _, v = torch.ops.sgr_kernels.torch_quadratic_form(g, spectrum, True, "highest")
    torch.testing.assert_close(q_tangent, 2 * v.sum((1, 2, 3)))


def test_deterministic_algorithms_suffice(kernels):
    """Nothing that torch calls nondeterministic is used, and gradients repeat bit for bit."""
    g = gradients((6, 2, 12, 11), dtype=torch.float32, device=kernels.device).requires_grad_()
    f = covariances("radial", 2, (12, 11)).float().to(kernels.device).requires_grad_()
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            v = sgr.covariance_product(g, f, backend=kernels.backend)
            q = sgr.covariance_quadratic_form(v, f, backend=kernels.backend)
            estimate = sgr.displacement_covariance(v, backend=kernels.backend)
            results.append(torch.autograd.grad(q.sum() + estimate.sum(), (g, f)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_no_graph_is_kept_where_none_is_wanted(place):
    g, f = _arguments("radial", place)
    with torch.no_grad():
        assert not sgr.covariance_quadratic_form(g, f, backend=place.backend).requires_grad
    with torch.inference_mode():
        assert sgr.covariance_product(g, f, backend=place.backend).shape == g.shape
    # What inference mode left in the caches must serve training afterwards.
    q = sgr.covariance_quadratic_form(g, f, backend=place.backend).sum()
    torch.autograd.grad(q, (g, f), create_graph=True)


def test_a_covariance_that_changed_behind_the_back_of_autograd_is_seen(place):
    """Spectra of the covariances last given are remembered; by their values, whatever wrote them."""
    g = gradients((2, 2, *SIZE), device=place.device)
    array = covariances("radial", 2, SIZE).numpy().copy()
    f = torch.from_numpy(array)
    on_device = f.to(place.device)

    def check() -> None:
        v = sgr.covariance_product(g, on_device, backend=place.backend)
        torch.testing.assert_close(v.cpu(), dense_product(g, on_device, "radial")[0])

    check()
    check()
    array[...] *= 2
    on_device = f.to(place.device)  # on CPUs the same tensor, with the same version
    check()
    on_device.data.add_(1.0)
    check()
    with torch.inference_mode():
        on_device = on_device + 0.5
        check()
    on_device = on_device.clone()
    check()
    q = sgr.covariance_quadratic_form(g.requires_grad_(), on_device, backend=place.backend)
    torch.autograd.grad(q.sum(), g)
