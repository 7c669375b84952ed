"""The standard evaluation and the perturbations' covariance, on models whose answers are known in closed form."""

import pytest
import torch
from torch import nn

from sgr_kernels.evaluation.perturbations import SOURCES, perturbation_covariance, perturbations
from sgr_kernels.evaluation.suite import Plan, evaluate, parts
from sgr_kernels.toeplitz.geometry import dense_matrix, even_from_radial


class MeanSign(nn.Module):
    """Class 1 if the mean pixel exceeds one half; logits linear in the image."""

    def forward(self, images):
        score = images.mean((1, 2, 3)) - 0.5
        return torch.stack([-score, score], 1)


@pytest.fixture(scope="module")
def batches():
    """Constant-mean images whose margins are known: image k has mean 0.5 + (k - 4.5) / 100."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(10, 1, 6, 6, generator=generator) * 0.2
    means = 0.5 + (torch.arange(10.0) - 4.5) / 100
    images = noise - noise.mean((1, 2, 3), keepdim=True) + means.view(-1, 1, 1, 1)
    labels = (means > 0.5).long()
    return [(images[:6], labels[:6]), (images[6:], labels[6:])]


@pytest.mark.parametrize("strong", [False, True])
def test_gradient_attacks_break_exactly_the_images_within_reach(batches, strong):
    plan = Plan(eps=(0, 4), pgd_steps=5, strong_pgd=strong, decay_lengths=(1.0, 8.0), noise_eps=(0.0, 50.0), draws=8)
    seen = []
    result = evaluate(MeanSign(), batches, plan, on_part=seen.append)
    assert result.clean.accuracy == [1.0]
    margins = (torch.arange(10.0) - 4.5).abs() / 100
    within = int((margins < 4 / 255).sum())
    assert list(result.attacks) == ["fgsm", "pgd", *(["strong pgd"] if strong else [])]
    for curve in result.attacks.values():
        assert curve.accuracy == [1.0, 1 - within / 10]
    for curve in result.noise.values():
        assert curve.accuracy[0] == 1
        assert curve.accuracy[1] < 0.5  # 8 draws, each of which decides at random
    assert len(seen) == parts(plan)
    again = evaluate(MeanSign(), batches, plan)
    assert again.to_dict() == result.to_dict()
    assert list(result.to_dict()["noise"]) == ["1", "8"]


@pytest.mark.parametrize("source", SOURCES)
def test_perturbations_have_the_gradients_direction(batches, source):
    images, labels = batches[0]
    found = perturbations(MeanSign(), images, labels, source, eps=0.01, generator=torch.Generator().manual_seed(0))
    assert found.shape == images.shape
    # The loss of class 0 rises with every pixel, that of class 1 falls.
    direction = (1 - 2 * labels.float()).view(-1, 1, 1, 1)
    if source == "gradient":
        assert ((found * direction) > 0).all()
        assert torch.allclose(found, found[:, :, :1, :1].expand_as(found))
    else:
        size = 1.0 if source == "sign" else 0.01
        assert torch.allclose(found, (direction * size).expand_as(found), atol=1e-6)


def test_perturbation_covariance_is_the_mean_over_all_images(batches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Tanh(), nn.Linear(48, 2))
    values = perturbation_covariance(model, batches, "gradient", eps=0.1)
    generator = torch.Generator()
    xi = torch.cat([perturbations(model, *batch, "gradient", eps=0.1, generator=generator) for batch in batches])
    moment = xi.flatten(1).double().T @ xi.flatten(1).double() / len(xi)
    size = (6, 6)
    bins = torch.eye(values.shape[2], dtype=torch.float64)
    for k, indicator in enumerate(bins):
        mask = dense_matrix(even_from_radial(indicator.view(1, 1, -1), size), size)
        assert float(values[0, 0, k]) == pytest.approx(float((moment * mask).sum() / mask.sum()), rel=1e-4, abs=1e-12)


def test_unknown_sources_and_empty_loaders_are_refused(batches):
    with pytest.raises(ValueError, match="source must be one of gradient, sign, fgsm, pgd, got 'noise'"):
        perturbation_covariance(MeanSign(), batches, "noise", eps=0.1)
    with pytest.raises(ValueError, match="at least one image"):
        perturbation_covariance(MeanSign(), [], "sign", eps=0.1)
