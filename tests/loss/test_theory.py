"""The argument behind the penalty, Eq. (4) to (10): noise on the inputs of a Bayes-optimal classifier costs Omega.

The classifier is the exact posterior of a Gaussian mixture whose classes differ in mean and in spread, so that its
log-probabilities are curved and the Hessian terms of Eq. (6) do not vanish one by one.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from sgr_kernels import CovarianceFunction, SGRLoss

SHAPE, CLASSES = (1, 3, 4), 3
DIMENSION = math.prod(SHAPE)


class Posterior(nn.Module):
    """Bayes' rule for ``x | y ~ N(mean_y, spread_y^2 I)``, y uniform; ``sharpness`` other than 1 spoils it."""

    def __init__(self, sharpness: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.means = 0.8 * torch.randn(CLASSES, DIMENSION, dtype=torch.float64, generator=generator)
        self.spreads = torch.tensor([0.8, 1.0, 1.3], dtype=torch.float64)
        self.sharpness = sharpness

    def forward(self, images: Tensor) -> Tensor:
        squares = (images.flatten(1)[:, None] - self.means).square().sum(2)
        return self.sharpness * (-squares / (2 * self.spreads**2) - DIMENSION * self.spreads.log())

    def draw(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """Images and their labels."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(CLASSES, (n,), generator=generator)
        white = torch.randn(n, DIMENSION, dtype=torch.float64, generator=generator)
        images = self.means[labels] + self.spreads[labels, None] * white
        return images.view(n, *SHAPE), labels


def covariance(scale: float) -> CovarianceFunction:
    return CovarianceFunction.exponential(1, SHAPE[1:], 2.0, target_variance=scale**2).double()


def noise_cost(model: nn.Module, sigma: CovarianceFunction, images: Tensor, labels: Tensor, draws: int) -> Tensor:
    """``E l(x + xi) - l(x)`` for each sample; every draw is used with both signs, which cancels odd orders."""
    generator = torch.Generator().manual_seed(9)

    def losses(x: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x), labels, reduction="none")

    total = torch.zeros(len(images), dtype=torch.float64)
    for _ in range(draws):
        xi = sigma.sample(len(images), generator)
        total += (losses(images + xi) + losses(images - xi)) / 2 - losses(images)
    return total / draws


def omega(model: nn.Module, sigma: CovarianceFunction, images: Tensor, labels: Tensor) -> float:
    criterion = SGRLoss(sigma, 1.0)
    criterion(model, images, labels)
    return float(criterion.last.penalty)


def test_the_hessian_terms_cancel_on_average():
    """Eq. (6) to (9): ``sum_y phi_y Hess log phi_y = -sum_y phi_y grad log phi_y grad log phi_y^T``, point by point."""
    model = Posterior()
    images, _ = model.draw(6, seed=1)

    def log_phi(x: Tensor) -> Tensor:
        return torch.log_softmax(model(x.view(1, *SHAPE)), 1)[0]

    for x in images.flatten(1):
        phi = log_phi(x).exp()
        hessian, jacobian = torch.func.hessian(log_phi)(x), torch.func.jacrev(log_phi)(x)
        assert float(hessian.abs().max()) > 0.1
        average = torch.einsum("k,kij->ij", phi, hessian)
        torch.testing.assert_close(
            average, -torch.einsum("k,ki,kj->ij", phi, jacobian, jacobian), rtol=1e-9, atol=1e-11
        )


@pytest.mark.parametrize("scale", [0.05, 0.1])
def test_small_noise_costs_omega(scale):
    """Eq. (10), within four standard errors and the neglected fourth order."""
    model, sigma = Posterior(), covariance(scale)
    images, labels = model.draw(40_000, seed=2)
    cost = noise_cost(model, sigma, images, labels, draws=4)
    error = float(cost.std() / math.sqrt(len(cost)))
    predicted = omega(model, sigma, images, labels)
    assert error < 0.05 * predicted
    assert abs(float(cost.mean()) - predicted) < 4 * error + 5 * scale**2 * predicted


def test_the_approximation_is_of_second_order():
    """With labels averaged exactly the relative error falls with the square of the noise, from visible to small."""
    model = Posterior()
    images, _ = model.draw(10_000, seed=3)
    posterior = torch.softmax(model(images), 1)
    deviations = []
    for scale in (0.6, 0.3, 0.15):
        sigma = covariance(scale)
        cost, predicted = torch.zeros(len(images), dtype=torch.float64), 0.0
        for k in range(CLASSES):
            labels = torch.full((len(images),), k)
            x = images.clone().requires_grad_()
            losses = nn.functional.cross_entropy(model(x), labels, reduction="none")
            (g,) = torch.autograd.grad(losses.sum(), x)
            predicted += float((posterior[:, k] * sigma.quadratic_form(g)).mean()) / 2
            cost += posterior[:, k] * noise_cost(model, sigma, images, labels, draws=6)
        deviations.append(abs(float(cost.mean()) / predicted - 1))
    assert deviations[0] > 1  # noise that is not small
    assert deviations[1] < 0.3 * deviations[0]
    assert deviations[2] < 0.35 * deviations[1] < 0.1


@pytest.mark.parametrize("sharpness", [0.4, 2.5])
def test_a_classifier_that_is_not_the_posterior_pays_something_else(sharpness):
    """The argument needs the Bayes-optimal classifier: labels that follow its own probabilities."""
    model, sigma = Posterior(sharpness), covariance(0.1)
    images, labels = model.draw(40_000, seed=4)
    cost = noise_cost(model, sigma, images, labels, draws=4)
    error = float(cost.std() / math.sqrt(len(cost)))
    predicted = omega(model, sigma, images, labels)
    assert abs(float(cost.mean()) - predicted) > 10 * error
    assert not 0.7 < float(cost.mean()) / predicted < 1.4
