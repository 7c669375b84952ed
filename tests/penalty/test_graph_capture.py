"""A training step asks the device for no value, and can be recorded as a CUDA graph."""

import contextlib

import pytest
import torch

from sgr_kernels import CovarianceFunction, SGRLoss, loss
from sgr_kernels.models import carlini_wagner
from sgr_kernels.penalty import choice, proof, statistics, way
from tests.graph_emulator import capturing_on_meta

SIZES = {1: (28, 28), 3: (32, 32)}


def setting(channels: int, device: str, **options):
    """A model and its criterion."""
    torch.manual_seed(0)
    model = carlini_wagner("mnist" if channels == 1 else "cifar10").to(device)
    criterion = SGRLoss(CovarianceFunction(channels, SIZES[channels], target_variance=0.06), 1.0, **options)
    return model, criterion.to(device)


def believed(name: str, trial: object) -> way.Way:
    """A way without a trial."""
    found = proof.WAYS[name]()
    found.proved = True
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"perturbation": "gradient"},
        {"penalty_every": 4},
        {"fraction": 0.25},
        {"mean_correction": True},
        {"method": "finite-difference"},
        {"method": "forward-mode"},
    ],
    ids=str,
)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_step_asks_the_device_for_no_value(channels, options, monkeypatch):
    """On the meta device, whose tensors have no values: whatever asked for one would fail, but not what waits inside
    PyTorch, as its eigenvalue solver does (`test_clipping_is_the_same_while_a_graph_records`).
    """
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # autocast does not know that device
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(choice, "prove", believed)  # before the first step, it does look
    model, criterion = setting(channels, "meta", **options)
    images = torch.rand(8, channels, *SIZES[channels], device="meta")
    labels = torch.zeros(8, dtype=torch.int64, device="meta")
    for step in range(1, 6):  # the 10th, 20th, ... look whether penalties are finite
        criterion.steps = step
        criterion(model, images, labels).backward()
    with capturing_on_meta():  # when constants are in place, nothing is brought to the device
        criterion(model, images, labels).backward()
    assert criterion.peek().loss.device.type == "meta"
    with pytest.raises(RuntimeError, match="meta"):
        float(criterion.peek().loss)


def test_replays_draw_other_samples(monkeypatch):
    """What a graph records has the number of the draw on the device, and counts it there."""
    model, criterion = setting(1, "cpu", fraction=0.5)
    images, labels = torch.rand(4, 1, 28, 28), torch.zeros(4, dtype=torch.int64)
    criterion(model, images, labels)
    monkeypatch.setattr(loss, "recording", lambda: True)
    for draws in (2, 3, 4):
        criterion.steps = 1  # as a replay has it
        criterion(model, images, labels)
        assert int(criterion.drawn) == draws


def test_only_steps_that_record_skip_the_look_at_penalties(monkeypatch):
    model, criterion = setting(1, "cpu", nonfinite_patience=1)
    images, labels = torch.rand(2, 1, 28, 28), torch.zeros(2, dtype=torch.int64)
    criterion.nonfinite_in_a_row += 1
    with monkeypatch.context() as patch:
        patch.setattr(statistics, "recording", lambda: True)
        criterion._stop_if_hopeless()
    with pytest.raises(RuntimeError, match="in a row"):
        criterion(model, images, labels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("channels", [1, 3])
def test_a_recorded_step_trains_as_an_eager_one(channels):
    generator = torch.Generator("cuda").manual_seed(0)
    batches = [torch.rand(16, channels, *SIZES[channels], device="cuda", generator=generator) for _ in range(8)]
    labels = torch.arange(16, device="cuda") % 10

    def step(model, criterion, optimizer, images):
        criterion(model, images, labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def begun():
        model, criterion = setting(channels, "cuda")
        model.eval()  # without dropout: a recorded step draws other numbers
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)  # Adam makes much of rounding
        return model, criterion, optimizer

    eager, recorded = begun(), begun()
    images = batches[0].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for batch in batches[:3]:
            images.copy_(batch)
            step(*recorded, images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*recorded, images)
    for batch in batches[3:]:
        images.copy_(batch)
        graph.replay()
    for batch in batches:
        step(*eager, batch)
    torch.testing.assert_close(recorded[1].covariance.values, eager[1].covariance.values, rtol=1e-3, atol=1e-9)
    for one, other in zip(recorded[0].parameters(), eager[0].parameters()):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
