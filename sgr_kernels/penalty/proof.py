"""Whether a way is right on a model: tried on the first batch, against plain gradients.

A way is right if the parameters' gradient that it gives is the derivative, along v, of the parameters' plain gradient:
``grad_theta (v . grad_x l) = d/dh grad_theta l(x + h v)``. That is checked by a central difference, of a copy of the
model in float64 where there can be one: there the kinks of ReLU are too far apart to meet.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from sgr_kernels.penalty.double_backward import DoubleBackward
from sgr_kernels.penalty.finite_difference import FiniteDifference, samples_interact
from sgr_kernels.penalty.forward_mode import ForwardMode
from sgr_kernels.penalty.layers.batch_norm import is_too_coarse
from sgr_kernels.penalty.metric import Metric
from sgr_kernels.penalty.passes import couples_samples
from sgr_kernels.penalty.trial import IDENTITY, WIDE, Trial, differences, norm, penalty_gradients
from sgr_kernels.penalty.way import Outcome, Way
from sgr_kernels.penalty.wrappers import PenaltyGradientError, is_sharded

logger = logging.getLogger("sgr_kernels")

WAYS: dict[str, Callable[[], Way]] = {way.name: way for way in (DoubleBackward, ForwardMode, FiniteDifference)}

_COSINE = 0.9
"""Of a difference's gradient to the exact one: in float32 below it on networks with kinks, 0.99 on smooth ones."""


def prove(name: str, trial: Trial) -> Way:
    """A way, tried.

    Raises:
        PenaltyGradientError: If it cannot be right on this model.
    """
    way = WAYS[name]()
    obstacle = way.obstacle(trial.model)
    if obstacle is not None:
        raise PenaltyGradientError(f"method: {obstacle}")
    if is_sharded(trial.model):
        logger.info("SGRLoss: method %r is not compared with plain gradients, the parameters are sharded", name)
        return way
    if trial.sampled:
        _expect_independent(trial)
    if way.exact:
        generic = trial.apart()
        try:
            with torch.autocast(trial.images.device.type, enabled=False):
                wide = generic.doubled()
                if wide is not None:
                    _compare_exact(way, wide)
        except torch.OutOfMemoryError:
            wide = None
        if wide is None:
            _compare_exact(way, generic)
    else:
        _compare_difference(way, trial)
    return way


def _expect_independent(trial: Trial) -> None:
    """Expect samples that do not change each other's losses, but for BatchNorm once a pass, which a part is taught.

    Raises:
        PenaltyGradientError: If they do.
    """
    if any(is_too_coarse(part) for module in trial.passes().modules for part in module.modules()):
        raise PenaltyGradientError(
            "fraction: the batch's statistics cannot be told from BatchNorm's running ones in half precision; keep "
            "BatchNorm in float32, or use fraction=1"
        )
    place = trial.doubled()
    if place is None:
        if any(map(couples_samples, trial.passes().modules)) or not isinstance(trial.model, nn.Module):
            return  # cannot be told apart here
        place = trial
    else:
        _take_out_batch_norms(place)
    if samples_interact(place.passes(), place.images.detach().requires_grad_()):
        raise PenaltyGradientError(
            "fraction: the samples of a batch change each other's losses (batch statistics that are not BatchNorm's "
            "running ones), so that a part cannot stand for the whole; use fraction=1"
        )


def _take_out_batch_norms(trial: Trial) -> None:
    """Put BatchNorms in evaluation mode that a part of a batch is taught, on a copy of the model."""
    norms = {
        module: int(module.num_batches_tracked)
        for module in trial.model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.training
        and module.num_batches_tracked is not None
        and module.momentum != 0
    }
    with trial.passes().replayed():
        trial.model(trial.images.clone())
    for module, before in norms.items():
        if int(module.num_batches_tracked or 0) - before > 1:
            raise PenaltyGradientError("fraction: a BatchNorm runs more than once a pass; use fraction=1")
        module.eval()


def _compare_exact(way: Way, trial: Trial) -> None:
    outcome, found = penalty_gradients(way, trial)
    assert outcome.gradient is not None
    if not bool(outcome.gradient.isfinite().all()):
        return  # the batch's fault
    best = math.inf
    for expected, rounding in differences(trial, outcome, outcome.gradient.detach()):
        size, error = norm(expected), norm([a - b for a, b in zip(found, expected)])
        worst = error / size if size > 0 else (0.0 if error == 0 else math.inf)
        if rounding < WIDE and size > 0:  # a small part that is wrong counts, too
            parts = (norm([a - b]) / (norm([b]) + 0.01 * size) for a, b in zip(found, expected))
            worst = max(worst, 0.4 * max(parts, default=0.0))
        best = min(best, worst)
        way.proved = size > 0 or not trial.parameters
        if best <= (0.02 if rounding < WIDE else 0.1):
            return
    message = (
        f"the parameters' gradient by {way.name} differs by {best:.2g} of its size from a difference of plain gradients"
    )
    if rounding < WIDE and not trial.allow_kinks:
        raise PenaltyGradientError(f"method: {message}")
    if rounding >= WIDE:
        message += (
            ", which proves nothing: part of the model computes in less than float64, and kinks lie within a step"
        )
    logger.warning("SGRLoss: %s", message)


def _compare_difference(way: Way, trial: Trial) -> None:
    assert isinstance(way, FiniteDifference)
    cosine = _agreement(way, trial)
    if cosine >= _COSINE:
        return
    message = (
        "method: finite differences lose the exact gradient in kinks of ReLU and max-pooling, in curvature or in "
        f"rounding (the cosine between the two is {cosine:.2f} on this batch, in {trial.images.dtype})"
    )
    if not trial.allow_kinks:
        raise PenaltyGradientError(f"{message}; allow_kinks=True uses them all the same")
    logger.warning("SGRLoss: %s", message.removeprefix("method: "))


@_disable_dynamo
def agreement(trial: Trial) -> float:
    """Cosine between the penalty's gradients in the parameters by finite differences and exact; 1 where both vanish.

    Raises:
        PenaltyGradientError: If the model supports neither.
    """
    return _agreement(FiniteDifference(), trial)


def _agreement(way: FiniteDifference, trial: Trial) -> float:
    way.coupled = samples_interact(trial.passes(), trial.images.detach().requires_grad_())
    metric = trial.metric
    outcome, found = penalty_gradients(way, trial, metric)
    if norm(found) == 0:  # a covariance that has learned nothing yet
        metric = IDENTITY
        outcome, found = penalty_gradients(way, trial, metric)
    expected = _reference(trial, outcome, metric)
    sizes = norm(found) * norm(expected)
    way.proved = sizes > 0 or not trial.parameters
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(found, expected)) / sizes if sizes > 0 else 1.0


def _reference(trial: Trial, outcome: Outcome, metric: Metric) -> list[Tensor]:
    """The exact gradient, by a way that is right on this model; else a central difference."""
    for name, way in WAYS.items():
        if way().exact:
            try:
                return penalty_gradients(prove(name, trial), trial, metric)[1]
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                continue
    place = trial.doubled() or trial
    assert outcome.gradient is not None
    return next(differences(place, outcome, metric.direction(outcome.gradient.detach())))[0]
