"""Independent checks of what agreement between two implementations, or a zero in a test's data, would hide."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sgr_kernels import CovarianceFunction, SGRLoss
from sgr_kernels.penalty.choice import METHODS
from sgr_kernels.perturbations import ATTACKS, FREE

SIZE, CLASSES, BATCH, STRENGTH = 6, 4, 12, 2.0


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(64, CLASSES)).double()


def batch() -> tuple[Tensor, Tensor]:
    """Images of very different brightness, and so of different penalties and chances to be drawn."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(BATCH, 1, SIZE, SIZE, dtype=torch.float64, generator=generator)
    images *= torch.logspace(-1, 0.5, BATCH, dtype=torch.float64).view(-1, 1, 1, 1)
    return images, torch.randint(0, CLASSES, (BATCH,), generator=generator)


def covariance() -> CovarianceFunction:
    """Of perturbations whose mean is as large as their deviation."""
    generator = torch.Generator().manual_seed(2)
    found = CovarianceFunction(1, (SIZE, SIZE), target_variance=0.5).double()
    found.update(1 + torch.randn(50, 1, SIZE, SIZE, dtype=torch.float64, generator=generator))
    return found


def by_hand(model: nn.Module, images: Tensor, labels: Tensor, mean_correction: bool) -> tuple[Tensor, Tensor]:
    """Cross-entropy and penalty, Eq. 11 and 12, from the matrix."""
    sigma = covariance()
    x = images.clone().requires_grad_()
    losses = nn.functional.cross_entropy(model(x), labels, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
    flat = gradient.flatten(1)
    omegas = ((flat @ sigma.dense()) * flat).sum(1) / 2
    if mean_correction:  # of the log-probability's gradient, minus this one
        scale = (0.5 / sigma.values[0, 0, 0]).sqrt()
        omegas = omegas + flat @ (scale * sigma.mean).flatten()
    return losses.mean(), omegas.mean()


def gradients(loss: Tensor, model: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mean_correction", [False, True])
def test_the_mean_enters_the_gradient_by_every_method(method: str, mean_correction: bool) -> None:
    model, (images, labels) = network(), batch()
    criterion = SGRLoss(covariance(), STRENGTH, perturbation=None, method=method, mean_correction=mean_correction)
    found = criterion(model, images, labels)
    cross_entropy, penalty = by_hand(model, images, labels, mean_correction)
    wanted = cross_entropy + STRENGTH * penalty
    torch.testing.assert_close(found, wanted)
    assert relative(gradients(found, model), gradients(wanted, model)) <= 1e-5
    if mean_correction:  # the check is worth something: without the mean the gradient is another one
        _, without = by_hand(model, images, labels, False)
        assert relative(gradients(without, model), gradients(by_hand(model, images, labels, True)[1], model)) > 0.1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sampling", ["importance", "uniform"])
@pytest.mark.parametrize("mean_correction", [False, True])
def test_subsets_of_the_batch_have_the_whole_batchs_gradient_on_average(
    method: str, sampling: str, mean_correction: bool
) -> None:
    """Over the offsets, which fill the unit interval evenly; each sample with the share that its chance asks for."""
    model, (images, labels) = network(), batch()
    criterion = SGRLoss(
        covariance(), STRENGTH, perturbation=None, method=method, mean_correction=mean_correction, fraction=0.25,
        sampling=sampling,
    )  # fmt: skip
    draws = 60
    found = sum(gradients(criterion(model, images, labels), model) for _ in range(draws)) / draws
    plain, penalty = (gradients(by_hand(model, images, labels, mean_correction)[k], model) for k in (0, 1))
    assert relative(found - plain, STRENGTH * penalty) <= 0.05


@pytest.mark.parametrize("perturbation", [*FREE, *ATTACKS])
def test_labels_do_not_leak_into_the_attacks_that_a_covariance_learns_from(perturbation: str) -> None:
    model, (images, labels) = network(), batch()
    found = []
    for given in (labels, (labels + 1) % CLASSES):
        estimate = CovarianceFunction(1, (SIZE, SIZE), target_variance=0.5).double()
        SGRLoss(estimate, STRENGTH, perturbation=perturbation)(model, images, given)
        found.append(torch.cat([estimate.values.flatten(), estimate.mean.flatten()]))
    assert torch.equal(*found) == (perturbation in ATTACKS)
