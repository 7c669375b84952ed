"""The paper's training methods: what each perturbs or penalizes, and the search for a strength."""

import math

import pytest
import torch
from torch import nn

from sgr_kernels.covariance import CovarianceFunction, FullCovariance
from sgr_kernels.loss import SGRLoss
from sgr_kernels.models import carlini_wagner
from sgr_kernels.penalty.norms import NormPenalty
from sgr_kernels.training.criteria import Augmented, with_fgsm, with_noise, with_pgd
from sgr_kernels.training.loop import Trainer
from sgr_kernels.training.methods import METHODS, Settings, build_criterion
from sgr_kernels.training.search import Trial, attack_area, choose, held_out, strength_search
from sgr_kernels.training.trained import load_model


@pytest.fixture
def batch(digits):
    images = digits.train.images[:12].float() / 255
    return images, digits.train.labels[:12]


def network():
    torch.manual_seed(3)
    return carlini_wagner("mnist")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_a_step(digits, method):
    trainer = Trainer(Settings("mnist", method=method, batch_size=8), digits)
    before = [p.clone() for p in trainer.model.parameters()]
    assert not trainer.run(1, progress=False, stop=lambda: True)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))


def test_smooth_networks_train_and_come_back(digits, tmp_path):
    settings = Settings("mnist", method="l1", strength=0.01, activation="gelu", pooling="average", batch_size=8)
    trainer = Trainer(settings, digits)
    assert isinstance(trainer.criterion.covariance, NormPenalty)
    trainer.run(1, out=tmp_path, progress=False)
    kinds = {type(module) for module in load_model(tmp_path)[0].modules()}
    assert {nn.GELU, nn.AvgPool2d} <= kinds
    assert not {nn.ReLU, nn.MaxPool2d} & kinds
    for option in ("activation", "pooling"):
        with pytest.raises(ValueError, match=f"{option} must be one of"):
            Settings("mnist", **{option: "sine"})


@pytest.mark.parametrize(
    ("method", "source"), [("sgr_grad", "gradient"), ("sgr_sign", "sign"), ("fgsm_sgr", "fgsm"), ("pgd_sgr", "pgd")]
)
def test_variants_of_sgr_estimate_from_their_own_perturbations(digits, method, source):
    settings = Settings("mnist", method=method, perturbation="deepfool")
    assert settings.perturbation == source
    assert build_criterion(settings, digits.train).perturbation == source


def test_the_exponential_variant_is_frozen_and_at_the_data_variance(digits):
    criterion = build_criterion(Settings("mnist", method="sgr_exp", decay_length=4.0), digits.train)
    assert isinstance(criterion, SGRLoss)
    assert criterion.covariance.frozen
    matrix = criterion.covariance.dense()
    variance = digits.train.pixel_variance()
    assert torch.allclose(matrix.diagonal(), torch.full((784,), variance), rtol=1e-4)
    assert float(matrix[0, 4]) == pytest.approx(variance * math.exp(-1), rel=1e-2)


def test_the_full_covariance_can_stand_in_for_the_function(digits):
    full = build_criterion(Settings("mnist", method="sgr_sign", covariance="full"), digits.train)
    assert isinstance(full.covariance, FullCovariance)
    with pytest.raises(ValueError, match="covariance must be one of"):
        Settings("mnist", covariance="half")


@pytest.mark.parametrize("criterion", [with_fgsm(0.2), with_pgd(0.2, 3)], ids=["fgsm", "pgd"])
def test_adversarial_training_perturbs_half_of_the_batch_within_the_ball(batch, criterion):
    images, labels = batch
    model = network()
    sizes = set()
    for _ in range(5):
        mixture = criterion.mixture(model, images, labels)
        change = (mixture - images).abs().flatten(1).amax(1)
        assert torch.equal(mixture[:6], images[:6])
        assert bool((change[6:] > 0).all())
        assert bool((change <= 0.2 + 1e-6).all())
        assert 0 <= float(mixture.min()) <= float(mixture.max()) <= 1
        sizes.add(round(float(change.max()), 6))
    assert len(sizes) == 5


def test_strengths_of_adversarial_training_are_uniform(batch):
    images, labels = batch
    seen = []

    def perturb(model, images, labels, eps, generator):
        seen.append(eps)
        return images

    criterion = Augmented(perturb, 2.0)
    for _ in range(400):
        criterion.mixture(None, images[:2], labels[:2])
    seen = torch.tensor(seen)
    assert float(seen.mean()) == pytest.approx(1.0, abs=0.15)
    assert float(seen.std()) == pytest.approx(2 / 12**0.5, abs=0.08)
    assert float(seen.max()) < 2.0


@pytest.mark.parametrize("criterion", [with_fgsm(0.2), with_pgd(0.2, 3)], ids=["fgsm", "pgd"])
def test_adversarial_training_starts_from_own_predictions_unless_labels_may_leak(batch, criterion):
    images, _ = batch
    model = network()
    with torch.no_grad():
        own = model(images).argmax(1)
    other = (own + 1) % 10

    def mixture(criterion, labels):
        torch.manual_seed(0)
        return criterion.mixture(model, images, labels)

    assert torch.equal(mixture(criterion, own), mixture(criterion, other))
    leaking = with_fgsm(0.2, true_labels=True)
    assert not torch.equal(mixture(leaking, own), mixture(leaking, other))


def test_noise_of_the_augmented_training_has_its_covariance():
    covariance = CovarianceFunction.exponential(1, 28, 6.0, target_variance=0.3)
    criterion = with_noise(0.5, covariance)
    assert criterion.covariance is covariance
    images = (torch.arange(784.0).remainder(2) / 2).view(1, 1, 28, 28).expand(3000, -1, -1, -1)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    generator = torch.Generator().manual_seed(0)
    noise = criterion.perturb(model, images, torch.zeros(3000, dtype=torch.int64), 0.5, generator) - images
    noise = noise / (0.5 * 0.25)  # eps times the image's standard deviation
    row = noise[:, 0, 14]
    assert float(row.square().mean()) == pytest.approx(1.0, rel=0.05)
    assert float((row[:, :-6] * row[:, 6:]).mean()) == pytest.approx(math.exp(-1), abs=0.05)


def test_in_evaluation_mode_nothing_is_perturbed(batch):
    images, labels = batch
    model, criterion = network(), with_pgd(0.3, 2).eval()
    expected = torch.nn.functional.cross_entropy(model(images), labels)
    assert torch.allclose(criterion(model, images, labels), expected)


def trial(strength, accuracy, area, allowed):
    return Trial(strength, accuracy, area, allowed)


def test_the_search_takes_the_most_robust_of_those_that_cost_little():
    trials = [trial(1, 0.97, 0.5, True), trial(3, 0.968, 0.6, True), trial(10, 0.9, 0.8, False)]
    assert choose(trials) == 3
    assert choose([trial(1, 0.7, 0.5, False), trial(3, 0.6, 0.6, False)]) == 1
    assert choose([trial(1, 0.9, 0.5, True), trial(3, 0.9, 0.5, True)]) == 1


def test_the_search_trains_plainly_for_its_yardstick(digits):
    settings = Settings("mnist", method="gn")
    accuracies = {0.0: 0.95, 1.0: 0.945, 10.0: 0.93}
    asked = []

    class Fixed(torch.nn.Module):
        def __init__(self, share):
            super().__init__()
            self.wrong = round((1 - share) * 100)

        def forward(self, images):
            answers = labels[: len(images)].clone()
            answers[: self.wrong] = (answers[: self.wrong] + 1) % 10
            return torch.nn.functional.one_hot(answers, 10).float()

    labels = digits.test.labels

    def train(trials):
        asked.extend((s.method, s.strength) for s in trials)
        return [Fixed(accuracies[s.strength]) for s in trials]

    found = strength_search(settings, [10.0, 1.0], digits.test, train, lambda model: model.wrong / 100)
    assert asked == [("clean", 0.0), ("gn", 1.0), ("gn", 10.0)]
    assert found.clean_accuracy == pytest.approx(0.95)
    assert [t.allowed for t in found.trials] == [True, False]
    assert found.strength == 1.0
    with pytest.raises(ValueError, match="no strength to search for"):
        strength_search(Settings("mnist", method="pgd"), [1.0], digits.test, train, lambda model: 0.0)


def test_validation_images_are_nobody_elses(digits):
    split = held_out(digits, 100, 50)
    assert (len(split.train), len(split.test)) == (100, 50)
    assert torch.equal(split.test.images, digits.train.images[150:])
    with pytest.raises(ValueError, match="do not suffice for 50 validation images and 160"):
        held_out(digits, 160, 50)


def test_stronger_attacks_leave_less_area(digits):
    model = network()
    few = digits.test.first(20)
    for attack in ("pgd", "noise"):
        weak, strong = (attack_area(model, few, attack, [eps], steps=3, draws=3) for eps in (0.0, 0.9))
        assert strong <= weak
