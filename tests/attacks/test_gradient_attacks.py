"""FGM, FGSM and PGD against closed forms, brute force and finite differences."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from sgr_kernels.attacks import fgm, fgsm, pgd
from sgr_kernels.attacks.inputs import norms, shrink_to_ball
from sgr_kernels.attacks.objective import logit_ratio, scaled_loss, targeted_logit_ratio
from tests.attack_models import Linear, convolutional, images_like, linear

ONE_STEP_AND_PGD = {
    "fgsm": (fgsm, "Linf"),
    "fgm": (fgm, "L2"),
    "pgd Linf": (functools.partial(pgd, steps=5), "Linf"),
    "pgd L2": (functools.partial(pgd, norm="L2", steps=5), "L2"),
}


def two_classes(seed: int = 0) -> tuple[Linear, torch.Tensor]:
    """A linear classifier with two classes and the normal of its boundary, pointing to class 1."""
    model = linear(classes=2, seed=seed)
    return model, (model.weight[1] - model.weight[0]).detach().reshape(1, 2, 3, 3)


def size(delta: torch.Tensor, norm: str) -> torch.Tensor:
    flat = delta.double().flatten(1)
    return flat.abs().amax(1) if norm == "Linf" else torch.linalg.vector_norm(flat, dim=1)


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("targeted", [False, True])
def test_linear_closed_forms(label, targeted):
    model, normal = two_classes()
    images, labels = images_like(5), torch.full((5,), label)
    away = (1 if label == 0 else -1) * (-1 if targeted else 1)
    options = {"eps": 0.05, "targeted": targeted}
    torch.testing.assert_close(fgsm(model, images, labels, **options), images + away * 0.05 * normal.sign())
    expected = images + away * 0.05 * normal / normal.norm()
    torch.testing.assert_close(fgm(model, images, labels, **options), expected)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("random_start", [False, True])
def test_pgd_reaches_its_fixed_point_on_a_linear_model(norm, random_start):
    """The optimum over the ball is the closed form, and enough steps stop there."""
    model, normal = two_classes()
    images, labels = images_like(5), torch.zeros(5, dtype=torch.int64)
    best = normal.sign() if norm == "Linf" else normal / normal.norm()
    adversarial = pgd(model, images, labels, eps=0.05, norm=norm, steps=200, step_size=0.02, random_start=random_start)
    torch.testing.assert_close(adversarial, images + 0.05 * best, atol=1e-6 if random_start else 1e-9, rtol=0)


def test_clipping_solves_the_box_constrained_linear_problem():
    """At the bounds the optimum of a linear loss over ball and box is the clipped corner: also found by brute force."""
    model = linear(classes=2, shape=(1, 2, 2), seed=3)
    images = torch.tensor([0.0, 0.02, 0.97, 1.0], dtype=torch.float64).reshape(1, 1, 2, 2)
    labels = torch.zeros(1, dtype=torch.int64)
    low, high = (images - 0.1).clamp(min=0), (images + 0.1).clamp(max=1)
    corners = [
        torch.where(torch.tensor(bits).reshape(images.shape), high, low)
        for bits in itertools.product([False, True], repeat=4)
    ]
    worst = max(corners, key=lambda x: cross_entropy(model(x), labels).item())
    for attack in (fgsm, functools.partial(pgd, steps=50)):
        torch.testing.assert_close(attack(model, images, labels, eps=0.1), worst)


def test_l2_in_a_corner_of_the_box():
    """Where clipping stops one pixel, the others use up its share of the ball."""
    model = Linear(torch.tensor([[0.0, 0.0], [-1.0, -1.0]], dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    images = torch.tensor([[0.05, 0.5]], dtype=torch.float64)
    adversarial = pgd(model, images, torch.zeros(1, dtype=torch.int64), eps=0.2, norm="L2", steps=300, step_size=0.01)
    expected = torch.tensor([[0.0, 0.5 - (0.2**2 - 0.05**2) ** 0.5]], dtype=torch.float64)
    torch.testing.assert_close(adversarial, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shrinking_never_ends_outside_the_ball(dtype):
    generator = torch.Generator().manual_seed(0)
    for eps in (0.3, 1.0, 77.7):
        delta = 100 * torch.randn(5000, 3, generator=generator, dtype=dtype)
        shrunk = shrink_to_ball(delta, eps)
        assert (norms(shrunk) <= eps * (1 + 1e-15)).all()
        torch.testing.assert_close(shrunk, delta * (eps / norms(delta)).clamp(max=1)[:, None].to(dtype))


def test_sign_agrees_with_finite_differences():
    model, images = convolutional().double().eval(), images_like(3, (1, 8, 8))
    labels = torch.tensor([0, 1, 2])
    step = fgsm(model, images, labels, eps=0.01) - images
    h, slopes = 1e-6, torch.empty_like(images)
    for i in range(64):
        probe = torch.zeros(64, dtype=images.dtype)
        probe[i] = h
        probe = probe.reshape(1, 1, 8, 8)
        with torch.no_grad():
            up, down = (cross_entropy(model(images + s * probe), labels, reduction="none") for s in (1, -1))
        slopes.flatten(1)[:, i] = (up - down) / (2 * h)
    clear = slopes.abs() > 1e-7
    assert clear.float().mean() > 0.9
    assert torch.equal(step.sign()[clear], slopes.sign()[clear])


def test_confident_models_are_attacked_all_the_same():
    """A margin of 200 leaves no cross-entropy gradient in float32; its direction is still there."""
    model, normal = two_classes()
    model.bias.data[0] += 200
    images = images_like(4, dtype=torch.float32)
    adversarial = fgsm(model.float(), images, eps=0.05)
    torch.testing.assert_close(adversarial, images + 0.05 * normal.float().sign())


@pytest.mark.parametrize("name", ONE_STEP_AND_PGD)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_projection_is_last(name, dtype):
    attack, norm = ONE_STEP_AND_PGD[name]
    model = linear(dtype=torch.float32).to(dtype)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(64, 2, 3, 3, generator=generator).to(dtype)
    for eps in (1e-4, 8 / 255, 0.3, 1.0) + ((4.0,) if norm == "L2" else ()):
        adversarial = attack(model, images, eps=eps)
        assert adversarial.dtype == dtype
        assert (size(adversarial.double() - images.double(), norm) <= eps + 6e-8).all()
        assert adversarial.min() >= 0
        assert adversarial.max() <= 1


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ONE_STEP_AND_PGD)
def test_rounding_errors_of_many_pixels_do_not_add_up(name, value):
    """All pixels alike and moved alike: whatever rounding adds to one, it adds to 3,072."""
    attack, norm = ONE_STEP_AND_PGD[name]
    model = Linear(torch.tensor([[1.0], [-1.0]]).expand(2, 3072).clone(), torch.zeros(2))
    images = torch.full((2, 3, 32, 32), value)
    for label in (0, 1):
        for eps in (1 / 255, 0.3, 1.0) + ((8.4,) if norm == "L2" else ()):
            adversarial = attack(model, images, torch.full((2,), label), eps=eps)
            assert (size(adversarial.double() - images.double(), norm) <= eps + 6e-8).all()


@pytest.mark.parametrize("name", ONE_STEP_AND_PGD)
def test_zero_eps_is_bit_for_bit(name):
    attack, _ = ONE_STEP_AND_PGD[name]
    images = images_like(4)
    images[0] = -0.0
    adversarial = attack(linear(), images, eps=0)
    assert torch.equal(adversarial.view(torch.int64), images.view(torch.int64))


@pytest.mark.parametrize("name", ONE_STEP_AND_PGD)
@pytest.mark.parametrize("targeted", [False, True])
def test_a_list_of_eps_equals_separate_calls(name, targeted):
    attack, _ = ONE_STEP_AND_PGD[name]
    model, images, grid = convolutional(), images_like(7, (1, 8, 8), dtype=torch.float32), [0.0, 0.02, 0.1, 0.3]
    together = attack(model, images, eps=grid, targeted=targeted, generator=torch.Generator().manual_seed(5))
    for eps, one in zip(grid, together):
        apart = attack(model, images, eps=eps, targeted=targeted, generator=torch.Generator().manual_seed(5))
        assert torch.equal(one, apart)


def test_own_prediction_is_the_default_label():
    model, images = linear(), images_like(8)
    own = model(images).argmax(1)
    for attack in (fgsm, fgm, pgd):
        assert torch.equal(attack(model, images, eps=0.05), attack(model, images, own, eps=0.05))


def test_pgd_keeps_the_best_iterate():
    """Steps so long that the last iterate is arbitrary: more of them must never lose ground."""
    model, images = convolutional().eval(), images_like(16, (1, 8, 8), dtype=torch.float32)
    labels = model(images).argmax(1)
    losses, broken = [], []
    for steps in (1, 2, 5, 10, 20):
        adversarial = pgd(model, images, labels, eps=0.1, steps=steps, step_size=0.2, random_start=False)
        logits = model(adversarial).detach()
        losses.append(cross_entropy(logits, labels, reduction="none"))
        broken.append(logits.argmax(1) != labels)
    for k in range(len(losses) - 1):
        assert (broken[k + 1] >= broken[k]).all()
        same = broken[k + 1] == broken[k]
        assert (losses[k + 1] >= losses[k] - 1e-6)[same].all()
    assert (losses[-1] > losses[0]).any()


def test_restarts_only_help():
    model, images = convolutional().eval(), images_like(32, (1, 8, 8), dtype=torch.float32)
    labels = model(images).argmax(1)
    options = {"eps": 0.08, "steps": 2}
    one, five = (
        cross_entropy(model(pgd(model, images, labels, restarts=n, **options)), labels, reduction="none")
        for n in (1, 5)
    )
    assert (five >= one - 1e-6).all()
    assert (five > one).any()


@pytest.mark.parametrize("targeted", [False, True])
def test_early_stop_breaks_the_same_images(targeted):
    model, images = convolutional().double().eval(), images_like(40, (1, 8, 8))
    labels = model(images).argmax(1)
    if targeted:
        labels = (labels + 1) % 4
    for eps in (0.02, 0.05, 0.1):
        verdicts = [
            model(pgd(model, images, labels, eps=eps, steps=10, restarts=2, targeted=targeted, early_stop=stop)).argmax(
                1
            )
            == labels
            for stop in (False, True)
        ]
        assert torch.equal(*verdicts)


def test_early_stop_saves_work():
    seen = 0

    def model(x):
        nonlocal seen
        seen += len(x)
        return net(x)

    net, images = linear(), images_like(50)
    costs = []
    for stop in (False, True):
        seen = 0
        pgd(model, images, eps=0.3, early_stop=stop)
        costs.append(seen)
    assert costs[1] < costs[0] / 4


def test_targeted_attacks_reach_their_target():
    model, images = linear(), images_like(10)
    own = model(images).argmax(1)
    for offset in (1, 2, 3):
        targets = (own + offset) % 4
        adversarial = pgd(model, images, targets, eps=0.5, targeted=True, steps=40)
        assert (model(adversarial).argmax(1) == targets).float().mean() > 0.8


def test_random_targets_are_uniform_over_the_other_classes():
    weight = torch.eye(4, dtype=torch.float64)[:, :, None, None].flatten(1)
    model = Linear(weight, torch.zeros(4, dtype=torch.float64))
    images = torch.full((6000, 4, 1, 1), 0.5, dtype=torch.float64)
    images[:, 2] = 0.6
    reached = (fgsm(model, images, eps=0.1, targeted=True) - images).flatten(1).argmax(1)
    counts = torch.bincount(reached, minlength=4)
    assert counts[2] == 0
    assert (counts[[0, 1, 3]] - 2000).abs().max() < 5 * math.sqrt(6000 * (1 / 3) * (2 / 3))


def test_random_starts_fill_the_ball():
    """With a step too short to matter and the loss constant over iterates, what comes back is the start."""
    images = torch.full((4000, 1, 2, 2), 0.5, dtype=torch.float64)
    model = linear(classes=2, shape=(1, 2, 2))
    targets = torch.zeros(4000, dtype=torch.int64)
    starts = {}
    for norm in ("Linf", "L2"):
        both = [
            pgd(model, images, targets, eps=0.1, norm=norm, steps=1, step_size=1e-12, targeted=t) - images
            for t in (False, True)
        ]
        moved = torch.stack(both).flatten(2).abs().amax(2).argmax(0)
        starts[norm] = torch.stack(both)[moved, torch.arange(4000)].flatten(1)
    assert starts["Linf"].abs().max() <= 0.1
    assert abs(float(starts["Linf"].square().mean()) - 0.01 / 3) < 2e-4
    radius = starts["L2"].norm(dim=1)
    assert radius.max() <= 0.1
    assert abs(float((radius / 0.1).pow(4).mean()) - 0.5) < 0.03  # r^4 is uniform in four dimensions


def test_default_generator_is_private_and_fixed():
    model, images = convolutional(), images_like(4, (1, 8, 8), dtype=torch.float32)
    assert torch.equal(pgd(model, images, eps=0.1, steps=1), pgd(model, images, eps=0.1, steps=1))
    other = pgd(model, images, eps=0.1, steps=1, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(pgd(model, images, eps=0.1, steps=1), other)


def test_ratios_of_logits_by_hand():
    """Croce and Hein (2020), on sorted logits; where the target is not the answer theirs has the largest for it."""
    z = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(50) % 6
    for logits, label, plain, aimed in zip(z, y, logit_ratio(z, y), targeted_logit_ratio(z, y)):
        first, second, third, fourth = logits.sort(descending=True).values[:4]
        largest_other = second if logits.argmax() == label else first
        torch.testing.assert_close(plain, (largest_other - logits[label]) / (first - third))
        torch.testing.assert_close(aimed, (largest_other - logits[label]) / (first - (third + fourth) / 2))
    assert torch.equal(logit_ratio(z, y) < 0, z.argmax(1) == y)
    assert torch.equal(targeted_logit_ratio(z, y) < 0, z.argmax(1) == y)


@pytest.mark.parametrize("loss", [logit_ratio, targeted_logit_ratio, scaled_loss])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_losses_without_a_scale(loss, scale):
    """Neither value nor direction sees it, in float32 too."""
    z, y = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 5
    found = []
    for factor in (1.0, scale):
        leaf = (factor * z).requires_grad_()
        values = loss(leaf, y)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
        found.append((values.detach(), factor * gradient))
    torch.testing.assert_close(found[0], found[1])
    ties = torch.zeros(2, 5, requires_grad=True)
    assert torch.autograd.grad(loss(ties, y[:2]).sum(), ties)[0].isfinite().all()


@pytest.mark.parametrize("loss", ["scaled", "dlr"])
def test_targets_are_reached_by_every_loss(loss):
    model, images = linear(), images_like(10)
    targets = (model(images).argmax(1) + 1) % 4
    adversarial = pgd(model, images, targets, eps=0.5, targeted=True, steps=40, loss=loss)
    assert (model(adversarial).argmax(1) == targets).float().mean() > 0.8


def test_losses_name_what_they_take():
    images = images_like(2)
    with pytest.raises(ValueError, match="loss: expected one of cross-entropy, scaled, dlr, got 'margin'"):
        pgd(linear(), images, eps=0.1, loss="margin")
    with pytest.raises(ValueError, match="loss: 'dlr' away from a class expects at least 3 classes, got 2"):
        pgd(linear(classes=2), images, eps=0.1, loss="dlr")
    with pytest.raises(ValueError, match="loss: 'dlr' towards a target expects at least 4 classes, got 3"):
        pgd(linear(classes=3), images, eps=0.1, loss="dlr", targeted=True)
    two = pgd(linear(classes=2), images, eps=0.1, steps=3, random_start=False)
    assert torch.equal(pgd(linear(classes=2), images, eps=0.1, steps=3, random_start=False, loss="scaled"), two)


def test_shrinking_steps():
    """Along half a cosine; on a linear model, far from the ball's end, their sum is how far an image gets."""
    model, normal = two_classes()
    images, labels = images_like(2), torch.zeros(2, dtype=torch.int64)
    options = {"eps": 0.2, "steps": 4, "random_start": False, "schedule": "cosine"}
    adversarial = pgd(model, images, labels, step_size=0.01, **options)
    gone = 0.01 * sum((1 + math.cos(math.pi * k / 4)) / 2 for k in range(4))
    torch.testing.assert_close(adversarial, images + gone * normal.sign())
    torch.testing.assert_close(pgd(model, images, labels, **options), images + 0.2 * normal.sign())
    curved, digits = convolutional(), images_like(3, (1, 8, 8), dtype=torch.float32)
    options |= {"eps": 0.02}
    assert torch.equal(pgd(curved, digits, **options), pgd(curved, digits, step_size=0.04, **options))
    assert not torch.equal(pgd(curved, digits, **options), pgd(curved, digits, step_size=0.02, **options))
    with pytest.raises(ValueError, match="schedule: expected 'constant' or 'cosine', got 'linear'"):
        pgd(model, images, eps=0.1, schedule="linear")
