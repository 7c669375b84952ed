"""The trial: what a method gets wrong on a model is refused by name, and what works is named and was tried."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sgr_kernels import CovarianceFunction, IdentityCovariance, PenaltyGradientError, SGRLoss, cross_entropy_per_sample
from sgr_kernels.penalty.choice import METHODS
from sgr_kernels.penalty.double_backward import differentiable_twice
from sgr_kernels.training.datasets import load
from sgr_kernels.training.models import carlini_wagner
from tests.support_matrix import CLASSES, SIZE, Lambda, criterion, difference_of_losses, gradients

BATCH = 6
EXACT = ("double-backward", "forward-mode")


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(BATCH, 1, SIZE, SIZE, dtype=torch.float64, generator=generator)
    return images, torch.randint(0, CLASSES, (BATCH,), generator=generator)


def head(*layers: nn.Module, channels: int = 3) -> nn.Sequential:
    """A convolution, the layers, which keep the shape, and a linear head, float64."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, channels, 3), *layers)
    return nn.Sequential(body, nn.Flatten(), nn.Linear(channels * 36, CLASSES)).double()


def assert_right(model: nn.Module, method: str, call: Callable[[Tensor], Any] | None = None) -> None:
    images, labels = batch()
    expected = difference_of_losses(model, images, labels)
    torch.manual_seed(0)
    criterion(method)(call or model, images, labels).backward()
    assert (gradients(model) - expected).norm() <= 1e-5 * expected.norm()


def refusal(step: Callable[[], object]) -> str:
    """Why a model is refused; empty where it is not."""
    try:
        step()
    except PenaltyGradientError as error:
        return str(error)
    return ""


# Layers that PyTorch has no second derivative of, or a wrong one, or NaN.


def _padded_directions(x: Tensor) -> Tensor:
    """Unit vectors of 3 channels, some of them zero, as in padded windows."""
    padded = F.pad(x, (1, 1, 1, 1))
    return F.normalize(padded, dim=1)[..., 1:-1, 1:-1] + 0 * F.normalize(padded, dim=1).sum()


WRITTEN_OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardswish in place": lambda x: F.hardswish(x * 1, inplace=True),
    "hardsigmoid gate": lambda x: x * F.hardsigmoid(x.mean((2, 3), keepdim=True)),
    "normalize at zero": _padded_directions,
    "norm at zero": lambda x: x + torch.norm(F.relu(x - 9), dim=1, keepdim=True),
    "vector norm at zero": lambda x: x + torch.linalg.vector_norm(F.relu(x - 9), dim=1, keepdim=True),
    "cosine similarity at zero": lambda x: x + F.cosine_similarity(F.relu(x - 9), x, dim=1)[:, None],
}


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_functions_that_are_written_out(name: str, method: str) -> None:
    assert_right(head(Lambda(WRITTEN_OUT[name])), method)


@pytest.mark.parametrize("method", METHODS)
def test_not_a_number_in_a_parameter_s_gradient_is_refused_by_name(method: str) -> None:
    """A finite value, finite gradients in the images, and NaN in the parameters."""

    def root(x: Tensor) -> Tensor:
        zero = F.relu(x - 99)
        return x + torch.where(zero > 0, zero, zero.square()).pow(0.75)

    images, labels = batch()
    model = head(Lambda(root))
    reason = refusal(lambda: criterion(method)(model, images, labels).backward())
    if not reason:
        assert bool(gradients(model).isfinite().all())
    if method == "double-backward":
        assert "is not finite: the derivative of Pow is NaN at this input" in reason


class _Remembers(torch.autograd.Function):
    """A hand-written Swish that saves its sigmoid: right once, and a constant to a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate = torch.sigmoid(x)
        ctx.save_for_backward(x, gate)
        return x * gate

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> Tensor:
        x, gate = ctx.saved_tensors
        return incoming * (gate + x * gate.detach() * (1 - gate.detach()))


@pytest.mark.parametrize("method", ["double-backward", "auto"])
@pytest.mark.parametrize("closure", [False, True])
def test_a_function_that_saves_what_it_computed(method: str, closure: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = head(Lambda(_Remembers.apply))
    images, labels = batch()
    call = (lambda x: model(x)) if closure else model
    if method == "auto":
        assert_right(model, "auto", call)
        return
    with pytest.raises(PenaltyGradientError, match=r"differs by .* of its size from a difference.*'finite-difference'"):
        criterion(method)(call, images, labels)


def _solve(x: Tensor) -> Tensor:
    matrix = torch.eye(6, dtype=x.dtype) * 3 + x
    return torch.linalg.solve(matrix, x)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["solve", "det", "slogdet"])
def test_linear_algebra_is_right_or_refused(name: str, method: str) -> None:
    functions = {
        "solve": _solve,
        "det": lambda x: x + torch.det(torch.eye(6, dtype=x.dtype) + 0.3 * x)[..., None, None],
        "slogdet": lambda x: x + torch.slogdet(torch.eye(6, dtype=x.dtype) * 3 + x)[1][..., None, None],
    }
    reason = refusal(lambda: assert_right(head(Lambda(functions[name])), method))
    assert not reason or (method == "forward-mode" and "use method='double-backward'" in reason)


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.batch_norm": lambda x: torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False),
    "torch.instance_norm": lambda x: torch.instance_norm(x, None, None, None, None, True, 0.1, 1e-5, False),
    "torch.layer_norm": lambda x: torch.layer_norm(x, [6, 6]),
    "aten layer_norm": lambda x: torch.ops.aten.layer_norm(x, [6, 6], None, None),
    "native layer_norm": lambda x: torch.native_layer_norm(x, [6, 6], None, None, 1e-5)[0],
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NORMS)
def test_normalization_by_another_name_is_right_or_refused(name: str, method: str) -> None:
    reason = refusal(lambda: assert_right(head(Lambda(NORMS[name])), method))
    assert not reason or (method == "forward-mode" and "use method='double-backward'" in reason)


@pytest.mark.parametrize("method", METHODS)
def test_exported_models_are_right_or_refused(method: str) -> None:
    images, labels = batch()
    model = head(nn.BatchNorm2d(3), nn.GELU(), nn.LayerNorm([6, 6])).eval()
    exported = torch.export.export(model, (images,)).module()
    expected = difference_of_losses(model, images, labels)
    reason = refusal(lambda: criterion(method)(exported, images, labels).backward())
    assert not reason or "use method=" in reason
    if not reason:
        found = torch.cat([p.grad.flatten() for _, p in sorted(exported.named_parameters())])
        wanted = dict(zip([n for n, _ in model.named_parameters()], _split(expected, model)))
        assert (found - torch.cat([wanted[n] for n in sorted(wanted)])).norm() <= 1e-5 * expected.norm()


def _split(flat: Tensor, model: nn.Module) -> list[Tensor]:
    return list(flat.split([p.numel() for p in model.parameters()]))


@pytest.mark.parametrize("method", METHODS)
def test_scripted_models_get_a_remedy_or_work(method: str) -> None:
    images, labels = batch()
    with pytest.warns(DeprecationWarning, match="script"):
        scripted = torch.jit.script(head(nn.GELU()))
    reason = refusal(lambda: criterion(method)(scripted, images, labels).backward())
    assert not reason or "use method=" in reason or "no method works" in reason


class _Masked(nn.Module):
    """Attention in which a query may attend to nothing."""

    def __init__(self, additive: bool) -> None:
        super().__init__()
        allowed = torch.ones(6, 6, dtype=torch.bool).tril(-1)  # the first row is empty
        mask = torch.zeros(6, 6).masked_fill(~allowed, -torch.inf).double() if additive else allowed
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=self.mask)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("additive", [False, True])
def test_attention_to_nothing_is_zero(method: str, additive: bool) -> None:
    images, labels = batch()
    model = head(_Masked(additive))
    loss = criterion(method)
    value = loss(model, images, labels)
    plain = F.cross_entropy(model(images), labels)
    torch.testing.assert_close(value.detach(), (plain + 3 * loss.peek().penalty).detach())
    assert_right(model, method)


# Habits of code around models.


@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_closures_over_the_batch_s_own_tensors(method: str) -> None:
    """Side inputs, per-sample weights in the loss, a fixed number of groups: of the batch as it is."""
    model, (images, labels) = head(nn.GELU()), batch()
    side = torch.linspace(0.5, 2, BATCH, dtype=torch.float64)[:, None]
    weights = torch.linspace(1, 2, BATCH, dtype=torch.float64)

    class Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            assert len(x) == BATCH
            return self.model(x) * side

    def weighted(outputs: Tensor, y: Tensor) -> Tensor:
        return cross_entropy_per_sample(outputs, y) * weights

    covariance = criterion("auto").covariance
    found = []
    for call in (Bound(), lambda x: model(x) * side):
        model.zero_grad()
        SGRLoss(covariance, 3.0, method=method, loss_fn=weighted)(call, images, labels).backward()
        found.append(gradients(model))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


class _GhostNorm(nn.Module):
    """BatchNorm of two halves."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        half = len(x) // 2
        assert half == BATCH // 2
        return torch.cat([self.norm(x[:half]), self.norm(x[half:])])


@pytest.mark.parametrize("method", METHODS)
def test_batch_norm_of_parts_of_the_batch(method: str) -> None:
    assert_right(head(_GhostNorm(), nn.GELU()), method)


class _Random(nn.Module):
    """Scales by numbers of Python's and NumPy's streams."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) * (1 + random.random()) * (1 + np.random.rand())  # noqa: NPY002


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("method", METHODS)
def test_random_numbers_of_python_and_numpy_are_replayed(method: str, fraction: float) -> None:
    images, labels = batch()

    def run(way: str) -> tuple[Tensor, float, float]:
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        model = head(_Random())
        loss = SGRLoss(criterion(way).covariance, 3.0, method=way, fraction=fraction)
        loss(model, images, labels).backward()
        return gradients(model), random.random(), float(np.random.rand())  # noqa: NPY002

    found, expected = run(method), run("double-backward")
    assert (found[0] - expected[0]).norm() <= 1e-5 * expected[0].norm()
    assert found[1:] == expected[1:]
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    head(_Random())(images)
    assert expected[1:] == (random.random(), float(np.random.rand()))  # noqa: NPY002


def test_state_in_plain_attributes_has_no_trace_of_the_trial() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x

    images, labels = batch()
    model = head(counter := Counts())
    criterion("double-backward")(model, images, labels)
    assert counter.calls == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_head_that_starts_at_zero(method: str) -> None:
    """Its gradient is zero, so that nothing can be compared; once there is one, it is."""
    model, (images, labels) = head(nn.GELU()), batch()
    nn.init.zeros_(model[2].weight)
    loss = criterion(method)
    loss(model, images, labels).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.5 * parameter.grad
    model.zero_grad()
    expected = difference_of_losses(model, images, labels)
    loss(model, images, labels).backward()
    assert (gradients(model) - expected).norm() <= 1e-5 * expected.norm()


def test_finite_differences_on_a_network_with_kinks_say_their_cosine(caplog: pytest.LogCaptureFixture) -> None:
    digits = load("mnist-sample").train.first(16)
    images, labels, model = digits.images.double() / 255, digits.labels, carlini_wagner("mnist")
    covariance = CovarianceFunction.exponential(1, 28, 3.0)
    with pytest.raises(
        PenaltyGradientError, match=r"kinks .*cosine .* is -?0\.\d+ on this batch.*allow_kinks=True.*'double"
    ):
        SGRLoss(covariance, method="finite-difference")(model, images.float(), labels)
    with caplog.at_level(logging.WARNING, "sgr_kernels"):
        SGRLoss(covariance, method="finite-difference", allow_kinks=True)(model, images.float(), labels).backward()
    assert "cosine" in caplog.text
    with caplog.at_level(logging.INFO, "sgr_kernels"):
        SGRLoss(covariance, method="auto")(model, images.float(), labels)
    assert "method 'double-backward', a step costs about 2 plain ones" in caplog.text


@pytest.mark.parametrize("method", METHODS)
def test_out_of_memory_passes_through_as_itself(method: str) -> None:
    model, (images, labels) = head(nn.GELU()), batch()
    loss, calls = criterion(method), itertools.count()

    def exhausted(x: Tensor) -> Tensor:
        if next(calls) > 0 or method == "double-backward":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model(x)

    with pytest.raises(torch.OutOfMemoryError):
        loss(exhausted, images, labels)


@pytest.mark.parametrize("method", ["forward-mode", "finite-difference"])
def test_second_order_through_the_criterion_is_refused(method: str) -> None:
    """As in MAML: the remedy is the method that has further derivatives."""
    model, (images, labels) = head(nn.GELU()), batch()
    parameters = list(model.parameters())
    with pytest.raises(RuntimeError, match=r'only method="double-backward" on the whole batch'):
        torch.autograd.grad(criterion(method)(model, images, labels), parameters, create_graph=True)


def test_second_order_by_double_backward() -> None:
    """A Hessian-vector product against a difference of the gradient."""
    model, (images, labels) = head(nn.GELU()), batch()
    parameters = list(model.parameters())
    vector = [torch.randn_like(p) for p in parameters]

    def gradient() -> list[Tensor]:
        loss = criterion("double-backward")(model, images, labels)
        return list(torch.autograd.grad(loss, parameters, create_graph=True))

    along = sum((g * v).sum() for g, v in zip(gradient(), vector))
    found = torch.cat([h.flatten() for h in torch.autograd.grad(along, parameters)])
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, v in zip(parameters, vector):
                p += sign * 1e-6 * v
        sides.append(torch.cat([g.detach().flatten() for g in gradient()]))
        with torch.no_grad():
            for p, v in zip(parameters, vector):
                p -= sign * 1e-6 * v
    expected = (sides[0] - sides[1]) / 2e-6
    assert (found - expected).norm() <= 1e-5 * expected.norm()


class _Checkpointed(nn.Module):
    """Attention that is computed again in the backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.projection, self.reentrant = nn.Linear(6, 18), reentrant

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.projection(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.attend, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_checkpointed_attention_is_right_or_refused_with_what_works(method: str) -> None:
    reason = refusal(lambda: assert_right(head(_Checkpointed(False)), method))
    if reason:
        named = [name for name in METHODS if f"'{name}'" in reason.rsplit("use method", 1)[-1]]
        assert named
        for name in named:
            assert_right(head(_Checkpointed(False)), name)


@pytest.mark.parametrize("method", [*METHODS, "auto"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpoints_are_refused_with_pytorch_s_own_remedy(method: str) -> None:
    images, labels = batch()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        criterion(method)(head(_Checkpointed(True)), images, labels).backward()


def test_a_dataclass_as_output() -> None:
    @dataclass
    class Answer:
        logits: Tensor
        extra: dict[str, Tensor]

    model, (images, labels) = head(nn.GELU()), batch()

    def answer(x: Tensor) -> Answer:
        logits = model(x)
        return Answer(logits, {"twice": 2 * logits})

    values = []
    for method in METHODS:
        loss = SGRLoss(
            criterion(method).covariance,
            3.0,
            method=method,
            loss_fn=lambda out, y: cross_entropy_per_sample(out.logits, y),
        )
        model.zero_grad()
        loss(answer, images, labels).backward()
        values.append(gradients(model))
        outputs = loss.peek().outputs
        assert not outputs.logits.requires_grad
        assert not outputs.extra["twice"].requires_grad
    torch.testing.assert_close(values[1], values[0])
    torch.testing.assert_close(values[2], values[0], rtol=1e-4, atol=1e-7)


def test_a_model_that_float64_does_not_suit_is_compared_in_its_own(caplog: pytest.LogCaptureFixture) -> None:
    model, (images, labels) = head(Lambda(lambda x: torch.tanh(x.float()).to(x.dtype))), batch()
    with caplog.at_level(logging.WARNING, "sgr_kernels"):
        criterion("double-backward")(model, images, labels).backward()
    assert caplog.text == ""


def test_the_whole_batch_is_tried_once() -> None:
    """And a compiled model is compiled for it once."""
    torch._dynamo.reset()
    model, (images, labels) = head(nn.GELU()), batch()
    compilations = 0

    def backend(graph: torch.fx.GraphModule, _: list) -> Any:
        nonlocal compilations
        compilations += 1
        return graph

    compiled = torch.compile(copy.deepcopy(model), backend=backend)
    loss = SGRLoss(criterion("auto").covariance, 3.0, method="finite-difference")
    for _ in range(3):
        loss(compiled, images, labels).backward()
    assert compilations <= 2  # images that are differentiated in, and those ahead that are not


def test_signs_of_what_is_not_a_number_do_not_enter() -> None:
    """Through the criterion, for every source: a batch that is not finite is skipped whole, and counted."""
    model, (images, labels) = head(nn.GELU()), batch()
    broken = images.clone()
    broken[0, 0, 0, 0] = torch.nan
    for source in ("sign", "gradient", lambda model, images, labels: torch.ones_like(images)):
        covariance = CovarianceFunction(1, SIZE, psd="none").double()
        loss = SGRLoss(covariance, 0.1, perturbation=source)
        loss(model, images, labels)
        before = covariance.values.clone()
        loss(model, broken, labels)
        assert torch.equal(covariance.values, before)
        assert int(covariance.skipped) == 1


@pytest.mark.parametrize("every", [1, 2])
def test_steps_counted_by_hand_have_one_cadence_for_all_their_calls(every: int) -> None:
    """As under SAM, with two calls to a step."""
    model, (images, labels) = head(nn.GELU()), batch()
    covariance = CovarianceFunction(1, SIZE).double()
    loss = SGRLoss(covariance, lambda step: 1.0 + step, penalty_every=every, update_every=every, count_calls=False)
    for step in range(4):
        for _ in range(2):
            loss(model, images, labels)
            assert (loss.last.penalty is not None) == (step % every == 0)
            assert loss.last.strength == 1.0 + step
        loss.advance()
    assert loss.steps == 4
    assert int(covariance.updates) == 8 // every


def test_every_model_of_a_criterion_is_tried() -> None:
    """Two in turn, a copy of the criterion and one that was pickled: each model is tried once by each."""
    good, bad, (images, labels) = head(nn.GELU()), head(Lambda(_Remembers.apply)), batch()
    loss = criterion("double-backward")
    loss(good, images, labels)
    for other in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        with pytest.raises(PenaltyGradientError, match="differs by"):
            other(bad, images, labels)
        other(good, images, labels)
    for call in (lambda x: good(x), functools.partial(good)):
        loss(call, images, labels)
    with pytest.raises(PenaltyGradientError, match="differs by"):
        loss(functools.partial(bad), images, labels)
    with pytest.raises(PenaltyGradientError, match="differs by"):
        loss(lambda x: bad(x), images, labels)


def test_a_model_that_changes_is_tried_again() -> None:
    """Another layer, another precision, another set of trained parameters, another method."""
    model, (images, labels) = head(nn.GELU()), batch()
    loss = criterion("double-backward")
    loss(model, images, labels)
    model[0][1] = Lambda(_Remembers.apply)
    with pytest.raises(PenaltyGradientError, match="differs by"):
        loss(model, images, labels)
    frozen = head(Lambda(_Remembers.apply))
    frozen[0].requires_grad_(False)
    loss(frozen, images, labels)
    frozen[0].requires_grad_(True)
    with pytest.raises(PenaltyGradientError, match="differs by"):
        loss(frozen, images, labels)


def test_autocast_does_not_blind_the_trial() -> None:
    model, (images, labels) = head(Lambda(_Remembers.apply)).float(), batch()
    loss = criterion("double-backward", torch.float32)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(PenaltyGradientError, match="differs by"):
        loss(model, images.float(), labels)


def test_the_trial_s_noise_keeps_the_range_of_the_images() -> None:
    def range_kept(x: Tensor) -> Tensor:
        assert float(x.detach().min()) >= 0
        assert float(x.detach().max()) <= 1
        return (x + 1e-6).sqrt()

    images, labels = batch()
    images[:, :, :2] = 0
    images[:, :, 2] = 1
    model = nn.Sequential(Lambda(range_kept), head(nn.GELU())).double()
    loss = criterion("double-backward")
    loss(model, images, labels).backward()
    assert loss._ways.get(model, ("double-backward", False, False, False)) is not None


@pytest.mark.parametrize("name", ["normalize", "norm", "cosine"])
@pytest.mark.parametrize("size", [300.0, 1e-4])
def test_sixteen_bits_keep_their_values(name: str, size: float) -> None:
    functions = {
        "normalize": F.normalize,
        "norm": lambda x: torch.linalg.vector_norm(x, dim=1),
        "cosine": lambda x: F.cosine_similarity(x, x),
    }
    x = torch.full((1, 8), size, dtype=torch.float16)
    with differentiable_twice():
        found = functions[name](x)
    assert found.dtype == x.dtype
    torch.testing.assert_close(found.double(), functions[name](x.double()), rtol=2e-2, atol=1e-7)


def test_checkpointed_batch_norm_is_right_by_double_backward() -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda z: F.gelu(self.norm(self.conv(z))), x, use_reentrant=False)

    assert_right(head(Body()), "double-backward")


def test_softmax_by_keyword() -> None:
    assert_right(head(Lambda(lambda x: torch.softmax(input=x, dim=-1))), "forward-mode")


@pytest.mark.parametrize("learned", [False, True])
def test_finite_differences_are_judged_along_the_covariance_s_own_directions(learned: bool) -> None:
    """A model that wriggles between neighbouring pixels is smooth to perturbations which all pixels share."""

    class Wriggles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fine, self.coarse = nn.Linear(SIZE**2, CLASSES), nn.Linear(1, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            mean = x.mean((1, 2, 3), keepdim=True)
            return self.fine(1e-2 * torch.sin(1e4 * (x - mean)).flatten(1)) + self.coarse(torch.tanh(mean).flatten(1))

    images, labels = batch()
    model, ones = Wriggles(), torch.ones(1, 1, CovarianceFunction(1, SIZE).values.shape[-1])
    covariance = CovarianceFunction.from_values(ones, SIZE, psd="none")
    if learned:
        covariance = CovarianceFunction(1, SIZE, psd="none")
        covariance.update(torch.ones(4, 1, SIZE, SIZE))
    found = []
    for method in ("finite-difference", "double-backward"):
        model.zero_grad()
        SGRLoss(covariance, 10.0, perturbation=None, method=method)(model, images.float(), labels).backward()
        found.append(gradients(model))
    assert (found[0] - found[1]).norm() <= 0.2 * found[1].norm()  # rounding of single precision
    for other in (IdentityCovariance(), CovarianceFunction(1, SIZE)):  # one that is zero as yet says nothing
        with pytest.raises(PenaltyGradientError, match="finite differences lose"):
            SGRLoss(other, 10.0, perturbation=None, method="finite-difference")(model, images.float(), labels)
