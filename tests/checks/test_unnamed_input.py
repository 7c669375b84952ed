"""What attacks, evaluations and trainings say of arguments of a wrong kind: which one, what was expected, what came."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

import sgr_kernels as sgr
from sgr_kernels.attacks import deepfool, fgsm, pgd, uniform_noise
from sgr_kernels.evaluation import diagnose, robustness_curve, sanity_report
from sgr_kernels.evaluation.perturbations import SOURCES, perturbation_covariance, perturbations
from sgr_kernels.evaluation.suite import Plan, evaluate
from sgr_kernels.models import carlini_wagner
from sgr_kernels.training.batches import Batches
from sgr_kernels.training.criteria import CrossEntropy, with_fgsm, with_pgd
from sgr_kernels.training.datasets import load
from sgr_kernels.training.methods import Settings
from sgr_kernels.training.search import strength_search
from sgr_kernels.training.trained import accuracy
from tests.attack_models import exponential, images_like, linear

MODEL, IMAGES, LABELS = linear(), images_like(2), torch.tensor([0, 1])
LOADER, SIGMA = [(IMAGES, LABELS)], exponential((2, 3, 3), 2.0)
BYTES = torch.zeros(2, 2, 3, 3, dtype=torch.uint8)
GN = Settings("mnist", method="gn")

NUMBERS = {
    "fgsm: eps": lambda value: fgsm(MODEL, IMAGES, eps=value),
    "noise: eps": lambda value: uniform_noise(MODEL, IMAGES, eps=[0.1, value]),
    "pgd: step_size": lambda value: pgd(MODEL, IMAGES, eps=0.1, norm="L2", step_size=value),
    "deepfool: overshoot": lambda value: deepfool(MODEL, IMAGES, overshoot=value),
    "curve: eps": lambda value: robustness_curve(MODEL, LOADER, fgsm, [value]),
    "sanity: eps": lambda value: sanity_report(MODEL, LOADER, eps=value),
    "covariance: eps": lambda value: perturbation_covariance(MODEL, LOADER, "fgsm", eps=value),
    "diagnose: strengths": lambda value: diagnose(MODEL, LOADER, SIGMA, strengths=[value]),
    "diagnose: tolerance": lambda value: diagnose(MODEL, LOADER, SIGMA, tolerance=value),
    "search: strengths": lambda value: strength_search(GN, [value], load("mnist-sample").test, None, None),
    "settings: strength": lambda value: Settings("mnist", strength=value),
    "settings: eps": lambda value: Settings("mnist", eps=value if value is not None else "0"),
}


@pytest.mark.parametrize("value", [None, "0.1", torch.ones(2, 2), {"a": 1}, True, 1e39, float("nan"), -1.0], ids=str)
@pytest.mark.parametrize("argument", NUMBERS)
def test_numbers(argument, value):
    name = argument.partition(": ")[2]
    if (argument, value) == ("pgd: step_size", None) or (argument.startswith("settings") and str(value) == "1e+39"):
        pytest.skip("no step size means the default; settings are checked for use where an attack takes them")
    with pytest.raises((TypeError, ValueError)) as error:
        NUMBERS[argument](value)
    message = str(error.value)
    assert re.match(rf"{name}(: expected| must be) a (finite )?number", message), message
    assert "got" in message


def test_a_report_is_of_one_strength():
    with pytest.raises(TypeError, match="eps: expected a number, got list"):
        sanity_report(MODEL, LOADER, eps=[0.1, 0.2])


@pytest.mark.parametrize("bounds", [1.0, "01", (0, 1, 2), {"low": 0}, torch.tensor([0.0, 1.0])])
def test_bounds(bounds):
    with pytest.raises(TypeError, match=r"bounds: expected \(low, high\) or None, got"):
        fgsm(MODEL, IMAGES, eps=0.1, bounds=bounds)


class Answers(nn.Module):
    """A model with outputs of another kind than logits."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, images):
        return self.answer(MODEL(images))


ASKED = {
    **{source: lambda m, source=source: perturbation_covariance(m, LOADER, source, eps=0.1) for source in SOURCES},
    "accuracy": lambda m: accuracy(m, LOADER),
    "cross-entropy": lambda m: CrossEntropy()(m, IMAGES, LABELS),
    "adversarial training": lambda m: with_fgsm(0.1)(m, IMAGES, LABELS),
    "curve": lambda m: robustness_curve(m, LOADER, fgsm, [0.1]),
    "diagnose": lambda m: diagnose(m, LOADER, SIGMA, draws=2),
}


@pytest.mark.parametrize(
    "answer",
    [lambda z: (z,), lambda z: {"logits": z}, lambda z: None, lambda z: z[0]],
    ids=["tuple", "dict", "None", "1d"],
)
@pytest.mark.parametrize("asked", ASKED)
def test_outputs(asked, answer):
    with pytest.raises((TypeError, ValueError), match=r"(model|outputs): expected logits"):
        ASKED[asked](Answers(answer))


GIVEN = {
    "gradient": lambda x, y: perturbations(MODEL, x, y, "gradient", eps=0.1, generator=torch.Generator()),
    "accuracy": lambda x, y: accuracy(MODEL, [(x, y)]),
    "cross-entropy": lambda x, y: CrossEntropy()(MODEL, x, y),
    "adversarial training": lambda x, y: with_pgd(0.1, 2)(MODEL, x, y),
    "curve": lambda x, y: robustness_curve(MODEL, [(x, y)], fgsm, [0.1]),
    "diagnose": lambda x, y: diagnose(MODEL, [(x, y)], SIGMA, draws=2),
}


@pytest.mark.parametrize("labels", [[0, 1], LABELS.numpy(), None, LABELS[:1], LABELS + 7, LABELS - 1], ids=str)
@pytest.mark.parametrize("given", GIVEN)
def test_labels(given, labels):
    with pytest.raises((TypeError, ValueError), match=r"(labels: expected|loader: expected .*labels)"):
        GIVEN[given](IMAGES, labels)


@pytest.mark.parametrize(
    "given", ["gradient", "accuracy", "cross-entropy", "adversarial training", "curve", "diagnose"]
)
def test_images_of_bytes_are_to_be_divided(given):
    with pytest.raises(TypeError, match=r"images: expected .*floating-point tensor, got.* divide .*by 255"):
        GIVEN[given](BYTES, LABELS)


def test_a_network_wants_images_divided():
    with pytest.raises(TypeError, match=r"images: expected .* got \(1, 1, 28, 28\) torch.uint8; divide by 255"):
        carlini_wagner("mnist")(torch.zeros(1, 1, 28, 28, dtype=torch.uint8))


@pytest.mark.parametrize("seed", [2**64, -1, 0.5, None])
def test_seeds(seed):
    for ask in (
        lambda: perturbation_covariance(MODEL, LOADER, "fgsm", eps=0.1, seed=seed),
        lambda: evaluate(MODEL, LOADER, Plan([0], seed=seed)),
        lambda: Settings("mnist", seed=seed),
    ):
        with pytest.raises(ValueError, match=r"seed(: expected| must be) a whole number"):
            ask()


def test_batches_are_of_a_number_of_images():
    for wrong in (None, 0, 1.5, "8"):
        with pytest.raises(ValueError, match="batch_size: expected a whole number >= 1, got"):
            Batches(load("mnist-sample").test, wrong)


def test_whole_numbers_may_be_numpys() -> None:
    two, six = np.int64(2), np.uint8(6)
    images, labels = torch.rand(4, 2, 6, 6), torch.zeros(4, dtype=torch.int64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 3))
    own = sgr.CovarianceFunction(two, (six, six), max_displacement=two)
    assert own.shape == (2, 6, 6)
    assert all(type(extent) is int for extent in own.shape)
    assert sgr.CovarianceFunction(2, six).shape == sgr.FullCovariance(two, six).shape == (2, 6, 6)
    criterion = sgr.SGRLoss(own, 1.0, update_every=two, penalty_every=two, nonfinite_patience=six)
    criterion(model, images, labels).backward()
    assert sgr.attacks.pgd(model, images, labels, eps=0.1, steps=two, restarts=two).shape == images.shape
    for value in (np.bool_(True), np.float64(2), True):
        with pytest.raises(ValueError, match="steps: expected a whole number >= 1"):
            sgr.attacks.pgd(model, images, labels, eps=0.1, steps=value)
