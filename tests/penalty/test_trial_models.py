"""The trial model by model: what a method gets wrong is refused by name, and what it works with is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sgr_kernels import PenaltyGradientError, SGRLoss, cross_entropy_per_sample
from sgr_kernels.penalty.choice import METHODS
from sgr_kernels.penalty.double_backward import differentiable_twice
from tests.support_matrix import Lambda, criterion, difference_of_losses, gradients
from tests.trial_models import BATCH, EXACT, Remembers, assert_right, batch, head, refusal


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


@pytest.mark.parametrize("method", ["double-backward", "auto"])
@pytest.mark.parametrize("closure", [False, True])
def test_a_function_that_saves_what_it_computed(method: str, closure: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = head(Lambda(Remembers.apply))
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
