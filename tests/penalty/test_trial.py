"""The trial itself: when it is made, what it compares, what it says, and that it leaves no trace."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sgr_kernels import CovarianceFunction, IdentityCovariance, PenaltyGradientError, SGRLoss
from sgr_kernels.models import carlini_wagner
from sgr_kernels.penalty.choice import METHODS
from sgr_kernels.training.datasets import load
from tests.support_matrix import CLASSES, SIZE, Lambda, criterion, gradients
from tests.trial_models import Remembers, batch, head


class _Random(nn.Module):
    """Scales by numbers of Python's and NumPy's streams."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) * (1 + random.random()) * (1 + np.random.rand())  # noqa: NPY002


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("method", METHODS)
def test_random_numbers_of_python_and_numpy_are_replayed(method: str, fraction: float) -> None:
    images, labels = batch()

    def run(way: str) -> tuple[Tensor, float, float]:
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        model = head(_Random())
        loss = SGRLoss(criterion(way).covariance, 3.0, method=way, fraction=fraction)
        loss(model, images, labels).backward()
        return gradients(model), random.random(), float(np.random.rand())  # noqa: NPY002

    found, expected = run(method), run("double-backward")
    assert (found[0] - expected[0]).norm() <= 1e-5 * expected[0].norm()
    assert found[1:] == expected[1:]
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    head(_Random())(images)
    assert expected[1:] == (random.random(), float(np.random.rand()))  # noqa: NPY002


def test_state_in_plain_attributes_has_no_trace_of_the_trial() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x

    images, labels = batch()
    model = head(counter := Counts())
    criterion("double-backward")(model, images, labels)
    assert counter.calls == 1


def test_finite_differences_on_a_network_with_kinks_say_their_cosine(caplog: pytest.LogCaptureFixture) -> None:
    digits = load("mnist-sample").train.first(16)
    images, labels, model = digits.images.double() / 255, digits.labels, carlini_wagner("mnist")
    covariance = CovarianceFunction.exponential(1, 28, 3.0)
    with pytest.raises(
        PenaltyGradientError, match=r"kinks .*cosine .* is -?0\.\d+ on this batch.*allow_kinks=True.*'double"
    ):
        SGRLoss(covariance, method="finite-difference")(model, images.float(), labels)
    with caplog.at_level(logging.WARNING, "sgr_kernels"):
        SGRLoss(covariance, method="finite-difference", allow_kinks=True)(model, images.float(), labels).backward()
    assert "cosine" in caplog.text
    with caplog.at_level(logging.INFO, "sgr_kernels"):
        SGRLoss(covariance, method="auto")(model, images.float(), labels)
    assert "method 'double-backward', a step costs about 2 plain ones" in caplog.text


@pytest.mark.parametrize("method", METHODS)
def test_out_of_memory_passes_through_as_itself(method: str) -> None:
    model, (images, labels) = head(nn.GELU()), batch()
    loss, calls = criterion(method), itertools.count()

    def exhausted(x: Tensor) -> Tensor:
        if next(calls) > 0 or method == "double-backward":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model(x)

    with pytest.raises(torch.OutOfMemoryError):
        loss(exhausted, images, labels)


@pytest.mark.parametrize("method", ["forward-mode", "finite-difference"])
def test_second_order_through_the_criterion_is_refused(method: str) -> None:
    """As in MAML: the remedy is the method that has further derivatives."""
    model, (images, labels) = head(nn.GELU()), batch()
    parameters = list(model.parameters())
    with pytest.raises(RuntimeError, match=r'only method="double-backward" on the whole batch'):
        torch.autograd.grad(criterion(method)(model, images, labels), parameters, create_graph=True)


def test_second_order_by_double_backward() -> None:
    """A Hessian-vector product against a difference of the gradient."""
    model, (images, labels) = head(nn.GELU()), batch()
    parameters = list(model.parameters())
    vector = [torch.randn_like(p) for p in parameters]

    def gradient() -> list[Tensor]:
        loss = criterion("double-backward")(model, images, labels)
        return list(torch.autograd.grad(loss, parameters, create_graph=True))

    along = sum((g * v).sum() for g, v in zip(gradient(), vector))
    found = torch.cat([h.flatten() for h in torch.autograd.grad(along, parameters)])
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, v in zip(parameters, vector):
                p += sign * 1e-6 * v
        sides.append(torch.cat([g.detach().flatten() for g in gradient()]))
        with torch.no_grad():
            for p, v in zip(parameters, vector):
                p -= sign * 1e-6 * v
    expected = (sides[0] - sides[1]) / 2e-6
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_a_model_that_float64_does_not_suit_is_compared_in_its_own(caplog: pytest.LogCaptureFixture) -> None:
    model, (images, labels) = head(Lambda(lambda x: torch.tanh(x.float()).to(x.dtype))), batch()
    with caplog.at_level(logging.WARNING, "sgr_kernels"):
        criterion("double-backward")(model, images, labels).backward()
    assert caplog.text == ""


def test_the_whole_batch_is_tried_once() -> None:
    """And a compiled model is compiled for it once."""
    torch._dynamo.reset()
    model, (images, labels) = head(nn.GELU()), batch()
    compilations = 0

    def backend(graph: torch.fx.GraphModule, _: list) -> Any:
        nonlocal compilations
        compilations += 1
        return graph

    compiled = torch.compile(copy.deepcopy(model), backend=backend)
    loss = SGRLoss(criterion("auto").covariance, 3.0, method="finite-difference")
    for _ in range(3):
        loss(compiled, images, labels).backward()
    assert compilations <= 2  # images that are differentiated in, and those ahead that are not


def test_signs_of_what_is_not_a_number_do_not_enter() -> None:
    """Through the criterion, for every source: a batch that is not finite is skipped whole, and counted."""
    model, (images, labels) = head(nn.GELU()), batch()
    broken = images.clone()
    broken[0, 0, 0, 0] = torch.nan
    for source in ("sign", "gradient", lambda model, images, labels: torch.ones_like(images)):
        covariance = CovarianceFunction(1, SIZE, psd="none").double()
        loss = SGRLoss(covariance, 0.1, perturbation=source)
        loss(model, images, labels)
        before = covariance.values.clone()
        loss(model, broken, labels)
        assert torch.equal(covariance.values, before)
        assert int(covariance.skipped) == 1


@pytest.mark.parametrize("every", [1, 2])
def test_steps_counted_by_hand_have_one_cadence_for_all_their_calls(every: int) -> None:
    """As under SAM, with two calls to a step."""
    model, (images, labels) = head(nn.GELU()), batch()
    covariance = CovarianceFunction(1, SIZE).double()
    loss = SGRLoss(covariance, lambda step: 1.0 + step, penalty_every=every, update_every=every, count_calls=False)
    for step in range(4):
        for _ in range(2):
            loss(model, images, labels)
            assert (loss.last.penalty is not None) == (step % every == 0)
            assert loss.last.strength == 1.0 + step
        loss.advance()
    assert loss.steps == 4
    assert int(covariance.updates) == 8 // every


def test_every_model_of_a_criterion_is_tried() -> None:
    """Two in turn, a copy of the criterion and one that was pickled: each model is tried once by each."""
    good, bad, (images, labels) = head(nn.GELU()), head(Lambda(Remembers.apply)), batch()
    loss = criterion("double-backward")
    loss(good, images, labels)
    for other in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        with pytest.raises(PenaltyGradientError, match="differs by"):
            other(bad, images, labels)
        other(good, images, labels)
    for call in (lambda x: good(x), functools.partial(good)):
        loss(call, images, labels)
    with pytest.raises(PenaltyGradientError, match="differs by"):
        loss(functools.partial(bad), images, labels)
    with pytest.raises(PenaltyGradientError, match="differs by"):
        loss(lambda x: bad(x), images, labels)


def test_a_model_that_changes_is_tried_again() -> None:
    """Another layer, another precision, another set of trained parameters, another method."""
    model, (images, labels) = head(nn.GELU()), batch()
    loss = criterion("double-backward")
    loss(model, images, labels)
    model[0][1] = Lambda(Remembers.apply)
    with pytest.raises(PenaltyGradientError, match="differs by"):
        loss(model, images, labels)
    frozen = head(Lambda(Remembers.apply))
    frozen[0].requires_grad_(False)
    loss(frozen, images, labels)
    frozen[0].requires_grad_(True)
    with pytest.raises(PenaltyGradientError, match="differs by"):
        loss(frozen, images, labels)


def test_autocast_does_not_blind_the_trial() -> None:
    model, (images, labels) = head(Lambda(Remembers.apply)).float(), batch()
    loss = criterion("double-backward", torch.float32)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(PenaltyGradientError, match="differs by"):
        loss(model, images.float(), labels)


def test_the_trial_s_noise_keeps_the_range_of_the_images() -> None:
    def range_kept(x: Tensor) -> Tensor:
        assert float(x.detach().min()) >= 0
        assert float(x.detach().max()) <= 1
        return (x + 1e-6).sqrt()

    images, labels = batch()
    images[:, :, :2] = 0
    images[:, :, 2] = 1
    model = nn.Sequential(Lambda(range_kept), head(nn.GELU())).double()
    loss = criterion("double-backward")
    loss(model, images, labels).backward()
    assert loss._ways.get(model, ("double-backward", False, False, False)) is not None


@pytest.mark.parametrize("learned", [False, True])
def test_finite_differences_are_judged_along_the_covariance_s_own_directions(learned: bool) -> None:
    """A model that wriggles between neighbouring pixels is smooth to perturbations which all pixels share."""

    class Wriggles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fine, self.coarse = nn.Linear(SIZE**2, CLASSES), nn.Linear(1, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            mean = x.mean((1, 2, 3), keepdim=True)
            return self.fine(1e-2 * torch.sin(1e4 * (x - mean)).flatten(1)) + self.coarse(torch.tanh(mean).flatten(1))

    images, labels = batch()
    model, ones = Wriggles(), torch.ones(1, 1, CovarianceFunction(1, SIZE).values.shape[-1])
    covariance = CovarianceFunction.from_values(ones, SIZE, psd="none")
    if learned:
        covariance = CovarianceFunction(1, SIZE, psd="none")
        covariance.update(torch.ones(4, 1, SIZE, SIZE))
    found = []
    for method in ("finite-difference", "double-backward"):
        model.zero_grad()
        SGRLoss(covariance, 10.0, perturbation=None, method=method)(model, images.float(), labels).backward()
        found.append(gradients(model))
    assert (found[0] - found[1]).norm() <= 0.2 * found[1].norm()  # rounding of single precision
    for other in (IdentityCovariance(), CovarianceFunction(1, SIZE)):  # one that is zero as yet says nothing
        with pytest.raises(PenaltyGradientError, match="finite differences lose"):
            SGRLoss(other, 10.0, perturbation=None, method="finite-difference")(model, images.float(), labels)
