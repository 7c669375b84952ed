"""The SGR loss against brute force and closed forms."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor, nn

import sgr_kernels as sgr
from sgr_kernels import CovarianceFunction, FullCovariance, IdentityCovariance, SGRLoss
from tests.helpers import covariances, dense, gradients

SHAPE, CLASSES = (2, 6, 5), 4


class Smooth(nn.Module):
    """A small convolutional network, float64, that can be differentiated as often as one likes."""

    def __init__(self, seed: int = 0, batch_norm: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            norm = nn.BatchNorm2d(3) if batch_norm else nn.Identity()
            self.features = nn.Sequential(nn.Conv2d(2, 3, 3), norm, nn.Softplus(), nn.Conv2d(3, 2, 2), nn.Tanh())
            self.head = nn.Linear(2 * 3 * 2, CLASSES)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).flatten(1))


def linear(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPE), CLASSES)).double()


def batch(n: int = 5) -> tuple[Tensor, Tensor]:
    return gradients((n, *SHAPE), seed=11), torch.arange(n) % CLASSES


def radial(psd: str = "none") -> CovarianceFunction:
    """A fixed covariance that is not clipped, so that its matrix is known exactly."""
    f = covariances("radial", 2, SHAPE[1:], seed=4)
    return CovarianceFunction.from_values((f + f.transpose(0, 1)) / 2, SHAPE[1:], psd=psd).double()


def brute_force(model: nn.Module, images: Tensor, labels: Tensor, sigma: Tensor, strength: float, mean=None) -> Tensor:
    """``mean l + strength (1/2 mean g^T Sigma g - mean g . mu)``, with one backward for each sample."""
    total = torch.zeros((), dtype=torch.float64)
    for image, label in zip(images, labels):
        x = image[None].clone().requires_grad_()
        log_probability = torch.log_softmax(model(x), 1)[0, label]
        (g,) = torch.autograd.grad(log_probability, x, create_graph=True)
        omega = g.flatten() @ sigma @ g.flatten() / 2
        if mean is not None:
            omega = omega - (g * mean).sum()
        total = total - log_probability + strength * omega
    return total / len(images)


def gradients_of(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True))


def assert_same_training_signal(model: nn.Module, loss: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    for (name, _), got, exact in zip(
        model.named_parameters(), gradients_of(loss, model), gradients_of(expected, model)
    ):
        error = float((got - exact).abs().max())
        assert error <= 1e-10 * max(1.0, float(exact.abs().max())), f"{name}: {error}"


@pytest.mark.parametrize("build", [Smooth, linear])
@pytest.mark.parametrize("strength", [0.0, 0.7, 30.0])
def test_parameter_gradients_equal_a_dense_double_backward(build, strength):
    """Eq. 11, with Sigma formed and one backward a sample."""
    model, covariance = build(), radial()
    images, labels = batch()
    loss = SGRLoss(covariance, strength)(model, images, labels)
    expected = brute_force(model, images, labels, torch.tensor(dense(covariance.values, SHAPE[1:], "radial")), strength)
    assert_same_training_signal(model, loss, expected)


@pytest.mark.parametrize("estimate", ["function", "full"])
def test_a_running_estimate_enters_before_its_use_and_is_a_constant(estimate):
    """The batch's own gradients are in Sigma, and no gradient flows through them."""
    model, (images, labels) = Smooth(), batch()
    covariance = FullCovariance(*_size()) if estimate == "full" else CovarianceFunction(*_size(), target_variance=1.0)
    covariance = covariance.double()
    criterion = SGRLoss(covariance, 2.0, perturbation="gradient")
    loss = criterion(model, images, labels)
    assert int(covariance.updates) == 1
    assert_same_training_signal(model, loss, brute_force(model, images, labels, covariance.dense(), 2.0))
    xi = torch.autograd.grad(
        nn.functional.cross_entropy(model(images.requires_grad_()), labels, reduction="sum"), images
    )
    again = type(covariance)(*_size()).double()
    again.update(xi[0])
    torch.testing.assert_close(covariance.values, again.values)


def _size() -> tuple:
    return SHAPE[0], SHAPE[1:]


def test_the_sign_source_learns_from_the_signs_of_the_gradient():
    model, (images, labels) = Smooth(), batch()
    covariance, expected = (CovarianceFunction(*_size()).double() for _ in range(2))
    SGRLoss(covariance)(model, images, labels)  # "sign" is the default of a covariance that learns
    x = images.clone().requires_grad_()
    nn.functional.cross_entropy(model(x), labels, reduction="sum").backward()
    expected.update(x.grad.sign())
    torch.testing.assert_close(covariance.values, expected.values)


@pytest.mark.parametrize("source", ["fgsm", "pgd", "deepfool"])
def test_attacks_as_sources(source):
    """Perturbations by an attack on the model's own predictions, in the scale of the attack."""
    model, (images, labels) = Smooth(), batch()
    covariance = CovarianceFunction(*_size(), psd="none").double()
    criterion = SGRLoss(covariance, 0.5, perturbation=source)
    loss = criterion(model, images, labels)
    assert int(covariance.updates) == 1
    assert covariance.values.any()
    if source == "fgsm":
        prediction = model(images).argmax(1)
        expected = sgr.attacks.fgsm(model, images, prediction, eps=8 / 255, bounds=None) - images
        other = CovarianceFunction(*_size(), psd="none").double()
        other.update(expected)
        torch.testing.assert_close(covariance.values, other.values)
    assert_same_training_signal(model, loss, brute_force(model, images, labels, covariance.dense(), 0.5))


def test_a_callable_source_gets_model_images_and_labels():
    model, (images, labels) = Smooth(), batch()
    seen = []

    def source(*arguments):
        seen.append(arguments)
        return torch.ones_like(images)

    covariance = CovarianceFunction(*_size(), psd="none").double()
    SGRLoss(covariance, perturbation=source)(model, images, labels)
    assert seen[0][0] is model
    assert torch.equal(seen[0][1], images)
    assert seen[0][2] is labels
    torch.testing.assert_close(covariance.values, torch.ones_like(covariance.values))


def test_a_linear_softmax_model_has_a_closed_form():
    """``Omega = 1/2 mean (w_y - <w>)^T Sigma (w_y - <w>)``, <w> the mean weight under the model's probabilities."""
    model, covariance, (images, labels) = linear(), radial(), batch()
    sigma = torch.tensor(dense(covariance.values, SHAPE[1:], "radial"))
    criterion = SGRLoss(covariance, 1.0)
    criterion(model, images, labels)
    weight = model[1].weight.detach()
    difference = weight[labels] - torch.softmax(model(images), 1).detach() @ weight
    expected = ((difference @ sigma) * difference).sum(1).mean() / 2
    torch.testing.assert_close(criterion.peek().penalty, expected, rtol=1e-13, atol=1e-13)


def test_the_logit_form():
    """Eq. 13: ``grad log phi_y = grad z_y - sum_k phi_k grad z_k``."""
    model, covariance, (images, labels) = Smooth(), radial(), batch()
    sigma = torch.tensor(dense(covariance.values, SHAPE[1:], "radial"))
    jacobian = torch.func.vmap(torch.func.jacrev(lambda image: model(image[None])[0]))(images).flatten(2).detach()
    phi = torch.softmax(model(images), 1).detach()
    difference = jacobian[torch.arange(len(labels)), labels] - torch.einsum("bk,bkd->bd", phi, jacobian)
    expected = ((difference @ sigma) * difference).sum(1).mean() / 2
    criterion = SGRLoss(covariance, 1.0)
    criterion(model, images, labels)
    torch.testing.assert_close(criterion.peek().penalty, expected, rtol=1e-12, atol=1e-13)


def test_the_identity_is_the_gradient_norm_penalty():
    model, (images, labels) = Smooth(), batch()
    loss = SGRLoss(IdentityCovariance(0.3), 2.0)(model, images, labels)
    x = images.clone().requires_grad_()
    cross_entropy = nn.functional.cross_entropy(model(x), labels, reduction="none")
    (g,) = torch.autograd.grad(cross_entropy.sum(), x, create_graph=True)
    expected = cross_entropy.mean() + 2.0 * 0.3 / 2 * g.square().sum((1, 2, 3)).mean()
    assert_same_training_signal(model, loss, expected)


@pytest.mark.parametrize("target", [None, 2.0])
def test_the_mean_correction(target):
    """Eq. 12: ``- mean g . mu`` with the running mean perturbation in the scale of Sigma."""
    model, (images, labels) = Smooth(), batch()
    covariance = CovarianceFunction(*_size(), target_variance=target).double()
    covariance.update(gradients((7, *SHAPE), seed=3) + 0.4)
    criterion = SGRLoss(covariance, 1.5, perturbation=None, mean_correction=True)
    loss = criterion(model, images, labels)
    mu = covariance.mean
    if target is not None:
        f0 = covariance.values[..., 0].diagonal().mean()
        mu = mu * (target / f0).sqrt()
    expected = brute_force(model, images, labels, covariance.dense(), 1.5, mu)
    assert_same_training_signal(model, loss, expected)
    plain = SGRLoss(covariance, 1.5, perturbation=None)(model, images, labels)
    assert not torch.allclose(loss, plain)


def test_soft_labels():
    """Class probabilities: g is the gradient of the expected log-probability."""
    model, covariance, (images, _) = Smooth(), radial(), batch()
    soft = torch.softmax(gradients((5, 1, 1, CLASSES), seed=2).flatten(1), 1)
    loss = SGRLoss(covariance, 0.5)(model, images, soft)
    x = images.clone().requires_grad_()
    losses = -(soft * torch.log_softmax(model(x), 1)).sum(1)
    (g,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
    sigma = torch.tensor(dense(covariance.values, SHAPE[1:], "radial"))
    expected = losses.mean() + 0.5 * ((g.flatten(1) @ sigma) * g.flatten(1)).sum(1).mean() / 2
    assert_same_training_signal(model, loss, expected)
    one_hot = nn.functional.one_hot(torch.arange(5) % CLASSES, CLASSES).double()
    hard = SGRLoss(covariance, 0.5)(model, images, torch.arange(5) % CLASSES)
    torch.testing.assert_close(SGRLoss(covariance, 0.5)(model, images, one_hot), hard)


def test_several_labels_at_once():
    """Any per-sample loss: here the negative log-likelihood of independent labels."""
    model, covariance, (images, _) = Smooth(), radial(), batch()
    targets = (torch.arange(5 * CLASSES).view(5, CLASSES) % 3 == 0).double()

    def loss_fn(outputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(outputs, labels, reduction="none").sum(1)

    loss = SGRLoss(covariance, 0.5, loss_fn=loss_fn)(model, images, targets)
    x = images.clone().requires_grad_()
    losses = loss_fn(model(x), targets)
    (g,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
    sigma = torch.tensor(dense(covariance.values, SHAPE[1:], "radial"))
    expected = losses.mean() + 0.5 * ((g.flatten(1) @ sigma) * g.flatten(1)).sum(1).mean() / 2
    assert_same_training_signal(model, loss, expected)


def test_cross_entropy_per_sample():
    logits = gradients((6, 1, 1, CLASSES))[:, 0, 0]
    labels = torch.arange(6) % CLASSES
    expected = -torch.log_softmax(logits, 1)[torch.arange(6), labels]
    torch.testing.assert_close(sgr.cross_entropy_per_sample(logits, labels), expected)


def test_the_loss_does_not_depend_on_how_a_batch_is_cut():
    """G is per sample: the gradient of the sum of losses, not of their mean."""
    model, covariance, (images, labels) = Smooth(), radial(), batch(6)
    criterion = SGRLoss(covariance, 3.0)
    whole = criterion(model, images, labels)
    parts = [criterion(model, images[i : i + 1], labels[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(whole, torch.stack(parts).mean())


def test_low_precision_models_are_penalized_in_float32():
    model, (images, labels) = Smooth().to(torch.bfloat16), batch()
    criterion = SGRLoss(CovarianceFunction.exponential(2, SHAPE[1:], 2.0), 1.0)
    criterion(model, images.bfloat16(), labels).backward()
    assert criterion.last.penalty.dtype == torch.float32
    assert re.match(r"loss [\d.]+, cross_entropy [\d.]+, penalty [\d.e-]+, mean gradient norm", str(criterion.last))
    wide, exact = Smooth().to(torch.bfloat16).double(), SGRLoss(CovarianceFunction.exponential(2, SHAPE[1:], 2.0), 1.0)
    exact(wide, images.bfloat16().double(), labels)
    assert float(criterion.last.penalty) == pytest.approx(float(exact.last.penalty), rel=0.05)
