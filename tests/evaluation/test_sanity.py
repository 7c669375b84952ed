"""The sanity report passes honest models and catches each way of hiding a gradient."""

from __future__ import annotations

import functools
import importlib.util
import json
import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sgr_kernels.attacks import pgd
from sgr_kernels.evaluation import SanityReport, sanity, sanity_report
from sgr_kernels.evaluation.planted import planted_examples
from tests.attack_models import NormalizingInPlace, convolutional, images_like, linear

EPS = 0.08


def blobs(n: int = 96, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Four classes of 8x8 images: a bright quadrant and noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (n,), generator=generator)
    images = 0.3 + 0.1 * torch.rand(n, 1, 8, 8, generator=generator)
    for i, y in enumerate(labels.tolist()):
        images[i, 0, 4 * (y // 2) : 4 * (y // 2) + 4, 4 * (y % 2) : 4 * (y % 2) + 4] += 0.1
    return images, labels


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 64), nn.ReLU(), nn.Linear(64, 4)
        )
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        images, labels = blobs(512, seed=1)
        for _ in range(40):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images - 0.35), labels).backward()
            optimizer.step()
    return nn.Sequential(Shift(), net)


class Shift(nn.Module):
    def forward(self, x):
        return x - 0.35


class Staircase(nn.Module):
    """Gradient zero almost everywhere."""

    def forward(self, x):
        return (x * 20).round() / 20


class WrongGradient(nn.Module):
    """The identity with somebody else's gradient."""

    def forward(self, x):
        stripes = torch.linspace(-1, 1, x.shape[-1])
        return x.detach() + (x - x.detach()) * stripes.sign()


class Target(nn.Module):
    """Wrong only around a point inside the ball, which a single long step misses."""

    def forward(self, x):
        squared = ((x - 0.5 - 0.8 * EPS) / EPS).square().flatten(1).mean(1)
        return torch.stack([torch.zeros_like(squared), 0.2 - squared], dim=1)


class Noise(nn.Module):
    def forward(self, x):
        return x + 0.2 * torch.randn_like(x)


def run(model: nn.Module, **options) -> tuple[SanityReport, dict[str, bool | None]]:
    loader = DataLoader(TensorDataset(*blobs()), batch_size=40)
    report = sanity_report(model, loader, eps=EPS, max_images=64, **options)
    return report, {check.name: check.passed for check in report.checks}


def test_honest_model_passes(trained):
    report, answers = run(trained)
    assert report.passed
    assert report.images == 64
    assert report.clean_accuracy > 0.9
    assert report.accuracy < 0.7
    assert answers.pop("PGD is stronger than transfer") is None
    assert all(answers.values())
    assert json.loads(json.dumps(report.to_dict()))["passed"]
    assert str(report).count("ok") >= len(answers)


def test_all_checks_are_made_with_a_surrogate(trained):
    _, answers = run(trained, surrogate=linear(shape=(1, 8, 8), dtype=torch.float32))
    assert all(answers.values())


def test_zero_gradients_are_caught(trained):
    report, answers = run(nn.Sequential(Staircase(), trained), surrogate=trained)
    assert not report.passed
    assert answers["gradients are there"] is False
    assert answers["PGD is stronger than transfer"] is False
    assert answers["planted examples are found"] is False
    assert answers["the loss follows its gradient"] is None


def test_wrong_gradients_are_caught(trained):
    _, answers = run(nn.Sequential(WrongGradient(), trained), surrogate=trained)
    assert answers["gradients are there"]
    assert answers["the loss follows its gradient"] is False
    assert answers["PGD is stronger than transfer"] is False


def test_attacks_weaker_than_noise_are_caught():
    """The gradient points away from danger, which a tenth of the ball is."""

    class Reversed(nn.Module):
        def forward(self, x):
            x = x.detach() - (x - x.detach())
            score = x.flatten(1).sum(1) - 2.2
            return torch.stack([torch.zeros_like(score), score], dim=1)

    grey = torch.full((64, 1, 2, 2), 0.5), torch.zeros(64, dtype=torch.int64)
    report = sanity_report(Reversed(), [grey], eps=0.15)
    answers = {check.name: check.passed for check in report.checks}
    assert answers["PGD is stronger than noise"] is False


def test_randomised_forward_is_caught(trained):
    _, answers = run(nn.Sequential(Noise(), trained))
    assert answers["the forward pass is deterministic"] is False


def test_survival_of_the_full_range_is_caught():
    """A model that has nothing to do with its input keeps its accuracy in any ball."""

    class Constant(nn.Module):
        def forward(self, x):
            return torch.tensor([[2.0, 0.0, 0.0, 0.0]]) + 1e-12 * x.flatten(1)[:, :4]

    images, _ = blobs()
    report = sanity_report(Constant(), [(images, torch.zeros(len(images), dtype=torch.int64))], eps=EPS)
    answers = {check.name: check.passed for check in report.checks}
    assert answers["nothing survives the full range"] is False


def test_unfinished_attacks_are_caught(trained):
    grey = torch.full((64, 1, 8, 8), 0.5), torch.zeros(64, dtype=torch.int64)
    for steps, enough in ((1, False), (10, True)):
        report = sanity_report(Target(), [grey], eps=EPS, steps=steps, bounds=None)
        answers = {check.name: check.passed for check in report.checks}
        assert answers["more iterations gain nothing"] is enough
        assert answers["nothing survives the full range"] is None


def test_one_image_more_is_no_gain():
    """28 of 48 minus 27 of 48 is more than 1/48 in floating point."""
    assert sanity._converged(28 / 48, 27 / 48, 20, 48).passed
    assert not sanity._converged(28 / 48, 26 / 48, 20, 48).passed
    assert sanity._converged(100 / 200, 96 / 200, 20, 200).passed
    assert not sanity._converged(100 / 200, 95 / 200, 20, 200).passed


def test_confident_models_are_no_false_alarm(trained):
    scaled = nn.Linear(4, 4, bias=False)
    scaled.weight.data = 1e3 * torch.eye(4)
    report, answers = run(nn.Sequential(trained, scaled))
    assert answers["gradients are there"]
    assert report.passed


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scaled_logits_are_caught(trained, scale):
    """They classify alike, and hide what a loss that does not see their scale finds."""

    class Scaled(nn.Module):
        def forward(self, x):
            return scale * trained(x)

    data = blobs(200)
    report = sanity_report(Scaled(), [data], eps=0.04, steps=10, max_images=200)
    (check,) = [check for check in report.checks if check.name == "the logits' scale hides nothing"]
    assert check.passed is False
    assert "pgd(..., loss='scaled')" in check.detail
    images, labels = data
    for loss in ("scaled", "dlr"):  # the same images are broken, whatever the scale
        found = [
            model(pgd(model, images, labels, eps=0.04, steps=10, loss=loss)).argmax(1) == labels
            for model in (trained, Scaled())
        ]
        assert (found[0] == found[1]).double().mean() >= 0.99
    assert report.accuracy - check.value > 0.05


def test_a_usual_scale_is_no_false_alarm(trained):
    report = sanity_report(trained, [blobs(200)], eps=0.045, steps=10, max_images=200)
    (check,) = [check for check in report.checks if check.name == "the logits' scale hides nothing"]
    assert check.passed
    assert 0 < check.value < report.clean_accuracy


def test_planted_examples(trained):
    """Found by a real attack, not by one that does nothing, and rarely by chance."""
    images, _ = blobs(16)
    result = planted_examples(trained, images, functools.partial(pgd, steps=20), eps=EPS)
    assert result.tested >= 14
    assert result.rate >= 0.9
    assert result.by_chance < 0.05
    idle = planted_examples(trained, images, lambda model, x, y, *, eps, generator: x, eps=EPS)
    assert idle.found == 0
    assert idle.tested == result.tested
    assert all(not module._forward_pre_hooks for module in trained.modules())


def test_features_of_models_that_write_are_of_the_images(trained):
    """An attack that asks the readout directly gets its images back as they were."""
    images, _ = blobs(4)

    def asks(readout, x, y, *, eps, generator):
        before = x.clone()
        readout(x)
        assert torch.equal(x, before)
        return pgd(readout, x, y, eps=eps, generator=generator)

    for tail in ([], [nn.ReLU()]):  # with a linear layer last, and on logits without one
        body = nn.Sequential(*trained[1][:-1], *tail) if tail else trained[1]
        found = [
            planted_examples(NormalizingInPlace(body, in_place), images, asks, eps=EPS) for in_place in (False, True)
        ]
        assert str(found[0]) == str(found[1])


def test_planted_examples_without_a_linear_layer():
    model = linear(classes=4, shape=(1, 4, 4))
    result = planted_examples(model, images_like(6, (1, 4, 4)), functools.partial(pgd, steps=20), eps=0.1)
    assert result.tested == 0 or result.rate >= 0.9
    plain = planted_examples(lambda x: model(x), images_like(6, (1, 4, 4)), functools.partial(pgd, steps=20), eps=0.1)
    assert plain == result or plain.tested == 0


def test_report_leaves_the_model_alone(trained):
    trained.train()
    before = [p.detach().clone() for p in trained.parameters()]
    run(trained)
    assert trained.training
    assert all(torch.equal(a, b) for a, b in zip(before, trained.parameters()))
    assert all(p.grad is None or not p.grad.isnan().any() for p in trained.parameters())


def test_bad_input(trained):
    with pytest.raises(ValueError, match="loader: expected at least one image"):
        sanity_report(trained, [], eps=EPS)
    images, labels = blobs(4)
    with pytest.raises(ValueError, match="eps: expected"):
        sanity_report(trained, [(images, labels)], eps=-1.0)
    with pytest.raises(ValueError, match="labels: expected 0 to 3"):
        sanity_report(trained, [(images, labels + 4)], eps=EPS)


def snippet(package: str) -> str:
    """The documented way to run another project's attack."""
    found = re.search(rf"    (?:from|import) {package}.*?(?=\n\n\S|\"\"\"|\Z)", sanity.__doc__, re.DOTALL)
    return re.sub(r"^    ", "", found[0], flags=re.MULTILINE)


@pytest.mark.parametrize("package", ["torchattacks", "foolbox"])
def test_snippets_compile(package):
    compile(snippet(package), package, "exec")


@pytest.mark.parametrize("package", ["torchattacks", "foolbox"])
@pytest.mark.filterwarnings("default")
def test_snippets_run(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    model, (images, labels) = convolutional(classes=12).eval(), blobs(8)
    scope = {"model": model, "images": images, "labels": labels}
    exec(snippet(package), scope)
    adversarial = scope["clipped"][-1] if package == "foolbox" else scope["adversarial"]
    assert (adversarial - images).abs().max() <= 8 / 255 + 1e-6
