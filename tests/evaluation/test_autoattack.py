"""AutoAttack on models of this package: exact where a model is, the package's own run, and without traces."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from sgr_kernels.evaluation import AutoAttackResult, autoattack
from sgr_kernels.evaluation.autoattack import STANDARD
from sgr_kernels.evaluation.crosscheck import against_pgd
from tests.attack_models import Linear, NormalizingInPlace, convolutional, images_like, linear
from tests.autoattack_stand_in import Scripted, stand_in

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("pyautoattack") is None, reason="pyautoattack is not installed"
)


def linear_case(count: int, norm: str) -> tuple[Linear, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Model, images, labels (a fifth of them wrong), and each image's distance from where its label ends."""
    model, images = linear(classes=5), images_like(count)
    logits = model(images).detach()
    labels = logits.argmax(1)
    labels[::5] = (labels[::5] + 1) % 5
    normals = (model.weight[labels][:, None] - model.weight).detach()
    slopes = normals.abs().sum(2) if norm == "Linf" else normals.norm(dim=2)
    reach = (logits.gather(1, labels[:, None]) - logits) / slopes
    reach[torch.arange(count), labels] = float("inf")
    return model, images, labels, reach.amin(1)


@needs_package
@pytest.mark.parametrize(("norm", "names"), [("Linf", STANDARD), ("L2", ("apgd-ce", "fab"))])
def test_finds_exactly_what_there_is_on_a_linear_model(norm, names):
    model, images, labels, reach = linear_case(10, norm)
    eps = float(reach.sort().values[7:9].mean())  # one is left to the slow attacks
    found = autoattack(model, [(images, labels)], eps, norm=norm, attacks=names, keep_images=True)
    assert torch.equal(found.robust, reach > eps)
    assert torch.equal(found.clean, reach > 0)
    assert found.standard is (names == STANDARD)
    assert torch.equal(model(found.adversarial).argmax(1) == labels, found.robust)
    assert found.largest_change <= eps * (1 + 1e-5)
    assert found.parts[0].attacked == int(found.clean.sum())
    assert sum(part.broken for part in found.parts) == int((found.clean & ~found.robust).sum())
    assert not found.warnings


@needs_package
def test_is_the_packages_own_run():
    """Attack by attack on what is left, in its batches and with its random numbers."""
    from pyautoattack import AutoAttack

    model, images, labels, reach = linear_case(12, "Linf")
    model, images, eps = model.float(), images.float(), float(reach.median())
    names = ["apgd-ce", "apgd-t"]
    found = autoattack(model, [(images, labels)], eps, attacks=names, batch_size=5, seed=3, keep_images=True)
    theirs = AutoAttack(model, eps=eps, seed=3)
    theirs.attacks_to_run = names
    theirs.apgd_targeted.n_target_classes = 4
    expected, answers = theirs.run_standard_evaluation(images, labels, batch_size=5)
    assert found.accuracy < found.clean_accuracy
    assert torch.equal(found.robust, answers == labels)
    torch.testing.assert_close(found.adversarial, expected.detach(), rtol=0, atol=0)


@needs_package
def test_models_that_write_and_other_ranges_make_no_difference():
    model, images, labels, reach = linear_case(4, "Linf")
    model, images, eps = model.float(), images.float(), float(reach.sort().values[2:].mean())
    weight = model.weight.detach()
    body = Linear(weight / 4, model.bias.detach() + weight.sum(1) / 2)  # of (x - 0.5) / 0.25
    runs = [
        autoattack(network, [(pixels, labels)], (bounds[1] - bounds[0]) * eps, attacks=["apgd-ce"], bounds=bounds)
        for network, pixels, bounds in (
            (model, images, (0.0, 1.0)),
            (NormalizingInPlace(body, in_place=False), images, (0.0, 1.0)),
            (NormalizingInPlace(body), images, (0.0, 1.0)),
            (lambda x: model(x / 4 + 0.5), 4 * images - 2, (-2.0, 2.0)),
        )
    ]
    assert 0 < runs[0].accuracy < runs[0].clean_accuracy
    for run in runs[1:]:
        assert torch.equal(run.robust, runs[0].robust)
        assert run.largest_change / run.eps == pytest.approx(1, rel=1e-5)


@needs_package
def test_leaves_everything_as_it_was():
    model, images = convolutional(), images_like(1, (1, 8, 8), dtype=torch.float32)
    model[0].bias.requires_grad_(False)
    model[5].weight.grad = torch.ones_like(model[5].weight)
    before, original = {k: v.clone() for k, v in model.state_dict().items()}, images.clone()
    stream, level = torch.get_rng_state(), logging.getLogger("auto-attack").handlers[:]

    with torch.no_grad():
        labels = model.eval()(images).argmax(1)
    model.train()

    def trace(frame, event, argument):
        return None

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        autoattack(model, [(images, labels)], 0.05, attacks=["fab-t"])
        kept = sys.gettrace()
    finally:
        sys.settrace(outer)
    assert kept is trace
    assert model.training
    assert not model[0].bias.requires_grad
    assert model[0].weight.requires_grad
    assert torch.equal(model[5].weight.grad, torch.ones_like(model[5].weight))
    assert model[0].weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(images, original)
    assert torch.equal(torch.get_rng_state(), stream)
    assert logging.getLogger("auto-attack").handlers == level


@needs_package
def test_its_own_checks_are_heard():
    images, labels = images_like(6, (1, 8, 8), dtype=torch.float32), torch.zeros(6, dtype=torch.int64)
    body = convolutional().eval()

    def said(model, attacks=("apgd-ce",)) -> str:
        return str(autoattack(model, [(images, labels)], 0.05, attacks=attacks))

    assert "randomized defense" in said(lambda x: body(x + 0.1 * torch.randn_like(x)))
    with pytest.warns(UserWarning, match="expected logits, not probabilities"):
        assert "probability distribution" in said(lambda x: body(x).softmax(1))
    first = torch.tensor([1.0, 0, 0, 0])
    assert "points with zero gradient" in said(lambda x: body(x.detach()) + 0 * x.sum() + 9 * first, ("apgd-dlr",))

    class Dynamic(nn.Module):
        def forward(self, x):
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                (step,) = torch.autograd.grad(body(leaf).sum(), leaf)
            return body(x + 0.1 * step)

    assert "dynamic defense" in said(Dynamic())
    assert "dynamic defense" not in said(body)


@pytest.fixture
def scripted(monkeypatch) -> ModuleType:
    package = stand_in()
    monkeypatch.setitem(sys.modules, "pyautoattack", package)
    Scripted.script = {"apgd-ce": [0, 2, 3], "apgd-t": [2], "fab-t": [4], "square": [5]}
    return package


def bright(images: torch.Tensor) -> torch.Tensor:
    """Class 1 where the last pixel is above one half, else 0; two more classes never."""
    score = images[:, 0, 1, 1] - 0.5
    return torch.stack([-score, score, -9 + 0 * score, -9 + 0 * score], 1)


def numbered(count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of class 0 but the first, which is misclassified."""
    images = torch.full((count, 1, 2, 2), 0.45)
    images[:, 0, 0, 0] = torch.arange(count) / 100
    labels = torch.zeros(count, dtype=torch.int64)
    labels[0] = 1
    return images, labels


def run(**options) -> AutoAttackResult:
    images, labels = numbered()
    return autoattack(bright, [(images[:5], labels[:5]), (images[5:], labels[5:])], 0.1, **options)


def test_what_is_counted(scripted):
    order: list[str] = []
    found = run(keep_images=True, on_part=order.append)
    assert order == list(STANDARD)
    assert [(part.name, part.attacked, part.broken) for part in found.parts] == [
        ("apgd-ce", 7, 2),
        ("apgd-t", 5, 0),
        ("fab-t", 5, 1),
        ("square", 4, 1),
    ]
    assert found.clean.tolist() == [False] + 7 * [True]
    assert found.robust.tolist() == [False, True, False, False, False, False, True, True]
    assert found.broken_by.tolist() == [-1, -1, 0, 0, 2, 3, -1, -1]
    assert found.accuracy == 3 / 8
    assert found.clean_accuracy == 7 / 8
    assert found.parts[0].warnings == ["apgd-ce saw 8."]
    images, _ = numbered()
    assert (found.adversarial != images).flatten(1).any(1).tolist() == [k in (2, 3, 4, 5) for k in range(8)]
    assert found.largest_change == pytest.approx(0.1)
    assert scripted.checks.funcs == {"grad": 0}  # one model's count is not held against the next


def test_record(scripted):
    record = json.loads(json.dumps(run().to_dict()))
    assert record["robustbench"] == {"eps": "0.1", "clean_acc": "87.50", "autoattack_acc": "37.50"}
    assert record["version"] == "standard"
    assert record["pyautoattack"] == "9.9"
    assert record["n_ex"] == 8
    assert record["interval95"][0] < 3 / 8 < record["interval95"][1]
    some = run(attacks=["fab-t"], max_images=6)
    assert some.to_dict()["version"] == "custom"
    assert [part["name"] for part in some.to_dict()["attacks"]] == ["fab-t"]
    assert some.to_dict()["n_ex"] == 6
    assert "8/255" in str(autoattack(bright, [numbered()], 8 / 255))


def test_nothing_is_left_to_attack(scripted):
    Scripted.script["apgd-ce"] = list(range(8))
    found = run()
    assert [part.attacked for part in found.parts] == [7, 0, 0, 0]
    assert found.accuracy == 0
    images, labels = numbered()
    nothing = autoattack(bright, [(images, 1 - labels)], 0.1)
    assert [part.attacked for part in nothing.parts][1:] == [0, 0, 0]


def test_rounding_beyond_the_bounds_is_clipped(scripted):
    images, labels = numbered()
    images[1, 0, 0, 1] = 1 + 2.4e-7
    assert autoattack(bright, [(images, labels)], 0.1).accuracy == 3 / 8
    images[1, 0, 0, 1] = 1.001
    with pytest.raises(ValueError, match=r"images: expected values in \[0, 1\]"):
        autoattack(bright, [(images, labels)], 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attacks": ["pgd"]}, "attacks: expected some of apgd-ce, apgd-t, fab-t, square.*got pgd"),
        ({"attacks": []}, "attacks: expected some of"),
        ({"attacks": ["square", "square"]}, "each once"),
        ({"norm": "L1"}, "norm: expected 'Linf' or 'L2', got 'L1'"),
        ({"batch_size": 0}, "batch_size: expected a whole number >= 1"),
        ({"max_images": -1}, "max_images: expected a whole number >= 1"),
        ({"seed": -1}, "seed: expected"),
    ],
)
def test_bad_input(scripted, options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_bad_images_and_models(scripted):
    images, labels = numbered()
    with pytest.raises(ValueError, match="eps: expected"):
        autoattack(bright, [(images, labels)], 0)
    with pytest.raises(ValueError, match="loader: expected at least one image"):
        autoattack(bright, [], 0.1)
    with pytest.raises(ValueError, match="labels: expected 0 to 3"):
        autoattack(bright, [(images, labels + 4)], 0.1)
    with pytest.raises(ValueError, match=r"images: expected shape \(B, C, H, W\)"):
        autoattack(bright, [(images[:, 0], labels)], 0.1)
    with pytest.raises(ValueError, match=r"attacks: apgd-t expects at least 4 classes.*3; name attacks that fit"):
        autoattack(lambda x: bright(x)[:, :3], [(images, labels)], 0.1)
    assert autoattack(lambda x: bright(x)[:, :3], [(images, labels)], 0.1, attacks=["square"]).accuracy == 6 / 8


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sgr_kernels\[autoattack\]'"):
        run()


def test_beside_pgd(scripted):
    """The script's attacks break what PGD, held back, leaves: who won is counted, and says why."""

    def hidden(images: torch.Tensor) -> torch.Tensor:
        return bright(images.detach()) + 0 * images.sum()  # no gradient for PGD

    data = numbered()
    check = against_pgd(hidden, [data], autoattack(hidden, [data], 0.055), pgd_steps=2)
    assert check.pgd.accuracy == [7 / 8]
    assert check.difference == pytest.approx(4 / 8)
    assert check.both == check.autoattack.accuracy == 3 / 8
    assert check.won_by() == {"apgd-ce": 2, "apgd-t": 0, "fab-t": 1, "square": 1}
    assert [cause.partition(":")[0] for cause in check.causes()] == [
        "apgd-ce broke 2 that PGD did not",
        "fab-t broke 1 that PGD did not",
        "square broke 1 that PGD did not",
    ]
    assert json.loads(json.dumps(check.to_dict()))["pgd"]["won_by"]["square"] == 1
    assert "+50.0 points" in str(check)
    assert "uses no gradients" in str(check)


def test_pgd_that_finds_more_is_said(scripted):
    """Ours breaks all but the misclassified one, which it leads back to its label: ours began at the wrong answer."""
    data = numbered()
    Scripted.script["apgd-ce"] = [1]
    check = against_pgd(bright, [data], autoattack(bright, [data], 0.1, attacks=["apgd-ce"]))
    assert check.difference == pytest.approx(1 / 8 - 6 / 8)
    assert check.both == 0
    (cause,) = check.causes()
    assert cause.startswith("PGD broke 6 of 8 images that AutoAttack did not; not all of its attacks were run")
    Scripted.script["apgd-ce"] = list(range(8))
    check = against_pgd(bright, [data], autoattack(bright, [data], 0.1))
    assert check.causes() == [
        "Misclassified images that count as correct under PGD: 1; it starts from the model's own answer and led away "
        "from it."
    ]


def test_agreement_needs_no_words(scripted):
    Scripted.script = {name: list(range(8)) for name in STANDARD}
    images, labels = numbered()
    check = against_pgd(bright, [(images, 0 * labels)], autoattack(bright, [(images, 0 * labels)], 0.1))
    assert check.difference == 0
    assert check.causes() == []
    with pytest.raises(ValueError, match="loader: expected the 8 images"):
        against_pgd(bright, [(images[:7], labels[:7])], check.autoattack)
