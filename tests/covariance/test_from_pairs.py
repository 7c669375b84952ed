"""The covariance of a corruption, from pairs of images."""

from __future__ import annotations

import pytest
import torch

from sgr_kernels import CovarianceFunction, SGRLoss, perturbations
from sgr_kernels.functional import displacement_covariance


def images(count, shape=(3, 10, 8), seed=0, dtype=torch.float64):
    return 0.2 + 0.4 * torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_white_noise_has_its_variance_at_zero_and_nothing_elsewhere():
    clean = images(4000)
    noise = 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1), dtype=clean.dtype)
    found = CovarianceFunction.from_pairs(clean, clean + noise)
    expected = torch.zeros_like(found.values)
    expected[:, :, 0] = 0.01 * torch.eye(3)
    # 4,000 images of 80 pixels; the last bins hold four pairs of an image.
    assert torch.allclose(found.values, expected, atol=5 * 0.01 / (4000 * 4) ** 0.5)
    assert torch.allclose(found.values[:, :, 0], expected[:, :, 0], atol=5 * 0.01 * (2 / (4000 * 80)) ** 0.5)
    assert found.frozen


@pytest.mark.parametrize("binning", ["rounded", "linear", "even", "offset"])
def test_brightness_has_a_constant_covariance_of_rank_one(binning):
    clean = images(5)
    found = CovarianceFunction.from_pairs(clean, clean + 0.3, binning=binning, psd="none")
    assert torch.allclose(found.dense(), torch.full((240, 240), 0.09, dtype=torch.float64), atol=1e-9)
    assert torch.linalg.matrix_rank(found.dense(), rtol=1e-6) == 1
    assert torch.allclose(found.mean, torch.full((3, 10, 8), 0.3, dtype=torch.float64))
    # About its mean nothing is left of it.
    centred = CovarianceFunction.from_pairs(clean, clean + 0.3, binning=binning, center=True, psd="none")
    assert float(centred.values.abs().max()) < 1e-12
    assert centred.scaled_mean() is None


def test_it_is_the_second_moment_of_the_difference_in_any_chunks():
    clean, corrupted = images(7), images(7, seed=3)
    for chunk in (1, 3, 1024):
        found = CovarianceFunction.from_pairs(clean, corrupted, chunk=chunk, target_variance=2.0)
        assert torch.allclose(found.values, displacement_covariance(corrupted - clean))
        assert float(found.dense().diagonal().mean()) == pytest.approx(2.0)
        assert torch.allclose(found.mean, (corrupted - clean).mean(0))
    moment = CovarianceFunction.from_images(corrupted - clean, center=True)
    assert torch.allclose(CovarianceFunction.from_pairs(clean, corrupted, center=True).values, moment.values)


def test_bytes_are_grey_levels_and_may_meet_floating_point():
    clean = torch.arange(0, 200, 2, dtype=torch.uint8).view(1, 1, 10, 10)
    for corrupted in (clean + 51, (clean + 51) / 255):
        found = CovarianceFunction.from_pairs(clean, corrupted, psd="none")
        assert torch.allclose(found.values, torch.full_like(found.values, 0.04))


def test_bad_pairs_are_named():
    clean = images(3)
    from_pairs = CovarianceFunction.from_pairs
    with pytest.raises(
        ValueError, match=r"corrupted: expected the shape of clean, \(3, 3, 10, 8\), got \(2, 3, 10, 8\)"
    ):
        from_pairs(clean, clean[:2])
    with pytest.raises(ValueError, match="corrupted: expected finite numbers, got NaN"):
        from_pairs(clean, clean * torch.nan)
    with pytest.raises(ValueError, match="clean: expected finite numbers"):
        from_pairs(clean / 0, clean)
    with pytest.raises(TypeError, match="corrupted: expected a real floating-point tensor"):
        from_pairs(clean, clean.long())
    with pytest.raises(ValueError, match="clean: expected at least one image, got none"):
        from_pairs(clean[:0], clean[:0])
    with pytest.raises(ValueError, match="chunk: expected a whole number >= 1, got 0"):
        from_pairs(clean, clean, chunk=0)
    with pytest.raises(ValueError, match="the penalty would always be zero"):
        from_pairs(clean, clean, target_variance=1.0)


def linear():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(240, 4)).double()


def shift(x):
    return x + torch.linspace(0, 0.5, 8, dtype=x.dtype)


@pytest.mark.parametrize("mean_correction", [False, True])
def test_the_loss_with_a_transform_is_that_with_its_covariance(mean_correction):
    """The first update sets the estimate; after it the running one and the one made by hand are the same."""
    batch, labels, model = images(6), torch.tensor([0, 1, 2, 3, 0, 1]), linear()
    running = SGRLoss(
        CovarianceFunction(3, (10, 8), target_variance=1.0).double(),
        0.7,
        perturbation=perturbations.from_transform(shift),
        mean_correction=mean_correction,
    )
    by_hand = SGRLoss(
        CovarianceFunction.from_pairs(batch, shift(batch), target_variance=1.0), 0.7, mean_correction=mean_correction
    )
    losses = [criterion(model, batch, labels) for criterion in (running, by_hand)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-9)
    gradients = [torch.autograd.grad(loss, model[1].weight)[0] for loss in losses]
    assert torch.allclose(*gradients, rtol=1e-8)
    # And it is a half of g^T Sigma g: gradients of a softmax of a linear network are known.
    if not mean_correction:
        weight, probabilities = model[1].weight, model(batch).softmax(1)
        g = weight[labels] - probabilities @ weight
        omega = 0.5 * ((g @ by_hand.covariance.dense()) * g).sum(1).mean()
        plain = torch.nn.functional.cross_entropy(model(batch), labels)
        assert losses[0].item() == pytest.approx((plain + 0.7 * omega).item(), rel=1e-8)


def test_a_transform_sees_a_copy_outside_any_graph():
    seen = []

    def fn(x):
        seen.append((x.requires_grad, torch.is_grad_enabled()))
        return x.mul_(0.5)

    batch = images(2)
    before = batch.clone()
    batch.requires_grad_()
    xi = perturbations.from_transform(fn)(linear(), batch, torch.tensor([0, 1]))
    assert seen == [(False, False)]
    assert torch.equal(batch, before)
    assert torch.allclose(xi, -0.5 * before)
    assert not xi.requires_grad


def test_a_random_transform_draws_anew_at_each_update():
    covariance = CovarianceFunction(3, (10, 8), decay=1.0).double()
    criterion = SGRLoss(covariance, 0.1, perturbation=perturbations.from_transform(lambda x: x + torch.randn_like(x)))
    found, model = [], linear()
    for _ in range(2):
        criterion(model, images(4), torch.tensor([0, 1, 2, 3])).backward()
        found.append(covariance.values.clone())
    assert not torch.equal(*found)


def test_bad_transforms_are_named():
    batch, labels = images(2), torch.tensor([0, 1])

    def called(fn):
        return perturbations.from_transform(fn)(linear(), batch, labels)

    with pytest.raises(TypeError, match="fn: expected a callable, images to corrupted images, got str 'fog'"):
        perturbations.from_transform("fog")
    with pytest.raises(TypeError, match=r"fn: expected floating-point images, got .*uint8"):
        called(lambda x: (x * 255).to(torch.uint8))
    with pytest.raises(TypeError, match="fn: expected floating-point images, got NoneType"):
        called(lambda x: None)
    with pytest.raises(
        ValueError, match=r"fn: expected images \(2, 3, 10, 8\) on cpu, as it was given, got \(2, 3, 5, 4\)"
    ):
        called(lambda x: x[:, :, ::2, ::2])
    with pytest.raises(ValueError, match="fn: expected finite images, got NaN or infinity"):
        called(lambda x: x / 0)
    # Images that are not finite themselves are the loss's affair.
    broken = batch.clone()
    broken[0, 0, 0, 0] = torch.nan
    assert perturbations.from_transform(lambda x: x + 1)(linear(), broken, labels).isnan().sum() == 1
    criterion = SGRLoss(
        CovarianceFunction(3, (10, 8)).double(), perturbation=perturbations.from_transform(lambda x: x[:1])
    )
    with pytest.raises(ValueError, match="fn: expected images"):
        criterion(linear(), batch, labels)
