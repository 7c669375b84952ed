"""Noise attacks: distribution, worst of k against brute force, independence of chunks and strengths."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from sgr_kernels import CovarianceFunction, FullCovariance
from sgr_kernels.attacks import correlated_noise, uniform_noise
from sgr_kernels.attacks.noise import mean_variance
from tests.attack_models import DenseCovariance, convolutional, exponential, images_like, linear

SHAPE = (2, 4, 4)


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat():
    """Where the draws are not selected, any model will do."""
    return linear(shape=SHAPE)


def test_uniform_noise_is_uniform():
    images = torch.full((500, *SHAPE), 0.5, dtype=torch.float64)
    noise = (uniform_noise(flat(), images, eps=0.2) - images).flatten()
    assert noise.abs().max() <= 0.2
    n = noise.numel()
    assert abs(float(noise.mean())) < 5 * 0.2 / (3 * n) ** 0.5
    assert abs(float(noise.square().mean()) - 0.04 / 3) < 5 * 0.04 * (4 / 45 / n) ** 0.5
    quartiles = noise.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    assert (quartiles - torch.tensor([-0.1, 0.0, 0.1])).abs().max() < 5 * 0.2 / n**0.5


def estimated() -> CovarianceFunction:
    """A running estimate from a few fields, clipped, in float64."""
    covariance = CovarianceFunction(2, 4, binning="linear").double()
    covariance.update(torch.randn(50, *SHAPE, dtype=torch.float64, generator=seeded()).cumsum(-1))
    return covariance


@pytest.mark.parametrize(
    "covariance",
    [
        exponential(SHAPE, 3.0),
        exponential(SHAPE, 3.0, variance=0.04),
        CovarianceFunction.exponential(2, 4, 3.0),
        CovarianceFunction.exponential(2, 4, 3.0, target_variance=0.1),
        estimated(),
    ],
    ids=["dense", "dense, scaled", "exponential", "exponential, scaled", "estimated"],
)
def test_correlated_noise_has_the_covariance(covariance):
    """Normalised to unit mean diagonal, in units of the image's standard deviation."""
    image = images_like(1, SHAPE)
    images = image.expand(20_000, *SHAPE)
    noise = correlated_noise(flat(), images, None, covariance=covariance, eps=0.3, draws=1, clip=False) - images
    spread = float(image.std(correction=0))
    empirical = noise.flatten(1).T @ noise.flatten(1) / len(noise) / (0.3 * spread) ** 2
    expected = covariance.dense() / covariance.dense().diagonal().mean()
    # A product of Gaussians has a standard error of at most sqrt(2 / n) = 0.01 times their variance.
    assert (empirical - expected).abs().max() < 0.055 * expected.max()
    assert noise.flatten(1).mean(0).abs().max() / (0.3 * spread) < 0.04 * expected.max()


def test_mean_variance():
    root = torch.randn(32, 32, dtype=torch.float64, generator=seeded())
    nonstationary = DenseCovariance(root @ root.T, SHAPE)
    for covariance in (nonstationary, estimated(), CovarianceFunction.exponential(2, 4, 3.0), FullCovariance(2, 4)):
        if isinstance(covariance, FullCovariance):
            covariance.update(torch.rand(20, *SHAPE, generator=seeded()))
        expected = float(covariance.dense().diagonal().mean())
        assert mean_variance(covariance, torch.Size(SHAPE), torch.device("cpu")) == pytest.approx(expected, rel=1e-5)


class Recorded:
    """A covariance that keeps what it drew."""

    def __init__(self, covariance: DenseCovariance) -> None:
        self.covariance, self.drawn = covariance, []

    def quadratic_form(self, gradient):
        return self.covariance.quadratic_form(gradient)

    def sample(self, n, generator=None):
        noise = self.covariance.sample(n, generator)
        self.drawn.append(noise)
        return noise


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize(("eps", "classes"), [(0.3, 4), (1.0, 4), (3.0, 4), (1.0, 40)])
def test_worst_of_draws_against_brute_force(early_stop, eps, classes):
    """With many near classes the largest loss need not be a misclassification."""
    model, images = linear(classes=classes, shape=SHAPE), images_like(30, SHAPE)
    if classes == 40:
        model.weight.data *= 0.1
    labels = torch.randint(classes, (30,), generator=seeded())
    labels[:25] = model(images).argmax(1)[:25]
    recorded = Recorded(exponential(SHAPE, 2.0))
    kept = correlated_noise(
        model, images, labels, covariance=recorded, eps=eps, draws=25, early_stop=early_stop, generator=seeded()
    )
    draws = torch.cat([block.unflatten(0, (30, -1)) for block in recorded.drawn[1:]], dim=1)
    spread = images.flatten(1).std(1, correction=0)
    for i in range(30):
        noisy = (images[i] + eps * spread[i] * draws[i]).clamp(0, 1)
        logits = model(noisy).detach()
        loss = cross_entropy(logits, labels[i].expand(len(noisy)), reduction="none")
        wrong = logits.argmax(1) != labels[i]
        if early_stop and wrong.any():
            expected = int(wrong.float().argmax())
        elif wrong.any():
            expected = int(loss.where(wrong, torch.tensor(-1.0, dtype=loss.dtype)).argmax())
        else:
            expected = int(loss.argmax())
        torch.testing.assert_close(kept[i], noisy[expected], rtol=0, atol=1e-12)


def test_early_stop_breaks_the_same_images_with_less_work():
    seen = 0

    def model(x):
        nonlocal seen
        seen += len(x)
        return net(x)

    net, images = linear(classes=4, shape=SHAPE), images_like(40, SHAPE)
    labels, verdicts, costs = net(images).argmax(1), [], []
    for stop in (True, False):
        seen = 0
        options = {"covariance": exponential(SHAPE, 2.0), "eps": 2.0, "draws": 60, "early_stop": stop}
        verdicts.append(net(correlated_noise(model, images, labels, **options)).argmax(1) == labels)
        costs.append(seen)
    assert torch.equal(*verdicts)
    assert costs[0] < costs[1] / 2


@pytest.mark.parametrize("draws", [1, 7, 10, 23])
def test_chunk_size_does_not_matter(draws):
    model, images = convolutional(channels=2).double(), images_like(9, (2, 8, 8))
    covariance = exponential((2, 8, 8), 3.0)
    runs = [
        correlated_noise(model, images, None, covariance=covariance, eps=0.7, draws=draws, chunk_size=chunk)
        for chunk in (1, 16, 1000)
    ]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[1], runs[2])
    runs = [uniform_noise(model, images, None, eps=0.2, draws=draws, chunk_size=chunk) for chunk in (1, 16, 1000)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[1], runs[2])


def test_chunks_are_as_large_as_allowed():
    sizes = []

    def model(x):
        sizes.append(len(x))
        return net(x)

    net, images = linear(shape=SHAPE), images_like(20, SHAPE)
    for chunk, expected in ((40, [20, 40, 40, 40, 40, 40]), (1000, [20, 200]), (1, [20] + 200 * [1])):
        sizes.clear()
        correlated_noise(model, images, None, covariance=exponential(SHAPE, 2.0), eps=0.1, draws=10, chunk_size=chunk)
        assert sizes == expected


def test_strengths_share_their_draws_and_equal_separate_calls():
    model, images, grid = (
        convolutional(channels=2),
        images_like(9, (2, 8, 8), dtype=torch.float32),
        [0.0, 0.1, 0.5, 2.0],
    )
    recorded = Recorded(exponential((2, 8, 8), 3.0))
    options = {"covariance": recorded, "draws": 30}
    together = correlated_noise(model, images, None, eps=grid, generator=seeded(), **options)
    drawn = len(recorded.drawn)
    assert drawn == 4  # one to see the shape, then three blocks
    for eps, one in zip(grid, together):
        assert torch.equal(one, correlated_noise(model, images, None, eps=eps, generator=seeded(), **options))
    together = uniform_noise(model, images, eps=grid[:3], draws=12, generator=seeded())
    for eps, one in zip(grid, together):
        assert torch.equal(one, uniform_noise(model, images, eps=eps, draws=12, generator=seeded()))


@pytest.mark.parametrize("eps", [0.0, 0.1, 5.0])
def test_the_generator_moves_on_by_the_same_amount(eps):
    """Whatever the strength and however early the search could stop."""
    model, images, after = linear(shape=SHAPE), images_like(5, SHAPE), []
    for strength in (eps, 0.5):
        for attack in (correlated_noise, uniform_noise):
            generator = seeded()
            extra = {"covariance": exponential(SHAPE, 2.0)} if attack is correlated_noise else {}
            attack(model, images, None, eps=min(strength, 0.9), draws=30, generator=generator, **extra)
            after.append(float(torch.rand((), generator=generator)))
    assert len(set(after)) == 1


def test_zero_eps_is_bit_for_bit():
    images = images_like(5, SHAPE)
    images[0] = -0.0
    options = {"covariance": exponential(SHAPE, 2.0)}
    for result in (uniform_noise(flat(), images, eps=0), correlated_noise(flat(), images, None, eps=0, **options)):
        assert torch.equal(result.view(torch.int64), images.view(torch.int64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_uniform_noise_stays_in_its_ball(dtype):
    images = torch.rand(200, *SHAPE, generator=seeded()).to(dtype)
    for eps in (1e-3, 8 / 255, 0.5):
        noisy = uniform_noise(flat(), images, eps=eps)
        assert (noisy.double() - images.double()).abs().max() <= eps + 6e-8
        assert noisy.min() >= 0
        assert noisy.max() <= 1


def test_clipping_is_an_option():
    images, options = images_like(20, SHAPE), {"covariance": exponential(SHAPE, 2.0), "eps": 5.0, "draws": 3}
    clipped = correlated_noise(flat(), images, None, **options)
    assert clipped.min() == 0
    assert clipped.max() == 1
    free = correlated_noise(flat(), images, None, clip=False, **options)
    assert free.min() < 0
    assert free.max() > 1


def test_constant_images_have_no_scale_and_stay():
    images = torch.full((3, *SHAPE), 0.5, dtype=torch.float64)
    assert torch.equal(correlated_noise(flat(), images, None, covariance=exponential(SHAPE, 2.0), eps=1.0), images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 0}, "draws: expected a whole number >= 1"),
        ({"chunk_size": 0}, "chunk_size: expected a whole number >= 1"),
        ({"covariance": exponential((2, 3, 3), 2.0)}, "covariance: expected"),
    ],
)
def test_bad_options(options, message):
    defaults = {"covariance": exponential(SHAPE, 2.0), "eps": 0.1}
    with pytest.raises(ValueError, match=message):
        correlated_noise(flat(), images_like(2, SHAPE), None, **{**defaults, **options})


def test_zero_covariance():
    class Zero(DenseCovariance):
        def quadratic_form(self, gradient):
            return torch.zeros(len(gradient))

    covariance = Zero(torch.eye(32, dtype=torch.float64), SHAPE)
    with pytest.raises(ValueError, match="covariance: expected a positive mean variance"):
        correlated_noise(flat(), images_like(2, SHAPE), None, covariance=covariance, eps=0.1)
