"""Steps that are captured and replayed train to the same bits as eager ones; what cannot be captured runs eagerly.

Graphs are emulated on the CPU (`tests.graph_emulator`), but for the last tests, which want a device.
"""

import copy
import gc
import logging
import random
import weakref

import pytest
import torch
from torch import nn

from sgr_kernels.training import cuda_graphs, kinds, loop
from sgr_kernels.training.loop import Trainer
from sgr_kernels.training.methods import Settings
from sgr_kernels.training.network import GIVEN
from sgr_kernels.training.processes import Processes
from tests.graph_emulator import EmulatedGraph


@pytest.fixture
def graphs(monkeypatch):
    """Has trainings capture, and lists their graphs."""
    made = []

    def new_graph():
        EmulatedGraph(made)
        return made[-1]

    streams = kinds._random_streams
    monkeypatch.setattr(loop, "usable", lambda asked, device, processes: asked)
    monkeypatch.setattr(loop, "graphs_on", lambda device: new_graph)
    # PyTorch's stream on the CPU is the device's here.
    monkeypatch.setattr(kinds, "_random_streams", lambda: streams()[1:])
    return made


def settings(**changed):
    return Settings(**{"architecture": GIVEN, "method": "sgr", "batch_size": 64, "seed": 5, **changed})


class Own(nn.Module):
    """A network with normalization and perhaps dropout, which may do something on the host at each call."""

    def __init__(self, on_host=lambda self: None, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2),
            nn.BatchNorm2d(4),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(4 * 13 * 13, 10),
        )
        self.calls, self.on_host = 0, on_host

    def forward(self, x):
        self.on_host(self)
        return self.layers(x)


def trained(digits, chosen, epochs=3, *, make=Own, graphs=True):
    model = make() if chosen.architecture == GIVEN else None
    trainer = Trainer(chosen, digits, model=model, cuda_graphs=graphs)
    trainer.run(epochs, progress=False)
    return trainer


def bits(trainer):
    """All that a training's future depends on, and its history, but for the clock."""
    state = trainer.state_dict()
    parts = (state["model"], state["average"] or {}, state["criterion"], *state["optimizer"]["state"].values())
    tensors = [value for part in parts for value in part.values()]
    tensors += [state["totals"], state["rng"]["cpu"]]
    records = [{**record, "seconds": 0} for record in state["history"]]
    return tensors, records


def assert_same(one, other):
    for a, b in zip(bits(one)[0], bits(other)[0], strict=True):
        assert torch.equal(a, b)
    assert bits(one)[1] == bits(other)[1]
    assert one.criterion.steps == other.criterion.steps
    mine, its = one.criterion.last, other.criterion.last
    assert torch.equal(mine.loss, its.loss)
    assert torch.equal(mine.outputs, its.outputs)
    assert mine.strength == its.strength


# An epoch of 200 digits has three steps of 64 and one of 8: two kinds, and as many as the cadences make of them.
@pytest.mark.parametrize(
    ("changed", "epochs", "replays"),
    [
        ({"method": "clean"}, 4, [9, 1]),
        ({"architecture": "mnist"}, 2, [3]),
        ({"method": "sgr_exp", "accumulate": 3, "clip_gradient": 1.0}, 3, [6, 0]),
        ({"fraction": 0.25, "accumulate": 2, "schedule": "cosine", "ema": 0.9}, 3, [6, 0]),
        ({"penalty_method": "forward-mode", "perturbation": "gradient", "amp": "bf16"}, 3, [6, 0]),
        ({"penalty_method": "finite-difference", "allow_kinks": True}, 2, [3]),
        ({"update_every": 2, "penalty_every": 4}, 4, [1, 1, 1, 1]),
        ({"method": "pgd", "attack_steps": 2, "accumulate": 2}, 3, [6, 0]),
        ({"method": "fgsm"}, 3, [6, 0]),
        ({"perturbation": "fgsm"}, 3, [6, 0]),
        ({"warmup": 2, "optimizer": "sgd", "learning_rate_warmup": 5}, 3, [5, 0]),
    ],
    ids=str,
)
def test_a_captured_training_ends_in_the_same_bits(digits, graphs, changed, epochs, replays):
    captured = trained(digits, settings(**changed), epochs)
    assert [graph.replays for graph in graphs] == replays
    assert_same(captured, trained(digits, settings(**changed), epochs, graphs=False))


def test_dropout_draws_other_masks_in_replays(digits, graphs):
    ends = [trained(digits, settings(), make=lambda: Own(dropout=0.2), graphs=asked) for asked in (True, False)]
    assert graphs[0].replays == 6
    assert_same(*ends)


def count(self):
    self.calls += 1


def draw(self):
    random.random()


@pytest.mark.parametrize(
    ("changed", "on_host", "reason"),
    [
        ({}, count, "changes what modules keep (calls)"),
        ({}, draw, "draws random numbers on the host"),
        ({"fraction": 0.5}, lambda self: None, "random numbers cannot be repeated"),
        ({"method": "lrc"}, lambda self: None, "correlated_noise: this part of an attack"),
        ({"perturbation": "pgd"}, lambda self: None, "random_start of a generator on the host"),
        ({"perturbation": "deepfool"}, lambda self: None, "deepfool: this part of an attack"),
        ({}, lambda self: float(self.layers[0].weight.detach().sum()), "not permitted"),
    ],
)
def test_what_cannot_be_captured_runs_eagerly_and_says_why_once(digits, graphs, caplog, changed, on_host, reason):
    chosen = settings(**changed)
    with caplog.at_level(logging.WARNING, "sgr_kernels"):
        captured = trained(digits, chosen, make=lambda: Own(on_host, 0.2))
    assert [reason in record.message for record in caplog.records if "CUDA graphs" in record.message] == [True]
    assert all(graph.replays == 0 for graph in graphs)
    assert_same(captured, trained(digits, chosen, make=lambda: Own(on_host, 0.2), graphs=False))


def test_strengths_that_never_stay_are_said_to_run_eagerly(digits, graphs, caplog, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "_REMEMBERED", 6)
    with caplog.at_level(logging.WARNING, "sgr_kernels"):
        captured = trained(digits, settings(warmup=100))
    assert graphs == []
    assert [r.message for r in caplog.records if "CUDA graphs" in r.message] == [
        "CUDA graphs: some steps run eagerly: no two steps are of the same shapes and strength for long"
    ]
    assert captured.criterion.steps == 12


def test_what_is_derived_of_a_covariance_follows_replays(digits, graphs):
    trainer = Trainer(settings(), digits, model=Own(), cuda_graphs=True)
    trainer.run(1, progress=False)
    covariance = trainer.criterion.covariance
    generator = torch.Generator()
    before = covariance.sample(1, generator.manual_seed(0))
    trainer.run(2, progress=False, stop=lambda: trainer.step == 2)  # replays alone
    assert graphs[0].replays == 2
    after = covariance.sample(1, generator.manual_seed(0))
    fresh = type(covariance).from_values(covariance.values, (28, 28), target_variance=covariance.target_variance)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, fresh.sample(1, generator.manual_seed(0)))


def test_a_training_may_be_resumed_between_replays(digits, graphs, tmp_path):
    straight = trained(digits, settings(), 4)
    trainer = Trainer(settings(), digits, model=Own(), cuda_graphs=True)
    trainer.run(4, out=tmp_path, progress=False, stop=lambda: trainer.epoch == 2 and trainer.step == 1)
    trainer.run(4, progress=False)
    trainer.resume(tmp_path)
    trainer.run(4, progress=False)
    assert_same(trainer, straight)


def test_penalties_that_are_never_finite_end_a_replayed_training(digits, graphs):
    trainer = Trainer(settings(perturbation="exponential", batch_size=40), digits, model=Own(), cuda_graphs=True)
    trainer.run(1, progress=False)
    trainer.criterion.nonfinite_in_a_row.fill_(10)
    with pytest.raises(RuntimeError, match="10 penalties in a row"):
        trainer.run(2, progress=False)


def test_a_training_that_is_dropped_is_gone_at_once_and_copies_go_on_by_themselves(digits, graphs):
    """No circle of references holds on to a device's memory."""
    trainer = trained(digits, settings(method="clean"), 1)
    other = copy.deepcopy(trainer)
    for each in (other, trainer):
        each.run(2, progress=False)
    assert_same(other, trainer)
    dropped = weakref.ref(trainer)
    gc.disable()
    try:
        del trainer, each
        assert dropped() is None
    finally:
        gc.enable()


def test_graphs_are_for_one_process_on_a_device():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert cuda_graphs.usable(None, cuda, Processes())
    assert not cuda_graphs.usable(None, cpu, Processes())
    assert not cuda_graphs.usable(False, cuda, Processes())
    assert not cuda_graphs.usable(None, cuda, Processes(0, 2))
    with pytest.raises(ValueError, match="cuda_graphs: expected one process on a CUDA device, got 1 on cpu"):
        cuda_graphs.usable(True, cpu, Processes())
    with pytest.raises(ValueError, match="got 2 on cuda"):
        cuda_graphs.usable(True, cuda, Processes(0, 2))


needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("changed", [{"method": "clean"}, {}, {"warmup": 2, "update_every": 2}], ids=str)
def test_a_training_captured_on_a_device_ends_where_an_eager_one_does(digits, changed):
    chosen = settings(optimizer="sgd", learning_rate=1e-3, **changed)
    ends = []
    for asked in (True, False):
        trainer = Trainer(chosen, digits, model=Own(), device="cuda", cuda_graphs=asked)
        trainer.run(6, progress=False)
        ends.append(trainer)
    captured, eager = ends
    assert captured.graphs.captured
    assert captured.graphs.reasons == []
    assert captured.criterion.steps == eager.criterion.steps
    for one, other in zip(captured.model.state_dict().values(), eager.model.state_dict().values()):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(captured.history[-1]["loss"], eager.history[-1]["loss"], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@needs_device
def test_after_a_capture_that_fails_everything_goes_on(digits):
    """A value asked for ends the capture; random numbers, streams and later captures are as if there had been none."""
    stream = torch.cuda.current_stream()
    chosen = settings(optimizer="sgd", learning_rate=1e-3)
    ends = []
    for asked in (True, False):
        model = Own(lambda self: float(self.layers[0].weight.detach().sum()))
        trainer = Trainer(chosen, digits, model=model, device="cuda", cuda_graphs=asked)
        trainer.run(2, progress=False)
        ends.append(trainer)
    assert ends[0].graphs.reasons
    assert not ends[0].graphs.captured
    assert torch.cuda.current_stream() == stream
    for one, other in zip(*(end.model.state_dict().values() for end in ends)):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    trainer = Trainer(chosen, digits, model=Own(), device="cuda")
    trainer.run(2, progress=False)
    assert trainer.graphs.captured
