"""Training: it learns, it resumes from between any two steps to the same bits, it refuses what does not fit."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from sgr_kernels.training import checkpoint
from sgr_kernels.training.checkpoint import CheckpointError
from sgr_kernels.training.datasets import DataSet
from sgr_kernels.training.loop import CHECKPOINT_FILE, HISTORY_FILE, Trainer, TrainingError
from sgr_kernels.training.methods import METHODS, PERTURBATIONS, Settings, weight_decay
from sgr_kernels.training.trained import accuracy, load_model

SETTINGS = Settings("mnist", method="clean", batch_size=64, seed=5)
VARIANTS = [
    Settings("mnist", method="clean", batch_size=8),
    Settings("mnist", method="wdecay", batch_size=8, augment=False),
    Settings("mnist", method="gn", batch_size=8),
    Settings("mnist", method="pgd", batch_size=8, attack_steps=2),
    Settings("mnist", method="fgsm", batch_size=8, eps=16.0),
    Settings("mnist", method="lrc", batch_size=8),
    Settings("mnist", method="sgr_sign", covariance="full", batch_size=8),
    *(Settings("mnist", method="sgr", perturbation=p, batch_size=8, flip=True) for p in PERTURBATIONS),
    Settings("mnist", binning="linear", psd="none", weight_decay=1e-3, update_every=2, penalty_every=3, batch_size=8),
    Settings("mnist", method="clean", schedule="cosine", batch_size=8),
    Settings(
        "mnist",
        fraction=0.5,
        penalty_method="finite-difference",
        allow_kinks=True,
        warmup=3,
        mean_correction=True,
        batch_size=8,
    ),
]


def name(settings):
    return f"{settings.method}-{settings.perturbation}" if settings.method == "sgr" else settings.method


def bits(trainer):
    """Everything a training's future depends on, except the clock."""
    state = trainer.state_dict()
    flat = {**state["model"], **{f"average.{k}": v for k, v in (state["average"] or {}).items()}}
    flat |= {**{f"criterion.{k}": v for k, v in state["criterion"].items()}}
    for index, moments in state["optimizer"]["state"].items():
        flat |= {f"optimizer.{index}.{k}": v for k, v in moments.items()}
    return flat | {"rng": state["rng"]["cpu"], "totals": state["totals"]}


def history(trainer):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in trainer.history]


def assert_same(a, b):
    left, right = bits(a), bits(b)
    assert left.keys() == right.keys()
    different = [key for key in left if not torch.equal(left[key], right[key])]
    assert not different
    assert history(a) == history(b)


def stop_after(steps):
    """A stop function that says yes at the given step."""
    remaining = iter(range(steps - 1, -1, -1))
    return lambda: next(remaining) == 0


@pytest.mark.parametrize("settings", VARIANTS, ids=name)
def test_resuming_gives_the_same_bits_as_not_stopping(digits, tmp_path, settings):
    digits = DataSet(digits.train.first(30), digits.test.first(20))
    whole = Trainer(settings, digits)
    assert whole.run(1, progress=False)
    stopped = Trainer(settings, digits)
    assert not stopped.run(1, out=tmp_path, progress=False, stop=stop_after(2))
    assert (stopped.epoch, stopped.step) == (0, 2)
    torch.rand(17)  # whatever else the process draws
    resumed = Trainer(settings, digits)
    resumed.resume(tmp_path)
    assert resumed.run(1, progress=False)
    assert_same(resumed, whole)


def test_every_step_and_the_ends_of_epochs_can_be_resumed_from(digits, tmp_path):
    whole = Trainer(SETTINGS, digits)
    whole.run(2, progress=False)
    current = Trainer(SETTINGS, digits)
    for step in range(8):  # 200 digits in batches of 64: 4 steps an epoch
        assert current.run(2, out=tmp_path, progress=False, stop=stop_after(1)) == (step == 7)
        current = Trainer(SETTINGS, digits)
        current.resume(tmp_path / CHECKPOINT_FILE)
    assert_same(current, whole)


def test_the_random_stream_continues_where_it_was(digits, tmp_path):
    trainer = Trainer(SETTINGS, digits)
    torch.rand(17)  # as dropout would
    trainer.save(tmp_path)
    expected = torch.rand(5)
    Trainer(SETTINGS, digits).resume(tmp_path)
    assert torch.equal(torch.rand(5), expected)


def test_a_killed_process_resumes_to_the_same_bits(digits, tmp_path):
    settings = dataclasses.replace(SETTINGS, method="gn")
    script = f"""
import torch; torch.set_num_threads(1)
from sgr_kernels.training.datasets import DataSet, load
from sgr_kernels.training.loop import Trainer
from sgr_kernels.training.methods import Settings
train, test = load("mnist-sample")
trainer = Trainer({settings!r}, DataSet(train.first(200), test.first(100)))
trainer.run(100, out={str(tmp_path)!r}, checkpoint_every=1, progress=False)
"""
    with subprocess.Popen([sys.executable, "-c", script]) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / CHECKPOINT_FILE).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
    resumed = Trainer(settings, digits)
    resumed.resume(tmp_path)
    steps = resumed.epoch * 4 + resumed.step
    assert 0 < steps < 400
    epochs = resumed.epoch + 1
    resumed.run(epochs, progress=False)
    whole = Trainer(settings, digits)
    whole.run(epochs, progress=False)
    assert_same(resumed, whole)


def test_training_learns_and_leaves_a_usable_checkpoint(digits, tmp_path):
    records = []
    trainer = Trainer(dataclasses.replace(SETTINGS, augment=False), digits)
    assert trainer.run(8, out=tmp_path, progress=False, on_epoch=records.append)
    assert [record["epoch"] for record in records] == list(range(1, 9))
    assert records[-1]["cross_entropy"] < 0.6 * records[0]["cross_entropy"]
    assert records[-1]["test_accuracy"] > 0.6
    model, state = load_model(tmp_path)
    assert not model.training
    assert accuracy(model, trainer.test_batches) == records[-1]["test_accuracy"]
    assert state["history"] == records
    saved = json.loads((tmp_path / HISTORY_FILE).read_text())
    assert saved["epochs"] == records
    assert saved["settings"] == dataclasses.asdict(trainer.settings)
    assert accuracy(model, trainer.test_batches) == pytest.approx(
        (model(digits.test.images / 255).argmax(1) == digits.test.labels).float().mean().item()
    )


@pytest.mark.parametrize("method", ["gn", "sgr"])
def test_records_add_up(digits, method):
    trainer = Trainer(dataclasses.replace(SETTINGS, method=method, strength=2.5), digits)
    trainer.run(1, progress=False)
    (record,) = trainer.history
    assert record["penalty"] > 0
    assert record["loss"] == pytest.approx(record["cross_entropy"] + 2.5 * record["penalty"], rel=1e-5)


def test_more_epochs_can_be_added(digits, tmp_path):
    whole = Trainer(SETTINGS, digits)
    whole.run(3, progress=False)
    Trainer(SETTINGS, digits).run(1, out=tmp_path, progress=False)
    longer = Trainer(SETTINGS, digits)
    longer.resume(tmp_path)
    longer.run(3, progress=False)
    assert_same(longer, whole)


def test_other_settings_data_and_models_are_refused(digits, tmp_path):
    Trainer(SETTINGS, digits).run(1, out=tmp_path, progress=False)
    with pytest.raises(CheckpointError, match=r"other settings \(method: 'gn', not 'clean'\)"):
        Trainer(dataclasses.replace(SETTINGS, method="gn"), digits).resume(tmp_path)
    fewer = DataSet(digits.train.first(199), digits.test)
    with pytest.raises(CheckpointError, match="trained on other data"):
        Trainer(SETTINGS, fewer).resume(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        Trainer(SETTINGS, digits).resume(tmp_path / "nowhere")
    state = checkpoint.load(tmp_path / CHECKPOINT_FILE)
    state["settings"]["architecture"] = "cifar10"
    checkpoint.save(tmp_path / "other", state)
    with pytest.raises(CheckpointError, match=r"'features.0.weight' of shape \(32, 1, 3, 3\), expected \(64, 3"):
        load_model(tmp_path / "other")


def test_two_trainings_do_not_share_a_folder(digits, tmp_path):
    """The second is refused while the first is at work, also in the same process, and the first is left alone."""
    refused = []

    def intrude(record):
        with pytest.raises(TrainingError, match=f"written by process {os.getpid()}") as error:
            Trainer(SETTINGS, digits).run(1, out=tmp_path, progress=False)
        refused.append(error)

    first = Trainer(SETTINGS, digits)
    first.run(1, out=tmp_path, progress=False, on_epoch=intrude)
    assert len(refused) == 1
    second = Trainer(SETTINGS, digits)
    second.resume(tmp_path)
    assert second.run(2, out=tmp_path, progress=False)


def test_a_killed_trainings_folder_is_free(digits, tmp_path):
    script = (
        f"import os, pathlib, sgr_kernels.training.records as r\nr.claimed(pathlib.Path({str(tmp_path)!r})).__enter__()"
    )
    subprocess.run([sys.executable, "-c", f"{script}\nos._exit(1)"], check=False)
    Trainer(SETTINGS, digits).run(1, out=tmp_path, progress=False)


def leaves(tree, path=()):
    """Every place in a nested state, its inner nodes too."""
    if path:
        yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from leaves(value, (*path, key))


def replaced(tree, path, change):
    """A copy of the tree with one place changed, or left out where the change is None."""
    if not path:
        return change(tree)
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = replaced(tree[path[0]], path[1:], change)
    return copy


def without(tree, path):
    return replaced(tree, path[:-1], lambda node: {k: v for k, v in node.items() if k != path[-1]})


# A name to show; absent from older files; how an optimizer computes on its device.
FREE = {("data", "name"), ("epochs",), ("average",), ("data", "origin"), ("data", "shape"), ("data", "classes")}
FREE |= {("optimizer", "param_groups", 0, name) for name in ("foreach", "fused")}


def test_hand_edited_checkpoints_are_refused_in_one_line(digits, tmp_path):
    """Whatever is left out of the tree, or is of another kind than it was."""
    digits = DataSet(digits.train.first(20), digits.test.first(10))
    settings = dataclasses.replace(SETTINGS, method="sgr", batch_size=8, seed=0)
    Trainer(settings, digits).run(2, out=tmp_path, progress=False, stop=stop_after(4))
    state = checkpoint.load(tmp_path / CHECKPOINT_FILE)
    trainer = Trainer(settings, digits)
    trainer.load_state_dict(state)
    assert (trainer.epoch, trainer.step) == (1, 1)
    before = bits(trainer)
    broken = {}
    for path in leaves(state):
        place = ".".join(map(str, path))
        if isinstance(path[-1], str) and path not in FREE and path[0] != "settings":  # which have defaults
            broken[f"{place} left out"] = without(state, path)
        node = state
        for key in path:
            node = node[key]
        changes = {"a list": ["x"], "text": "x", "a tensor": torch.ones(7, 7, dtype=torch.int64)}
        if isinstance(node, torch.Tensor):
            changes["of integers"] = node.to(torch.int16)
        for name, value in changes.items():
            if path not in FREE and not (name == "text" and isinstance(node, str)):
                broken[f"{place} {name}"] = replaced(state, path, lambda node, value=value: value)
    assert len(broken) > 300
    for what, tree in broken.items():
        with pytest.raises(CheckpointError) as error:
            trainer.load_state_dict(tree)
        assert "\n" not in str(error.value), what
    after = bits(trainer)
    assert all(torch.equal(before[key], after[key]) for key in before)  # refused before anything is taken over


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("position", "epoch"), -1, "position"),
        (("position", "step"), -1, "position"),
        (("position", "step"), 4, "position"),
        (("position", "epoch"), 3, "history"),
        (("seconds",), -1.0, "seconds"),
        (("seconds",), math.nan, "seconds"),
        (("optimizer", "state"), {}, r"optimizer\.state lacks 0"),
        (("optimizer", "param_groups", 0, "betas"), (0.5, 0.9), "betas"),
        (("optimizer", "param_groups", 0, "params"), [1, 0], "params"),
        (("settings", "strength"), "1", "strength must be a number, got '1'"),
        (("settings", "spell"), "1", "unknown training setting 'spell'"),
        (("rng", "cpu"), torch.full((5056,), 255, dtype=torch.uint8), "rng"),
        (("epochs",), -1, "epochs"),
    ],
)
def test_checkpoints_that_make_no_sense_are_refused(digits, tmp_path, path, value, message):
    Trainer(SETTINGS, digits).run(2, out=tmp_path, progress=False, stop=stop_after(5))
    state = checkpoint.load(tmp_path / CHECKPOINT_FILE)
    node = state
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(CheckpointError, match=message):
        Trainer(SETTINGS, digits).load_state_dict(state)


@pytest.mark.parametrize("part", ["settings", "data", "model", "position"])
def test_networks_of_edited_checkpoints_are_refused(digits, tmp_path, part):
    Trainer(SETTINGS, digits).run(1, out=tmp_path, progress=False)
    state = checkpoint.load(tmp_path / CHECKPOINT_FILE)
    for other in ({}, "x", ["x"], None):
        checkpoint.save(tmp_path / CHECKPOINT_FILE, {**state, part: other})
        with pytest.raises(CheckpointError, match=part):
            load_model(tmp_path)
    del state[part]
    checkpoint.save(tmp_path / CHECKPOINT_FILE, state)
    with pytest.raises(CheckpointError, match=f"lacks '{part}'"):
        load_model(tmp_path)


def test_a_falling_learning_rate_is_resumed_to_the_same_end_only(digits, tmp_path):
    """The rates so far were those of a training of two epochs."""
    settings = dataclasses.replace(SETTINGS, schedule="cosine")
    Trainer(settings, digits).run(2, out=tmp_path, progress=False, stop=stop_after(1))
    before = (tmp_path / CHECKPOINT_FILE).read_bytes()
    for epochs in (1, 3):
        other = Trainer(settings, digits)
        other.resume(tmp_path)
        with pytest.raises(TrainingError, match=f"a training of 2 epochs.*cosine.*got {epochs}"):
            other.run(epochs, out=tmp_path, progress=False)
    assert (tmp_path / CHECKPOINT_FILE).read_bytes() == before
    same = Trainer(settings, digits)
    same.resume(tmp_path)
    assert same.run(2, progress=False)


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(digits, tmp_path):
    trainer = Trainer(SETTINGS, digits)
    trainer.run(1, out=tmp_path, progress=False)
    before = (tmp_path / CHECKPOINT_FILE).read_bytes()
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(math.nan)
    with pytest.raises(TrainingError, match=r"no longer finite \(epoch 2"):
        trainer.run(2, out=tmp_path, progress=False, checkpoint_every=1)
    assert (tmp_path / CHECKPOINT_FILE).read_bytes() == before


def test_weight_decay_is_the_methods_unless_named():
    assert weight_decay(SETTINGS) == 0
    assert weight_decay(dataclasses.replace(SETTINGS, method="wdecay")) == METHODS["wdecay"].weight_decay > 0
    assert weight_decay(dataclasses.replace(SETTINGS, method="sgr", weight_decay=0.1)) == 0.1


def test_a_cosine_schedule_ends_at_no_learning_rate(digits):
    trainer = Trainer(dataclasses.replace(SETTINGS, schedule="cosine", learning_rate=0.5, batch_size=10), digits)
    rates = []
    trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    trainer.run(2, progress=False)
    steps = 2 * len(trainer.batches)
    assert rates == pytest.approx([0.25 * (1 + math.cos(math.pi * n / steps)) for n in range(steps)])
    assert rates[0] == 0.5
    assert rates[-1] < 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "magic"}, "method must be one of clean, wdecay, pgd, .*, lrc, got 'magic'"),
        ({"perturbation": "noise"}, "perturbation must be one of .* got 'noise'"),
        ({"strength": -1.0}, "strength must be a finite number >= 0, got -1.0"),
        ({"strength": math.inf}, "strength must be a finite number >= 0, got inf"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number >= 0, got -0.1"),
        ({"warmup": -1}, "warmup must be a number of steps >= 0, got -1"),
        ({"schedule": "linear"}, "schedule must be one of constant, cosine, got 'linear'"),
        ({"learning_rate": 0.0}, "learning_rate must be a finite number > 0, got 0.0"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **change)


def test_a_penalty_left_out_is_left_out_of_the_records(digits):
    trainer = Trainer(dataclasses.replace(SETTINGS, method="gn"), digits)
    covariance, finite = trainer.criterion.covariance, trainer.criterion.covariance.quadratic_form
    covariance.quadratic_form = lambda g: finite(g) * (math.inf if trainer.step == 1 else 1.0)
    trainer.run(1, progress=False)
    (record,) = trainer.history
    assert int(trainer.criterion.nonfinite) == 1
    assert 0 < record["penalty"] < 1e3
