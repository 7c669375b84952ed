"""Finite differences along ``v = Sigma g``: their own formula, their limit, and what they leave of a step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sgr_kernels import CovarianceFunction, SGRLoss
from sgr_kernels.penalty.finite_difference import difference, sample_weights, scale_of_steps
from sgr_kernels.penalty.per_sample import cross_entropy_per_sample

SIZE, CLASSES, BATCH = 8, 4, 6


def network(activation: type[nn.Module] = nn.GELU, *layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), *layers, activation(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(45, CLASSES)
    )


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(BATCH, 2, SIZE, SIZE, dtype=torch.float64, generator=generator).to(dtype)
    images[0] *= 0.01  # a dark one
    return images, torch.randint(0, CLASSES, (BATCH,), generator=generator)


def criterion(method: str = "finite-difference", dtype: torch.dtype = torch.float64, **options) -> SGRLoss:
    covariance = CovarianceFunction.exponential(2, (SIZE, SIZE), 3.0).to(dtype)
    covariance.mean.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))  # for Eq. 12
    return SGRLoss(covariance, 3.0, method=method, **options)


def gradients(loss: Tensor, model: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("activation", [nn.GELU, nn.ReLU])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-2)])
def test_the_gradient_is_that_of_its_own_formula(
    activation: type[nn.Module], dtype: torch.dtype, tolerance: float
) -> None:
    """``mean_b l_b + w (l_b(x + h v) - l_b(x)) / h``, every l_b of both terms differentiated in one graph."""
    model, (images, labels) = network(activation).to(dtype), batch(dtype)
    loss = criterion(dtype=dtype)
    found = gradients(loss(model, images, labels), model)
    x = images.clone().requires_grad_()
    losses = cross_entropy_per_sample(model(x), labels)
    (g,) = torch.autograd.grad(losses.sum(), x, retain_graph=True)
    v = loss.covariance.product(g)
    equal = torch.ones(BATCH, dtype=torch.float64)
    weights = sample_weights(losses, images, False, equal)
    scale = scale_of_steps(images, v, weights, equal, torch.finfo(dtype).eps ** 0.5)
    sides = difference(scale, weights, loss.strength, equal, with_loss=True)
    steps = sides.steps.to(dtype)
    ahead = cross_entropy_per_sample(model(images + steps.view(-1, 1, 1, 1) * v), labels)
    # Cross-entropy is taken at the moved images, of which the formula's remainder is w (1/h - 1/w) of both.
    slope = (1 / sides.steps - 1 / loss.strength) * (ahead - losses)
    formula = (ahead + loss.strength * slope).mean()
    assert relative(found, gradients(formula, model)) <= tolerance  # a rounding error over h
    plainly = (losses + loss.strength * (ahead - losses) / sides.steps).mean()
    torch.testing.assert_close(formula, plainly, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.float64, 1e-5)])
@pytest.mark.parametrize("options", [{}, {"fraction": 0.5}, {"penalty_every": 4}])
def test_smooth_networks_have_the_exact_gradient(dtype: torch.dtype, tolerance: float, options: dict) -> None:
    model, (images, labels) = network().to(dtype), batch(dtype)
    losses = {}
    for method in ("finite-difference", "double-backward"):
        loss = criterion(method, dtype, **options)
        losses[method] = loss(model, images, labels)
    torch.testing.assert_close(losses["finite-difference"], losses["double-backward"], rtol=1e-5, atol=0)
    found, exact = (gradients(value, model) for value in losses.values())
    assert relative(found, exact) <= tolerance


def test_steps_are_those_of_each_sample() -> None:
    """About the root of the rounding unit of the image, whatever the size of its gradient."""
    images, _ = batch()
    losses = torch.tensor([1e-2, 1e-1, 0.7, 2.0, 5.0, 20.0], dtype=torch.float64)
    size = (1 - torch.exp(-losses)).view(-1, 1, 1, 1)  # of a cross-entropy's gradient
    direction = size * torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    equal = torch.ones(BATCH, dtype=torch.float64)
    weights = sample_weights(losses, images, False, equal)
    wanted = torch.finfo(torch.float64).eps ** 0.5
    steps = difference(scale_of_steps(images, direction, weights, equal, wanted), weights, 1.0, equal, True).steps
    moved = steps * direction.flatten(1).norm(dim=1) / images.flatten(1).norm(dim=1)
    assert bool((moved[1:] > wanted / 3).all())
    assert bool((moved[1:] < wanted * 3).all())
    assert float(moved[0]) < 20 * wanted


def test_hooks_on_parameters_see_the_whole_gradient_once() -> None:
    model, (images, labels) = network(), batch()
    model.double()
    expected = gradients(criterion()(model, images, labels), model)
    seen: list[Tensor] = []
    parameter = model[0].weight
    parameter.register_hook(lambda gradient: seen.append(gradient.clone()) or 2 * gradient)
    criterion()(model, images, labels).backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0].flatten(), expected[: seen[0].numel()])
    torch.testing.assert_close(parameter.grad, 2 * seen[0])


def test_a_penalty_that_is_not_finite_leaves_a_plain_step() -> None:
    model, (images, labels) = network().double(), batch()
    loss = criterion()
    loss.covariance.product = lambda gradient: torch.full_like(gradient, torch.nan)
    loss.covariance.quadratic_form = lambda gradient: torch.full((len(gradient),), torch.nan, dtype=gradient.dtype)
    value = loss(model, images, labels)
    plain = nn.functional.cross_entropy(model(images), labels)
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(gradients(value, model), gradients(plain, model))
    assert int(loss.nonfinite) == 1


class Centred(nn.Module):
    """Couples the samples of a batch, behind the back of any list of layers that do."""

    def forward(self, x: Tensor) -> Tensor:
        return x - 2 * x.mean(0)


def test_samples_that_interact_are_noticed() -> None:
    images, labels = batch()
    model = network(nn.GELU, Centred()).double()
    losses = {method: criterion(method)(model, images, labels) for method in ("finite-difference", "double-backward")}
    found, exact = (gradients(value, model) for value in losses.values())
    assert relative(found, exact) <= 1e-5
    torch.testing.assert_close(*losses.values(), rtol=1e-6, atol=0)


def test_the_gradient_has_no_further_derivative() -> None:
    model, (images, labels) = network().double(), batch()
    loss = criterion()(model, images, labels)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, model[0].weight, create_graph=True)


def test_scaled_losses_accumulate_and_may_be_differentiated_again() -> None:
    model, (images, labels) = network().double(), batch()
    loss = criterion()(model, images, labels)
    once = gradients(criterion()(model, images, labels), model)
    (8 * loss).backward(retain_graph=True)
    loss.backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(found, 9 * once)
