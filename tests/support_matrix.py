"""What works with which way to the penalty's gradient: cases, and the table in docs/support.md.

``python -m tests.support_matrix`` writes the page down to its models, which are of `tests.zoo`; the test of the same
name compares it with the file.
"""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sgr_kernels as sgr
from sgr_kernels.penalty.choice import METHODS

PAGE = Path(__file__).parent.parent / "docs" / "support.md"
MODELS = "\n## Real models\n"
"""Where the page goes on with what is not from here."""
SIZE, CLASSES = 8, 4


@dataclass(frozen=True)
class Outcome:
    """Parameter gradients by a method, and those that they must equal."""

    found: Tensor
    expected: Tensor
    tolerance: float = 1e-4


Case = Callable[[str], Outcome]


def _head(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 6, 3), *layers, nn.GELU(), nn.Flatten(), nn.Linear(6 * 36, CLASSES))


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(8, 1, SIZE, SIZE, dtype=torch.float64, generator=generator)
    return images, torch.randint(0, CLASSES, (8,), generator=generator)


class Lambda(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def criterion(method: str, dtype: torch.dtype = torch.float64) -> sgr.SGRLoss:
    covariance = sgr.CovarianceFunction.exponential(1, (SIZE, SIZE), 3.0).to(dtype)
    return sgr.SGRLoss(covariance, 3.0, method=method)


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def difference_of_losses(model: nn.Module, images: Tensor, labels: Tensor, seed: int = 0) -> Tensor:
    """The oracle: gradients of ``CE + strength Omega`` with Omega's from a central difference of CE's gradients.

    ``grad_theta mean_b v_b . grad_x l_b = d/dh grad_theta mean_b l_b(x + h v_b)`` at h = 0. Shares nothing with the
    three methods but first derivatives.
    """
    model = copy.deepcopy(model)
    covariance = criterion(METHODS[0], torch.float64).covariance

    def gradient(at: Tensor) -> tuple[Tensor, Tensor]:
        work = copy.deepcopy(model)
        torch.manual_seed(seed)
        leaf = at.detach().requires_grad_()
        losses = sgr.cross_entropy_per_sample(work(leaf), labels)
        (by_images,) = torch.autograd.grad(losses.sum(), leaf, retain_graph=True)
        losses.mean().backward()
        return gradients(work), by_images

    at_images, by_images = gradient(images)
    direction = covariance.product(by_images)
    step = 1e-5 / float(direction.norm())
    forward, backward = (gradient(images + sign * step * direction)[0] for sign in (1, -1))
    return at_images + 3.0 * (forward - backward) / (2 * step)


def plain(build: Callable[[], nn.Module], training: bool = True) -> Case:
    def case(method: str) -> Outcome:
        torch.manual_seed(0)
        model = build().double().train(training)
        images, labels = _batch()
        expected = difference_of_losses(model, images, labels)
        torch.manual_seed(0)
        criterion(method)(model, images, labels).backward()
        return Outcome(gradients(model), expected)

    return case


class _Tokens(nn.Module):
    """A layer over 36 tokens of 6 features."""

    def __init__(self, layer: nn.Module, attention: bool = False) -> None:
        super().__init__()
        self.layer, self.attention = layer, attention

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT
        if self.attention:
            out = self.layer(tokens, tokens, tokens, need_weights=False)[0]
        else:
            out = self.layer(tokens)
            out = out[0] if isinstance(out, tuple) else out
        return out.mT.reshape(x.shape)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(6, 18)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = (part[:, None] for part in self.projection(tokens).chunk(3, -1))
        return nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class _Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Conv2d(1, 6, 3), nn.GELU()), nn.Linear(6 * 36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False).flatten(1))


class _CheckpointedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = _Tokens(_Attention())

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)


def single_precision(build: Callable[[], nn.Module]) -> Case:
    """In float32, beside the oracle in float64."""

    def case(method: str) -> Outcome:
        torch.manual_seed(0)
        model = build().double()
        images, labels = _batch()
        expected = difference_of_losses(model, images, labels)
        criterion(method, torch.float32)(model.float(), images.float(), labels).backward()
        return Outcome(gradients(model), expected, tolerance=1e-2)

    return case


def _kinks() -> nn.Module:
    layers = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, CLASSES))


def compiled(method: str) -> Outcome:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = _head().double()
    images, labels = _batch()
    expected = difference_of_losses(model, images, labels)
    criterion(method)(torch.compile(model, backend="aot_eager"), images, labels).backward()
    return Outcome(gradients(model), expected)


def compiled_step(method: str) -> Outcome:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, loss = _head().double(), criterion(method)
    images, labels = _batch()
    expected = difference_of_losses(model, images, labels)

    @torch.compile(backend="aot_eager")
    def step(images: Tensor, labels: Tensor) -> Tensor:
        return loss(model, images, labels)

    step(images, labels).backward()
    return Outcome(gradients(model), expected)


def mixed_precision(dtype: torch.dtype) -> Case:
    def case(method: str) -> Outcome:
        torch.manual_seed(0)
        model = _head()
        images, labels = _batch()
        expected = difference_of_losses(model.double(), images, labels)
        model.float()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype == torch.float16)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with torch.autocast("cpu", dtype=dtype):
            loss = criterion(method, torch.float32)(model, images.float(), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        return Outcome(gradients(model), expected, tolerance=5e-2 if dtype == torch.bfloat16 else 1e-2)

    return case


def channels_last(method: str) -> Outcome:
    torch.manual_seed(0)
    model = _head().double()
    images, labels = _batch()
    images = images.expand(-1, 1, -1, -1)
    expected = difference_of_losses(model, images, labels)
    model = model.to(memory_format=torch.channels_last)
    criterion(method)(model, images.to(memory_format=torch.channels_last), labels).backward()
    return Outcome(gradients(model), expected)


def accumulation(method: str) -> Outcome:
    torch.manual_seed(0)
    model, loss = _head().double(), criterion(method)
    images, labels = _batch()
    expected = difference_of_losses(model, images, labels)
    for part in (slice(0, 4), slice(4, 8)):
        (loss(model, images[part], labels[part]) / 2).backward()
    return Outcome(gradients(model), expected)


class _Conditioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = _head()

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.body(x) * scale


def several_inputs(method: str) -> Outcome:
    torch.manual_seed(0)
    model, scale = _Conditioned().double(), torch.linspace(0.5, 2, 8, dtype=torch.float64)[:, None]
    images, labels = _batch()

    class Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x, scale[: len(x)])

    expected = difference_of_losses(Bound(), images, labels)
    criterion(method)(lambda x: model(x, scale[: len(x)]), images, labels).backward()
    return Outcome(gradients(model), expected)


def embedding(method: str) -> Outcome:
    """Regularized in an embedding: the penalty's gradient also goes through it, as double backward has it."""

    def run(method: str) -> Tensor:
        torch.manual_seed(0)
        table, head = nn.Embedding(9, 4).double(), nn.Sequential(nn.Flatten(), nn.Linear(20, 8), nn.Tanh())
        head = nn.Sequential(head, nn.Linear(8, CLASSES)).double()
        tokens = torch.arange(40).view(8, 5) % 9
        covariance = sgr.CovarianceFunction.exponential(4, (5,), 2.0).double()
        sgr.SGRLoss(covariance, 3.0, method=method)(head, table(tokens).mT, torch.arange(8) % CLASSES).backward()
        return torch.cat([gradients(table), gradients(head)])

    return Outcome(run(method), run(METHODS[0]))


@contextlib.contextmanager
def _single_process_group() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


def distributed_data_parallel(method: str) -> Outcome:
    torch.manual_seed(0)
    model = _head().double()
    images, labels = _batch()
    expected = difference_of_losses(model, images, labels)
    with _single_process_group():
        criterion(method)(nn.parallel.DistributedDataParallel(model), images, labels).backward()
    return Outcome(gradients(model), expected)


def fully_sharded(method: str) -> Outcome:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = _head().double()
    images, labels = _batch()
    expected = difference_of_losses(model, images, labels)
    with _single_process_group():
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        criterion(method)(model, images, labels).backward()
        full = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
    return Outcome(torch.cat([g.flatten() for g in full]), expected)


CASES: dict[str, Case] = {
    "convolutions, smooth activations": plain(_head),
    "residual connections": plain(lambda: _head(_Residual(nn.Conv2d(6, 6, 3, padding=1)))),
    "BatchNorm, training mode": plain(lambda: _head(nn.BatchNorm2d(6))),
    "BatchNorm, evaluation mode": plain(lambda: _head(nn.BatchNorm2d(6)), training=False),
    "LayerNorm": plain(lambda: _head(nn.LayerNorm([6, 6, 6]))),
    "GroupNorm": plain(lambda: _head(nn.GroupNorm(2, 6))),
    "dropout": plain(lambda: _head(nn.Dropout(0.5))),
    "scaled_dot_product_attention": plain(lambda: _head(_Tokens(_Attention()))),
    "nn.MultiheadAttention": plain(lambda: _head(_Tokens(nn.MultiheadAttention(6, 2, batch_first=True), True))),
    "LSTM": plain(lambda: _head(_Tokens(nn.LSTM(6, 6, batch_first=True)))),
    "LSTM, float32": single_precision(lambda: _head(_Tokens(nn.LSTM(6, 6, batch_first=True)))),
    "ReLU and max-pooling, float32": single_precision(_kinks),
    "torch.compile of the model": compiled,
    "torch.compile of the step": compiled_step,
    "autocast bfloat16": mixed_precision(torch.bfloat16),
    "autocast float16 with GradScaler": mixed_precision(torch.float16),
    "activation checkpointing, convolutions": plain(_Checkpointed),
    "activation checkpointing, attention": plain(lambda: _head(_CheckpointedAttention())),
    "gradient accumulation": accumulation,
    "channels_last": channels_last,
    "several inputs (a closure)": several_inputs,
    "regularizing an embedding": embedding,
    "DistributedDataParallel": distributed_data_parallel,
    "FSDP2 (fully_shard)": fully_sharded,
}


def outcome(case: str, method: str) -> str:
    """``"yes"``, or ``"no: "`` and the first clause of the error; a wrong gradient is an AssertionError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = CASES[case](method)
        except sgr.PenaltyGradientError as error:
            return f"no: {reason(str(error))}"
    difference = (result.found - result.expected).norm() / result.expected.norm()
    assert difference <= result.tolerance, f"{case}, {method}: gradients differ by {float(difference):.2g}"
    return "yes"


def reason(message: str) -> str:
    """The error's own first words, without what varies."""
    return message.removeprefix("method: ").split("(")[0].split(";")[0].strip()


def render() -> str:
    """The page without its models."""
    lines = [
        "# What works with which method",
        "",
        "Every `yes` is a test: the parameters' gradients equal those of an independent oracle (a central difference "
        "of plain",
        "cross-entropy gradients, in float64). Every `no` raises `PenaltyGradientError`, which names the remedy. "
        "Generated by",
        "`python -m tests.support_matrix`, on a CPU.",
        "",
        "| | " + " | ".join(METHODS) + " |",
        "|---|" + "---|" * len(METHODS),
    ]
    for case in CASES:
        lines.append(f"| {case} | " + " | ".join(outcome(case, method) for method in METHODS) + " |")
    lines += [
        "",
        "In BatchNorm's training mode the gradient of a sample's loss also flows through the other samples; all "
        "methods agree on",
        "that. Fused attention has no second derivative: double backward runs it as its definition, and forward mode "
        "writes",
        "attention, softmax and normalization layers out (`sgr_kernels/penalty/layers/forward_rules.py`). The exact "
        "methods run",
        "compiled code in eager mode, be it the model, a part of it, or hidden in a callable; finite differences keep "
        "it compiled.",
        'On GPUs, cuDNN\'s recurrent layers have no second derivative either: use `method="finite-difference"`.',
    ]
    return "\n".join(lines) + "\n"


def main() -> Any:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rest = PAGE.read_text().partition(MODELS)[2]
    PAGE.write_text(render() + MODELS + rest)


if __name__ == "__main__":
    main()
