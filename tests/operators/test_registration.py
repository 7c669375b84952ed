"""The registered operators and what torch does with them: opcheck, compilation, autocast, fake tensors, export."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import sgr_kernels
from sgr_kernels import functional as sgr
from sgr_kernels.ops import SCHEMAS
from tests.helpers import assert_product_close, assert_quadratic_close, covariances, dense_product, gradients


def _images(dtype: torch.dtype, layout: str, device: torch.device) -> Tensor:
    images = gradients((2, 2, 4, 5), dtype=dtype, device=device)
    if layout == "channels_last":
        images = images.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        images = gradients((2, 2, 4, 10), dtype=dtype, device=device)[..., ::2]
    return images.detach().requires_grad_()


def _samples(operator: str, dtype: torch.dtype, layout: str, device: torch.device) -> list[tuple]:
    a = _images(dtype, layout, device)
    b = gradients((2, 2, 4, 5), seed=1, dtype=dtype, device=device).requires_grad_()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    even = covariances("even", 2, (4, 5)).to(device, wide).requires_grad_()
    signed = torch.stack([covariances("even", 2, (4, 5), seed=s) for s in range(4)]).to(device, wide).requires_grad_()
    if operator == "product":
        return [(a, even, "highest"), (a, signed, "highest")]
    if operator == "quadratic_form":
        return [(a, even, True, "highest"), (a, signed, True, "highest")]
    return [(a, b, 4, 5, False, "highest"), (a, b, 3, 5, True, "highest")]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("operator", SCHEMAS)
def test_opcheck(operator, layout, kernels):
    """Schema, autograd registration, fake kernel and ahead-of-time dispatch, of dense and permuted inputs."""
    dtype = torch.float64 if layout == "contiguous" else torch.float32
    op = getattr(torch.ops.sgr_kernels, f"{kernels.backend}_{operator}").default
    for arguments in _samples(operator, dtype, layout, kernels.device):
        torch.library.opcheck(op, arguments)


def test_opcheck_without_the_product(kernels):
    """The second output is empty and not differentiable."""
    op = getattr(torch.ops.sgr_kernels, f"{kernels.backend}_quadratic_form").default
    g, spectrum, *_ = _samples("quadratic_form", torch.float64, "contiguous", kernels.device)[0]
    utilities = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(op, (g, spectrum, False, "highest"), test_utils=utilities)
    assert op(g, spectrum, False, "highest")[1].shape == (0,)


def test_opcheck_of_an_empty_batch(kernels):
    empty = torch.zeros(0, 3, 4, 5, device=kernels.device, requires_grad=True)
    spectrum = torch.zeros(3, 3, 4, 5, device=kernels.device)
    op = getattr(torch.ops.sgr_kernels, f"{kernels.backend}_product").default
    torch.library.opcheck(op, (empty, spectrum, "highest"))


def _all_operators(g: Tensor, f: Tensor, backend: str) -> tuple[Tensor, ...]:
    x, t = g * 1.5, f * 0.5
    v = sgr.covariance_product(x, t, backend=backend)
    q = sgr.covariance_quadratic_form(x, t, backend=backend)
    estimate = sgr.displacement_covariance(x, max_displacement=3, backend=backend)
    return v, q, estimate


def _check_compiled(compiled: Callable, eager: Callable, g: Tensor, f: Tensor) -> None:
    g, f = g.requires_grad_(), f.requires_grad_()
    outputs, expected = compiled(g, f), eager(g, f)
    torch.testing.assert_close(outputs, expected)
    got = torch.autograd.grad(sum(o.square().sum() for o in outputs), (g, f))
    torch.testing.assert_close(got, torch.autograd.grad(sum(o.square().sum() for o in expected), (g, f)))


@pytest.mark.parametrize("form", ["radial", "even", "signed"])
def test_compilation_without_a_graph_break(form, kernels):
    """Values and gradients of the compiled operators equal those of the eager ones."""
    torch._dynamo.reset()

    def step(g: Tensor, f: Tensor) -> tuple[Tensor, ...]:
        v = sgr.covariance_product(g, f, form=form, backend=kernels.backend)
        return v, sgr.covariance_quadratic_form(v, f, form=form, backend=kernels.backend)

    if form == "radial":
        step = functools.partial(_all_operators, backend=kernels.backend)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    g = gradients((4, 2, 6, 7), device=kernels.device)
    _check_compiled(compiled, step, g, covariances(form, 2, (6, 7), smooth=True).to(g))


@pytest.mark.parametrize("size", [(1, 700), (1, 2100), (240, 3)], ids=str)
def test_compilation_of_long_axes(size):
    """Their kernels run through FFT, and what a compiler traces may choose otherwise."""
    torch._dynamo.reset()
    step = functools.partial(_all_operators, backend="torch")
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    _check_compiled(compiled, step, gradients((2, 1, *size)), covariances("radial", 1, size, smooth=True))


def test_compilation_for_a_dynamic_batch(kernels):
    """One compilation serves every batch size."""
    torch._dynamo.reset()
    step = functools.partial(_all_operators, backend=kernels.backend)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    f = covariances("radial", 2, (6, 7), smooth=True).to(kernels.device)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (4, 3, 700):
            g = gradients((batch, 2, 6, 7), device=kernels.device)
            torch._dynamo.mark_dynamic(g, 0)
            _check_compiled(compiled, step, g, f)


def test_compilation_for_dynamic_sizes(kernels):
    torch._dynamo.reset()
    quadratic_form = functools.partial(sgr.covariance_quadratic_form, backend=kernels.backend)
    compiled = torch.compile(quadratic_form, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in ((6, 7), (9, 8), (5, 12)):
        g, f = gradients((3, 2, *size), device=kernels.device), covariances("radial", 2, size).to(kernels.device)
        torch.testing.assert_close(compiled(g, f), quadratic_form(g, f))


def test_compilation_of_covariance_modules(kernels):
    torch._dynamo.reset()
    covariance = sgr_kernels.CovarianceFunction.exponential(2, (6, 7), 2.0).to(kernels.device)
    g = gradients((3, 2, 6, 7), dtype=torch.float32, device=kernels.device)
    with sgr_kernels.use_backend(kernels.backend):
        compiled = torch.compile(covariance.quadratic_form, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(g), covariance.quadratic_form(g))


@pytest.mark.slow
def test_compilation_to_machine_code():
    torch._dynamo.reset()
    g = gradients((3, 2, 6, 7)).requires_grad_()
    f = covariances("radial", 2, (6, 7))

    def penalty(x: Tensor) -> Tensor:
        return sgr.covariance_quadratic_form(2 * x + 1, f).tanh().sum()

    value, expected = torch.compile(penalty, fullgraph=True)(g), penalty(g)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, g), torch.autograd.grad(expected, g))


def test_export(place):
    class Penalty(torch.nn.Module):
        def forward(self, g: Tensor, f: Tensor) -> Tensor:
            return sgr.covariance_quadratic_form(g, f, backend=place.backend)

    g = gradients((3, 2, 6, 7), device=place.device)
    f = covariances("radial", 2, (6, 7)).to(place.device)
    program = torch.export.export(Penalty(), (g, f), dynamic_shapes=({0: torch.export.Dim("batch")}, None))
    other = gradients((5, 2, 6, 7), seed=4, device=place.device)
    torch.testing.assert_close(program.module()(other, f), sgr.covariance_quadratic_form(other, f))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_precision_alone(dtype, place):
    """Forward, backward and estimates are as accurate as without it; they accumulate in float32."""
    g = gradients((3, 2, 12, 11), dtype=torch.float32).to(place.device).requires_grad_()
    f = covariances("radial", 2, (12, 11), smooth=True).float().to(place.device).requires_grad_()
    exact_v, exact_q = dense_product(g, f, "radial")
    plain = torch.autograd.grad(sgr.covariance_quadratic_form(g, f, backend=place.backend).sum(), (g, f))
    estimate = sgr.displacement_covariance(g, backend=place.backend)
    with torch.autocast(place.device.type, dtype=dtype):
        v = sgr.covariance_product(g, f, backend=place.backend)
        q = sgr.covariance_quadratic_form(g, f, backend=place.backend)
        under = torch.autograd.grad(sgr.covariance_quadratic_form(g, f, backend=place.backend).sum(), (g, f))
        estimate_under = sgr.displacement_covariance(g, backend=place.backend)
    assert v.dtype == q.dtype == estimate_under.dtype == torch.float32
    assert_product_close(v, exact_v, 5e-6)
    assert_quadratic_close(q, exact_q, g, exact_v, 1e-6)
    torch.testing.assert_close(under, plain)
    torch.testing.assert_close(estimate_under, estimate)


def test_autocast_leaves_covariances_alone(place):
    xi = gradients((4, 2, 6, 7), dtype=torch.float32, device=place.device)
    for build in (sgr_kernels.CovarianceFunction, sgr_kernels.FullCovariance):
        plain, under = (build(2, (6, 7), target_variance=1.0).to(place.device) for _ in range(2))
        with sgr_kernels.use_backend(place.backend):
            plain.update(xi)
            q = plain.quadratic_form(xi)
            with torch.autocast(place.device.type, dtype=torch.bfloat16):
                under.update(xi)
                q_under = under.quadratic_form(xi)
        assert torch.equal(plain.values, under.values)
        torch.testing.assert_close(q_under, q)


def test_fake_tensors(place):
    """Shapes and dtypes without data, also after real calls have filled the caches."""
    g = gradients((3, 2, 6, 7), dtype=torch.float32, device=place.device)
    f = covariances("radial", 2, (6, 7)).float().to(place.device)
    sgr.covariance_quadratic_form(g, f, backend=place.backend)
    sgr.displacement_covariance(g, backend=place.backend)
    with FakeTensorMode() as mode:
        fake_g, fake_f = mode.from_tensor(g), mode.from_tensor(f)
        assert sgr.covariance_product(fake_g, fake_f, backend=place.backend).shape == g.shape
        assert sgr.covariance_quadratic_form(fake_g, fake_f, backend=place.backend).shape == (3,)
        assert sgr.displacement_covariance(fake_g, backend=place.backend).shape == f.shape


def test_the_default_device_does_not_matter(place):
    g = gradients((2, 1, 3, 23), device=place.device)
    f = covariances("radial", 1, (3, 23)).to(place.device)
    with torch.device("meta"):
        v = sgr.covariance_product(g, f, backend=place.backend)
        estimate = sgr.displacement_covariance(g, backend=place.backend)
    assert_product_close(v, dense_product(g, f, "radial")[0], 1e-12)
    assert estimate.device == g.device
