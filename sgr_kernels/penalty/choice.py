"""Which way to the penalty's gradient a model supports: tried on the first batch, against plain gradients.

A way is right if the parameters' gradient that it gives is the derivative, along v, of the parameters' plain gradient:
``grad_theta (v . grad_x l) = d/dh grad_theta l(x + h v)``. That is checked by a central difference, of a copy of the
model in float64 where there can be one: there the kinks of ReLU are too far apart to meet.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils._pytree import tree_map_only

from sgr_kernels.covariance import IdentityCovariance
from sgr_kernels.penalty.double_backward import DoubleBackward, has_no_second_derivative
from sgr_kernels.penalty.finite_difference import FiniteDifference, samples_interact
from sgr_kernels.penalty.forward_mode import ForwardMode
from sgr_kernels.penalty.gradients import coarsest_rounding, hooks_withheld, leaves
from sgr_kernels.penalty.layers.batch_norm import is_too_coarse
from sgr_kernels.penalty.metric import CovarianceMetric, Metric
from sgr_kernels.penalty.passes import Evaluate, Passes, couples_samples
from sgr_kernels.penalty.way import Outcome, Task, Way
from sgr_kernels.penalty.wrappers import PenaltyGradientError, is_compiled, is_sharded, modules_in, uncompiled

logger = logging.getLogger("sgr_kernels")

WAYS: dict[str, Callable[[], Way]] = {way.name: way for way in (DoubleBackward, ForwardMode, FiniteDifference)}
METHODS = tuple(WAYS)
AUTO = "auto"

COST = {"double-backward": "about 2", "forward-mode": "3 to 4", "finite-difference": "about 2"}
"""Of a step in plain ones, for the log."""

_COSINE = 0.9
"""Of a difference's gradient to the exact one: in float32 below it on networks with kinks, 0.99 on smooth ones."""
_WIDE = 1e-12  # a rounding unit below this is float64's


_IDENTITY = CovarianceMetric(IdentityCovariance())


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
    metric: Metric = _IDENTITY

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


class Ways:
    """The ways that were tried, by model as it is: what it holds, trains and computes in; functions by their code.

    Copies and pickles begin empty, so that what they serve is tried, too.
    """

    def __init__(self) -> None:
        self._tried: weakref.WeakKeyDictionary[Any, dict[Any, Way]] = weakref.WeakKeyDictionary()

    def get(self, model: Any, options: Any) -> Way | None:
        """The way that was tried on a model as it is, with given options."""
        key = _key(model)
        return self._tried.get(key[0], {}).get((*key[1:], options))

    def keep(self, model: Any, options: Any, way: Way) -> None:
        """Remember it."""
        key = _key(model)
        self._tried.setdefault(key[0], {})[(*key[1:], options)] = way

    def __reduce__(self) -> tuple[type[Ways], tuple[()]]:
        """Empty."""
        return Ways, ()


def _key(model: Any) -> tuple[Any, ...]:
    """A module, the code that calls it, and what of its state decides whether a way is right."""
    model = uncompiled(model)
    modules = [model] if isinstance(model, nn.Module) else modules_in(model)
    state = tuple(
        (
            module.training,
            type(module),
            *((p.dtype, p.requires_grad) for p in module._parameters.values() if p is not None),
        )
        for each in modules
        for module in each.modules()
    )
    code = None if isinstance(model, nn.Module) else getattr(model, "__code__", type(model))
    others = tuple(id(module) for module in modules[1:])
    return (modules[0] if modules else _NOBODY), code, others, state


class _Nobody:
    """Stands for the module of a callable in which none is seen."""


_NOBODY = _Nobody()


def is_traceable(method: str) -> bool:
    """Whether a compiler of the whole step may trace a method's passes."""
    return method != AUTO and WAYS[method]().traceable


@_disable_dynamo
def choose(method: str, trial: Trial) -> Way:
    """The way of a name, or the first that the model supports; tried, which waits for the device.

    Raises:
        PenaltyGradientError: If the model does not support it; names those that it does support.
    """
    names = (method,) if method != AUTO else _preference(trial.model)
    failures: dict[str, str] = {}
    for name in names:
        try:
            way = prove(name, trial)
        except PenaltyGradientError as error:
            failures[name] = str(error)
            continue
        if method == AUTO:
            why = "".join(f"; not {other!r}: {reason}" for other, reason in failures.items())
            logger.info("SGRLoss: method %r, a step costs %s plain ones%s", name, COST[name], why)
        return way
    raise PenaltyGradientError(f"{'; '.join(failures.values())}; {_remedy(failures, trial)}")


def _preference(model: Any) -> tuple[str, ...]:
    """Cheapest first; of a compiled model what keeps it compiled."""
    return METHODS if not is_compiled(model) else ("finite-difference", "double-backward", "forward-mode")


def _remedy(failures: dict[str, str], trial: Trial) -> str:
    """The methods that work, tried."""
    working = []
    for name in METHODS:
        if name not in failures:
            try:
                prove(name, trial)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                continue
            working.append(repr(name))
    return f"use method={' or '.join(working)}" if working else "no method works on this model"


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
    outcome, found = _penalty_gradients(way, trial)
    assert outcome.gradient is not None
    if not bool(outcome.gradient.isfinite().all()):
        return  # the batch's fault
    best = math.inf
    for expected, rounding in _differences(trial, outcome, outcome.gradient.detach()):
        size, error = _norm(expected), _norm([a - b for a, b in zip(found, expected)])
        worst = error / size if size > 0 else (0.0 if error == 0 else math.inf)
        if rounding < _WIDE and size > 0:  # a small part that is wrong counts, too
            parts = (_norm([a - b]) / (_norm([b]) + 0.01 * size) for a, b in zip(found, expected))
            worst = max(worst, 0.4 * max(parts, default=0.0))
        best = min(best, worst)
        way.proved = size > 0 or not trial.parameters
        if best <= (0.02 if rounding < _WIDE else 0.1):
            return
    message = (
        f"the parameters' gradient by {way.name} differs by {best:.2g} of its size from a difference of plain gradients"
    )
    if rounding < _WIDE and not trial.allow_kinks:
        raise PenaltyGradientError(f"method: {message}")
    if rounding >= _WIDE:
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
    outcome, found = _penalty_gradients(way, trial, metric)
    if _norm(found) == 0:  # a covariance that has learned nothing yet
        metric = _IDENTITY
        outcome, found = _penalty_gradients(way, trial, metric)
    expected = _reference(trial, outcome, metric)
    sizes = _norm(found) * _norm(expected)
    way.proved = sizes > 0 or not trial.parameters
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(found, expected)) / sizes if sizes > 0 else 1.0


def _reference(trial: Trial, outcome: Outcome, metric: Metric) -> list[Tensor]:
    """The exact gradient, by a way that is right on this model; else a central difference."""
    for name in METHODS:
        if WAYS[name]().exact:
            try:
                return _penalty_gradients(prove(name, trial), trial, metric)[1]
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                continue
    place = trial.doubled() or trial
    assert outcome.gradient is not None
    return next(_differences(place, outcome, metric.direction(outcome.gradient.detach())))[0]


def _penalty_gradients(way: Way, trial: Trial, metric: Metric = _IDENTITY) -> tuple[Outcome, list[Tensor]]:
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
    if not math.isfinite(_norm(gradients)) and bool(outcome.gradient.isfinite().all()):
        raise PenaltyGradientError(f"method: the gradient by {way.name} is not finite{_culprit(way, task, trial)}")
    return outcome, gradients


def _differences(trial: Trial, outcome: Outcome, direction: Tensor) -> Iterator[tuple[list[Tensor], float]]:
    """Central differences of the mean loss's plain gradients along a direction, and the passes' rounding unit.

    Of several lengths, the likeliest first: a kink may lie within one. They are relative to the images where the loss
    follows them in proportion, and to the loss where it does not: that of a deep network at its beginning may change
    by a thousand times as much, and that of one without normalization by next to nothing, which rounding hides.
    """
    passes, images, samples = trial.passes(), trial.images.detach(), max(1, len(trial.images))
    direction = direction.to(images.dtype)
    leaf = images.clone().requires_grad_()
    rounding = coarsest_rounding(passes.again(leaf).losses, leaf)
    lengths = [1e-9, 1e-10, 1e-11, 1e-8, 1e-7] if rounding < _WIDE else [rounding**0.5 * s for s in (1, 4, 0.25, 16)]
    size = max(_norm([direction]), 1e-30)
    assert outcome.gradient is not None
    slope = abs(float((outcome.gradient.detach().double() * direction.double()).sum())) / size
    growth = _norm([images]) * slope / max(abs(float(outcome.cross_entropy)) * samples, 1e-30)
    if growth < 1e-3 and rounding < _WIDE:
        lengths += [1e-6, 1e-5, 1e-4, 1e-3]
    for length in lengths:
        step = max(length / max(1.0, growth), 100 * rounding) * _norm([images]) / size
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


def _norm(tensors: list[Tensor]) -> float:
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
