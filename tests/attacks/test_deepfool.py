"""DeepFool against exact distances, a plain loop over one image, and the other published conventions."""

from __future__ import annotations

import math

import pytest
import torch

from sgr_kernels.attacks import deepfool, relative_norm
from sgr_kernels.attacks.inputs import norms
from tests.attack_models import Linear, convolutional, images_like, linear


def exact_distance(model: Linear, images: torch.Tensor) -> torch.Tensor:
    """Distance to the nearest decision boundary of a linear classifier, (B,)."""
    logits = model(images).detach()
    own = logits.argmax(1)
    distances = []
    for row, y in zip(logits, own.tolist()):
        slopes = (model.weight - model.weight[y]).detach().norm(dim=1)
        distances.append(min(float((row[y] - row[k]) / slopes[k]) for k in range(len(row)) if k != y))
    return torch.tensor(distances, dtype=torch.float64)


@pytest.mark.parametrize("classes", [2, 4, 12])
def test_exact_distance_on_linear_models(classes):
    model, images = linear(classes=classes), images_like(50)
    own = model(images).argmax(1)
    adversarial = deepfool(model, images, bounds=None)
    assert (model(adversarial).argmax(1) != own).all()
    moved, exact = norms(adversarial - images), exact_distance(model, images)
    # The logit slack of 1e-5 is the only excess beyond the overshoot.
    assert (moved >= 1.02 * exact - 1e-12).all()
    assert (moved <= 1.02 * (exact + 1e-4)).all()


def one_by_one(model, image, bounds, overshoot=0.02, max_iterations=50, candidates=10):
    """The loop of CleverHans 3.1 on one image (1, C, H, W), with the Jacobian by rows."""
    total = torch.zeros_like(image)
    with torch.no_grad():
        original = int(model(image).argmax())
    for _ in range(max_iterations):
        x = (image + total).clamp(*bounds)
        logits = model(x)[0].detach()
        if int(logits.argmax()) != original:
            break
        rows = torch.autograd.functional.jacobian(lambda z: model(z)[0], x)
        order = logits.argsort(descending=True)[:candidates].tolist()
        best, step = math.inf, None
        for k in order[1:]:
            w = rows[k] - rows[order[0]]
            distance = (abs(float(logits[k] - logits[order[0]])) + 1e-5) / float(w.norm())
            if distance < best:
                best, step = distance, distance * w / w.norm()
        total = total + step
    return (image + (1 + overshoot) * total).clamp(*bounds)


@pytest.mark.parametrize("candidates", [2, 3, 10])
@pytest.mark.parametrize("binary", [False, True])
def test_batched_equals_one_by_one(candidates, binary):
    """Binary images are clipped at every iterate, and some are never broken."""
    model, images = convolutional(classes=6).double().eval(), images_like(12, (1, 8, 8))
    images = images.round() if binary else images
    expected = torch.cat([one_by_one(model, image[None], (0.0, 1.0), candidates=candidates) for image in images])
    actual = deepfool(model, images, candidates=candidates)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    assert actual.min() >= 0
    assert actual.max() <= 1


def test_overshoot_is_a_relative_length():
    model, images = linear(), images_like(20)
    short, long = (norms(deepfool(model, images, overshoot=o, bounds=None) - images) for o in (0.0, 0.5))
    torch.testing.assert_close(long, 1.5 * short)


@pytest.mark.parametrize("convention", ["authors", "foolbox"])
def test_other_conventions_are_near_the_exact_distance(convention):
    model, images = linear(), images_like(50)
    own = model(images).argmax(1)
    adversarial = deepfool(model, images, convention=convention, bounds=None)
    assert (model(adversarial).argmax(1) != own).all()
    moved, exact = norms(adversarial - images), exact_distance(model, images)
    torch.testing.assert_close(moved, 1.02 * (exact + 1e-4), rtol=1e-9, atol=0)


def test_only_the_authors_convention_leaves_the_bounds():
    model, images = linear(), torch.ones(10, 2, 3, 3, dtype=torch.float64)
    assert deepfool(model, images, convention="authors").max() > 1
    assert deepfool(model, images, convention="foolbox").max() <= 1


def test_zero_iterations_return_the_images():
    images = images_like(3)
    assert torch.equal(deepfool(linear(), images, max_iterations=0), images)


def test_labels_are_the_reference():
    model, images = linear(), images_like(10)
    own = model(images).argmax(1)
    assert torch.equal(deepfool(model, images, own), deepfool(model, images))


def test_relative_norm():
    images = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    moved = torch.tensor([[3.0, 3.0], [0.0, 0.0], [1.0, 0.0]])
    assert relative_norm(images, moved).tolist() == [0.2, 0.0, math.inf]
    with pytest.raises(ValueError, match="adversarial: expected shape"):
        relative_norm(images, moved[:1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"convention": "art"}, "convention: expected one of"),
        ({"overshoot": -0.1}, "overshoot: expected a finite number >= 0"),
        ({"overshoot": float("inf")}, "overshoot: expected a finite number >= 0"),
        ({"candidates": 1}, "candidates: expected a whole number >= 2"),
        ({"max_iterations": -1}, "max_iterations: expected a whole number >= 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        deepfool(linear(), images_like(2), **options)
