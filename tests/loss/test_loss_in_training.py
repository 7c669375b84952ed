"""How the SGR loss behaves inside a training loop: cadences, modes, state, and what it leaves untouched."""

from __future__ import annotations

import copy
import hashlib

import pytest
import torch
from torch import Tensor, nn

from sgr_kernels import CovarianceFunction, FullCovariance, IdentityCovariance, SGRLoss
from tests.helpers import gradients

SHAPE = (2, 6, 5)


class Plain(nn.Module):
    """Everything with a state: batch normalisation, dropout, and a parameter that is frozen."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(36, 4)
            )
        self.layers[0].bias.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def batch(n: int = 6) -> tuple[Tensor, Tensor]:
    return gradients((n, *SHAPE), seed=5, dtype=torch.float32), torch.arange(n) % 4


def running(**options) -> CovarianceFunction:
    return CovarianceFunction(2, SHAPE[1:], target_variance=1.0, **options)


def state_of(model: nn.Module) -> str:
    """A digest of everything but parameter gradients: tensors, flags, modes, random streams."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    digest.update(str([(n, p.requires_grad) for n, p in model.named_parameters()]).encode())
    digest.update(str([(n, m.training) for n, m in model.named_modules()]).encode())
    digest.update(torch.get_rng_state().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("source", ["gradient", "sign", "fgsm", "pgd", "deepfool"])
@pytest.mark.parametrize("training", [True, False])
def test_a_step_changes_of_the_model_what_a_cross_entropy_step_changes(source, training):
    """Buffers, modes, flags and random streams; no parameter's gradient before ``backward``, the usual ones after."""
    images, labels = batch()
    model, plain = Plain().train(training), Plain().train(training)
    criterion = SGRLoss(running(), 0.5, perturbation=source).train(training)
    torch.manual_seed(7)
    nn.functional.cross_entropy(plain(images), labels)
    expected = state_of(plain)
    torch.manual_seed(7)
    loss = criterion(model, images, labels)
    assert state_of(model) == expected
    assert all(p.grad is None for p in model.parameters())
    assert images.grad is None
    assert not images.requires_grad
    loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert state_of(model) == expected


def test_gradients_accumulate_as_usual():
    images, labels = batch()
    model = Plain().eval()
    criterion = SGRLoss(IdentityCovariance(), 0.5)
    criterion(model, images, labels).backward()
    once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    criterion(model, images, labels).backward()
    twice = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(twice, [2 * g for g in once])


def test_strength_zero_is_the_cross_entropy():
    images, labels = batch()
    model = Plain().eval()
    loss = SGRLoss(running(), 0.0)(model, images, labels)
    expected = nn.functional.cross_entropy(model(images), labels)
    torch.testing.assert_close(loss, expected)
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters))


def test_the_covariance_learns_in_training_mode_alone():
    images, labels = batch()
    covariance = running()
    criterion = SGRLoss(covariance)
    criterion(Plain(), images, labels)
    criterion.eval()
    before = covariance.values.clone()
    for _ in range(3):
        criterion(Plain(), images, labels)
    assert torch.equal(covariance.values, before)
    assert (int(covariance.updates), criterion.steps) == (1, 1)
    criterion.train()(Plain(), images, labels)
    assert (int(covariance.updates), criterion.steps) == (2, 2)


@pytest.mark.parametrize(("update_every", "penalty_every"), [(1, 1), (3, 1), (1, 4), (2, 3)])
def test_cadences(update_every, penalty_every):
    """Updates on every multiple; the penalty on every multiple, with that weight."""
    images, labels = batch()
    model, covariance = Plain().eval(), running()
    criterion = SGRLoss(covariance, 0.5, update_every=update_every, penalty_every=penalty_every)
    for step in range(9):
        loss = criterion(model, images, labels)
        last = criterion.last
        assert int(covariance.updates) == step // update_every + 1
        assert (last.penalty is not None) == (step % penalty_every == 0)
        expected = last.cross_entropy
        if last.penalty is not None:
            q = covariance.quadratic_form(_input_gradient(model, images, labels))
            torch.testing.assert_close(last.penalty, q.mean() / 2)
            expected = expected + penalty_every * 0.5 * last.penalty
        torch.testing.assert_close(loss.detach(), expected)
        torch.testing.assert_close(last.cross_entropy, nn.functional.cross_entropy(model(images), labels).detach())


def _input_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    x = images.clone().requires_grad_()
    losses = nn.functional.cross_entropy(model(x), labels, reduction="sum")
    return torch.autograd.grad(losses, x)[0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_evaluation_without_gradients(mode, training):
    """The same value as with them, whether or not the batch was made under the same mode."""
    images, labels = batch()
    model = Plain().eval()
    covariance = CovarianceFunction.exponential(2, SHAPE[1:], 2.0)
    criterion = SGRLoss(covariance, 0.5).train(training)
    expected = criterion(model, images, labels)
    assert expected.requires_grad
    with mode():
        inside = criterion(model, images, labels)
        made_inside = criterion(model, images.clone(), labels.clone())
    assert not inside.requires_grad
    torch.testing.assert_close(inside, expected.detach())
    torch.testing.assert_close(made_inside, expected.detach())
    criterion(model, images, labels).backward()


def test_statistics_are_detached_and_complete():
    images, labels = batch()
    model = Plain()
    criterion = SGRLoss(running(), 0.5)
    with pytest.raises(RuntimeError, match="has not been called"):
        _ = criterion.last
    loss = criterion(model, images, labels)
    last = criterion.last
    tensors = (last.loss, last.cross_entropy, last.penalty, last.outputs, last.gradient_norm)
    assert not any(t.requires_grad for t in tensors)
    torch.testing.assert_close(last.loss, loss.detach())
    torch.testing.assert_close(last.loss, last.cross_entropy + 0.5 * last.penalty)
    assert last.outputs.shape == (6, 4)
    eval_norm = _input_gradient(copy.deepcopy(model).eval(), images, labels).flatten(1).norm(dim=1)
    criterion(model.eval(), images, labels)
    torch.testing.assert_close(criterion.last.gradient_norm, eval_norm)


def test_empty_batches():
    model = Plain().eval()
    for covariance in (running(), IdentityCovariance(), FullCovariance(2, SHAPE[1:])):
        loss = SGRLoss(covariance, 0.5)(model, torch.zeros(0, *SHAPE), torch.zeros(0, dtype=torch.long))
        loss.backward()
        assert float(loss.detach()) == 0


def test_warnings_are_raised_when_statistics_are_read():
    images, labels = batch()
    model = Plain().eval()
    covariance = running()
    criterion = SGRLoss(covariance, perturbation=lambda *_: torch.full((6, *SHAPE), torch.nan))
    criterion(model, images, labels)
    with pytest.warns(RuntimeWarning, match="1 batches with non-finite perturbations") as caught:
        _ = criterion.last
    assert {warning.filename for warning in caught} == {__file__}
    negative = CovarianceFunction.from_values(-torch.eye(2)[..., None], SHAPE[1:], psd="none")
    criterion = SGRLoss(negative)
    criterion(model, images, labels)
    with pytest.warns(RuntimeWarning, match="negative"):
        _ = criterion.last


def test_gradients_reach_images_that_ask_for_them():
    """As in an attack on the regularized loss, or an embedding in front of it."""
    images, labels = batch()
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Softplus(), nn.Flatten(), nn.Linear(36, 4)).double()
    covariance = CovarianceFunction.exponential(2, SHAPE[1:], 2.0).double()
    x = images.double().requires_grad_()
    torch.autograd.gradcheck(lambda t: SGRLoss(covariance, 0.5)(model, t, labels), (x,))


def test_state_dict_carries_the_covariance_and_the_cadence():
    images, labels = batch()
    model = Plain().eval()
    criterion, fresh = (SGRLoss(running(), update_every=2) for _ in range(2))
    for _ in range(3):
        criterion(model, images, labels)
    fresh.load_state_dict(criterion.state_dict())
    assert fresh.steps == 3
    for c in (criterion, fresh):
        c(model, 2 * images, labels)
    assert torch.equal(fresh.covariance.values, criterion.covariance.values)
    assert int(fresh.covariance.updates) == 2


def test_a_copy_learns_on_its_own():
    images, labels = batch()
    criterion = SGRLoss(running())
    criterion(Plain().eval(), images, labels)
    twin = copy.deepcopy(criterion)
    before = criterion.covariance.values.clone()
    twin(Plain().eval(), 3 * images, labels)
    assert torch.equal(criterion.covariance.values, before)
    assert (criterion.steps, twin.steps) == (1, 2)


def test_a_model_may_be_any_callable():
    images, labels = batch()
    weight = gradients((1, 1, 4, 60), dtype=torch.float32)[0, 0].requires_grad_()
    loss = SGRLoss(IdentityCovariance(), 0.5)(lambda x: x.flatten(1) @ weight.T, images, labels)
    (grad,) = torch.autograd.grad(loss, weight)
    assert grad.any()


def test_training_lowers_the_penalty():
    """A hundred steps of a linear classifier: structure in the covariance is what the weights avoid."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, *SHAPE, generator=generator)
    labels = (images.mean((1, 2, 3)) + images[:, 0, 0, 0] > 0).long()
    covariance = CovarianceFunction.exponential(2, SHAPE[1:], 8.0)
    smoothness = {}
    for strength in (0.0, 1.0):
        model = nn.Sequential(nn.Flatten(), nn.Linear(60, 2))
        nn.init.zeros_(model[1].weight)
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        criterion = SGRLoss(covariance, strength)
        for _ in range(100):
            optimizer.zero_grad()
            criterion(model, images, labels).backward()
            optimizer.step()
        weight = (model[1].weight[1] - model[1].weight[0]).detach().view(1, *SHAPE)
        smoothness[strength] = float(covariance.quadratic_form(weight) / weight.square().sum())
    assert smoothness[1.0] < 0.5 * smoothness[0.0]


def test_the_default_device_does_not_matter():
    images, labels = batch()
    model, criterion = Plain(), SGRLoss(running(), fraction=0.5)
    with torch.device("meta"):
        loss = criterion(model, images, labels)
        loss.backward()
    assert loss.device.type == "cpu"
    assert loss.isfinite()
