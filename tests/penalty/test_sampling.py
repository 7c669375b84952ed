"""The penalty's gradient of a part of the batch: unbiased, of little variance, and the value of the whole."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sgr_kernels import CovarianceFunction, PenaltyGradientError, SGRLoss, cross_entropy_per_sample
from sgr_kernels.loss import _say_once
from sgr_kernels.penalty.choice import METHODS
from sgr_kernels.penalty.sampling import draw, inclusion, offset, proxy

SIZE, CLASSES, BATCH = 6, 4, 16


def network(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 4, 3), *layers, nn.GELU(), nn.Flatten(), nn.Linear(64, CLASSES))
    return body.double()


def batch(n: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(n, 1, SIZE, SIZE, dtype=torch.float64, generator=generator)
    images *= torch.logspace(-2, 0.5, n, dtype=torch.float64).view(-1, 1, 1, 1)  # penalties that differ
    return images, torch.randint(0, CLASSES, (n,), generator=generator)


def criterion(method: str = "double-backward", **options) -> SGRLoss:
    return SGRLoss(CovarianceFunction.exponential(1, (SIZE, SIZE), 2.0).double(), 3.0, method=method, **options)


def gradients(loss: Tensor, model: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


SIZES = {
    "drawn": torch.rand(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    "tied": torch.ones(12, dtype=torch.float64),
    "zero": torch.zeros(12, dtype=torch.float64),
    "some zero": torch.tensor([0.0, 1, 2, 0, 3, 0, 0, 1, 1, 5, 0, 0], dtype=torch.float64),
    "one dominates": torch.tensor([1e9] + [1.0] * 11, dtype=torch.float64),
    "negative": torch.linspace(-1, 1, 12, dtype=torch.float64),
}


@pytest.mark.parametrize("uniformly", [False, True])
@pytest.mark.parametrize("count", [1, 3, 11, 12])
@pytest.mark.parametrize("name", SIZES)
def test_the_weights_make_any_sum_unbiased(name: str, count: int, uniformly: bool) -> None:
    """Each sample is drawn at a share of all offsets that is its chance, and weighs one over that."""
    chances = inclusion(torch.ones(12, dtype=torch.float64) if uniformly else proxy(SIZES[name]), count)
    assert float(chances.sum()) == pytest.approx(count)
    offsets, drawn = 200, torch.zeros(12, dtype=torch.float64)
    for step in range(offsets):
        chosen, shares = draw(SIZES[name], count, torch.tensor((step + 0.5) / offsets, dtype=torch.float64), uniformly)
        assert len(set(chosen.tolist())) == count
        assert bool((chosen.diff() > 0).all())
        torch.testing.assert_close(shares, 1 / (12 * chances[chosen]))
        drawn[chosen] += 1
    assert (drawn / offsets - chances).abs().max() <= 2 / offsets


@settings(max_examples=100)
@given(st.lists(st.just(0.0) | st.floats(1e-3, 1e3), min_size=1, max_size=40), st.data())
def test_inclusion_probabilities(sizes: list[float], data: st.DataObject) -> None:
    """Proportional to the sizes, but for those that would pass one; the sum is the number to be drawn."""
    size, count = torch.tensor(sizes, dtype=torch.float64), data.draw(st.integers(1, len(sizes)))
    chances = inclusion(size, count)
    positive = int((size > 0).sum())
    assert float(chances.sum()) == pytest.approx(min(count, positive), rel=1e-9)
    assert bool(((chances >= 0) & (chances <= 1)).all())
    below = (chances < 1) & (size > 0)
    if bool(below.any()):
        ratio = chances[below] / size[below]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-9, atol=0)
        assert bool((size[chances == 1] >= size[below].max() * (1 - 1e-9)).all())


def test_offsets_are_spread_over_the_unit_interval() -> None:
    numbers = torch.stack([offset(torch.tensor(n)) for n in range(1000)]).sort().values
    assert float(numbers[0]) >= 0
    assert float(numbers.diff().max()) < 3e-3


# What is drawn is the same for every method; its weights, which differ by importance, are each method's to use.
DRAWN = [("double-backward", f, s) for f in (1 / 16, 1 / 4) for s in ("importance", "uniform")]


@pytest.mark.parametrize(
    ("method", "fraction", "sampling"), DRAWN + [(m, 1 / 4, "importance") for m in METHODS if m != "double-backward"]
)
def test_the_gradient_is_unbiased_given_the_batch(method: str, fraction: float, sampling: str) -> None:
    """The mean of 400 draws lies within four standard errors of the whole batch's gradient, along any direction."""
    model, (images, labels) = network(), batch()
    exact = gradients(criterion()(model, images, labels), model)
    loss, found = criterion(method, fraction=fraction, sampling=sampling), []
    for _ in range(400):
        found.append(gradients(loss(model, images, labels), model))
    draws = torch.stack(found) - exact
    probes = torch.randn(len(exact), 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    along = draws @ probes
    error = along.std(0) / math.sqrt(len(along))
    assert bool((along.mean(0).abs() <= 4 * error + 1e-4 * (exact @ probes).abs()).all())


@pytest.mark.parametrize("method", METHODS)
def test_value_and_learning_are_those_of_the_whole_batch(method: str) -> None:
    model, (images, labels) = network(), batch()
    whole, part = (
        SGRLoss(CovarianceFunction(1, (SIZE, SIZE), target_variance=1.0).double(), 3.0, method=method, fraction=f)
        for f in (1.0, 1 / 8)
    )
    torch.testing.assert_close(part(model, images, labels), whole(model, images, labels))
    torch.testing.assert_close(part.last.penalty, whole.last.penalty)
    torch.testing.assert_close(part.last.gradient_norm, whole.last.gradient_norm)
    torch.testing.assert_close(part.covariance.values, whole.covariance.values)


@pytest.mark.parametrize("method", METHODS)
def test_all_samples_are_the_whole_batch(method: str) -> None:
    """As many draws as samples: then nothing is left to chance."""
    model, (images, labels) = network(), batch()
    exact = gradients(criterion()(model, images, labels), model)
    loss = criterion(method, fraction=1 - 1e-9)
    found = gradients(loss(model, images, labels), model)
    assert (found - exact).norm() <= 1e-5 * exact.norm()


def test_importance_has_a_fraction_of_the_variance_of_uniform_draws() -> None:
    """On a network that has learned most of its samples, as after two epochs on digits."""
    model, (images, labels) = network(), batch(64)
    labels = (images.mean((1, 2, 3)) > images.mean()).long()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    exact = gradients(criterion()(model, images, labels), model)
    spread = {}
    for sampling in ("importance", "uniform"):
        loss = criterion(fraction=1 / 8, sampling=sampling)
        draws = torch.stack([gradients(loss(model, images, labels), model) for _ in range(50)])
        spread[sampling] = float((draws - exact).square().sum(1).mean())
    assert spread["importance"] <= spread["uniform"] / 5


def test_samples_that_are_not_finite_are_left_out_and_counted() -> None:
    model, (images, labels) = network(), batch()
    quadratic = CovarianceFunction.quadratic_form
    broken = torch.zeros(BATCH, dtype=torch.bool)
    broken[[3, 15]] = True

    class Broken(CovarianceFunction):
        def quadratic_form(self, gradient: Tensor) -> Tensor:
            q = quadratic(self, gradient)
            return torch.where(broken, torch.nan, q) if len(q) == BATCH else q

    covariance = Broken.exponential(1, (SIZE, SIZE), 2.0).double()
    loss = SGRLoss(covariance, 3.0, fraction=1 / 4)
    value = loss(model, images, labels)
    kept = quadratic(covariance, torch.autograd.grad(_sum(model, x := images.clone().requires_grad_(), labels), x)[0])
    expected = torch.where(broken, 0, kept).sum() / (2 * BATCH)
    torch.testing.assert_close(value, nn.functional.cross_entropy(model(images), labels) + 3 * expected)
    assert bool(gradients(value, model).isfinite().all())
    assert int(loss.nonfinite) == 1
    chosen, shares = draw(torch.where(broken, torch.nan, kept), 15, torch.tensor(0.3, dtype=torch.float64), False)
    assert int((shares > 0).sum()) == BATCH - 2
    assert not set(chosen[shares > 0].tolist()) & {3, 15}


def _sum(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy_per_sample(model(x), labels).sum()


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=None)], ids=["momentum", "cumulative"])
@pytest.mark.parametrize("method", METHODS)
def test_batch_norm_goes_by_the_whole_batch_s_statistics(method: str, layer: nn.Module) -> None:
    """Also in the derivatives: with as many draws as samples nothing is missing, with a quarter of them little."""
    model, (images, labels) = network(copy.deepcopy(layer)), batch(32)
    images[::2] += 0.3 * images[1::2]
    model(images)
    exact = gradients(criterion()(model, images, labels), model)
    plain = gradients(nn.functional.cross_entropy(model(images), labels), model)
    found = gradients(criterion(method, fraction=1 - 1e-9)(model, images, labels), model)
    assert (found - exact).norm() <= 1e-4 * exact.norm()
    quarter = criterion(method, fraction=1 / 4)
    mean = torch.stack([gradients(quarter(model, images, labels), model) for _ in range(60)]).mean(0)
    assert float(torch.cosine_similarity(mean - plain, exact - plain, dim=0)) > 0.95


def test_many_batch_norms_do_not_amplify_a_few_samples() -> None:
    """A part's derivative of a statistic is a projection, too: it does not grow from layer to layer."""
    blocks = [layer for _ in range(12) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())]
    model, (images, labels) = network(*blocks), batch(32)
    exact = gradients(criterion()(model, images, labels), model)
    loss = criterion(fraction=1 / 8)
    largest = max(float(gradients(loss(model, images, labels), model).norm()) for _ in range(30))
    assert largest <= 10 * float(exact.norm())


def test_a_callable_s_batch_norm_too() -> None:
    model, (images, labels) = network(nn.BatchNorm2d(4)), batch()
    loss, other = criterion(fraction=1 / 4), criterion(fraction=1 / 4)
    twin = copy.deepcopy(model)
    expected = gradients(loss(model, images, labels), model)
    torch.testing.assert_close(gradients(other(lambda x: twin(x), images, labels), twin), expected)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers()))


@pytest.mark.parametrize("options", [{"sampling": "best"}, {"fraction": 0.0}, {"fraction": "half"}, {"fraction": True}])
def test_bad_options(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        criterion(**options)


def test_no_second_derivative() -> None:
    model, (images, labels) = network(), batch()
    value = criterion(fraction=1 / 4)(model, images, labels)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*fraction=1"):
        torch.autograd.grad(value, list(model.parameters()), create_graph=True)


def test_a_compiled_model_stays_compiled_in_its_first_pass() -> None:
    torch._dynamo.reset()
    model, (images, labels) = network(), batch()
    whole = gradients(criterion(fraction=1 / 4)(model, images, labels), model)
    seen: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list) -> object:
        def run(*inputs: Tensor) -> object:
            seen.append(max(t.shape[0] for t in inputs if t.dim() == 4 and t.shape[1:] == images.shape[1:]))
            return graph(*inputs)

        return run

    loss = criterion(fraction=1 / 4)
    value = loss(torch.compile(model, backend=backend), images, labels)
    torch.testing.assert_close(gradients(value, model), whole)
    assert seen == [BATCH]


def test_labels_that_cannot_be_cut() -> None:
    model, (images, labels) = network(), batch()
    loss = SGRLoss(
        criterion().covariance,
        fraction=0.5,
        loss_fn=lambda outputs, names: cross_entropy_per_sample(outputs, torch.tensor([int(n) for n in names])),
    )
    with pytest.raises((TypeError, PenaltyGradientError), match="labels: expected tensors"):
        loss(model, images, "".join(str(int(label)) for label in labels))


def test_what_else_couples_samples_is_refused() -> None:
    """Batch statistics written by hand, without running ones, or of a BatchNorm that runs twice."""

    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(torch.tanh(self.norm(x)))

    images, labels = batch()
    for layer in (Centred(), nn.BatchNorm2d(4, track_running_stats=False), nn.BatchNorm2d(4, momentum=0.0), Twice()):
        with pytest.raises(PenaltyGradientError, match="use fraction=1"):
            criterion(fraction=1 / 4)(network(layer), images, labels)
        criterion()(network(layer), images, labels).backward()


def test_surplus_draws_do_not_bring_what_is_not_finite() -> None:
    """Where fewer samples are finite than are to be drawn, wherever in the batch they stand."""
    model, (images, labels) = network(), batch(4)
    found = []
    for broken in ([0, 1], [2, 3]):
        loss = criterion(fraction=3 / 4)
        order = [i for i in range(4) if i not in broken]
        x, y = images.clone(), labels.clone()
        x[order], y[order] = images[:2], labels[:2]
        quadratic = loss.covariance.quadratic_form
        mask = torch.zeros(4, dtype=torch.bool)
        mask[broken] = True
        loss.covariance.quadratic_form = lambda g, q=quadratic, m=mask: (
            torch.where(m, torch.nan, q(g)) if len(g) == 4 and not g.requires_grad else q(g)
        )
        plain = gradients(nn.functional.cross_entropy(model(x), y), model)
        found.append(gradients(loss(model, x, y), model) - plain)
    torch.testing.assert_close(found[0], found[1])
    assert float(found[0].norm()) > 0


def test_labels_that_are_not_of_samples_pass_through() -> None:
    """As mixup has them: two sets of labels and a number; a table of priors; a scalar tensor."""
    model, (images, labels) = network(), batch()
    prior = torch.zeros(CLASSES, dtype=torch.float64)

    def mixed(outputs: Tensor, given: dict) -> Tensor:
        a, b, share = given["pair"]
        outputs = outputs + given["prior"]
        return share * cross_entropy_per_sample(outputs, a) + (1 - share) * cross_entropy_per_sample(outputs, b)

    for share in (0.3, torch.tensor(0.3, dtype=torch.float64)):
        given = {"pair": (labels, labels.flip(0), share), "prior": prior, "nothing": None}
        values = [
            SGRLoss(criterion().covariance, 3.0, fraction=fraction, loss_fn=mixed)(model, images, given)
            for fraction in (1.0, 1 / 4)
        ]
        torch.testing.assert_close(values[1], values[0])


def test_small_gradients_survive_half_precision() -> None:
    """A scaler's factor comes after the backward of the first pass, which scales by itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 32), nn.GELU(), nn.Linear(32, CLASSES))
    with torch.no_grad():
        model[3].weight *= 3e-4
    images, labels = (t.float() if t.is_floating_point() else t for t in batch())
    covariance = CovarianceFunction.exponential(1, (SIZE, SIZE), 2.0)
    loss = SGRLoss(covariance, 0.0, fraction=1 / 4)
    wanted = gradients(nn.functional.cross_entropy(model(images), labels), model)
    with torch.autocast("cpu", torch.float16):
        value = loss(model, images, labels)
    found = gradients(65536 * value, model) / 65536
    assert (found - wanted).norm() <= 1e-2 * wanted.norm()
    first = slice(0, 36 * 32)
    assert (found[first] - wanted[first]).norm() <= 2e-2 * wanted[first].norm()


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize(
    ("samples", "layer", "said"), [(4, nn.BatchNorm2d(4), True), (8, nn.BatchNorm2d(4), False), (4, nn.GELU(), False)]
)
def test_a_single_sample_for_batch_norm_is_told(
    samples: int, layer: nn.Module, said: bool, closure: bool, caplog: pytest.LogCaptureFixture
) -> None:
    _say_once.cache_clear()
    model, loss = network(layer), criterion(fraction=0.25)
    for _ in range(2):
        loss((lambda x: model(x)) if closure else model, *batch(samples))
    assert caplog.text.count("one sample is left") == said


def peak_of_a_step(**options) -> int:
    """Bytes at the peak of a step's allocations, of a network that is all parameters."""
    torch.manual_seed(0)
    hidden = [layer for _ in range(20) for layer in (nn.Linear(100, 100), nn.GELU())]
    model = nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, 100), *hidden, nn.Linear(100, CLASSES)).double()
    images, labels = batch()
    penalty = criterion(**options, allow_kinks=True)  # so deep a network hardly has a penalty; it costs all the same
    penalty(model, images, labels).backward()
    model.zero_grad()
    with torch.profiler.profile(profile_memory=True) as profile:
        penalty(model, images, labels).backward()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return int(torch.tensor(changes).cumsum(0).max())


def test_a_part_takes_no_more_memory_than_the_whole_batch() -> None:
    """Finite differences have gradients of the parameters' size before the last backward: once, not once a pass."""
    method = "finite-difference"
    assert peak_of_a_step(method=method, fraction=1 / 4) < 1.05 * peak_of_a_step(method=method)
