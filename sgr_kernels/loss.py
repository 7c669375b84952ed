"""The SGR loss: cross-entropy plus the structured gradient penalty, a drop-in criterion."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # like torch.compiler.disable, but importing the compiler on first use
from torch.utils._pytree import tree_leaves, tree_map_only

from sgr_kernels import checks
from sgr_kernels.covariance import Covariance
from sgr_kernels.penalty import choice, proof, steps
from sgr_kernels.penalty.metric import CovarianceMetric, Metric
from sgr_kernels.penalty.norms import NormPenalty
from sgr_kernels.penalty.passes import Passes
from sgr_kernels.penalty.per_sample import cross_entropy_per_sample
from sgr_kernels.penalty.sampling import SAMPLINGS, offset
from sgr_kernels.penalty.statistics import Recorded, StepStatistics
from sgr_kernels.penalty.trial import Trial
from sgr_kernels.penalty.way import Outcome, Task, Way
from sgr_kernels.penalty.wrappers import PenaltyGradientError, refuse_static_graph, unwrapped
from sgr_kernels.perturbations import (
    ATTACKS,
    FREE,
    Perturbation,
    check_perturbation,
    from_gradient,
    only_where_finite,
)
from sgr_kernels.toeplitz.constants import recording

logger = logging.getLogger("sgr_kernels")

__all__ = ["SGRLoss", "StepStatistics", "linear_warmup"]

# Tells "left out" from None, so that a frozen covariance can go without a source but never silently ignores one.
_DEFAULT_PERTURBATION: Final = "sign (default)"


def linear_warmup(strength: float, steps: int) -> Callable[[int], float]:
    """A strength that grows linearly from ``strength / steps`` to ``strength`` over the first training steps."""
    checks.check_count("steps", steps)
    return functools.partial(_warmed_up, strength, steps)


def _warmed_up(strength: float, steps: int, step: int) -> float:
    return strength * min(1.0, (step + 1) / steps)


def _blame_devices(model: Any, images: Tensor, labels: Any, error: RuntimeError) -> None:
    """Raise an error that names the devices, if something failed and they differ; a model may well have several."""
    found = {"images": {images.device}, "labels": {t.device for t in tree_leaves(labels) if isinstance(t, Tensor)}}
    if isinstance(model, nn.Module):
        found["model"] = {p.device for p in model.parameters()}
    if len(set().union(*found.values())) > 1:
        where = ", ".join(f"{name} on {', '.join(sorted(map(str, on)))}" for name, on in found.items() if on)
        raise ValueError(f"device: got {where}; move them to one with .to(device) ({error})") from error


@functools.cache
def _say_once(message: str) -> None:
    logger.warning("SGRLoss: %s", message)


def _check_strength(strength: Any) -> None:
    number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
    if not callable(strength) and not (number and 0 <= strength < math.inf):
        raise ValueError(f"strength: expected a finite number >= 0 or a function of the step, got {strength!r}")


def _check_name(argument: str, value: Any, names: tuple[str, ...]) -> None:
    if value not in names:
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, names))}, got {value!r}")


class SGRLoss(Recorded):
    """Cross-entropy with structured gradient regularization, ``mean_b l_b + strength * Omega`` (paper, Eq. 11).

    ``Omega = 1/2 mean_b g_b^T Sigma g_b``, with g_b the gradient of the b-th log-probability with respect to the
    images. Sigma, and the perturbations it is estimated from, are constants for the backward.

    In training mode the covariance learns from the batch before it is used. Of the model only that changes what a
    cross-entropy step would change: further forward passes, where a method needs them, leave no trace in buffers, modes
    and random streams. Hooks and plain attributes see each of them, the last one perhaps on a part of the batch.

    With ``"gradient"`` or ``"sign"`` a step asks a GPU for a value only at the first call and, to see whether penalties
    are finite, at every ``nonfinite_patience``-th; for several channels and ``psd="clip"`` PyTorch's eigenvalue solver
    waits at each update. While a CUDA graph records, nothing waits, so that steps after the first are meant to be
    recorded; each replay has the strength and the cadences of the step that was recorded.

    Args:
        covariance: The metric. A frozen one is used as it is. A `NormPenalty` in its place makes Omega a norm of the
            gradient instead of a quadratic form.
        strength: lambda, not negative, or a function of the number of training steps taken (`linear_warmup`).
            Relative to the covariance's ``target_variance`` it is a noise-to-signal ratio.
        perturbation: Where the covariance learns from: ``"gradient"`` (the loss gradient) or ``"sign"`` (its sign),
            both free, with the true labels; ``"fgsm"``, ``"pgd"`` or ``"deepfool"``, of the model's own predictions;
            a callable ``(model, images, labels) -> xi``; None for no updates. Left out, it is ``"sign"``, or None
            where the covariance is frozen.
        update_every: Update the covariance on each training step that is a multiple of this.
        penalty_every: Apply the penalty on each training step that is a multiple of this, with this weight.
        fraction: Share of the batch, drawn anew each step, of which the penalty's gradient is taken; in (0, 1]. The
            value, and what the covariance learns from, are those of the whole batch, from the plain backward.
        sampling: Of a ``fraction`` below 1: ``"importance"`` draws samples by what they carry of the penalty,
            ``"uniform"`` draws all alike. Either estimate of the gradient is unbiased given the batch
            (`sgr_kernels.penalty.sampling`), up to dropout, whose masks are drawn anew for the part, and BatchNorm in
            training mode, which has the whole batch's statistics and the part's derivatives of them: close where the
            part has many values a channel (`sgr_kernels.penalty.layers.batch_norm`). Other ways in which samples
            change each other's losses are refused.
        method: Way to the penalty's gradient. ``"double-backward"`` is exact and needs a model that can be
            differentiated twice. ``"forward-mode"`` is exact too and needs forward-mode derivatives.
            ``"finite-difference"`` is approximate and needs plain forward and backward passes alone, also of compiled
            models; it is the cheapest, and on ReLU networks in float32 far from exact
            (`sgr_kernels.penalty.finite_difference`). It frees the graph of the first pass, as do a ``fraction`` below
            1 and a step without a penalty from which the covariance learns: an auxiliary loss that a model keeps of
            that pass cannot be differentiated any more, and one that it keeps of the last pass is that of the last.
            ``"auto"`` takes the first of these that the model supports, and says which in the log. Whatever it is, it
            is tried on the first batch against a difference of plain gradients (`sgr_kernels.penalty.proof`).
        allow_kinks: Use finite differences on a network on which the trial finds them far from exact.
        mean_correction: Subtract ``mean_b g_b . mu`` with the running mean perturbation mu (Eq. 12).
        loss_fn: Per-sample loss ``(outputs, labels) -> (B,)``, a negative log-likelihood: soft labels, several
            labels, other heads.
        count_calls: Whether each call in training mode is a training step to the cadences and to ``strength``. With
            several calls to one step of the optimizer (SAM, L-BFGS, accumulated gradients) say False, and
            `advance` after each step: so all calls of a step have the same cadence.
        nonfinite_patience: A penalty that is not finite is left out of its step; after so many in a row the next
            call raises.

    Raises:
        TypeError: If the covariance is neither a `Covariance` nor a `NormPenalty`.
        ValueError: If an argument is out of range, or a perturbation is named and the covariance is frozen.
    """

    drawn: Tensor

    def __init__(
        self,
        covariance: Covariance | NormPenalty,
        strength: float | Callable[[int], float] = 0.1,
        *,
        perturbation: str | Perturbation | None = _DEFAULT_PERTURBATION,
        update_every: int = 1,
        penalty_every: int = 1,
        fraction: float = 1.0,
        sampling: str = "importance",
        method: str = "double-backward",
        allow_kinks: bool = False,
        mean_correction: bool = False,
        loss_fn: Callable[[Any, Any], Tensor] = cross_entropy_per_sample,
        count_calls: bool = True,
        nonfinite_patience: int = 10,
    ) -> None:
        for name in ("update_every", "penalty_every", "nonfinite_patience"):
            checks.check_count(name, locals()[name])
        super().__init__(nonfinite_patience)
        if not isinstance(covariance, (Covariance, NormPenalty)):
            raise TypeError(
                f"covariance: expected a sgr_kernels covariance module or NormPenalty, "
                f"got {checks.describe(covariance)}"
            )
        _check_strength(strength)
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
            raise ValueError(f"fraction: expected a number in (0, 1], got {fraction!r}")
        _check_name("sampling", sampling, SAMPLINGS)
        _check_name("method", method, (*choice.METHODS, choice.AUTO))
        if perturbation is _DEFAULT_PERTURBATION:
            perturbation = None if covariance.frozen else "sign"
        check_perturbation(perturbation)
        if perturbation is not None and covariance.frozen:
            raise ValueError(f"perturbation: the covariance is frozen and takes no updates, got {perturbation!r}")
        if mean_correction and covariance.scaled_mean() is None:
            raise ValueError(f"mean_correction: {type(covariance).__name__} keeps no mean perturbation")
        self.covariance, self.strength, self.perturbation = covariance, strength, perturbation
        self.update_every, self.penalty_every, self.fraction = update_every, penalty_every, float(fraction)
        self.sampling, self.method, self.allow_kinks = sampling, method, allow_kinks
        self.mean_correction, self.loss_fn, self.count_calls = mean_correction, loss_fn, count_calls
        self._ways = choice.Ways()
        self._within_step = False  # between calls of one training step
        self.register_counter("drawn", persistent=False)

    def forward(self, model: Callable[[Tensor], Any], images: Tensor, labels: Any) -> Tensor:
        """Loss of a batch, ``mean_b l_b + strength * Omega``; a scalar to call ``backward`` on.

        Works under ``torch.no_grad`` for evaluation. In evaluation mode the covariance stays as it is and the penalty
        is that of the whole batch.

        Args:
            model: Maps images to outputs.
            images: (B, C, H, W) or whatever shape the covariance is of; floating point.
            labels: What ``loss_fn`` takes.

        Raises:
            TypeError: If the images are not floating point.
            ValueError: If the images have not the covariance's shape; if the loss is not one number per sample, or does
                not depend on the images; if something failed
                and the model, the images and the labels are on different devices.
            PenaltyGradientError: If the model does not support the method.
            RuntimeError: If too many penalties in a row were not finite.
        """
        checks.check_floating_point("images", images)
        if isinstance(self.covariance, Covariance):
            self.covariance.check_shape("images", images)
        self._stop_if_hopeless()
        differentiable = torch.is_grad_enabled()
        if differentiable:
            refuse_static_graph(model)
        with torch.inference_mode(False), torch.enable_grad():
            # What was made under inference mode cannot be saved for a backward.
            images, labels = tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, (images, labels))
            step = self._step if choice.is_traceable(self.method) else self._untraced_step
            try:
                outcome = step(model, images if differentiable else images.detach(), labels, differentiable)
            except (PenaltyGradientError, torch.OutOfMemoryError):
                raise
            except RuntimeError as error:
                _blame_devices(model, images, labels, error)
                raise
        self._record(outcome, self._strength())
        self.steps += self.training and self.count_calls
        return outcome.loss if differentiable else outcome.loss.detach()

    def advance(self) -> None:
        """Count a training step; with ``count_calls=False``, after each step of the optimizer."""
        self.steps += 1
        self._within_step = False

    def kind(self) -> Hashable:
        """As of `Criterion`, and what the cadences and the strength make of the next training step."""
        update, penalize = self._due()
        source = self.perturbation if isinstance(self.perturbation, str) else id(self.perturbation)
        return (update and source, self._weight() if penalize else None, id(self.loss_fn), super().kind())

    def before_replay(self) -> None:
        """As of `Criterion`; looks now and then whether penalties are finite."""
        self._stop_if_hopeless()
        if self.fraction < 1 and self._due()[1]:
            self._begin_draws()

    def after_replay(self, captured: StepStatistics | None) -> None:
        """As of `Criterion`."""
        super().after_replay(captured and replace(captured, strength=self._strength()))
        self.steps += self.training and self.count_calls

    @_disable_dynamo
    def _untraced_step(self, model: Any, images: Tensor, labels: Any, differentiable: bool) -> Outcome:
        return self._step(model, images, labels, differentiable)

    def _step(self, model: Any, images: Tensor, labels: Any, differentiable: bool) -> Outcome:
        """What this step's cadences ask for."""
        update, penalize = self._due()
        if update and isinstance(model, nn.Module) and not model.training:
            _say_once(
                "the model is in evaluation mode and the criterion in training mode: the covariance goes on learning; "
                "criterion.eval() stops that"
            )

        def learn(losses: Tensor, gradient: Tensor | None) -> None:
            if update:
                self._update(model, images, labels, losses, gradient)

        way = self._tried_way(model, images, labels) if differentiable and penalize else None
        count = self._sample_count(images) if way is not None else None
        replays = way is not None and (way.repeats or count is not None)
        passes = Passes(model, self._losses, labels, images.device, replays)
        task = Task(passes, images, self._metric(), self._weight(), learn, self._count_finite)
        if way is not None:
            return way(task) if count is None else self._sampled(task, way, count)
        free = update and self.perturbation in FREE
        if differentiable:
            return steps.learning(task) if free else steps.plain(task)
        return steps.evaluated(task, penalize) if free or penalize else steps.plain(task)

    def _due(self) -> tuple[bool, bool]:
        """Whether the covariance learns on this step, and whether it has a penalty."""
        step = self.steps if self.training else 0
        learns = self.training and self.perturbation is not None
        return learns and step % self.update_every == 0, step % self.penalty_every == 0

    def _begin_draws(self) -> None:
        """Draw as the step's number says, after whatever draws; later calls of the same step go on."""
        if not self._within_step:
            self.drawn.fill_(self.steps // self.penalty_every)
        self._within_step = not self.count_calls

    def _sampled(self, task: Task, way: Way, count: int) -> Outcome:
        if not recording():  # a replayed graph goes on counting by itself
            self._begin_draws()
        outcome = steps.sampled(task, way, count, offset(self.drawn), self.sampling == "uniform")
        self.drawn += 1 if self.count_calls else 10_007  # several calls of one step draw elsewhere each
        if count == 1 and task.passes.coupled:
            _say_once(
                f"fraction: one sample is left of a batch of {len(task.images)}, often the last of an epoch: its "
                "penalty's gradient takes BatchNorm's derivatives from this sample alone and is rough, not wrong; "
                "a larger fraction or batch, or drop_last in the loader, avoids it"
            )
        return outcome

    def _sample_count(self, images: Tensor) -> int | None:
        """How many samples the penalty's gradient is of; None for all."""
        if self.fraction == 1.0 or not self.training or len(images) < 2:
            return None
        return max(1, round(self.fraction * len(images)))

    def _metric(self) -> Metric:
        if isinstance(self.covariance, NormPenalty):
            return self.covariance
        return CovarianceMetric(self.covariance, self.mean_correction)

    def _weight(self) -> float:
        """Of the penalty on a step that has one."""
        return self._strength() * (self.penalty_every if self.training else 1)

    def _strength(self) -> float:
        if not callable(self.strength):
            return self.strength
        strength = float(self.strength(self.steps))
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength: expected a finite number >= 0 at step {self.steps}, got {strength}")
        return strength

    def _losses(self, outputs: Any, labels: Any) -> Tensor:
        losses = self.loss_fn(outputs, labels)
        if not isinstance(losses, Tensor) or losses.dim() != 1:
            hint = ' (reduction="none" gives them)' if isinstance(losses, Tensor) and losses.dim() == 0 else ""
            raise ValueError(f"loss_fn: expected one loss per sample, shape (B,), got {checks.describe(losses)}{hint}")
        return losses

    def _update(self, model: Any, images: Tensor, labels: Any, losses: Tensor, gradient: Tensor | None) -> None:
        if isinstance(self.perturbation, str) and self.perturbation in FREE:
            assert gradient is not None
            xi = from_gradient(self.perturbation, gradient)
        else:
            source = ATTACKS[self.perturbation] if isinstance(self.perturbation, str) else self.perturbation
            assert source is not None
            xi = source(unwrapped(model), images.detach(), labels)
        assert isinstance(self.covariance, Covariance)
        self.covariance.update(only_where_finite(xi, losses, gradient))

    def _tried_way(self, model: Any, images: Tensor, labels: Any) -> Way:
        """The way to the penalty's gradient; before its first use it is tried, leaving no trace."""
        sampled = self._sample_count(images) is not None
        options = (self.method, self.allow_kinks, sampled, torch.is_autocast_enabled(images.device.type))
        way = self._ways.get(model, options)
        if way is not None:
            return way
        if recording():
            raise RuntimeError(
                "SGRLoss: the first step on a model asks for values, which cannot be while a CUDA graph captures; "
                "take it before"
            )
        if len(images) == 0 and self.method != choice.AUTO:  # nothing to try it on
            return proof.WAYS[self.method]()
        trial = Trial(model, self._losses, images.detach(), labels, self.allow_kinks, sampled, self._metric())
        way = choice.choose(self.method, trial)
        if way.proved:
            self._ways.keep(model, options, way)
        return way

    def extra_repr(self) -> str:
        """Settings."""
        return (
            f"strength={self.strength}, perturbation={self.perturbation!r}, method={self.method!r}, "
            f"update_every={self.update_every}, penalty_every={self.penalty_every}, fraction={self.fraction}"
        )
