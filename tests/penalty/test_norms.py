"""Norms of the input gradient as penalties: their gradients are those of a difference of plain gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sgr_kernels as sgr

METHODS = ("double-backward", "forward-mode", "finite-difference")
STRENGTH = 0.7


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 3)).double()


def batch(size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(size, 2, 8, 8, generator=generator, dtype=torch.float64), torch.arange(size) % 3


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def plain_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    work = copy.deepcopy(model)
    F.cross_entropy(work(images), labels).backward()
    return gradients(work)


def input_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    x = images.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(x), labels, reduction="sum"), x)
    return g


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_gradient_is_that_of_the_norm(method: str, p: int) -> None:
    model, (images, labels) = network(), batch()
    g = input_gradient(model, images, labels)
    direction = g.sign() if p == 1 else g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    step = 1e-6
    ahead, behind = (plain_gradient(model, images + side * step * direction, labels) for side in (1, -1))
    expected = plain_gradient(model, images, labels) + STRENGTH * (ahead - behind) / (2 * step)
    criterion = sgr.SGRLoss(sgr.NormPenalty(p, smoothing=0.0), STRENGTH, method=method)
    loss = criterion(model, images, labels)
    loss.backward()
    norms = g.flatten(1).norm(p, dim=1)
    torch.testing.assert_close(criterion.last.penalty, norms.mean(), rtol=1e-10, atol=0)
    torch.testing.assert_close(
        loss.detach(), F.cross_entropy(model(images), labels).detach() + STRENGTH * norms.mean(), rtol=1e-10, atol=0
    )
    assert (gradients(model) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("p", [1, 2])
def test_direction_is_the_derivative_and_zero_at_zero(p: int) -> None:
    for smoothing in (0.0, 1e-3):
        penalty = sgr.NormPenalty(p, smoothing=smoothing)
        g = torch.randn(3, 2, 4, 4, dtype=torch.float64) * 1e-3
        g[1] = 0
        x = g.clone().requires_grad_()
        (derivative,) = torch.autograd.grad(penalty.omegas(x).sum(), x)
        torch.testing.assert_close(penalty.direction(g), derivative, rtol=1e-10, atol=1e-14)
        assert derivative[1].abs().max() == 0
        assert float(penalty.omegas(g)[1]) == 0


@pytest.mark.parametrize("smoothing", [0.0, 1e-25, 1e-200])
@pytest.mark.parametrize("p", [1, 2])
def test_a_smoothing_whose_square_rounds_to_zero_is_none(p: int, smoothing: float) -> None:
    """A zero gradient, as that of dead units, then has the slope zero, and no NaN."""
    penalty = sgr.NormPenalty(p, smoothing=smoothing)
    g = torch.tensor([[0.0, 0.0], [3e-20, -4e-3], [3.0, 4.0]], requires_grad=True)
    (slope,) = torch.autograd.grad(penalty.omegas(g).sum(), g)
    exact = g.detach().sign() if p == 1 else torch.tensor([[0.0, 0.0], [7.5e-18, -1.0], [0.6, 0.8]])
    torch.testing.assert_close(slope, exact)
    torch.testing.assert_close(penalty.direction(g.detach()), exact)


@pytest.mark.parametrize("p", [1, 2])
def test_smoothing_changes_little_above_it(p: int) -> None:
    g = torch.rand(4, 3, 8, 8) + 0.1
    rough, smooth = (sgr.NormPenalty(p, smoothing=s).omegas(g) for s in (0.0, 1e-6))
    torch.testing.assert_close(smooth, rough, rtol=2e-5, atol=0)


def test_drawn_samples_estimate_the_whole() -> None:
    model, (images, labels) = network(), batch(12)
    penalty = sgr.NormPenalty(1)
    sgr.SGRLoss(penalty, STRENGTH)(model, images, labels).backward()
    expected = gradients(model).clone()
    criterion = sgr.SGRLoss(penalty, STRENGTH, fraction=1 / 3)
    draws = []
    for _ in range(400):
        model.zero_grad()
        criterion(model, images, labels).backward()
        draws.append(gradients(model).clone())
    draws = torch.stack(draws)
    error = (draws.mean(0) - expected).norm()
    assert error <= 4 * (draws.var(0).sum() / len(draws)).sqrt()


def test_bad_arguments() -> None:
    for p in (0, 3, True, "1"):
        with pytest.raises(ValueError, match="p: expected 1 or 2"):
            sgr.NormPenalty(p)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="smoothing: expected a finite number >= 0"):
        sgr.NormPenalty(1, smoothing=-1.0)
    with pytest.raises(ValueError, match="takes no updates"):
        sgr.SGRLoss(sgr.NormPenalty(), perturbation="sign")
    with pytest.raises(ValueError, match="keeps no mean"):
        sgr.SGRLoss(sgr.NormPenalty(), mean_correction=True)
