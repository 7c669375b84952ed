"""Transforms in any order, one inside the other, and compiled: what one leaves behind must not meet the next."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sgr_kernels import CovarianceFunction
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
