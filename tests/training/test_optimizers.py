"""Optimizers, schedules and what a step adds to them: against formulas, and resumed to the same bits."""

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from sgr_kernels.penalty.per_sample import cross_entropy_per_sample
from sgr_kernels.training import checkpoint
from sgr_kernels.training.checkpoint import CheckpointError
from sgr_kernels.training.images import DataSet
from sgr_kernels.training.loop import CHECKPOINT_FILE, Trainer
from sgr_kernels.training.methods import Settings
from sgr_kernels.training.optimizers import learning_rate
from sgr_kernels.training.trained import load_model
from tests.own_network import write_network
from tests.training.test_loop import assert_same, stop_after


@pytest.fixture
def few(digits):
    return DataSet(digits.train.first(30), digits.test.first(20))


@pytest.fixture(autouse=True)
def own(tmp_path_factory, monkeypatch):
    """The name of a small network without a kink."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
    return f"{write_network(tmp_path_factory.mktemp('own'))}:small"


VARIANTS = {
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1, "betas": (0.8, 0.9)},
    "sgd": {"optimizer": "sgd", "momentum": 0.8, "nesterov": True},
    "plain sgd": {"optimizer": "sgd", "momentum": 0.0},
    "schedule": {"schedule": "cosine", "learning_rate_warmup": 2},
    "smoothing": {"label_smoothing": 0.1, "penalty_method": "forward-mode"},
    "average": {"ema": 0.7},
    "accumulated": {"accumulate": 3, "method": "pgd_sgr", "update_every": 2, "penalty_every": 2},
    "clipped": {"clip_gradient": 0.05},
    "bfloat16": {"amp": "bf16"},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_resuming_gives_the_same_bits_as_not_stopping(few, tmp_path, own, options):
    settings = Settings(own, **{"method": "sgr_sign", "batch_size": 8, **options})
    plain = Trainer(dataclasses.replace(settings, **{name: Settings(own).__dict__[name] for name in options}), few)
    plain.run(1, progress=False)
    whole = Trainer(settings, few)
    assert whole.run(1, progress=False)
    assert not torch.equal(whole.trained.first.weight, plain.trained.first.weight)  # the options tell
    stopped = Trainer(settings, few)
    assert not stopped.run(1, out=tmp_path, progress=False, stop=stop_after(3))
    resumed = Trainer(settings, few)
    resumed.resume(tmp_path)
    assert resumed.run(1, out=tmp_path, progress=False)
    assert_same(resumed, whole)
    loaded, state = load_model(tmp_path)
    assert all(torch.equal(value, whole.trained.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert state["history"][-1]["test_accuracy"] == whole.history[-1]["test_accuracy"]


def test_a_step_of_each_optimizer_is_its_formula(few):
    """On one weight, from the gradient that the step had."""
    for options, change in (
        ({"optimizer": "sgd", "momentum": 0.0}, lambda w, g: -0.1 * (g + 0.01 * w)),
        ({"optimizer": "adam"}, lambda w, g: -0.1 * (g + 0.01 * w).sign()),
        ({"optimizer": "adamw"}, lambda w, g: -0.1 * (g.sign() + 0.01 * w)),
    ):
        settings = Settings("mnist", method="clean", learning_rate=0.1, weight_decay=0.01, batch_size=30, **options)
        trainer = Trainer(settings, few)
        weight = trainer.model.classifier[-1].bias
        before = weight.detach().clone()
        trainer.run(1, progress=False)
        assert torch.allclose(weight - before, change(before, weight.grad), rtol=1e-3, atol=1e-5), options


def test_the_learning_rate_grows_and_falls():
    rates = [learning_rate(0.5, "cosine", 4, step, 20) for step in range(20)]
    assert rates[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert rates[4:] == pytest.approx([0.25 * (1 + math.cos(math.pi * k / 16)) for k in range(16)])
    assert [learning_rate(0.5, "constant", 2, step, 5) for step in range(5)] == [0.25, 0.5, 0.5, 0.5, 0.5]
    assert learning_rate(0.5, "cosine", 9, 3, 5) == pytest.approx(0.5 * 4 / 9)  # a warm-up beyond the end


@pytest.mark.parametrize("method", ["clean", "gn"])
def test_parts_of_a_batch_add_up_to_it(few, method):
    settings = Settings("mnist", method=method, batch_size=15, optimizer="sgd", momentum=0.0, learning_rate=0.1)
    whole, parts = Trainer(settings, few), Trainer(dataclasses.replace(settings, accumulate=4), few)
    for trainer in (whole, parts):
        trainer.run(1, progress=False)
    for a, b in zip(whole.model.parameters(), parts.model.parameters()):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    a, b = whole.history[0], parts.history[0]
    assert all(a[k] == pytest.approx(b[k], rel=1e-4) for k in ("loss", "cross_entropy", "penalty", "train_accuracy"))


def test_smoothed_labels_have_the_share_they_ask_for():
    logits, labels = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 1])
    wanted = 0.8 * F.one_hot(labels, 4).double() + 0.2 / 4
    losses = cross_entropy_per_sample(logits, labels, label_smoothing=0.2)
    assert torch.allclose(losses, -(wanted * logits.log_softmax(1)).sum(1))


def test_the_average_is_the_exponential_one(few, own):
    trainer = Trainer(Settings(own, method="clean", batch_size=8, ema=0.75, learning_rate=0.01), few)
    seen = []
    trainer.optimizer.register_step_post_hook(lambda *_: seen.append(trainer.model.first.weight.detach().clone()))
    trainer.run(2, progress=False)
    expected = seen[0]
    for weight in seen[1:]:
        expected = 0.75 * expected + 0.25 * weight
    assert len(seen) == 8
    assert torch.allclose(trainer.trained.first.weight, expected, atol=1e-6)
    assert not torch.allclose(trainer.trained.norm.running_mean, trainer.model.norm.running_mean)  # buffers as well


def test_the_gradient_is_clipped_to_its_norm(few):
    trainer = Trainer(Settings("mnist", method="clean", batch_size=8, clip_gradient=0.01), few)
    norms = []

    def look(*_):
        norms.append(float(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm()))

    trainer.optimizer.register_step_pre_hook(look)
    trainer.run(1, progress=False)
    assert norms == pytest.approx([0.01] * 4, rel=1e-3)


def test_under_amp_the_network_computes_in_bfloat16(few, own):
    trainer = Trainer(Settings(own, method="sgr_sign", batch_size=8, amp="bf16"), few)
    seen = []
    trainer.model.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer.run(1, progress=False)
    assert torch.bfloat16 in seen
    assert trainer.model.first.weight.dtype == torch.float32
    assert math.isfinite(trainer.history[0]["penalty"])


def test_mixed_images_have_mixed_labels(few, tmp_path, own):
    pytest.importorskip("torchvision", reason="mixup is torchvision's")
    settings = Settings(own, method="sgr_sign", batch_size=8, mixup=0.4)
    whole = Trainer(settings, few)
    seen = []
    criterion = whole.criterion.loss_fn
    whole.criterion.loss_fn = lambda outputs, labels: seen.append(labels) or criterion(outputs, labels)
    whole.run(1, progress=False)
    assert all(labels.shape[1] == 10 and bool(((labels.sum(1) - 1).abs() < 1e-5).all()) for labels in seen)
    stopped = Trainer(settings, few)
    stopped.run(1, out=tmp_path, progress=False, stop=stop_after(2))
    resumed = Trainer(settings, few)
    resumed.resume(tmp_path)
    resumed.run(1, progress=False)
    assert_same(resumed, whole)
    for method in ("lrc", "fgsm"):
        Trainer(dataclasses.replace(settings, method=method, attack_labels="true"), few).run(1, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "lion"}, "optimizer: expected one of adam, adamw, sgd, got 'lion'"),
        ({"momentum": 0.9}, "momentum: an option of sgd; optimizer adam takes betas"),
        ({"optimizer": "adamw", "nesterov": True}, "nesterov: an option of sgd; optimizer adamw takes betas"),
        ({"optimizer": "sgd", "betas": (0.9, 0.99)}, "betas: an option of adam and adamw; .* momentum and nesterov"),
        ({"betas": (0.9, 1.0)}, r"betas: expected two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"optimizer": "sgd", "momentum": 1.0}, r"momentum: expected a number in \[0, 1\), got 1.0"),
        ({"optimizer": "sgd", "momentum": 0.0, "nesterov": True}, "nesterov: needs a momentum above 0"),
        ({"label_smoothing": 1.0}, r"label_smoothing: expected a number in \[0, 1\), got 1.0"),
        ({"ema": 1.0}, r"ema: expected a number in \(0, 1\), got 1.0"),
        ({"accumulate": 0}, "accumulate: expected a number of parts >= 1, got 0"),
        ({"clip_gradient": 0.0}, "clip_gradient: expected a finite number > 0, got 0.0"),
        ({"amp": "fp16"}, "amp: expected one of none, bf16, got 'fp16'"),
        ({"mixup": -1.0}, "mixup: expected a finite number >= 0, got -1.0"),
        ({"learning_rate_warmup": -1}, "learning_rate_warmup: expected a number of steps >= 0, got -1"),
        ({"normalize": (0.5, 0.5)}, "normalize must be means and deviations, a row of numbers each"),
    ],
)
def test_options_that_fit_nothing_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Settings("mnist", **change)


def test_checkpoints_of_before_these_options_go_on(few, tmp_path):
    settings = Settings("mnist", method="gn", batch_size=8)
    whole = Trainer(settings, few)
    whole.run(2, progress=False)
    Trainer(settings, few).run(2, out=tmp_path, progress=False, stop=stop_after(3))
    state = checkpoint.load(tmp_path / CHECKPOINT_FILE)
    old = dataclasses.replace(settings).record()
    assert len(old) == 28
    state = {**{k: v for k, v in state.items() if k != "average"}, "settings": old}
    state["data"] = {name: state["data"][name] for name in ("name", "digest")}
    checkpoint.save(tmp_path / CHECKPOINT_FILE, state)
    load_model(tmp_path)
    resumed = Trainer(settings, few)
    resumed.resume(tmp_path)
    resumed.run(2, progress=False)
    assert_same(resumed, whole)


def test_averages_of_another_training_are_refused(few, tmp_path):
    settings = Settings("mnist", method="clean", batch_size=8, ema=0.9)
    Trainer(settings, few).run(1, out=tmp_path, progress=False)
    state = checkpoint.load(tmp_path / CHECKPOINT_FILE)
    for broken in (None, {}, {**state["average"], "n_averaged": "x"}):
        with pytest.raises(CheckpointError, match="average"):
            Trainer(settings, few).load_state_dict({**state, "average": broken})


def test_a_state_from_a_gpu_goes_on_as_a_cpu_computes(few, own):
    settings = Settings(own, method="clean", batch_size=8)
    whole, stopped, resumed = (Trainer(settings, few) for _ in range(3))
    whole.run(2, progress=False)
    stopped.run(1, progress=False)
    state = stopped.state_dict()
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = True
    resumed.load_state_dict(state)
    assert resumed.optimizer.param_groups[0]["fused"] is None
    resumed.run(2, progress=False)
    assert_same(resumed, whole)
