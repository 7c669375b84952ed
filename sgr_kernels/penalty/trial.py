"""What a way is tried on, and what it gives there beside differences of plain gradients."""

from __future__ import annotations

import copy
import functools
import logging
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sgr_kernels.covariance import IdentityCovariance
from sgr_kernels.penalty.double_backward import DoubleBackward, has_no_second_derivative
from sgr_kernels.penalty.gradients import coarsest_rounding, hooks_withheld, leaves
from sgr_kernels.penalty.metric import CovarianceMetric, Metric
from sgr_kernels.penalty.passes import Evaluate, Passes
from sgr_kernels.penalty.way import Outcome, Task, Way
from sgr_kernels.penalty.wrappers import PenaltyGradientError, uncompiled

logger = logging.getLogger("sgr_kernels")

WIDE = 1e-12
"""A rounding unit below this is float64's."""

IDENTITY = CovarianceMetric(IdentityCovariance())


@dataclass
class Trial:
    """What a way is tried on: a model and a batch, as they are.

    Finite differences are tried along the metric's own directions, for a model may be smooth along these and rough
    along others; what is exact is exact along all, and is tried with Sigma = I.
    """

    model: Any
    evaluate: Evaluate
    images: Tensor
    labels: Any
    allow_kinks: bool = False
    sampled: bool = False
    metric: Metric = IDENTITY

    def passes(self) -> Passes:
        """Forward passes that leave no trace."""
        return Passes(self.model, self.evaluate, self.labels, self.images.device, replays=True)

    @functools.cached_property
    def parameters(self) -> list[Tensor]:
        """What can be trained: of a module all, of a callable what its losses depend on."""
        if isinstance(self.model, nn.Module):
            return [p for p in uncompiled(self.model).parameters() if p.requires_grad]
        return leaves(self.passes().again(self.images.detach()).losses)

    def apart(self) -> Trial:
        """The same with a thousandth of noise: in flat parts of images max-pooling has ties, and no derivative."""
        generator = torch.Generator(self.images.device if self.images.is_cuda else "cpu").manual_seed(0)
        images = self.images.detach()
        noise = torch.rand(images.shape, generator=generator, device=generator.device, dtype=torch.float32) - 0.5
        size = images.double().square().mean().sqrt()
        size = torch.where(size > 0, size, 1.0)
        moved = images + (2e-3 * size * noise.to(images.device)).to(images.dtype)
        # Not beyond what the images hold: a model may look at their range, or take roots.
        low, high = images.min(), images.max()
        within = torch.where((moved < low) | (moved > high), 2 * images - moved, moved).clamp(low, high)
        return replace(self, images=torch.where(high > low, within, moved))

    def doubled(self) -> Trial | None:
        """The same in float64 on a copy of the model; None where there can be none."""
        model = uncompiled(self.model)
        if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
            return None
        try:
            wide = copy.deepcopy(model).double()
            images, labels = tree_map_only(Tensor, _widened, (self.images, self.labels))
            trial = replace(self, model=wide, images=images, labels=labels)
            trial.passes().again(images)
        except Exception as error:  # whatever a model does not like about float64 or being copied
            logger.debug("SGRLoss: no float64 copy of the model (%s)", error)
            return None
        return trial


def _widened(tensor: Tensor) -> Tensor:
    return tensor.detach().double() if tensor.is_floating_point() else tensor


def penalty_gradients(way: Way, trial: Trial, metric: Metric = IDENTITY) -> tuple[Outcome, list[Tensor]]:
    """The penalty by a way, and its gradient in the parameters."""
    samples = max(1, len(trial.images))
    shares = torch.full((len(trial.images),), 1 / samples, device=trial.images.device, dtype=torch.float32)
    task = Task(trial.passes(), trial.images.detach(), metric, 1.0, shares=shares)
    outcome = way(task)
    assert outcome.gradient is not None
    if isinstance(way, DoubleBackward) and has_no_second_derivative(outcome.gradient):
        raise PenaltyGradientError("method: a part of the model can be differentiated only once (once_differentiable)")
    try:
        gradients = _grad(outcome.loss, trial.parameters)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PenaltyGradientError(f"method: the {way.name} slope has no backward ({error})") from error
    if not math.isfinite(norm(gradients)) and bool(outcome.gradient.isfinite().all()):
        raise PenaltyGradientError(f"method: the gradient by {way.name} is not finite{_culprit(way, task, trial)}")
    return outcome, gradients


def differences(trial: Trial, outcome: Outcome, direction: Tensor) -> Iterator[tuple[list[Tensor], float]]:
    """Central differences of the mean loss's plain gradients along a direction, and the passes' rounding unit.

    Of several lengths, the likeliest first: a kink may lie within one. They are relative to the images where the loss
    follows them in proportion, and to the loss where it does not: that of a deep network at its beginning may change
    by a thousand times as much, and that of one without normalization by next to nothing, which rounding hides.
    """
    passes, images, samples = trial.passes(), trial.images.detach(), max(1, len(trial.images))
    direction = direction.to(images.dtype)
    leaf = images.clone().requires_grad_()
    rounding = coarsest_rounding(passes.again(leaf).losses, leaf)
    lengths = [1e-9, 1e-10, 1e-11, 1e-8, 1e-7] if rounding < WIDE else [rounding**0.5 * s for s in (1, 4, 0.25, 16)]
    size = max(norm([direction]), 1e-30)
    assert outcome.gradient is not None
    slope = abs(float((outcome.gradient.detach().double() * direction.double()).sum())) / size
    growth = norm([images]) * slope / max(abs(float(outcome.cross_entropy)) * samples, 1e-30)
    if growth < 1e-3 and rounding < WIDE:
        lengths += [1e-6, 1e-5, 1e-4, 1e-3]
    for length in lengths:
        step = max(length / max(1.0, growth), 100 * rounding) * norm([images]) / size
        ahead, behind = (
            _grad(passes.again(images + side * step * direction).losses.sum() / samples, trial.parameters)
            for side in (1, -1)
        )
        yield [(a - b) / (2 * step) for a, b in zip(ahead, behind)], rounding


def _grad(loss: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """Gradients of a loss, zeros where it does not depend on a parameter; hooks do not see them."""
    if not loss.requires_grad or not parameters:
        return [torch.zeros_like(p) for p in parameters]
    with hooks_withheld(parameters):
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g.detach() for g, p in zip(found, parameters)]


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(t.detach().abs().double().square().sum()) for t in tensors))


def _culprit(way: Way, task: Task, trial: Trial) -> str:
    """The operation whose derivative is not finite, if autograd can name it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.autograd.detect_anomaly(check_nan=True):
                _grad(way(task).loss, trial.parameters)
    except RuntimeError as error:
        found = re.search(r"Function '(\w+?)(Backward\d*)+' returned nan", str(error))
        return "" if found is None else f": the derivative of {found.group(1)} is NaN at this input"
    return ""
