"""The spectrum that a covariance keeps in the kernels' order: made once, current after every change, of use to calls.

On a CPU, with stand-ins for the kernels of GPUs: the arranged spectrum is the spectrum's numbers in a row, and
quadratic forms are computed from it alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import sgr_kernels as sgr
from sgr_kernels import backends
from sgr_kernels.covariance import on_device

pytestmark = pytest.mark.skipif("native" not in backends.available(), reason="there are no compiled kernels")

OPS = torch.ops.sgr_kernels


@pytest.fixture
def arrangements(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """CPU tensors are served as those of GPUs; the list holds the memory of each arrangement made."""
    made: list[Tensor] = []

    def arrange(spectrum: Tensor, arranged: Tensor, height: int, width: int) -> None:
        assert len(arranged) == len(spectrum) * (len(spectrum) + 1) // 2 * 4 * 256 + 4
        arranged[: spectrum.numel()] = spectrum.flatten()
        made.append(arranged)

    def quadratic_form(
        gradient: Tensor, spectrum: Tensor, arranged: Tensor, with_product: bool, precision: str
    ) -> tuple[Tensor, Tensor]:
        found = arranged[: spectrum.numel()].view_as(spectrum)
        return OPS.native_quadratic_form(gradient, found, with_product, precision)

    library = torch.library.Library("sgr_kernels", "FRAGMENT")
    library.impl("native_arrange", arrange, "CPU")
    library.impl("native_arranged_quadratic_form", quadratic_form, "CPU")
    monkeypatch.setattr(
        on_device,
        "_serves",
        lambda images, state, form, backend: state.dtype == images.dtype == torch.float32 and form == "even",
    )
    with backends.use_backend("native"):
        yield made
    library._destroy()


def check(covariance: sgr.CovarianceFunction, gradient: Tensor) -> None:
    """Products, quadratic forms and their derivatives, against the dense matrix."""
    flat = gradient.flatten(1)
    v = flat @ covariance.dense().mT
    torch.testing.assert_close(covariance.product(gradient).flatten(1), v, rtol=1e-4, atol=1e-5)
    leaf = gradient.clone().requires_grad_()
    q = covariance.quadratic_form(leaf)
    torch.testing.assert_close(q, (v * flat).sum(1), rtol=1e-4, atol=1e-4)
    (slope,) = torch.autograd.grad(q.sum(), leaf, create_graph=True)
    torch.testing.assert_close(slope.flatten(1), 2 * v, rtol=1e-4, atol=1e-4)
    (again,) = torch.autograd.grad((slope * gradient).sum(), leaf)
    torch.testing.assert_close(again.flatten(1), 2 * v, rtol=1e-4, atol=1e-4)


def test_it_is_made_once_and_follows_every_change(arrangements: list[Tensor]) -> None:
    covariance, gradient = sgr.CovarianceFunction(2, (5, 6)), torch.randn(3, 2, 5, 6)
    covariance.update(torch.randn(8, 2, 5, 6))
    assert not arrangements  # nobody has asked
    check(covariance, gradient)
    check(covariance, gradient)
    assert len(arrangements) == 1
    covariance.update(torch.randn(8, 2, 5, 6) * torch.tensor([1.0, 3.0]).view(2, 1, 1))
    assert len(arrangements) == 2
    assert arrangements[0].data_ptr() == arrangements[1].data_ptr()  # where a CUDA graph reads it
    check(covariance, gradient)
    assert len(arrangements) == 2
    with torch.no_grad():  # as a moving average of models does
        covariance.matrix.spectrum.mul_(0.5)
        covariance.matrix.table.mul_(0.5)
    check(covariance, gradient)
    assert len(arrangements) == 3
    covariance.load_state_dict(covariance.state_dict())
    check(covariance, gradient)
    assert len(arrangements) == 4


def test_each_backend_keeps_its_own(arrangements: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that was captured with one may be replayed after another's kernels served for a while."""
    covariance, gradient = sgr.CovarianceFunction.exponential(1, (6, 6), 2.0), torch.randn(2, 1, 6, 6)
    check(covariance, gradient)
    of = covariance.matrix._arranged.of
    arguments = (covariance.matrix.spectrum, gradient, "even")
    first = of(*arguments, "native")
    monkeypatch.setattr(on_device, "_words", lambda backend, spectrum, size: 4 * 256 + 4)
    monkeypatch.setattr(on_device.ops, "in_place", lambda name, backend, spectrum, out, *size: out[0].fill_(7.0))
    second = of(*arguments, "triton")
    assert first is not None
    assert second is not None
    assert first.data_ptr() != second.data_ptr()
    assert of(*arguments, "native") is first
    covariance.matrix._arranged.renew(covariance.matrix.spectrum, (6, 6))
    assert first[0] == 7.0  # both follow
    assert of(*arguments, "triton") is second


def test_a_copy_has_its_own(arrangements: list[Tensor]) -> None:
    covariance, gradient = sgr.CovarianceFunction.exponential(1, (6, 6), 2.0), torch.randn(2, 1, 6, 6)
    check(covariance, gradient)
    other = copy.deepcopy(covariance)
    check(other, gradient)
    assert arrangements[0].data_ptr() != arrangements[1].data_ptr()
    check(other.double(), gradient.double())  # without one
    check(covariance, gradient)
    assert len(arrangements) == 2


def test_forward_mode_and_vmap(arrangements: list[Tensor]) -> None:
    covariance = sgr.CovarianceFunction.exponential(1, (6, 6), 2.0)
    gradient, direction = torch.randn(2, 2, 1, 6, 6)
    v = covariance.product(gradient)
    _, slope = torch.func.jvp(covariance.quadratic_form, (gradient,), (direction,))
    torch.testing.assert_close(slope, 2 * (v * direction).sum((1, 2, 3)))
    stacked = torch.stack([gradient, direction])
    torch.testing.assert_close(torch.vmap(covariance.quadratic_form)(stacked)[0], covariance.quadratic_form(gradient))
    assert len(arrangements) == 1
