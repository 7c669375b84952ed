"""Counters are state: they move, are saved and are copied with their module; averages of models leave them alone."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import sgr_kernels as sgr

COUNTERS = ("nonfinite", "nonfinite_in_a_row", "covariance.updates", "covariance.skipped")


class WithCriterion(nn.Module):
    """As Lightning's modules are, and the models of a Trainer that checkpoints its criterion."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        self.criterion = sgr.SGRLoss(sgr.CovarianceFunction(1, 4), 0.1)

    def step(self, images: torch.Tensor) -> None:
        self.criterion(self.body, images, torch.arange(len(images)) % 3)


def counts(model: nn.Module) -> dict[str, int]:
    return {name: int(model.state_dict()["criterion." + name]) for name in COUNTERS}


def after(steps: int) -> WithCriterion:
    model = WithCriterion()
    for _ in range(steps):
        model.step(torch.rand(4, 1, 4, 4))
    return model


@pytest.mark.parametrize(
    "how",
    [{}, {"avg_fn": get_ema_avg_fn(0.7)}, {"multi_avg_fn": get_ema_multi_avg_fn(0.7)}],
    ids=["swa", "ema", "multi"],
)
def test_averages_of_buffers_leave_counters_alone(how: dict) -> None:
    model = after(3)
    averaged = AveragedModel(model, use_buffers=True, **how)
    for _ in range(5):
        model.step(torch.rand(4, 1, 4, 4))
        averaged.update_parameters(model)
    assert counts(model)["covariance.updates"] == 8
    assert counts(averaged.module)["covariance.updates"] == 3
    assert averaged.module.criterion.steps == 3
    # The running second moment is averaged with the rest, and serves.
    assert not torch.equal(averaged.module.criterion.covariance.values, model.criterion.covariance.values)
    averaged.module.step(torch.rand(4, 1, 4, 4))
    assert counts(averaged.module)["covariance.updates"] == 4


def test_averages_of_state_dicts_leave_counters_alone() -> None:
    model = after(3)
    averaged = copy.deepcopy(model)
    for _ in range(5):
        model.step(torch.rand(4, 1, 4, 4))
    with torch.no_grad():
        for mine, other in zip(averaged.state_dict().values(), model.state_dict().values()):
            mine.copy_(0.7 * mine + 0.3 * other)
    assert counts(averaged)["covariance.updates"] == 3
    assert averaged.criterion.steps == 3


def test_counters_are_saved_loaded_and_missed_like_buffers() -> None:
    model, fresh = after(3), WithCriterion()
    state = model.state_dict()
    assert all("criterion." + name in state for name in COUNTERS)
    fresh.load_state_dict(state)
    assert counts(fresh) == counts(model)
    assert fresh.criterion.steps == 3
    del state["criterion.covariance.updates"]
    state["criterion.covariance.other"] = torch.zeros(())
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*covariance.updates.*Unexpected key.*covariance.other"):
        fresh.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fresh.load_state_dict(model.state_dict(), assign=True).missing_keys == []


def test_counters_move_with_their_module_and_keep_their_type() -> None:
    model = after(2).double()
    assert model.criterion.covariance.updates.dtype == torch.int64
    assert model.to("meta").criterion.covariance.updates.device.type == "meta"
    assert counts(copy.deepcopy(after(2)))["covariance.updates"] == 2


def test_a_replayed_draw_goes_on_counting_in_place() -> None:
    """What a captured graph holds is the counter's memory."""
    model = after(1)
    counters = [model.criterion.covariance.updates, model.criterion.nonfinite]
    places = [counter.data_ptr() for counter in counters]
    model.step(torch.rand(4, 1, 4, 4))
    assert [c.data_ptr() for c in (model.criterion.covariance.updates, model.criterion.nonfinite)] == places
