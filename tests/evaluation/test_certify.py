"""Certificates: exact bounds, radii that are the truth's for linear classifiers, and what bad input is told."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from scipy.stats import beta
from torch import nn

from sgr_kernels import CovarianceFunction, FullCovariance, IdentityCovariance, NormPenalty
from sgr_kernels.evaluation import certify
from sgr_kernels.evaluation.certificates import CertificatePlan, certificates
from sgr_kernels.evaluation.certify import clopper_pearson_lower
from sgr_kernels.evaluation.smoothing import fewest_draws
from sgr_kernels.functional import covariance_quadratic_form

SHAPE = (1, 6, 6)


class Linear(nn.Module):
    """Class 1 where ``w . x + b > 0``; counts what it is asked, and keeps a buffer of it."""

    def __init__(self, weight: torch.Tensor, bias: float = 0.0) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), bias
        self.register_buffer("asked", torch.zeros((), dtype=torch.int64))
        self.sizes: list[int] = []

    def forward(self, images):
        self.sizes.append(len(images))
        self.asked += len(images)
        score = (images * self.weight).flatten(1).sum(1) + self.bias
        return torch.stack([-score, score], 1)


class InPlace(Linear):
    """Standardizes what it is given where that lies, as much of the code that people have does."""

    def forward(self, images):
        images -= 0.5
        images *= 2
        return super().forward(images)


@pytest.fixture
def covariance():
    return CovarianceFunction.exponential(1, (6, 6), 3.0)


@pytest.fixture
def linear():
    return Linear(torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)))


@pytest.fixture
def images():
    return torch.rand(12, *SHAPE, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("alpha", [0.05, 1e-3, 1e-9])
@pytest.mark.parametrize(
    ("successes", "trials"),
    [(1, 1), (10, 10), (0, 7), (1, 50), (51, 100), (999, 1000), (9_900, 10_000), (5_200, 10_000), (99_990, 100_000)],
)
def test_the_lower_bound_is_that_of_clopper_and_pearson(successes, trials, alpha):
    exact = beta.ppf(alpha, successes, trials - successes + 1) if successes else 0.0
    found = clopper_pearson_lower(successes, trials, alpha)
    assert found == pytest.approx(exact, rel=1e-8, abs=1e-12)
    if successes == trials:
        assert found == pytest.approx(alpha ** (1 / trials), rel=1e-12)


@pytest.mark.parametrize("alpha", [0.5, 0.1, 1e-3, 1e-6, 2.0**-10])
def test_the_fewest_draws_that_can_certify(alpha):
    needed = fewest_draws(alpha)
    assert clopper_pearson_lower(needed, needed, alpha) > 0.5
    assert needed == 1 or clopper_pearson_lower(needed - 1, needed - 1, alpha) <= 0.5 + 1e-12


def test_radii_of_a_linear_classifier_are_its_distances_to_the_boundary(linear, images, covariance):
    """With ``s^2 = w^T Sigma w`` the probability is ``Phi(|w x + b| / (sigma s))``, the radius ``|w x + b| / s``."""
    with torch.no_grad():
        score = linear(images)[:, 1]
    spread = covariance_quadratic_form(linear.weight.detach()[None], covariance.table).sqrt()
    exact = (score / spread).abs().double()
    sigma = 0.5 * float(exact.median())
    result = certify(linear, images, (score > 0).long(), covariance=covariance, sigma=sigma, draws=2000)
    answered = result.predictions >= 0
    assert answered.sum() >= 10
    assert torch.equal(result.predictions[answered], (score > 0).long()[answered])
    assert (result.radii <= exact + 1e-9).all()
    reached = NormalDist().inv_cdf(clopper_pearson_lower(2000, 2000, 1e-3)) * sigma
    assert result.largest_radius == pytest.approx(reached)
    assert float(result.radii.max()) <= reached
    inside = answered & (exact < 0.8 * reached)
    assert inside.any()
    assert (result.radii[inside] > exact[inside] - 0.4 * sigma).all()
    # the nearest point of the boundary lies along Sigma w, and at the radius that delta has in the covariance's units
    along = covariance.product(linear.weight.detach()[None])
    torch.testing.assert_close(covariance.mahalanobis(along * exact[0] / spread)[0].double(), exact[0])


def test_certificates_hold_as_often_as_they_say(linear, covariance):
    """One and the same image many times, alpha one fifth: about a fifth of the bounds are too high, and not more."""
    image = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(1)).expand(300, *SHAPE)
    with torch.no_grad():
        score = linear(image[:1])[0, 1].abs()
    spread = covariance_quadratic_form(linear.weight.detach()[None], covariance.table).sqrt()
    exact = float(score / spread)
    result = certify(linear, image, covariance=covariance, sigma=exact, draws=100, selection=20, alpha=0.2)
    wrong = float((result.radii > exact).double().mean())
    assert 0.1 < wrong < 0.2 + 3 * (0.2 * 0.8 / 300) ** 0.5


def test_the_same_numbers_whatever_the_chunk_size_and_one_pass_a_draw(linear, images, covariance):
    results = []
    for chunk_size in (1, 7, 130, 1000):
        linear.sizes.clear()
        options = {"covariance": covariance, "sigma": 0.3, "draws": 310, "selection": 30, "chunk_size": chunk_size}
        results.append(certify(linear, images, **options))
        assert max(linear.sizes[2:]) <= chunk_size
        assert sum(linear.sizes) <= 12 * 340 + 2 * 24
    for result in results[1:]:
        assert torch.equal(result.counts, results[0].counts)
        assert torch.equal(result.selected, results[0].selected)
        assert torch.equal(result.radii, results[0].radii)
    assert results[0].counts.dtype == torch.int64
    assert (results[0].counts.sum(1) == 310).all()


def test_the_model_and_the_streams_are_left_as_they_were(linear, images, covariance):
    linear.train()
    linear.weight.grad = torch.ones(SHAPE)
    seeds = []
    for _ in range(2):
        torch.manual_seed(0)
        certify(linear, images, covariance=covariance, sigma=0.3, draws=10, selection=1)
        seeds.append(torch.rand(1))
    assert linear.training
    assert int(linear.asked) == 0
    assert torch.equal(linear.weight.grad, torch.ones(SHAPE))
    torch.manual_seed(0)
    assert torch.equal(seeds[0], torch.rand(1))
    generator = torch.Generator().manual_seed(7)
    first = certify(linear, images, covariance=covariance, sigma=0.3, draws=50, generator=generator)
    second = certify(linear, images, covariance=covariance, sigma=0.3, draws=50, generator=generator)
    assert not torch.equal(first.counts, second.counts)


def test_a_network_that_writes_into_its_input_is_certified_as_its_twin(images, covariance):
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    kept = images.clone()
    options = {"covariance": covariance, "sigma": 0.4, "draws": 200, "selection": 20, "chunk_size": 50}
    found = certify(InPlace(weight, 0.1), images, **options)
    expected = certify(Linear(2 * weight, 0.1 - float(weight.sum())), images, **options)
    assert torch.equal(images, kept)
    assert torch.equal(found.counts, expected.counts)


def test_undecided_images_get_no_answer(covariance):
    """A coin's class: half of the draws each."""
    model = Linear(torch.ones(SHAPE))
    result = certify(model, torch.zeros(3, *SHAPE), covariance=covariance, sigma=1.0, draws=400, selection=1)
    assert torch.equal(result.predictions, torch.full((3,), -1))
    assert torch.equal(result.radii, torch.zeros(3, dtype=torch.float64))
    assert result.abstained == 1
    assert set(result.selected.tolist()) <= {0, 1}


def test_the_draws_that_select_do_not_certify(covariance):
    """Of a coin's draws the most frequent class has half or more; of fresh ones it has less as often as more."""
    model = Linear(torch.ones(SHAPE))
    result = certify(model, torch.zeros(60, *SHAPE), covariance=covariance, sigma=1.0, draws=51, selection=51)
    agreeing = result.counts.gather(1, result.selected[:, None])
    assert 0.3 < float((agreeing < 25.5).double().mean()) < 0.7


def test_certified_accuracy_counts_right_answers_beyond_the_radius(linear, images, covariance):
    with torch.no_grad():
        labels = linear(images).argmax(1)
    labels[:3] = 1 - labels[:3]
    result = certify(linear, images, labels, covariance=covariance, sigma=0.2, draws=200)
    right = (result.predictions == labels) & (result.predictions >= 0)
    radii = [0.0, float(result.radii.median()), 1e9]
    assert result.certified_accuracy(radii) == [
        float((right & (result.radii > radius)).double().mean()) for radius in radii
    ]
    assert result.certified_accuracy([0.0])[0] == float(right.double().mean())
    for share, (low, high) in zip(result.certified_accuracy(radii), result.interval(radii)):
        assert low <= share <= high
    assert result.mean_radius == pytest.approx(float((result.radii * right).mean()))
    record = result.to_dict()
    assert record["images"] == 12
    assert record["counts"] == result.counts.tolist()
    assert math.isfinite(record["mean_radius"])
    with pytest.raises(ValueError, match="radii: expected a finite number >= 0, got -1"):
        result.certified_accuracy([-1])
    unlabelled = certify(linear, images, covariance=covariance, sigma=0.2, draws=200)
    assert unlabelled.to_dict()["mean_radius"] is None
    with pytest.raises(ValueError, match="labels: expected the images' labels"):
        unlabelled.certified_accuracy([0.0])


def test_radii_in_units_of_a_person(linear, images, covariance):
    result = certify(linear, images, covariance=covariance, sigma=0.3, draws=100)
    inverse = torch.linalg.inv(covariance.dense().double())
    ones = torch.ones(36, dtype=torch.float64)
    torch.testing.assert_close(result.largest_shift(), result.radii / (ones @ inverse @ ones).sqrt(), rtol=1e-5, atol=0)
    delta = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    flat = delta.flatten().double()
    exact = result.radii / (flat @ inverse @ flat).sqrt()
    torch.testing.assert_close(result.largest_displacement(delta), exact, rtol=1e-5, atol=0)
    # volumes of ellipsoids are those of balls times the square root of the determinant
    volume = torch.linalg.det(covariance.dense().double()) ** (0.5 / 36)
    torch.testing.assert_close(result.volume_radius(), result.radii * volume, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="delta: expected a direction, got a length of 0"):
        result.largest_displacement(torch.zeros(SHAPE))


def test_white_noise_gives_the_radii_of_plain_smoothing(linear, images):
    """For the identity the radius is in L2; also as a full covariance."""
    full = FullCovariance(1, (6, 6), target_variance=0.25)
    full.update(6 * torch.eye(36).view(36, *SHAPE))
    white = IdentityCovariance(0.25, SHAPE)
    result = certify(linear, images, covariance=white, sigma=0.5, draws=200)
    torch.testing.assert_close(result.volume_radius(), result.radii / 2)
    torch.testing.assert_close(result.largest_shift(), result.radii / 2 / 6)
    same = certify(linear, images, covariance=full, sigma=0.5, draws=200)
    torch.testing.assert_close(same.volume_radius(), same.radii / 2, rtol=1e-5, atol=0)
    assert (result.radii - same.radii).abs().max() < 0.5


def test_rounding_beyond_the_bounds_is_clipped(linear, covariance):
    images = torch.ones(2, *SHAPE)
    options = {"covariance": covariance, "sigma": 0.5, "draws": 100}
    expected = certify(linear, images, **options)
    assert torch.equal(certify(linear, images + 2.4e-7, **options).counts, expected.counts)
    with pytest.raises(ValueError, match=r"images: expected values in \[0, 1\], got \[1, 1\.001\d*\]"):
        certify(linear, torch.cat([images[:1], images[:1] + 1e-3]), **options)
    certify(linear, images + 1, bounds=None, **options)


class Random(Linear):
    """Draws dropout's mask in evaluation, too."""

    def forward(self, images):
        return super().forward(nn.functional.dropout(images, 0.5, training=True))


class InCompany(Linear):
    """Normalizes by the batch's own statistics, as BatchNorm does in training mode; which a function may hide."""

    def forward(self, images):
        return super().forward((images - images.mean(0)) / (images.std(0, correction=0) + 0.1))


@pytest.mark.parametrize("count", [1, 2, 150])
def test_answers_that_depend_on_the_batch_are_refused(covariance, count):
    """Such a network is no function of an image: neither the draws nor the certificate would mean anything."""
    images = torch.full((count, *SHAPE), 0.5)
    network = InCompany(torch.ones(SHAPE), 0.3)
    with pytest.raises(ValueError, match=r"model: expected the same logits for the same images.*training mode"):
        certify(lambda x: network(x), images, covariance=covariance, sigma=1.0, draws=10)


def test_units_are_those_of_the_covariance_certified_with(linear, images):
    """Whatever updates come later."""
    covariance = CovarianceFunction(1, 6, binning="even")
    noise = torch.randn(200, *SHAPE, generator=torch.Generator().manual_seed(2))
    covariance.update(noise)
    result = certify(linear, images, covariance=covariance, sigma=0.3, draws=20)
    shift, volume, along = result.largest_shift(), result.volume_radius(), result.largest_displacement(noise[0])
    covariance.update(9 * noise)
    assert torch.equal(result.largest_shift(), shift)
    assert torch.equal(result.volume_radius(), volume)
    assert torch.equal(result.largest_displacement(noise[0]), along)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"sigma": 0.0}, r"sigma: expected a finite number > 0, got 0"),
        ({"sigma": -1.0}, r"sigma: expected"),
        ({"alpha": 0.0}, r"alpha: expected a number inside \(0, 1\), got 0"),
        ({"alpha": 1.0}, r"alpha: expected a number inside \(0, 1\), got 1"),
        ({"draws": 9}, r"draws: expected at least 10, got 9: .*alpha = 0.001"),
        ({"draws": 10.5}, r"draws: expected a whole number"),
        ({"selection": 0}, r"selection: expected a whole number >= 1, got 0"),
        ({"chunk_size": 0}, r"chunk_size: expected a whole number >= 1, got 0"),
        ({"labels": torch.tensor([0, 2])}, r"labels: expected 0 to 1, got 0 to 2"),
        ({"labels": torch.tensor([0])}, r"labels: expected shape \(2,\)"),
        ({"images": torch.zeros(0, *SHAPE)}, r"images: expected at least one image, got none"),
        ({"images": torch.full((2, *SHAPE), float("nan"))}, r"images: expected finite values, got NaN"),
        (
            {"covariance": CovarianceFunction.exponential(1, 7, 2.0)},
            r"covariance: expected samples of shape \(1, 6, 6\), got \(1, 7, 7\)",
        ),
        (
            {"covariance": CovarianceFunction.exponential(1, 6, 4.0, rounded=True, psd="none")},
            r'covariance: cannot draw samples, it is indefinite .*psd="clip"',
        ),
        ({"covariance": IdentityCovariance()}, r"shape: the identity's size is unknown"),
        ({"covariance": CovarianceFunction(1, 6)}, r"covariance: expected a positive variance, got draws of zero"),
        ({"covariance": FullCovariance(1, 6)}, r"covariance: expected a positive variance, got draws of zero"),
        ({"covariance": IdentityCovariance(0.0, SHAPE)}, r"covariance: expected a positive variance"),
        ({"model": Random(torch.ones(SHAPE))}, r"model: expected the same logits for the same images"),
        ({"model": lambda x: x.flatten(1) * float("nan")}, r"model: expected finite logits"),
        ({"model": lambda x: x}, r"model: expected logits of shape"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(changed, words, covariance):
    arguments = {
        "model": Linear(torch.ones(SHAPE)),
        "images": torch.full((2, *SHAPE), 0.5),
        "draws": 10,
        "selection": 1,
    }
    arguments |= {"covariance": covariance, "sigma": 1.0, **changed}
    model, images = arguments.pop("model"), arguments.pop("images")
    with pytest.raises(ValueError, match=words):
        certify(model, images, **arguments)


def test_integers_are_no_images_and_probabilities_no_labels(linear, covariance):
    with pytest.raises(TypeError, match="images: expected a floating-point tensor"):
        certify(linear, torch.zeros(2, *SHAPE, dtype=torch.uint8), covariance=covariance, sigma=1.0)
    with pytest.raises(TypeError, match="labels: expected integer class indices"):
        certify(linear, torch.zeros(2, *SHAPE), torch.zeros(2), covariance=covariance, sigma=1.0, draws=10)


@pytest.mark.parametrize("none", [None, torch.eye(36), NormPenalty()])
def test_what_is_no_covariance_is_named(linear, images, none):
    with pytest.raises(TypeError, match="covariance: expected a Covariance, such as CovarianceFunction, got "):
        certify(linear, images, covariance=none, sigma=1.0)


def test_a_plan_goes_on_image_by_image(linear, images):
    """Stopped anywhere and begun again, it comes to the same, and counts nothing twice."""
    other = Linear(-linear.weight.detach(), 0.3)
    models, labels = {"a": linear, "b": other}, torch.zeros(12, dtype=torch.int64)
    plan = CertificatePlan((1.0, 4.0), (0.2, 0.5), draws=50, selection=10)
    whole = certificates(models, images, labels, plan)
    seen, rows = [], {}

    def stop(key):
        seen.append(key)
        if len(seen) in (5, 30):
            raise InterruptedError

    for _ in range(2):
        with pytest.raises(InterruptedError):
            certificates(models, images, labels, plan, rows=rows, on_image=stop)
    resumed = certificates(models, images, labels, plan, rows=rows, on_image=stop)
    assert len(seen) == 2 * 4 * 12
    assert resumed.to_dict() == whole.to_dict()
    assert list(whole.found) == plan.keys(["a", "b"])
    # the noise is the same for all networks and, but for its scale, for all sigmas
    alone = certificates({"b": other}, images, labels, plan)
    assert torch.equal(alone.found["b", 4.0, 0.5].counts, whole.found["b", 4.0, 0.5].counts)
    with pytest.raises(ValueError, match="draws: expected at least 10"):
        certificates(models, images, labels, CertificatePlan(draws=5))
