"""What attacks do with bad and with degenerate input: clear errors or defined results, never NaN."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from sgr_kernels.attacks import correlated_noise, deepfool, fgm, fgsm, pgd, uniform_noise
from tests.attack_models import Linear, convolutional, exponential, images_like, linear

COVARIANCE = exponential((2, 3, 3), 2.0)
WITH_EPS = {
    "uniform_noise": functools.partial(uniform_noise, draws=2),
    "fgm": fgm,
    "fgsm": fgsm,
    "pgd": functools.partial(pgd, steps=2),
    "correlated_noise": functools.partial(correlated_noise, covariance=COVARIANCE, draws=3),
}
ALL = {name: functools.partial(attack, eps=0.1) for name, attack in WITH_EPS.items()} | {"deepfool": deepfool}


@pytest.mark.parametrize("name", WITH_EPS)
@pytest.mark.parametrize("eps", [-0.1, float("nan"), float("inf"), [0.1, -1.0], []])
def test_bad_eps(name, eps):
    with pytest.raises(ValueError, match="eps: expected"):
        WITH_EPS[name](linear(), images_like(2), None, eps=eps)


@pytest.mark.parametrize("name", ["uniform_noise", "fgsm", "pgd"])
def test_eps_in_wrong_units_warns(name):
    with pytest.warns(UserWarning, match="8/255") as caught:
        WITH_EPS[name](linear(), images_like(2), None, eps=8)
    assert [warning.filename for warning in caught] == [__file__]  # the user's line, not one of the package


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((2, 2, 3, 3), 1.5), r"images: expected values in \[0, 1\], got \[1.5, 1.5\]"),
        (torch.full((2, 2, 3, 3), -0.1), "images: expected values in"),
        (torch.full((2, 2, 3, 3), float("nan")), "images: expected finite"),
        (torch.zeros(2, 2, 3, 3, dtype=torch.uint8), "images: expected a floating-point tensor, got torch.uint8"),
        (torch.zeros(3), "images: expected a batch"),
    ],
)
def test_bad_images(name, images, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ALL[name](linear(dtype=torch.float32), images, None)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-50.0, 205.0)])
def test_what_rounding_explains_is_clipped(name, dtype, bounds):
    """As resizing or an undone normalisation leaves it: 1 + 2.4e-7, or one unit in the last place."""
    model, spread = linear(dtype=torch.float32).to(dtype), bounds[1] - bounds[0]
    inside = bounds[0] + spread * images_like(2).to(torch.float32)
    inside[0, 0, 0], inside[1, 1, 2] = bounds
    inside = inside.to(dtype)
    rounding = max(2.4e-7 * spread, 0.75 * float(torch.finfo(dtype).eps) * spread)
    outside = inside + rounding * ((inside == bounds[1]).to(dtype) - (inside == bounds[0]).to(dtype))
    assert outside.max() > bounds[1]
    result = ALL[name](model, outside, None, bounds=bounds)
    assert torch.equal(result, ALL[name](model, inside, None, bounds=bounds))
    assert bounds[0] <= result.min()
    assert result.max() <= bounds[1]


def test_range_errors_print_enough_digits():
    with pytest.raises(ValueError, match=r"got \[0, 1\.00000\d"):
        fgsm(linear(dtype=torch.float32), torch.linspace(0, 1 + 2e-6, 36).reshape(2, 2, 3, 3), eps=0.1)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 4]), "labels: expected 0 to 3, got 0 to 4"),
        (torch.tensor([-1, 0]), "labels: expected 0 to 3"),
        (torch.tensor([0, 1, 2]), r"labels: expected shape \(2,\), got \(3,\)"),
        (torch.tensor([0.0, 1.0]), "labels: expected integer"),
        ([0, 1], "labels: expected a tensor of class indices, got list"),
    ],
)
def test_bad_labels(name, labels, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ALL[name](linear(), images_like(2), labels)


@pytest.mark.parametrize("name", ALL)
def test_probabilities_for_logits_warn(name):
    model = nn.Sequential(linear(), nn.Softmax(dim=1))
    with pytest.warns(UserWarning, match="probabilities") as caught:
        ALL[name](model, images_like(2), None)
    assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.parametrize("name", ["fgm", "fgsm", "pgd", "deepfool"])
@pytest.mark.parametrize("how", ["no_grad", "detach"])
def test_models_without_a_gradient(name, how):
    net = linear()

    def model(x):
        if how == "detach":
            return net(x.detach())
        with torch.no_grad():
            return net(x)

    with pytest.raises(ValueError, match="model: expected logits that are differentiable"):
        ALL[name](model, images_like(2), None)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(2,), (2, 1), (2, 4, 1), (3, 4)])
def test_outputs_that_are_not_logits(name, shape):
    with pytest.raises(ValueError, match="model: expected logits of shape"):
        ALL[name](lambda x: x.new_zeros(shape), images_like(2), None)


@pytest.mark.parametrize("name", ALL)
def test_outputs_that_are_not_finite(name):
    with pytest.raises(ValueError, match="model: expected finite logits, got NaN or infinity for 1 of 2"):
        ALL[name](lambda x: linear()(x) * torch.tensor([[1.0], [float("nan")]]), images_like(2), None)


@pytest.mark.parametrize("name", ["fgm", "fgsm", "pgd", "deepfool"])
def test_gradients_that_are_not_finite(name):
    """As from a standardisation without a guard, on a constant image."""
    net = linear()

    def model(x):
        return net(x + (0 * x).sqrt())

    with pytest.raises(ValueError, match="model: expected finite input gradients"):
        ALL[name](model, torch.full((1, 2, 3, 3), 0.5, dtype=torch.float64), None)


@pytest.mark.parametrize("name", ALL)
def test_identical_logits(name):
    model = Linear(torch.zeros(4, 18, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))
    images = images_like(3)
    result = ALL[name](model, images, None)
    assert result.isfinite().all()
    if name in ("fgm", "fgsm", "deepfool"):
        assert torch.equal(result, images)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_constant_images(name, value):
    result = ALL[name](linear(), torch.full((3, 2, 3, 3), value, dtype=torch.float64), None)
    assert result.isfinite().all()
    assert result.min() >= 0
    assert result.max() <= 1


@pytest.mark.parametrize("name", ALL)
def test_already_misclassified_images(name):
    model, images = linear(), images_like(6)
    wrong = (model(images).argmax(1) + 1) % 4
    result = ALL[name](model, images, wrong)
    assert result.isfinite().all()
    if name == "deepfool":
        assert torch.equal(result, images)
    if name != "fgsm" and name != "fgm":
        assert (model(result).argmax(1) != wrong).all()


@pytest.mark.parametrize("name", ALL)
def test_empty_batch(name):
    assert ALL[name](linear(), images_like(0), None).shape == (0, 2, 3, 3)


@pytest.mark.parametrize("name", ALL)
def test_one_image_and_any_strides(name):
    model, images = linear(), images_like(5)
    strided = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(ALL[name](model, strided, None), ALL[name](model, images, None))
    assert ALL[name](model, images[:1].expand(3, -1, -1, -1), None).shape == (3, 2, 3, 3)


@pytest.mark.parametrize("name", ALL)
def test_other_bounds(name):
    model, images = linear(), 200 * images_like(4) - 50
    attack = ALL[name] if name in ("deepfool", "correlated_noise") else functools.partial(ALL[name], eps=30.0)
    result = attack(model, images, None, bounds=(-50.0, 100.0))
    assert result.min() >= -50
    assert result.max() <= 100
    assert attack(model, images, None, bounds=None).isfinite().all()
    with pytest.raises(ValueError, match="bounds: expected"):
        attack(model, images, None, bounds=(1.0, 0.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "L1"}, "norm: expected 'Linf' or 'L2', got 'L1'"),
        ({"steps": 0}, "steps: expected a whole number >= 1"),
        ({"restarts": 1.5}, "restarts: expected a whole number"),
        ({"step_size": -0.1}, "step_size: expected a finite number > 0"),
        ({"step_size": float("inf")}, "step_size: expected a finite number > 0"),
        ({"restarts": 2, "random_start": False}, "restarts: expected 1 without random_start"),
    ],
)
def test_bad_pgd_options(options, message):
    with pytest.raises(ValueError, match=message):
        pgd(linear(), images_like(2), eps=0.1, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL)
def test_low_precision(name, dtype):
    model = convolutional(channels=2).to(dtype)
    result = (
        ALL[name](model, images_like(3, (2, 8, 8)).to(dtype), None)
        if name != "correlated_noise"
        else ALL[name](model, images_like(3, (2, 8, 8)).to(dtype), None, covariance=exponential((2, 8, 8), 2.0))
    )
    assert result.dtype == dtype
    assert result.isfinite().all()
