"""Attacks leave the model, the caller's tensors and the global random streams as they were."""

from __future__ import annotations

import functools
import hashlib
import random

import numpy as np
import pytest
import torch
from torch import nn

from sgr_kernels.attacks import correlated_noise, deepfool, fgm, fgsm, pgd, uniform_noise
from sgr_kernels.attacks.guard import preserve
from tests.attack_models import NormalizingInPlace, convolutional, exponential

ATTACKS = {
    "uniform_noise": functools.partial(uniform_noise, eps=0.1, draws=3),
    "fgm": functools.partial(fgm, eps=0.5),
    "fgsm": functools.partial(fgsm, eps=0.1),
    "pgd": functools.partial(pgd, eps=0.1, steps=3, restarts=2),
    "deepfool": deepfool,
    "correlated_noise": functools.partial(
        correlated_noise, labels=None, covariance=exponential((1, 8, 8), 2.0), eps=0.3, draws=12
    ),
}


def digest(model: nn.Module) -> str:
    """Of everything that a training step can see, identities included."""
    seen = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        grad = tensor.grad
        seen.update(f"{name} {id(tensor)} {tensor.requires_grad} {id(grad)} {tensor._version}".encode())
        seen.update(tensor.detach().numpy().tobytes())
        seen.update(b"" if grad is None else grad.numpy().tobytes())
    for name, module in model.named_modules():
        hooks = [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks]
        seen.update(f"{name} {module.training} {[len(h) for h in hooks]}".encode())
    seen.update(repr((random.getstate(), np.random.get_state()[1].tolist())).encode())  # noqa: NPY002
    seen.update(torch.get_rng_state().numpy().tobytes())
    return seen.hexdigest()


@pytest.fixture
def model() -> nn.Module:
    """In training mode, one part frozen in evaluation mode, with gradients, a flag off and a hook."""
    model = convolutional()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[5].weight.grad = torch.ones_like(model[5].weight)
    model[2].register_forward_hook(lambda module, inputs, output: None)
    return model


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_changes(name, model, images):
    before, original = digest(model), images.clone()
    result = ATTACKS[name](model, images)
    assert digest(model) == before
    assert torch.equal(images, original)
    assert not result.requires_grad
    assert result.data_ptr() != images.data_ptr()


@pytest.mark.parametrize("name", ATTACKS)
def test_runs_where_gradients_are_off(name, model, images):
    expected = ATTACKS[name](model, images)
    with torch.no_grad():
        assert torch.equal(ATTACKS[name](model, images), expected)
    with torch.inference_mode():
        assert torch.equal(ATTACKS[name](model, images.clone()), expected)


def test_images_that_require_a_gradient_collect_none(model, images):
    images.requires_grad_()
    expected = fgsm(model, images.detach(), eps=0.1)
    adversarial = fgsm(model, images, eps=0.1)
    assert torch.equal(adversarial, expected)
    assert images.grad is None
    assert images.requires_grad


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_restores_after_an_interruption(error, model, images):
    calls = 0

    def interrupt(module, inputs):
        nonlocal calls
        calls += 1
        module.bias.requires_grad_(True)
        if calls == 3:
            raise error

    model[0].register_forward_pre_hook(interrupt)
    before = digest(model)
    with pytest.raises(error):
        pgd(model, images, eps=0.1)
    assert digest(model) == before


class Careless(nn.Module):
    """Writes its buffers, replaces one, and draws from every global stream, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(64, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(3), persistent=False)

    def forward(self, images):
        self.calls += 1
        logits = self.body(images.flatten(1)) + 0.01 * torch.randn(3) + 0.01 * random.random() + 0.01 * np.random.rand()  # noqa: NPY002
        self.last = logits[0].detach()
        return logits


@pytest.mark.parametrize("name", ATTACKS)
def test_careless_models_are_restored_too(name, images):
    model = Careless()
    values = {name: buffer.clone() for name, buffer in model.named_buffers()}
    identities = {name: id(buffer) for name, buffer in model.named_buffers()}
    streams = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    ATTACKS[name](model, images)
    for name, buffer in model.named_buffers():
        assert id(buffer) == identities[name]
        assert torch.equal(buffer, values[name])
    assert random.getstate() == streams[0]
    assert np.random.get_state()[1].tolist() == streams[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), streams[2])


def test_a_backward_pass_of_the_caller_survives(model, images):
    """Buffers saved for a pending backward pass must not be written."""
    model.eval()
    loss = model(images).sum()
    pgd(model, images, eps=0.1, steps=2)
    loss.backward()


def test_what_a_foreign_attack_accumulates_is_dropped(model, images):
    before = digest(model)
    with preserve(model):
        model(images).sum().backward()
    assert digest(model) == before


def test_plain_functions_are_models(images):
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    adversarial = fgsm(lambda x: x.flatten(1) @ weight.T, images, eps=0.1)
    assert adversarial.shape == images.shape


@pytest.mark.parametrize("name", ATTACKS)
def test_models_may_write_into_their_input(name, images):
    """A network that normalises in place is attacked as its twin that does not, and no image changes."""
    body = convolutional()
    original = images.clone()
    expected = ATTACKS[name](NormalizingInPlace(body, in_place=False), images)
    actual = ATTACKS[name](NormalizingInPlace(body), images)
    assert torch.equal(images, original)
    assert torch.equal(actual, expected)
