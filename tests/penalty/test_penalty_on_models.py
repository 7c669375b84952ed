"""Penalty gradients of models of many kinds, by every method, against a difference of plain gradients in float64."""

from __future__ import annotations

import copy
import logging
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from sgr_kernels import CovarianceFunction, PenaltyGradientError, SGRLoss, cross_entropy_per_sample
from sgr_kernels.penalty.choice import METHODS
from tests.support_matrix import CLASSES, SIZE, criterion, difference_of_losses, gradients

BATCH = 6


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(BATCH, 1, SIZE, SIZE, dtype=torch.float64, generator=generator)
    return images, torch.randint(0, CLASSES, (BATCH,), generator=generator)


def classifier(*features: nn.Module) -> nn.Module:
    """Features of one channel, a smooth function, and a linear layer of the size that it takes."""
    body = nn.Sequential(*features, nn.GELU(), nn.Flatten()).double()
    with torch.no_grad():
        width = copy.deepcopy(body)(torch.rand(2, 1, SIZE, SIZE, dtype=torch.float64)).shape[1]
    return nn.Sequential(body, nn.Linear(width, CLASSES)).double()


def assert_exact(build: Callable[[], nn.Module], method: str, tolerance: float = 1e-5) -> None:
    torch.manual_seed(0)
    model, (images, labels) = build(), batch()
    expected, plain = difference_of_losses(model, images, labels), copy.deepcopy(model)
    torch.manual_seed(0)
    cross_entropy = F.cross_entropy(plain(images), labels)
    torch.manual_seed(0)
    loss = criterion(method)
    value = loss(model, images, labels)
    torch.testing.assert_close(value, cross_entropy + 3.0 * loss.peek().penalty, rtol=1e-10, atol=0)
    for (name, mine), wanted in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, wanted), name
    value.backward()
    assert (gradients(model) - expected).norm() <= tolerance * expected.norm()


class Twice(nn.Module):
    """One convolution, applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.tanh(self.conv(x)))


class Computed(nn.Module):
    """A convolution with weights that the images decide."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Linear(SIZE * SIZE, 27)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, torch.tanh(self.weights(x.flatten(1).mean(0))).view(3, 1, 3, 3))


class Correlation(nn.Module):
    """A convolution of which the images are the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.scene = nn.Parameter(torch.randn(1, 1, SIZE + 2, SIZE + 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.scene, x).transpose(0, 1)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.real, self.imaginary = (nn.Parameter(torch.randn(3, 1, 3, 3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        found = F.conv2d(torch.complex(x, x.square()), torch.complex(self.real, self.imaginary))
        return found.real * torch.sigmoid(found.imag)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "padding by name": lambda: classifier(nn.Conv2d(1, 3, 3, padding="same", dilation=2)),
    "circular padding": lambda: classifier(nn.Conv2d(1, 3, 3, padding=1, padding_mode="circular")),
    "one dimension": lambda: classifier(nn.Flatten(2), nn.Conv1d(1, 3, 5, stride=3, padding=2)),
    "three dimensions": lambda: classifier(nn.Unflatten(1, (1, 1)), nn.Conv3d(1, 3, (1, 3, 3))),
    "transposed": lambda: classifier(nn.Conv2d(1, 3, 3, stride=2), nn.GELU(), nn.ConvTranspose2d(3, 2, 3, stride=2)),
    "a weight used twice": lambda: classifier(Twice()),
    "computed weights": lambda: classifier(Computed()),
    "images as weights": lambda: classifier(Correlation()),
    "complex weights": lambda: classifier(Complex()),
    "weight normalization": lambda: classifier(parametrizations.weight_norm(nn.Conv2d(1, 3, 3))),
    "spectral normalization": lambda: classifier(parametrizations.spectral_norm(nn.Conv2d(1, 3, 3))),
    "instance normalization": lambda: classifier(nn.Conv2d(1, 3, 3), nn.InstanceNorm2d(3, track_running_stats=True)),
    "dropout of channels": lambda: classifier(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout2d(0.3)),
    "no parameter but the head's": lambda: classifier(nn.Conv2d(1, 3, 3).requires_grad_(False)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model(name: str, method: str) -> None:
    assert_exact(MODELS[name], method)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_convolution(data: st.DataObject) -> None:
    """Random strides, paddings, dilations, groups, biases, frozen weights and memory formats."""
    layers: list[nn.Module] = []
    channels, extent = 1, SIZE
    torch.manual_seed(data.draw(st.integers(0, 99)))
    for _ in range(data.draw(st.integers(1, 3))):
        kernel = data.draw(st.integers(1, 3))
        dilation, padding, stride = (data.draw(st.integers(low, 2)) for low in (1, 0, 1))
        after = (extent + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        if after < 1:
            break
        groups, out = data.draw(st.sampled_from([1, channels])), channels * data.draw(st.integers(1, 2))
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        conv = nn.Conv2d(channels, out, kernel, bias=data.draw(st.booleans()), **options)
        conv.weight.requires_grad_(data.draw(st.booleans()))
        layers += [conv, nn.Softplus()]
        channels, extent = out, after
    memory = data.draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))
    for method in METHODS:
        assert_exact(lambda: classifier(*copy.deepcopy(layers)).to(memory_format=memory), method)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("method", METHODS)
def test_a_table_that_makes_the_images_and_reads_the_model(method: str, fraction: float) -> None:
    """Tied embeddings: one weight before and behind the regularized representation."""

    def run(method: str) -> Tensor:
        torch.manual_seed(0)
        table, mix = nn.Embedding(CLASSES, 4).double(), nn.Linear(20, 4).double()
        tokens = torch.arange(40).view(8, 5) % CLASSES
        loss = SGRLoss(CovarianceFunction.exponential(4, (5,), 2.0).double(), 3.0, method=method, fraction=fraction)
        labels = torch.arange(8) % CLASSES
        loss(lambda x: torch.tanh(mix(x.flatten(1))) @ table.weight.mT, table(tokens).mT, labels).backward()
        return torch.cat([gradients(table), gradients(mix)])

    expected = run("double-backward")
    assert (run(method) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_modules_inside_a_callable_are_left_as_a_plain_step_leaves_them(method: str, fraction: float) -> None:
    """Several inputs come as a closure, which does not tell what it holds."""
    torch.manual_seed(0)
    model = classifier(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.3))
    plain, (images, labels) = copy.deepcopy(model), batch()
    own = [buffer.data_ptr() for buffer in model.buffers()]
    for seed in range(2):
        torch.manual_seed(seed)
        plain(images)
        random = torch.get_rng_state()
        torch.manual_seed(seed)
        loss = SGRLoss(criterion(method).covariance, 3.0, method=method, fraction=fraction)
        loss(lambda x: model(x) * 2, images, labels).backward()
        assert torch.equal(torch.get_rng_state(), random)
    for (name, mine), wanted in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, wanted), name
    assert [buffer.data_ptr() for buffer in model.buffers()] == own


@pytest.mark.parametrize("method", METHODS)
def test_a_functional_call_inside_a_callable_keeps_the_module_s_own_buffers(method: str) -> None:
    model, (images, labels) = classifier(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)), batch()
    own = {name: (id(buffer), buffer.clone()) for name, buffer in model.named_buffers()}
    given = {name: buffer.clone() for name, buffer in model.named_buffers()}
    loss = criterion(method)
    loss(lambda x: torch.func.functional_call(model, given, (x,)), images, labels).backward()
    for name, buffer in model.named_buffers():
        assert id(buffer) == own[name][0], name
        assert torch.equal(buffer, own[name][1]), name


@pytest.mark.parametrize("method", METHODS)
def test_batch_statistics_inside_a_callable(method: str) -> None:
    """Tried in evaluation mode first: that samples interact in training mode shows later."""
    torch.manual_seed(0)
    model, (images, labels) = classifier(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)), batch()
    loss = criterion(method)
    model.eval()
    loss(lambda x: model(x), images, labels)
    expected = difference_of_losses(model.train(), images, labels)
    loss(lambda x: model(x), images, labels).backward()
    assert (gradients(model) - expected).norm() <= 1e-5 * expected.norm()


class Lowered(nn.Module):
    """Float32 in and out, bfloat16 inside, as libraries wrap models."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.model(x).float()


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_lowers_its_own_precision(method: str) -> None:
    torch.manual_seed(0)
    model, (images, labels) = classifier(nn.Conv2d(1, 6, 3)), batch()
    expected = difference_of_losses(model, images, labels)
    criterion(method, torch.float32)(Lowered(model.float()), images.float(), labels).backward()
    assert (gradients(model) - expected).norm() <= 5e-2 * expected.norm()


def test_autocast_leaves_float64_as_it_is() -> None:
    model, (images, labels) = classifier(nn.Conv2d(1, 3, 3)), batch()
    wanted = torch.autograd.grad(criterion("double-backward")(model, images, labels), list(model.parameters()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion("double-backward")(model, images, labels)
    torch.testing.assert_close(torch.autograd.grad(loss, list(model.parameters())), wanted)


Answer = namedtuple("Answer", "logits features")


@pytest.mark.parametrize("method", METHODS)
def test_outputs_of_any_structure_are_detached(method: str) -> None:
    model, (images, labels) = classifier(nn.Conv2d(1, 3, 3)), batch()

    def answer(x: Tensor) -> Answer:
        logits = model(x)
        return Answer(logits, [logits])

    covariance = criterion(method).covariance
    loss = SGRLoss(covariance, 3.0, method=method, loss_fn=lambda out, y: cross_entropy_per_sample(out.logits, y))
    value = loss(answer, images, labels)
    outputs = loss.peek().outputs
    assert isinstance(outputs, Answer)
    assert not outputs.logits.requires_grad
    assert not outputs.features[0].requires_grad
    torch.testing.assert_close(value, criterion(method)(model, images, labels))


@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_labels_of_any_kind(method: str, caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be cut is tried whole; with a part of the batch it is an error that says so."""
    model, (images, labels) = classifier(nn.Conv2d(1, 3, 3)), batch()
    names = "".join("abcd"[label] for label in labels)

    def loss_fn(outputs: Tensor, names: Any) -> Tensor:
        return cross_entropy_per_sample(outputs, torch.tensor(["abcd".index(name) for name in names]))

    covariance = criterion("auto").covariance
    with caplog.at_level(logging.INFO, "sgr_kernels"):
        value = SGRLoss(covariance, 3.0, method=method, loss_fn=loss_fn)(model, images, names)
    torch.testing.assert_close(value, criterion(method)(model, images, labels))
    with pytest.raises(TypeError, match=r"labels: expected tensors, .* for fraction < 1"):
        SGRLoss(covariance, 3.0, method=method, loss_fn=loss_fn, fraction=0.5)(model, images, names)


@pytest.mark.parametrize("method", METHODS)
def test_an_error_inside_a_step_leaves_no_setting_behind(method: str) -> None:
    """Gradient mode, attention kernels, function modes, random streams, buffers, hooks; also when interrupted."""
    model, (images, labels) = classifier(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)), batch()
    weight = model[1].weight
    hook = weight.register_hook(lambda gradient: gradient)
    loss, calls = criterion(method), 0
    loss(model, images, labels)

    def flags() -> list[Any]:
        backends = torch.backends.cuda
        modes = torch.overrides._len_torch_function_stack()
        attention = [backends.flash_sdp_enabled(), backends.mem_efficient_sdp_enabled(), backends.math_sdp_enabled()]
        return [*attention, torch.is_grad_enabled(), modes, hook.id in weight._backward_hooks]

    before = flags()
    for error in (KeyboardInterrupt, MemoryError, RuntimeError):
        for fatal in (1, 2):

            def failing(x: Tensor, error: type[BaseException] = error, fatal: int = fatal) -> Tensor:
                nonlocal calls
                calls += 1
                result = model(x)
                if calls == fatal:
                    raise error
                return result

            calls = 0
            own = [buffer.data_ptr() for buffer in model.buffers()]
            if method == "double-backward" and fatal == 2:
                continue  # one pass only
            with pytest.raises((error, PenaltyGradientError)):
                loss(failing, images, labels)
            assert flags() == before
            assert [buffer.data_ptr() for buffer in model.buffers()] == own
    loss(model, images, labels).backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own look at it
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler's kernels need a C++ compiler")
@pytest.mark.parametrize("method", ["forward-mode", "finite-difference"])
def test_a_compiled_step_repeats_its_dropout_masks(method: str) -> None:
    """With generated kernels, which draw numbers of their own; masks that differ make differences huge."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, (images, labels) = classifier(nn.Conv2d(1, 3, 3), nn.Dropout(0.4)), batch()
    expected, loss = difference_of_losses(model, images, labels), criterion(method)
    torch.manual_seed(0)
    torch.compile(lambda x, y: loss(model, x, y))(images, labels).backward()
    ratio = float(gradients(model).norm() / expected.norm())
    assert 0.3 < ratio < 3  # other masks than those drawn outside


class Standardized(nn.Module):
    """Writes into its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(0.4).div_(0.3)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("method", METHODS)
def test_models_may_write_into_their_images(method: str, fraction: float) -> None:
    torch.manual_seed(0)
    body, (images, labels), before = classifier(nn.Conv2d(1, 3, 3)), batch(), batch()[0]
    found = []
    for first in (lambda x: (x - 0.4) / 0.3, Standardized()):
        model = copy.deepcopy(body)
        loss = criterion(method)
        loss.fraction = fraction
        value = loss(lambda x, first=first, model=model: model(first(x)), images, labels)
        value.backward()
        assert torch.equal(images, before)
        found.append((value.detach(), gradients(model)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_a_static_graph_of_distributed_training_is_refused(tmp_path: Path) -> None:
    """Its first backward, that for the images, would count as the step's, and nothing would be reduced."""
    model, (images, labels) = classifier(nn.Conv2d(1, 3, 3)), batch()
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model, static_graph=True)
        for method in METHODS:
            with pytest.raises(PenaltyGradientError, match="use static_graph=False"):
                criterion(method)(wrapped, images, labels)
    finally:
        distributed.destroy_process_group()
