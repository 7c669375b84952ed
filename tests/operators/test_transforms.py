"""Transforms in any order, one inside the other, and compiled: what one leaves behind must not meet the next."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sgr_kernels import CovarianceFunction, FullCovariance, IdentityCovariance
from sgr_kernels import functional as sgr
from tests.helpers import covariances, gradients

Function = Callable[[Tensor], Tensor]


def _operators(size: tuple[int, int], backend: str) -> dict[str, Function]:
    f = covariances("radial", 1, size)
    return {
        "product": lambda x: sgr.covariance_product(x, f, backend=backend),
        "quadratic_form": lambda x: sgr.covariance_quadratic_form(x, f, backend=backend),
        "covariance": lambda x: sgr.displacement_covariance(x, backend=backend),
    }


def _compiled(f: Function, x: Tensor) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(f, backend="eager", fullgraph=True)(x)


def _exported(f: Function, x: Tensor) -> Tensor:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return f(x)

    return torch.export.export(Model(), (x,)).module()(x)


TRANSFORMS: dict[str, Callable[[Function, Tensor], object]] = {
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).square().sum())(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x[None]),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda y: f(y).square().sum())(x),
    "compile": _compiled,
    "export": _exported,
}


@pytest.mark.parametrize("operator", ["product", "quadratic_form", "covariance"])
def test_every_pair_of_transforms_in_one_process(operator):
    """Every pair has a size of its own, so that its first transform is the first to ask for that size's constants."""
    for (first, second), size in zip(
        itertools.product(TRANSFORMS, repeat=2), itertools.product(range(3, 11), repeat=2)
    ):
        f = _operators(size, "torch")[operator]
        x = gradients((1, 1, *size))
        for name in (first, second):
            TRANSFORMS[name](f, x)
        torch.testing.assert_close(f(x), _operators(size, "reference")[operator](x))


def test_samples_drawn_within_transforms_leave_nothing_behind():
    covariance = CovarianceFunction.exponential(1, 5, 2.0)
    generator = torch.Generator()

    def noisy(x: Tensor) -> Tensor:
        return (x * covariance.sample(1, generator.manual_seed(0))).sum((1, 2, 3))

    x = torch.ones(1, 1, 5, 5)
    torch.func.grad(lambda z: torch.func.grad(lambda y: noisy(y).sum())(z).square().sum())(x)
    expected = CovarianceFunction.exponential(1, 5, 2.0).sample(1, generator.manual_seed(0)).sum()
    torch.testing.assert_close(noisy(x), expected[None])
    torch.testing.assert_close(torch.func.grad(lambda y: noisy(y).sum())(x).sum(), expected)


def _scalar(x: Tensor, f: Tensor) -> Tensor:
    """All three operators in one number."""
    v = sgr.covariance_product(x, f, backend="torch")
    estimate = sgr.displacement_covariance(v, backend="torch")
    return (sgr.covariance_quadratic_form(v, f, backend="torch") * v.sum((1, 2, 3))).sum() + estimate.square().sum()


def _sum_of_squares(x: Tensor, f: Tensor) -> Tensor:
    return sum(t.square().sum() for t in torch.func.grad(_scalar, (0, 1))(x, f))


COMPOSED = {
    "grad_and_value": torch.func.grad_and_value(_scalar, (0, 1)),
    "grad of grad": torch.func.grad(_sum_of_squares, (0, 1)),
    "grad of jvp": torch.func.grad(lambda x, f: torch.func.jvp(lambda y: _scalar(y, f), (x,), (x.sin(),))[1]),
    "vmap": lambda x, f: torch.func.vmap(_scalar, (3, None))(torch.stack([x, 2 * x], 3), f),
    "vmap of grad": lambda x, f: torch.func.vmap(torch.func.grad(_scalar, (0, 1)), (None, 2))(x, f[:, :, None]),
    "jvp": lambda x, f: torch.func.jvp(_scalar, (x, f), (x.cos(), f.sin())),
    "jacrev": torch.func.jacrev(_scalar, (0, 1)),
    "jacfwd": torch.func.jacfwd(_scalar, (0, 1)),
    "hessian": torch.func.hessian(_scalar),
}


@pytest.mark.parametrize("transform", COMPOSED)
def test_compiled_transforms_are_one_graph(transform):
    torch._dynamo.reset()
    x, f = gradients((2, 1, 3, 4)), covariances("radial", 1, (3, 4), smooth=True)
    expected = COMPOSED[transform](x, f)
    compiled = torch.compile(COMPOSED[transform], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, f), expected)


def test_the_registered_operators_within_transforms():
    """Called directly they differentiate and map as the public functions do."""
    g, spectrum = gradients((2, 1, 3, 4)), torch.rand(1, 1, 3, 4, dtype=torch.float64)

    def direct(x: Tensor) -> Tensor:
        return torch.ops.sgr_kernels.torch_product(x, spectrum, "highest")

    dense = torch.func.jacrev(direct)(g).view(24, 24)
    for name in ("grad", "vmap", "jvp", "jacrev", "jacfwd", "hessian"):
        expected = TRANSFORMS[name](lambda x: (x.flatten() @ dense.mT).view_as(x), g)
        torch.testing.assert_close(TRANSFORMS[name](direct, g), expected)


@pytest.mark.parametrize("build", [CovarianceFunction, FullCovariance, lambda *_: IdentityCovariance(2.0)])
def test_covariances_within_compiled_transforms(build):
    """One graph for all updates: each call takes the covariance as it is then."""
    torch._dynamo.reset()
    covariance, x = build(1, (3, 4)), gradients((2, 1, 3, 4), dtype=torch.float32)

    def penalty(y: Tensor) -> Tensor:
        return covariance.quadratic_form(y).square().sum()

    twice = torch.func.grad(lambda y: torch.func.grad(penalty)(y).square().sum())
    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        if not covariance.frozen:
            covariance.update(gradients((2, 1, 3, 4), seed=seed, dtype=torch.float32))
        torch.testing.assert_close(compiled(x), twice(x))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks
def test_the_engines_other_ways_backward(kernels):
    """Batched gradients, a pullback used after its transform, and compiled autograd."""
    torch._dynamo.reset()
    x, f = gradients((2, 1, 3, 4), device=kernels.device), covariances("radial", 1, (3, 4)).to(kernels.device)

    def q(y: Tensor) -> Tensor:
        return sgr.covariance_quadratic_form(y, f, backend=kernels.backend)

    expected = torch.autograd.functional.jacobian(q, x)
    for strategy in ("reverse-mode", "forward-mode"):
        batched = torch.autograd.functional.jacobian(q, x, vectorize=True, strategy=strategy)
        torch.testing.assert_close(batched, expected)
    _, pullback = torch.func.vjp(q, x)
    weights = x.new_ones(2).requires_grad_()
    (twice,) = torch.autograd.grad((pullback(weights)[0] * x).sum(), weights)
    torch.testing.assert_close(twice, 2 * q(x))
    leaf = x.clone().requires_grad_()
    loss = q(leaf).sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    torch.testing.assert_close(leaf.grad, expected.sum(0))
