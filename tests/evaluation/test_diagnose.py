"""The diagnosis against quadrature, and the Taylor argument itself on a mixture with its Bayes classifier."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import sgr_kernels
from sgr_kernels import CovarianceFunction, IdentityCovariance
from sgr_kernels.evaluation import Diagnosis, diagnose
from sgr_kernels.evaluation.diagnose import StrengthRow
from tests.attack_models import Linear, convolutional, exponential, images_like, linear


def test_public_name():
    assert sgr_kernels.diagnose is diagnose


def test_measured_and_predicted_against_quadrature():
    """For two linear classes the noise enters through one Gaussian number, whose average is a quadrature."""
    model, images = linear(classes=2), images_like(40)
    labels = torch.randint(2, (40,), generator=torch.Generator().manual_seed(0))
    covariance = exponential((2, 3, 3), 2.0, variance=0.1)
    result = diagnose(model, [(images[:30], labels[:30]), (images[30:], labels[30:])], covariance, draws=400)

    normal = (model.weight[1] - model.weight[0]).detach()
    sign = 1.0 - 2 * labels.double()  # the loss is softplus(sign * (z_1 - z_0))
    margin = sign * (images.flatten(1) @ normal + (model.bias[1] - model.bias[0]).detach())
    variance = float(normal @ covariance.dense() @ normal)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    softplus = nn.functional.softplus
    clean = softplus(margin)
    omega = 0.5 * variance * torch.sigmoid(margin).square()
    assert result.cross_entropy == pytest.approx(float(clean.mean()), rel=1e-9)
    assert result.penalty == pytest.approx(float(omega.mean()), rel=1e-9)
    assert result.balanced_strength == pytest.approx(result.cross_entropy / result.penalty)
    for row in result.rows:
        noisy = sum(
            w * softplus(margin + math.sqrt(row.strength * variance) * x)
            for x, w in zip(nodes.tolist(), weights.tolist())
        ) / math.sqrt(2 * math.pi)
        exact = float((noisy - clean).mean())
        assert row.monte_carlo == pytest.approx(exact, rel=0.15)
        assert row.predicted == pytest.approx(row.strength * float(omega.mean()), rel=1e-9)
        assert row.ratio == pytest.approx(row.monte_carlo / row.predicted)


def mixture(n: int, covariance: torch.Tensor, shift: torch.Tensor) -> tuple[Linear, torch.Tensor, torch.Tensor]:
    """Two Gaussian classes of one covariance, and their Bayes classifier, which is linear."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (n,), generator=generator)
    root = torch.linalg.cholesky(covariance)
    points = torch.randn(n, len(shift), dtype=torch.float64, generator=generator) @ root.T
    points = points + (2 * labels.double() - 1)[:, None] * shift
    slope = 2 * torch.linalg.solve(covariance, shift)
    model = Linear(torch.stack([torch.zeros_like(slope), slope]), torch.zeros(2, dtype=torch.float64))
    return model, points.reshape(n, 1, 2, 2), labels


def test_prediction_holds_for_a_bayes_classifier_and_small_noise():
    """Eqs. 4 to 10: the averaged Hessian of the loss is the averaged square of its gradient."""
    spread = exponential((1, 2, 2), 2.0).dense()
    model, images, labels = mixture(20_000, spread, torch.tensor([0.6, -0.2, 0.3, 0.5], dtype=torch.float64))
    covariance = exponential((1, 2, 2), 1.0)
    result = diagnose(model, [(images, labels)], covariance, strengths=(0.003, 0.01, 3.0), draws=32)
    for row in result.rows[:2]:
        assert row.holds
        assert abs(row.monte_carlo - row.predicted) < 4 * row.standard_error + 0.03 * row.predicted
    assert result.rows[0].ratio == pytest.approx(1, abs=0.1)


def test_an_overconfident_classifier_is_told_apart():
    """Four times the Bayes logits: the loss is the same function, but no longer averages to its own curvature."""
    spread = exponential((1, 2, 2), 2.0).dense()
    model, images, labels = mixture(20_000, spread, torch.tensor([0.6, -0.2, 0.3, 0.5], dtype=torch.float64))
    model.weight.data *= 4
    result = diagnose(model, [(images, labels)], exponential((1, 2, 2), 1.0), strengths=(0.0001, 0.001), draws=16)
    assert all(row.differs and not row.holds for row in result.rows)
    assert result.suggested_strength is None
    assert "fails at strength 0.0001" in str(result)


def test_few_images_suggest_nothing():
    """An interval that holds both agreement and its opposite is no agreement."""
    spread = exponential((1, 2, 2), 2.0).dense()
    model, images, labels = mixture(60, spread, torch.tensor([0.6, -0.2, 0.3, 0.5], dtype=torch.float64))
    result = diagnose(model, [(images, labels)], exponential((1, 2, 2), 1.0), strengths=(0.01, 0.1), draws=4)
    assert not any(row.holds or row.differs for row in result.rows)
    assert result.suggested_strength is None
    assert str(result).count("  uncertain") == 2
    assert "take more images" in str(result)


def test_a_failure_beyond_an_uncertain_beginning_is_named():
    unclear, failing = StrengthRow(0.1, 2.0, 1.0, 1.0, False, False), StrengthRow(0.3, 9.0, 1.0, 3.0, False, True)
    assert "fails at strength 0.3" in str(Diagnosis(10, 1.0, 1.0, [unclear, failing], None))


def test_suggested_strength_is_the_end_of_an_unbroken_run():
    model, images = linear(classes=2), images_like(200)
    labels = model(images).argmax(1)
    result = diagnose(model, [(images, labels)], exponential((2, 3, 3), 2.0), draws=64, tolerance=1.0)
    held = [row.strength for row in result.rows if row.holds]
    failed = [row.strength for row in result.rows if not row.holds]
    if failed:
        held = [s for s in held if s < min(failed)]
    assert result.suggested_strength == (max(held) if held else None)
    assert [row.strength for row in result.rows] == sorted(row.strength for row in result.rows)


@pytest.mark.parametrize(
    "covariance",
    [CovarianceFunction.exponential(1, 8, 4.0, target_variance=0.1), IdentityCovariance(0.1, shape=(1, 8, 8))],
    ids=["exponential", "identity"],
)
def test_package_covariances(covariance):
    model = convolutional()
    images, labels = images_like(12, (1, 8, 8), dtype=torch.float32), torch.arange(12) % 4
    result = diagnose(model, [(images, labels)], covariance, draws=8)
    assert result.images == 12
    assert all(math.isfinite(row.monte_carlo) for row in result.rows)
    assert json.loads(json.dumps(result.to_dict()))["penalty"] == result.penalty
    assert str(result).count("\n") == len(result.rows) + 2 + (result.gradient_cosine is not None)
    assert all(module.training for module in model.modules())


def test_same_result_from_the_default_generator():
    model, data = convolutional(), [(images_like(6, (1, 8, 8), dtype=torch.float32), torch.arange(6) % 4)]
    covariance = CovarianceFunction.exponential(1, 8, 4.0)
    assert diagnose(model, data, covariance, draws=4) == diagnose(model, data, covariance, draws=4)


def test_kinks_are_found_and_smoothness_too():
    torch.manual_seed(0)
    rough = sgr_kernels.models.carlini_wagner("mnist")
    images, labels = torch.rand(32, 1, 28, 28), torch.arange(32) % 10
    covariance = IdentityCovariance(0.1, shape=(1, 28, 28))
    before = {name: value.clone() for name, value in rough.state_dict().items()}
    for model, advice in ((rough, "has kinks"), (sgr_kernels.models.smooth(rough), "no kinks")):
        result = diagnose(model, [(images, labels)], covariance, strengths=[0.1], draws=2)
        assert (result.gradient_cosine > 0.9) == (advice == "no kinks")
        assert advice in str(result)
        assert result.to_dict()["gradient_cosine"] == result.gradient_cosine
        assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in rough.state_dict().items())
    function = diagnose(lambda x: rough(x), [(images, labels)], covariance, strengths=[0.1], draws=2)
    assert function.gradient_cosine is None


@pytest.mark.parametrize(
    ("cosine", "words"),
    [
        (0.99998, "no kinks were met; every method serves"),  # GELU, the least of 21 trained networks
        (
            0.998,
            "has kinks (ReLU, max-pooling), unless it computes in low precision. Take an exact method: finite",
        ),  # plain ReLU
        (
            0.94,
            "has kinks (ReLU, max-pooling), unless it computes in low precision. Take an exact method: finite",
        ),  # the same
        (0.3, "Take an exact method. What the penalty flattens are"),  # trained with a penalty
    ],
)
def test_a_network_of_relus_is_not_called_smooth_for_having_few_kinks(cosine, words):
    assert words in str(Diagnosis(1, 1.0, 1.0, [], None, cosine))


def test_zero_gradients_predict_nothing():
    model = Linear(torch.zeros(3, 18, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    result = diagnose(
        model, [(images_like(4), torch.zeros(4, dtype=torch.int64))], exponential((2, 3, 3), 2.0), draws=2
    )
    assert result.penalty == 0
    assert result.balanced_strength == math.inf
    assert all(row.monte_carlo == 0 and math.isnan(row.ratio) for row in result.rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strengths": [0.1, 0.0]}, "strengths: expected"),
        ({"strengths": []}, "strengths: expected"),
        ({"draws": 0}, "draws: expected a whole number >= 1"),
        ({"tolerance": 0.0}, "tolerance: expected a finite number > 0"),
        ({"loader": []}, "loader: expected at least one image"),
        ({"loader": [(images_like(2) * float("nan"), torch.tensor([0, 1]))]}, "images: expected finite values"),
        ({"loader": [(images_like(2), torch.tensor([0, 9]))]}, "labels: expected 0 to 3"),
    ],
)
def test_bad_input(options, message):
    defaults = {"loader": [(images_like(2), torch.tensor([0, 1]))], "covariance": exponential((2, 3, 3), 2.0)}
    with pytest.raises(ValueError, match=message):
        diagnose(linear(), **{**defaults, **options})
