"""Loops of one's own with `StepGraphs` train to the same bits as without graphs, whatever changes between steps."""

import copy
import gc

import pytest
import torch
from torch import nn

import sgr_kernels as sgr
from sgr_kernels.training import cuda_graphs, kinds
from sgr_kernels.training.cuda_graphs import StepGraphs
from tests.graph_emulator import EmulatedGraph, Generator, LeftBehind


@pytest.fixture(autouse=True)
def one_stream(monkeypatch):
    """PyTorch's stream on the CPU is the device's here."""
    streams = kinds._random_streams
    monkeypatch.setattr(kinds, "_random_streams", lambda: streams()[1:])


class Small(nn.Module):
    """Two layers with BatchNorm and dropout between."""

    def __init__(self, at_each_pass=lambda self, x: None, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("shift", torch.zeros(8))
        self.gain = torch.ones(8)
        self.at_each_pass = at_each_pass

    def forward(self, x):
        x = self.gain * self.norm(self.first(x.flatten(1))) + self.shift
        self.at_each_pass(self, x)
        return self.last(self.dropout(torch.nn.functional.gelu(x)))


class Loop:
    """Trains on random batches, with graphs or without."""

    def __init__(self, captured, model=None, criterion=None, compute=None, **options):
        self.model = Small() if model is None else model()
        torch.manual_seed(1)
        covariance = sgr.CovarianceFunction(1, (4, 4), target_variance=0.06)
        self.criterion = sgr.SGRLoss(covariance, 1.0, **options) if criterion is None else criterion()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1)
        self.captured, self.compute, self.made = captured, compute, []
        self.new_graph = (lambda: EmulatedGraph(self.made)) if captured else None
        self.step = StepGraphs(self.model, self.criterion, self._gradients, self.new_graph)
        self.generator = torch.Generator().manual_seed(2)

    def _gradients(self, parts):
        self.optimizer.zero_grad()
        if self.compute is not None:
            self.compute(self, parts)
            return
        for images, labels in parts:
            self.criterion(self.model, images, labels).backward()

    def batch(self):
        images = torch.rand(6, 1, 4, 4, generator=self.generator)
        return images, torch.randint(0, 3, (6,), generator=self.generator)

    def run(self, steps, between=lambda self, step: None, call=lambda self: self.step([self.batch()])):
        for step in range(steps):
            between(self, step)
            call(self)
            self.optimizer.step()
        return self

    def bits(self):
        return [*self.model.state_dict().values(), *self.criterion.state_dict().values()]


def both(steps=12, between=lambda self, step: None, call=lambda self: self.step([self.batch()]), **options):
    """The captured loop, after it has been compared with the eager one."""
    loops = []
    for captured in (True, False):
        torch.manual_seed(3)
        loops.append(Loop(captured, **options).run(steps, between, call))
    for one, other in zip(*(loop.bits() for loop in loops), strict=True):
        assert torch.equal(one, other)
    assert loops[0].criterion.steps == loops[1].criterion.steps
    return loops[0]


def at(when, change):
    return lambda self, step: change(self) if step == when else None


def set_attribute(path, value):
    def change(self):
        *owners, name = path.split(".")
        owner = self
        for part in owners:
            owner = getattr(owner, part)
        setattr(owner, name, value)

    return change


def replaced(self):
    self.model.first.weight.data = self.model.first.weight.data * 0.5


def exchanged(self):
    torch.manual_seed(4)
    self.model.last = nn.Linear(8, 3)
    self.optimizer.add_param_group({"params": list(self.model.last.parameters())})


CHANGES = {
    "decay": set_attribute("criterion.covariance.decay", 0.9),
    "variance": set_attribute("criterion.covariance.target_variance", 0.5),
    "psd": set_attribute("criterion.covariance.psd", "none"),
    "covariance": lambda self: setattr(self.criterion, "covariance", sgr.CovarianceFunction(1, (4, 4))),
    "loss": set_attribute(
        "criterion.loss_fn", lambda outputs, labels: sgr.cross_entropy_per_sample(outputs, labels) / 2
    ),
    "strength": set_attribute("criterion.strength", 3.0),
    "cadence": set_attribute("criterion.penalty_every", 2),
    "criterion": lambda self: self.criterion.eval(),
    "model": lambda self: self.model.eval(),
    "momentum": set_attribute("model.norm.momentum", 0.5),
    "dropout": set_attribute("model.dropout.p", 0.5),
    "frozen": lambda self: self.model.first.requires_grad_(False),
    "replaced": replaced,
    "exchanged": exchanged,
    "tensor": set_attribute("model.gain", torch.full((8,), 0.5)),
    "buffer": lambda self: self.model.register_buffer("shift", torch.ones(8)),
}


def test_another_backend_makes_another_kind():
    loop = Loop(True).run(5)
    replays = loop.made[0].replays
    with sgr.use_backend("reference"):
        loop.run(2)
    assert loop.made[0].replays == replays > 0
    loop.run(1)
    assert loop.made[0].replays == replays + 1


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_between_steps_is_not_replayed_as_it_was(change):
    loop = both(12, at(6, change), model=lambda: Small(dropout=0.2))
    assert loop.made[0].replays == 3


def test_autocast_around_a_step_is_part_of_it():
    def call(self):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.criterion.steps < 6):
            self.step([self.batch()])

    def compute(self, parts):
        ((images, labels),) = parts
        nn.functional.cross_entropy(self.model(images), labels).backward()
        self.criterion.steps += 1

    loop = both(12, call=call, compute=compute, criterion=lambda: sgr.SGRLoss(sgr.IdentityCovariance()))
    assert [graph.replays for graph in loop.made] == [3, 3]


def new_buffer(self, x):
    self.shift = 0.9 * self.shift + 0.1 * x.detach().mean(0)


def in_a_list(self, x):
    self.__dict__.setdefault("seen", []).append(len(x))


def on_the_host(self, x):
    if not hasattr(self, "counter"):
        self.counter = torch.zeros((), device="meta")
    self.counter.add_(1)


def kept_features(self, x):
    self.features = x.detach()


@pytest.mark.parametrize(
    ("at_each_pass", "reason"),
    [(new_buffer, "shift"), (in_a_list, "seen"), (on_the_host, "counter"), (kept_features, "features")],
)
def test_a_model_that_changes_itself_on_the_host_runs_eagerly(at_each_pass, reason):
    loop = both(8, model=lambda: Small(at_each_pass))
    assert loop.made == []
    assert reason in loop.step.reasons[0]


def test_calls_that_the_cadences_count_one_by_one_are_not_captured():
    def twice(self, parts):
        ((images, labels),) = parts
        for part in zip(images.chunk(2), labels.chunk(2)):
            self.criterion(self.model, *part).backward()

    loop = both(12, compute=twice, penalty_every=3)
    assert loop.made == []
    assert "count_calls" in loop.step.reasons[0]
    assert [graph.replays for graph in both(12, compute=twice, count_calls=False).made] == [9]


def test_several_captured_calls_of_one_optimizer_step_draw_elsewhere_each():
    def call(self):
        for _ in range(2):
            self.step([self.batch()])
        self.criterion.advance()

    def compute(self, parts):
        ((images, labels),) = parts
        self.criterion(self.model, images, labels).backward()

    loop = both(8, call=call, compute=compute, count_calls=False, fraction=0.5)
    assert loop.made[0].replays == 13


def test_gradients_are_dropped_before_each_step_wherever_a_loop_does_so():
    def compute(self, parts):
        ((images, labels),) = parts
        self.criterion(self.model, images, labels).backward()

    loops = [Loop(captured) for captured in (True, False)]
    for loop in loops:
        loop.step = StepGraphs(
            loop.model, loop.criterion, lambda parts, loop=loop: compute(loop, parts), loop.new_graph
        )
    before = [loop.run(8, lambda self, step: self.optimizer.zero_grad()).bits() for loop in loops]
    never = [loop.run(4).bits() for loop in loops]
    for one, other in (*zip(*before, strict=True), *zip(*never, strict=True)):
        assert torch.equal(one, other)
    assert loops[0].made[0].replays == 9


def test_an_optimizer_among_what_is_computed_is_not_captured():
    def compute(self, parts):
        ((images, labels),) = parts
        self.criterion(self.model, images, labels).backward()
        self.optimizer.param_groups[0]["lr"] *= 0.9
        self.optimizer.step()

    loop = both(8, compute=compute)
    assert loop.made == []
    assert "(first.weight)" in loop.step.reasons[0]


def test_labels_in_a_dict_and_numbers_beside_them():
    def compute(self, parts):
        ((images, labels),) = parts
        loss = nn.functional.cross_entropy(self.model(images), labels["class"], label_smoothing=labels["smoothing"])
        loss.backward()
        self.criterion.steps += 1

    def call(self):
        images, labels = self.batch()
        smoothing = 0.1 if self.criterion.steps < 6 else 0.0
        self.step([(images, {"class": labels, "smoothing": smoothing})])

    loop = both(12, call=call, compute=compute, criterion=lambda: sgr.SGRLoss(sgr.IdentityCovariance()))
    assert [graph.replays for graph in loop.made] == [3, 3]


def test_images_that_want_a_gradient_have_it():
    found = []

    def call(self):
        images, labels = self.batch()
        images.requires_grad_()
        self.step([(images, labels)])
        found.append(images.grad)

    assert both(6, call=call).made == []
    for one, other in zip(found[:6], found[6:], strict=True):
        assert torch.equal(one, other)


def test_statistics_that_somebody_keeps_stay_what_they_were():
    kept = {True: [], False: []}

    def call(self):
        self.step([self.batch()])
        kept[self.captured].append(self.criterion.last)

    assert [graph.replays for graph in both(14, call=call, penalty_every=2).made] == [4, 4]
    for one, other in zip(kept[True], kept[False], strict=True):
        assert torch.equal(one.loss, other.loss)
        assert torch.equal(one.outputs, other.outputs)
        assert one.strength == other.strength


class Attentive(nn.Module):
    """A layer of attention, fused by PyTorch."""

    def __init__(self, dropout):
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.last, self.dropout = nn.Linear(4, 4), nn.Linear(16, 3), dropout

    def forward(self, x):
        x = self.mix(x)
        x = nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=self.dropout)
        return self.last(x.flatten(1))


@pytest.mark.parametrize(("dropout", "replays"), [(0.0, [3]), (0.5, [0])])
def test_attention_draws_only_where_it_drops(dropout, replays):
    loop = both(6, model=lambda: Attentive(dropout), method="finite-difference")
    assert [graph.replays for graph in loop.made] == replays
    assert ["random numbers cannot be repeated" in reason for reason in loop.step.reasons] == [True] * (dropout > 0)


def test_an_interrupted_capture_is_made_up_for():
    interruptions = []

    def interrupt(self, x):
        if torch.cuda.is_initialized() and not interruptions:  # only while it is captured here
            interruptions.append(x)
            raise KeyboardInterrupt

    def call(self):
        batch = self.batch()
        try:
            self.step([batch])
        except KeyboardInterrupt:
            assert self.step.captured == 0

    loop = both(8, call=call, model=lambda: Small(interrupt))
    assert len(interruptions) == 1
    assert [graph.replays for graph in loop.made] == [0, 4]


def test_copies_begin_without_graphs():
    loop = Loop(True).run(6)
    assert loop.step.captured == 1
    loop.made = []  # what is emulated is nothing to copy
    other = copy.deepcopy(loop)
    assert other.step.captured == 0
    for each in (loop, other):
        each.run(6)
    for one, two in zip(loop.bits(), other.bits(), strict=True):
        assert torch.equal(one, two)


class Refused(RuntimeError):
    """What was not permitted."""


@pytest.mark.parametrize("by_cuda", [True, False])
def test_after_a_capture_that_fails_all_is_as_before(by_cuda, monkeypatch):
    """Whether CUDA has refused something, so that the capture cannot be ended, or only Python has raised."""
    cuda = LeftBehind(monkeypatch)
    new_graph = cuda_graphs.graphs_on("cuda")
    default, own, before = cuda.streams[1], Generator(), new_graph()
    before.capture(lambda: None, [own])

    def refused():
        cuda.refused = by_cuda
        raise Refused("waiting is not permitted while capturing")

    with pytest.raises(Refused):
        new_graph().capture(refused, [own])
    assert cuda.underway == []
    assert cuda.device == 0
    assert cuda.streams[1] is default
    after = new_graph()
    after.capture(lambda: None, [own])
    for graph in (before, after):
        graph.replay()
    for generator in (cuda.generator, own):  # the ones that everybody draws from
        assert generator.state == {"offset": 8, "capturing": False}
    del before, after, graph
    assert not any(cuda.users.values())
    assert copy.deepcopy(new_graph).stream is not new_graph.stream


def test_no_backward_of_earlier_steps_is_left_when_a_capture_begins(monkeypatch):
    """Its end, where gradients enter the parameters, would be on a stream that does not capture."""
    LeftBehind(monkeypatch)
    parameter = torch.zeros(3, requires_grad=True)

    def end():
        return torch.autograd.graph.get_gradient_edge(parameter).node.metadata

    def step():
        loss = parameter.sum()
        circle = [loss]
        circle.append(circle)
        end()["step"] = "eager"
        loss.backward()

    found = []
    gc.disable()
    try:
        step()
        assert end()
        cuda_graphs.graphs_on("cuda")().capture(lambda: found.append(dict(end())))
    finally:
        gc.enable()
    assert found == [{}]


def test_captures_begin_anew_where_tensors_of_forgotten_graphs_are_kept(monkeypatch):
    cuda = LeftBehind(monkeypatch)
    new_graph = cuda_graphs.graphs_on("cuda")
    graph = new_graph()
    graph.capture(lambda: None)
    cuda.outlived.update(cuda.users)
    del graph
    graph = new_graph()
    graph.capture(lambda: None)
    graph.replay()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_graphs_of_a_device_outlive_a_capture_that_fails():
    new_graph, found = cuda_graphs.graphs_on("cuda"), torch.empty(2, device="cuda")

    def draw():
        found.copy_(torch.rand(2, device="cuda"))

    before, after = new_graph(), new_graph()
    before.capture(draw)
    with pytest.raises(RuntimeError):
        new_graph().capture(lambda: float(torch.rand(2, device="cuda").sum()))
    after.capture(draw)
    draws = set()
    for again in (before.replay, draw, after.replay, before.replay):
        again()
        draws.add(tuple(found.tolist()))
    assert len(draws) == 4
