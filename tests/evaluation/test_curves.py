"""Robustness curves: equal to separate runs, cheaper than them, and honest about their uncertainty."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from scipy.stats import norm as normal
from torch.utils.data import DataLoader, TensorDataset

from sgr_kernels.attacks import correlated_noise, fgm, fgsm, pgd, uniform_noise
from sgr_kernels.covariance import CovarianceFunction
from sgr_kernels.evaluation import (
    RobustnessCurve,
    certify,
    diagnose,
    robustness_curve,
    sanity_report,
    transfer_curves,
    wilson_interval,
)
from sgr_kernels.evaluation.perturbations import SOURCES, perturbation_covariance
from sgr_kernels.training.criteria import CrossEntropy
from sgr_kernels.training.trained import accuracy
from tests.attack_models import Linear, NormalizingInPlace, convolutional, exponential, linear

GRID = [0.0, 0.02, 0.1, 0.3]


def own_attack(model, images, labels, *, eps, generator):
    """Draws more numbers the stronger it is."""
    noise = torch.rand(int(1 + 10 * eps), *images.shape, generator=generator)[-1]
    return (images + 4 * eps * (2 * noise - 1)).clamp(0, 1)


ATTACKS = {
    "fgsm": fgsm,
    "fgm": fgm,
    "pgd": functools.partial(pgd, steps=4, restarts=2),
    "pgd early": functools.partial(pgd, steps=4, restarts=2, early_stop=True),
    "pgd targeted": functools.partial(pgd, steps=4, targeted=True),
    "uniform_noise": functools.partial(uniform_noise, draws=12),
    "correlated_noise": functools.partial(correlated_noise, covariance=exponential((1, 8, 8), 2.0), draws=15),
    "own": own_attack,
}


@pytest.fixture(scope="module")
def model():
    return convolutional()


@pytest.fixture(scope="module")
def data(model):
    """Labels that the model mostly agrees with."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(44, 1, 8, 8, generator=generator)
    with torch.no_grad():
        labels = model.eval()(images).argmax(1)
    model.train()
    labels[::6] = (labels[::6] + 1) % 4
    return images, labels


@pytest.fixture
def loader(data):
    return DataLoader(TensorDataset(*data), batch_size=16)


@pytest.mark.parametrize("name", ATTACKS)
def test_equals_separate_runs(name, model, loader):
    curve = robustness_curve(model, loader, ATTACKS[name], GRID, torch.Generator().manual_seed(3))
    assert curve.correct.shape == (4, 44)
    for eps, row in zip(GRID, curve.correct):
        alone = robustness_curve(model, loader, ATTACKS[name], [eps], torch.Generator().manual_seed(3))
        assert torch.equal(alone.correct[0], row)


@pytest.mark.parametrize("name", ATTACKS)
def test_rows_are_the_attack_itself(name, model, data):
    """One batch by hand: same generator, own prediction for gradient attacks, true labels for the others."""
    images, labels = data
    curve = robustness_curve(model, [data], ATTACKS[name], GRID, torch.Generator().manual_seed(3))
    gradient = name.startswith(("fg", "pgd"))
    assert curve.labels == ("own" if gradient else "true")
    model.eval()
    for eps, row in zip(GRID, curve.correct):
        given = None if gradient else labels
        adversarial = ATTACKS[name](model, images, given, eps=eps, generator=torch.Generator().manual_seed(3))
        assert torch.equal(model(adversarial).argmax(1) == labels, row)
    model.train()


def test_foreign_attacks_see_the_same_numbers_at_each_strength(model, loader):
    drawn = []

    def attack(model, images, labels, *, eps, generator):
        drawn.append(float(torch.rand((), generator=generator)))
        return images

    robustness_curve(model, loader, attack, GRID)
    by_batch = torch.tensor(drawn).reshape(len(loader), len(GRID))
    assert (by_batch == by_batch[:, :1]).all()
    assert len(set(by_batch[:, 0].tolist())) == len(loader)


def test_clean_row(model, loader, data):
    curve = robustness_curve(model, loader, fgsm, GRID)
    with torch.no_grad():
        expected = model.eval()(data[0]).argmax(1) == data[1]
    model.train()
    assert torch.equal(curve.clean, expected)
    assert torch.equal(curve.correct[0], expected)
    assert curve.clean_accuracy == curve.accuracy[0] == pytest.approx(float(expected.double().mean()))


def test_label_source_can_be_chosen(model, data):
    images, labels = data
    for source, given in (("own", None), ("true", labels)):
        curve = robustness_curve(model, [data], fgsm, [0.1], labels=source)
        model.eval()
        expected = model(fgsm(model, images, given, eps=0.1)).argmax(1) == labels
        model.train()
        assert torch.equal(curve.correct[0], expected)
        assert curve.labels == source


def test_transfer(model, loader, data):
    """The same adversarial images for every target; the source is the white-box case."""
    other = convolutional(seed=1)
    curves = transfer_curves(model, {"self": model, "other": other}, loader, fgsm, GRID)
    assert torch.equal(curves["self"].correct, robustness_curve(model, loader, fgsm, GRID).correct)
    images, labels = data
    model.eval(), other.eval()
    for eps, row in zip(GRID, curves["other"].correct):
        assert torch.equal(other(fgsm(model, images, eps=eps)).argmax(1) == labels, row)
    model.train()


class Counted(torch.nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.passes = body, 0

    def forward(self, x):
        self.passes += 1
        return self.body(x)


@pytest.mark.parametrize(("name", "factor"), [("fgsm", 3), ("fgm", 3), ("pgd", 8), ("uniform_noise", 8)])
def test_forward_passes_are_shared(name, factor, loader):
    """FGSM: one gradient for all strengths. PGD: only the clean predictions can be shared without changing results."""
    counted, grid = Counted(convolutional()), [0.01 * k for k in range(1, 9)]
    robustness_curve(counted, loader, ATTACKS[name], grid)
    together, counted.passes = counted.passes, 0
    apart = 0
    for eps in grid:
        robustness_curve(counted, loader, ATTACKS[name], [eps])
        apart += counted.passes
        counted.passes = 0
    assert together < apart
    assert together <= factor * apart / 8 + 2 * len(loader)


def test_model_is_left_in_training_mode_without_gradients(model, loader):
    robustness_curve(model, loader, own_attack, GRID)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_foreign_attacks_leave_no_gradients(model, loader):
    def foreign(model, images, labels, *, eps, generator):
        model(images).sum().backward()
        return images

    robustness_curve(model, loader, foreign, [0.1])
    assert all(p.grad is None for p in model.parameters())


def test_generator_is_used_and_moves_on(model, loader):
    attack = ATTACKS["pgd"]
    generator = torch.Generator().manual_seed(0)
    robustness_curve(model, loader, attack, GRID, generator)
    alone = torch.Generator().manual_seed(0)
    robustness_curve(model, loader, attack, GRID[:1], alone)
    assert torch.equal(generator.get_state(), alone.get_state())


def test_wilson_interval_solves_its_equation():
    """Its ends are the proportions from which the observed one is exactly z standard errors away."""
    for successes, trials, confidence in [(3, 10, 0.95), (50, 100, 0.9), (999, 1000, 0.99)]:
        z = normal.ppf(0.5 + confidence / 2)
        for p in wilson_interval(successes, trials, confidence):
            assert abs(successes / trials - p) == pytest.approx(z * (p * (1 - p) / trials) ** 0.5, rel=1e-9)
    assert wilson_interval(0, 10)[0] == pytest.approx(0, abs=1e-15)
    assert wilson_interval(10, 10)[1] == pytest.approx(1, abs=1e-15)
    with pytest.raises(ValueError, match="trials: expected"):
        wilson_interval(0, 0)
    with pytest.raises(ValueError, match="confidence: expected"):
        wilson_interval(1, 2, 95)


def test_summary():
    correct = torch.tensor([[True, True, True, False], [True, False, False, False]])
    curve = RobustnessCurve([0.0, 0.1], correct, correct[0], "fgsm", "own")
    assert curve.accuracy == [0.75, 0.25]
    assert curve.area == 0.5
    assert curve.interval() == [wilson_interval(3, 4), wilson_interval(1, 4)]
    summary = json.loads(json.dumps(curve.to_dict()))
    assert summary["accuracy"] == [0.75, 0.25]
    assert summary["images"] == 4


def test_linear_model_loses_exactly_the_images_within_reach():
    """Two classes, no clipping: FGSM breaks an image when eps ||w||_1 exceeds its margin."""
    model = linear(classes=2)
    normal_vector = (model.weight[1] - model.weight[0]).detach()
    images = 0.5 + 0.1 * torch.randn(200, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    margin = (images.flatten(1) @ normal_vector + (model.bias[1] - model.bias[0]).detach()).abs()
    labels = model(images).argmax(1)
    grid = [0.001, 0.01, 0.03]
    curve = robustness_curve(model, [(images.clamp(0, 1), labels)], fgsm, grid)
    for eps, row in zip(grid, curve.correct):
        assert torch.equal(row, margin > eps * normal_vector.abs().sum())


def test_bad_input(model, loader, data):
    with pytest.raises(ValueError, match="eps: expected"):
        robustness_curve(model, loader, fgsm, [])
    with pytest.raises(ValueError, match="loader: expected at least one image"):
        robustness_curve(model, [], fgsm, GRID)
    with pytest.raises(ValueError, match="loader: expected at least one image"):
        robustness_curve(model, [(data[0][:0], data[1][:0])], fgsm, GRID)
    for batch, kind in ((data[0], "Tensor"), ({"x": data[0]}, "dict"), ((data[0], [0]), r"\(Tensor, list\)")):
        with pytest.raises(TypeError, match=rf"loader: expected batches .* got {kind}"):
            robustness_curve(model, [batch], fgsm, GRID)
    with pytest.raises(ValueError, match="labels: expected 'auto'"):
        robustness_curve(model, loader, fgsm, GRID, labels="both")
    with pytest.raises(ValueError, match="labels: expected 0 to 3"):
        robustness_curve(model, [(data[0], data[1] + 4)], fgsm, GRID)


def test_loaders_may_yield_more_and_empty_batches(model, data):
    images, labels = data
    plain = robustness_curve(model, [data], fgsm, GRID)
    more = robustness_curve(model, [(images[:0], labels[:0]), (images, labels, torch.arange(44))], fgsm, GRID)
    assert torch.equal(more.correct, plain.correct)


@pytest.mark.parametrize("shuffle", [False, True])
def test_loaders_do_not_move_the_global_stream(shuffle, model, data):
    """A DataLoader draws a seed from it whenever it is gone through."""
    loader, before = DataLoader(TensorDataset(*data), batch_size=16, shuffle=shuffle), torch.get_rng_state()
    robustness_curve(model, loader, fgsm, GRID)
    assert torch.equal(torch.get_rng_state(), before)
    sanity_report(model, loader, eps=0.1, steps=1, max_images=8)
    assert torch.equal(torch.get_rng_state(), before)


def test_callable_objects_are_attacks(model, loader):
    class Doubling:
        __hash__ = None

        def __call__(self, model, images, labels, *, eps, generator):
            return fgsm(model, images, labels, eps=min(1.0, 2 * eps))

    curve = robustness_curve(model, loader, Doubling(), [0.1])
    assert curve.attack == "Doubling"
    assert torch.equal(curve.correct, robustness_curve(model, loader, fgsm, [0.2], labels="true").correct)


def test_plain_functions_are_models():
    model = linear()
    images = torch.rand(5, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(5, dtype=torch.int64)
    assert isinstance(model, Linear)
    one = robustness_curve(lambda x: model(x), [(images, labels)], fgsm, GRID)
    assert torch.equal(one.correct, robustness_curve(model, [(images, labels)], fgsm, GRID).correct)


def writing_attack(model, images, labels, *, eps, generator):
    """Perturbs in place, as much of the code that people have does, and uses up its labels."""
    labels.zero_()
    return images.add_(eps * torch.rand(images.shape, generator=generator)).clamp_(0, 1)


@pytest.mark.parametrize("name", ["pgd", "uniform_noise", "correlated_noise", "writing"])
def test_models_and_attacks_may_write_into_their_input(name, data):
    attack = {**ATTACKS, "writing": writing_attack}[name]
    images, labels = data
    before, true = images.clone(), labels.clone()
    bodies = {seed: convolutional(seed) for seed in (0, 1)}
    found = []
    for in_place in (False, True):
        targets = {seed: NormalizingInPlace(body, in_place) for seed, body in bodies.items()}
        curves = transfer_curves(targets[0], targets, [data], attack, GRID, torch.Generator().manual_seed(3))
        found.append(curves)
        assert torch.equal(images, before)
        assert torch.equal(labels, true)
    for seed in bodies:
        assert torch.equal(found[0][seed].correct, found[1][seed].correct)
        assert torch.equal(found[0][seed].clean, found[1][seed].clean)
    if name == "writing":  # each strength starts from the clean images
        alone = robustness_curve(targets[0], [data], attack, GRID[-1:], torch.Generator().manual_seed(3))
        assert torch.equal(alone.correct[0], found[1][0].correct[-1])


@pytest.mark.parametrize("ask", ["sanity", "diagnose", "accuracy", *SOURCES])
def test_other_evaluations_keep_the_images_too(ask, data):
    images, _ = data
    before = images.clone()
    answers = []
    for in_place in (False, True):
        model = NormalizingInPlace(convolutional().eval(), in_place)
        if ask == "sanity":
            answers.append(sanity_report(model, [data], eps=0.1, steps=2).to_dict())
        elif ask == "diagnose":
            answers.append(diagnose(model, [data], exponential((1, 8, 8), 2.0), strengths=[0.1], draws=2).to_dict())
        elif ask == "accuracy":
            answers.append(accuracy(model, [data]))
        else:
            answers.append(perturbation_covariance(model, [data], ask, eps=0.1).tolist())
        assert torch.equal(images, before)
    assert str(answers[0]) == str(answers[1])


@pytest.mark.parametrize("beyond", [2.4e-7, 1e-6])
def test_rounding_beyond_the_bounds_is_no_error(beyond, data):
    """Every way to an image's answer takes 1 + 2.4e-7 for 1, and refuses what rounding does not explain."""
    images, labels = (part[:6].clone() for part in data)
    images[0, 0, 0, 0], images[1, 0, 1, 1] = 1, 0
    outside = images.clone()
    outside[0, 0, 0, 0] += beyond
    outside[1, 0, 1, 1] -= beyond
    model, covariance = convolutional().eval(), CovarianceFunction.exponential(1, (8, 8), 2.0)

    def certified(images):
        found = certify(model, images, labels, covariance=covariance, sigma=0.1, draws=20, selection=5, alpha=0.01)
        return found.counts.tolist()

    ways = {
        "pgd": lambda x: robustness_curve(model, [(x, labels)], functools.partial(pgd, steps=2), [0.1]).to_dict(),
        "noise": lambda x: robustness_curve(model, [(x, labels)], uniform_noise, [0.1]).to_dict(),
        "sanity": lambda x: str(sanity_report(model, [(x, labels)], eps=0.1, steps=1)),
        "certify": certified,
    }
    for name, way in ways.items():
        if name != "certify":
            assert way(outside) == way(images), name
        else:
            certified(outside)
        with pytest.raises(ValueError, match=r"images: expected values in \[0, 1\]"):
            way(images + 0.01)


def test_plain_training_keeps_the_images_too(data):
    images, labels = data
    before = images.clone()
    losses = [
        CrossEntropy()(NormalizingInPlace(convolutional().eval(), in_place), images, labels)
        for in_place in (False, True)
    ]
    assert torch.equal(images, before)
    assert losses[0] == losses[1]
