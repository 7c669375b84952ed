"""The SGR loss: cross-entropy plus the structured gradient penalty, a drop-in criterion."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # like torch.compiler.disable, but importing the compiler on first use
from torch.utils._pytree import tree_leaves, tree_map_only

from sgr_kernels import checks
from sgr_kernels.checks.caller import warn_caller
from sgr_kernels.covariance import Covariance
from sgr_kernels.penalty.finite_difference import (
    couples_samples,
    difference,
    moved,
    sample_weights,
    scale_of_steps,
    spend,
    substitute,
)
from sgr_kernels.penalty.passes import (
    METHODS,
    Passes,
    PenaltyGradientError,
    differentiable_twice,
    input_gradient,
    is_compiled,
    refuse_static_graph,
    samples_interact,
    select,
    slope_forward_mode,
    try_method,
    unwrapped,
)
from sgr_kernels.penalty.per_sample import cross_entropy_per_sample
from sgr_kernels.penalty.perturbations import ATTACKS, FREE, Perturbation, check_perturbation, from_gradient
from sgr_kernels.toeplitz.constants import recording

logger = logging.getLogger("sgr_kernels")

# Tells "left out" from None, so that a frozen covariance can go without a source but never silently ignores one.
_DEFAULT_PERTURBATION: Final = "sign (default)"


def linear_warmup(strength: float, steps: int) -> Callable[[int], float]:
    """A strength that grows linearly from ``strength / steps`` to ``strength`` over the first training steps."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: expected a positive int, got {steps!r}")
    return lambda step: strength * min(1.0, (step + 1) / steps)


@dataclass(frozen=True)
class StepStatistics:
    """What a call of `SGRLoss` computed; all tensors are detached.

    Attributes:
        loss: Value of the loss.
        cross_entropy: Mean of the per-sample losses.
        penalty: Omega (Eq. 11 or 12), without the strength; None on a step that left it out.
        strength: lambda on that step.
        outputs: What the model returned.
        gradient_norm: Norm of each sample's input gradient; None on a step that did not need it.
        nonfinite_penalties: Steps whose penalty was not finite and left out, so far.
    """

    loss: Tensor
    cross_entropy: Tensor
    penalty: Tensor | None
    strength: float
    outputs: Any
    gradient_norm: Tensor | None
    nonfinite_penalties: Tensor


def _detached(value: Any) -> Any:
    return tree_map_only(Tensor, Tensor.detach, value)


def _blame_devices(model: Any, images: Tensor, labels: Any, error: RuntimeError) -> None:
    """Raise an error that names the devices, if something failed and they differ; a model may well have several."""
    found = {"images": {images.device}, "labels": {t.device for t in tree_leaves(labels) if isinstance(t, Tensor)}}
    if isinstance(model, nn.Module):
        found["model"] = {p.device for p in model.parameters()}
    if len(set().union(*found.values())) > 1:
        where = ", ".join(f"{name} on {', '.join(sorted(map(str, on)))}" for name, on in found.items() if on)
        raise ValueError(f"device: got {where}; move them to one with .to(device) ({error})") from error


class SGRLoss(nn.Module):
    """Cross-entropy with structured gradient regularization, ``mean_b l_b + strength * Omega`` (paper, Eq. 11).

    ``Omega = 1/2 mean_b g_b^T Sigma g_b``, with g_b the gradient of the b-th log-probability with respect to the
    images. Sigma, and the perturbations it is estimated from, are constants for the backward.

    In training mode the covariance learns from the batch before it is used. Of the model only that changes what a
    cross-entropy step would change: further forward passes, where a method needs them, leave no trace.

    With ``"gradient"`` or ``"sign"`` a step asks a GPU for a value only at the first call and, to see whether penalties
    are finite, at every ``nonfinite_patience``-th; for several channels and ``psd="clip"`` PyTorch's eigenvalue solver
    waits at each update. While a CUDA graph records, nothing waits, so that steps after the first are meant to be
    recorded, if ``fraction`` is 1; each replay has the strength and the cadences of the step that was recorded.

    Args:
        covariance: The metric. A frozen one is used as it is.
        strength: lambda, not negative, or a function of the number of training steps taken (`linear_warmup`).
            Relative to the covariance's ``target_variance`` it is a noise-to-signal ratio.
        perturbation: Where the covariance learns from: ``"gradient"`` (the loss gradient) or ``"sign"`` (its sign),
            both free, with the true labels; ``"fgsm"``, ``"pgd"`` or ``"deepfool"``, of the model's own predictions;
            a callable ``(model, images, labels) -> xi``; None for no updates. Left out, it is ``"sign"``, or None
            where the covariance is frozen.
        update_every: Update the covariance on each training step that is a multiple of this.
        penalty_every: Apply the penalty on each training step that is a multiple of this, with this weight.
        fraction: Share of the batch, drawn anew each step, on which the penalty is computed; in (0, 1].
        method: Way to the penalty's gradient. ``"double-backward"`` is exact and needs a model that can be
            differentiated twice. ``"forward-mode"`` is exact too and needs forward-mode derivatives.
            ``"finite-difference"`` is approximate and needs plain forward and backward passes alone, also of compiled
            models; it is the cheapest, and on ReLU networks in float32 far from exact
            (`sgr_kernels.penalty.finite_difference`). It frees the graph of the first pass: what a model has left of
            that elsewhere, such as an auxiliary loss, cannot be differentiated any more. ``"auto"`` takes the first of
            these that the model supports, and says which in the log.
        mean_correction: Subtract ``mean_b g_b . mu`` with the running mean perturbation mu (Eq. 12).
        loss_fn: Per-sample loss ``(outputs, labels) -> (B,)``, a negative log-likelihood: soft labels, several
            labels, other heads.
        nonfinite_patience: A penalty that is not finite is left out of its step; after so many in a row the next
            call raises.

    Raises:
        TypeError: If the covariance is not a `Covariance`.
        ValueError: If an argument is out of range, or a perturbation is named and the covariance is frozen.
    """

    nonfinite: Tensor
    nonfinite_in_a_row: Tensor

    def __init__(
        self,
        covariance: Covariance,
        strength: float | Callable[[int], float] = 0.1,
        *,
        perturbation: str | Perturbation | None = _DEFAULT_PERTURBATION,
        update_every: int = 1,
        penalty_every: int = 1,
        fraction: float = 1.0,
        method: str = "double-backward",
        mean_correction: bool = False,
        loss_fn: Callable[[Any, Any], Tensor] = cross_entropy_per_sample,
        nonfinite_patience: int = 10,
    ) -> None:
        super().__init__()
        if not isinstance(covariance, Covariance):
            raise TypeError(f"covariance: expected a sgr_kernels covariance module, got {checks.describe(covariance)}")
        if not callable(strength) and not 0 <= strength < math.inf:
            raise ValueError(f"strength: expected a finite number >= 0 or a function of the step, got {strength!r}")
        cadences = {
            "update_every": update_every,
            "penalty_every": penalty_every,
            "nonfinite_patience": nonfinite_patience,
        }
        for name, value in cadences.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive int, got {value!r}")
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction: expected a number in (0, 1], got {fraction!r}")
        if method not in (*METHODS, "auto"):
            raise ValueError(f"method: expected one of {', '.join(map(repr, (*METHODS, 'auto')))}, got {method!r}")
        if perturbation is _DEFAULT_PERTURBATION:
            perturbation = None if covariance.frozen else "sign"
        check_perturbation(perturbation)
        if perturbation is not None and covariance.frozen:
            raise ValueError(f"perturbation: the covariance is frozen and takes no updates, got {perturbation!r}")
        if mean_correction and covariance.scaled_mean() is None:
            raise ValueError(f"mean_correction: {type(covariance).__name__} keeps no mean perturbation")
        self.covariance, self.strength, self.perturbation = covariance, strength, perturbation
        self.update_every, self.penalty_every, self.fraction = update_every, penalty_every, float(fraction)
        self.method, self.mean_correction, self.loss_fn = method, mean_correction, loss_fn
        self.nonfinite_patience = nonfinite_patience
        self.steps = 0
        """Training steps taken; the cadences count them."""
        self._working_method: str | None = None
        self._samples_interact = False
        self._last: StepStatistics | None = None
        self.register_buffer("nonfinite", torch.zeros((), dtype=torch.int64))
        self.register_buffer("nonfinite_in_a_row", torch.zeros((), dtype=torch.int64))

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
            ValueError: If the loss is not one number per sample, or does not depend on the images; if something failed
                and the model, the images and the labels are on different devices.
            PenaltyGradientError: If the model does not support the method.
            RuntimeError: If too many penalties in a row were not finite; if a CUDA graph records and ``fraction`` is
                below 1.
        """
        if not isinstance(images, Tensor) or not images.is_floating_point():
            raise TypeError(f"images: expected a real floating-point tensor, got {checks.describe(images)}")
        self._stop_if_hopeless()
        differentiable = torch.is_grad_enabled()
        if differentiable:
            refuse_static_graph(model)
        with torch.inference_mode(False), torch.enable_grad():
            # What was made under inference mode cannot be saved for a backward.
            images, labels = tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, (images, labels))
            # Finite differences are made of plain passes, which a compiler of the whole step may trace.
            step = self._step if self.method == "finite-difference" else self._untraced_step
            try:
                loss = step(model, images if differentiable else images.detach(), labels, differentiable)
            except PenaltyGradientError:
                raise
            except RuntimeError as error:
                _blame_devices(model, images, labels, error)
                raise
        self.steps += self.training
        return loss if differentiable else loss.detach()

    @_disable_dynamo
    def _untraced_step(self, model: Any, images: Tensor, labels: Any, differentiable: bool) -> Tensor:
        return self._step(model, images, labels, differentiable)

    def _step(self, model: Any, images: Tensor, labels: Any, differentiable: bool) -> Tensor:
        """Loss of a batch, by the cadences of this step."""
        count = self.steps if self.training else 0
        update = self.training and self.perturbation is not None and count % self.update_every == 0
        penalize = count % self.penalty_every == 0
        if not penalize and not (update and self.perturbation in FREE):
            outputs = model(images)
            losses, gradient = self._losses(outputs, labels), None
            if update:
                self._update(model, images, labels, None)
            return self._total(outputs, losses, None, None)
        # Images of an embedding keep their graph; others become leaves.
        embedded = differentiable and images.requires_grad
        x = images.view_as(images) if embedded else images.detach().requires_grad_()
        method = self._resolved_method(model, x, labels) if differentiable and penalize else "double-backward"
        if method == "finite-difference":
            return self._difference_step(model, images, labels, embedded, update)
        twice = differentiable and penalize and method == "double-backward"
        part = self._subset(images) if self.training else None
        passes = Passes(model, self._losses, labels, x.device, replays=part is not None or not twice)
        with differentiable_twice(twice) as rules:
            first = passes.first(x)
            outputs, losses = _detached(first.outputs), first.losses
            penalized, penalized_losses = x, first.losses
            if part is not None:
                penalized = x[part] if embedded else x.detach()[part].requires_grad_()
                passes = Passes(model, self._losses, select(labels, part), x.device, replays=True)
                penalized_losses = passes.again(penalized).losses
        if is_compiled(model) and differentiable and part is None:
            # A compiled graph serves one backward; that of the first pass belongs to the training step.
            # Its dropout masks may be others than those of forward mode, which looks inside.
            penalized_losses = passes.again(penalized, compiled=method != "forward-mode").losses
        spent = is_compiled(model) or method == "forward-mode"  # a compiled graph serves one backward
        gradient = input_gradient(model, penalized_losses, penalized, twice, rules, retain=not spent)
        if method == "forward-mode" and part is None:
            losses = losses.detach()
        if update:
            self._update(model, images, labels, gradient)
        if not penalize:
            return self._total(outputs, losses, gradient, None)
        if twice or not differentiable:
            return self._total(outputs, losses, gradient, self._omega(gradient))
        del first, penalized_losses
        base = penalized if embedded else penalized.detach()
        with torch.no_grad():
            value, direction = self._omega(gradient), self._direction(gradient)
        tangent_losses, slope = slope_forward_mode(passes, base, direction)
        mean_slope = slope.sum() / max(1, slope.shape[0])
        penalty = value + (mean_slope - mean_slope.detach()).to(value.dtype)
        return self._total(outputs, tangent_losses if part is None else losses, gradient, penalty)

    @_disable_dynamo(recursive=False)
    def _difference_step(self, model: Any, images: Tensor, labels: Any, embedded: bool, update: bool) -> Tensor:
        """A step with a penalty by finite differences; see `sgr_kernels.penalty.finite_difference`."""
        part = self._subset(images) if self.training else None
        passes = Passes(model, self._losses, labels, images.device, replays=True)
        # A leaf, so that g's backward does not go on into what the images, and perhaps the model, were made of.
        leaf = images.detach().requires_grad_()
        first = passes.first(images if part is not None else leaf)
        coupled = self._samples_interact or any(map(couples_samples, passes.modules))
        outputs, losses = _detached(first.outputs), first.losses
        base, base_losses = images, losses
        if part is not None:
            base, leaf = images[part], images.detach()[part].requires_grad_()
            passes = Passes(model, self._losses, select(labels, part), images.device, replays=True)
            base_losses = passes.again(leaf).losses
        weights = sample_weights(base_losses, leaf, coupled)
        spent = spend(base_losses, leaf, base if embedded else None, weights)
        if part is None:
            losses = losses.detach()
        del first, base_losses  # and with them the graph, before the next one grows
        if update:
            self._update(model, images, labels, spent.gradient)
        base = base if embedded else base.detach()
        with torch.no_grad():
            penalty = self._omega(spent.gradient)
            # A penalty that is not finite leaves a step of zero, that is, a plain one.
            finite = self._count_finite(penalty)
            direction = torch.where(finite, self._direction(spent.gradient), 0)
            scale = torch.where(finite, scale_of_steps(base, direction, weights, spent.step), 0)
            sides = difference(scale, weights, self._weight(), with_loss=part is None)
        ahead = passes.again(moved(base, direction, sides.steps)).losses
        cross_entropy = losses.sum() / max(1, losses.shape[0])
        value = self._weight() * torch.where(finite, penalty, 0)
        rest = cross_entropy if part is not None else 0
        value = value if part is not None else cross_entropy + value
        loss = rest + substitute(value, (sides.ahead * ahead).sum(), sides.behind, spent)
        self._record(loss, cross_entropy, penalty, outputs, spent.gradient)
        return loss

    def _total(self, outputs: Any, losses: Tensor, gradient: Tensor | None, penalty: Tensor | None) -> Tensor:
        """Cross-entropy and weighted penalty; keeps the statistics."""
        loss = cross_entropy = losses.sum() / max(1, losses.shape[0])
        if penalty is not None:
            assert gradient is not None
            loss = cross_entropy + self._weight() * self._finite_or_zero(penalty, gradient)
        self._record(loss, cross_entropy, penalty, outputs, gradient)
        return loss

    def _record(
        self, loss: Tensor, cross_entropy: Tensor, penalty: Tensor | None, outputs: Any, gradient: Tensor | None
    ) -> None:
        self._last = StepStatistics(
            loss=loss.detach(),
            cross_entropy=cross_entropy.detach(),
            penalty=None if penalty is None else penalty.detach(),
            strength=self._strength(),
            outputs=_detached(outputs),
            gradient_norm=None if gradient is None else gradient.detach().flatten(1).norm(dim=1),
            nonfinite_penalties=self.nonfinite,
        )

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
            raise ValueError(f"loss_fn: expected one loss per sample, shape (B,), got {checks.describe(losses)}")
        return losses

    def _subset(self, images: Tensor) -> Tensor | None:
        if self.fraction == 1.0 or len(images) < 2:
            return None
        count = max(1, round(self.fraction * len(images)))
        if recording():
            raise RuntimeError(f"fraction: a CUDA graph would repeat this step's samples for ever, got {self.fraction}")
        # By the step alone, so that a training resumed on any process and at any step goes on with the same subsets.
        generator = torch.Generator("cpu").manual_seed(self.steps)
        chosen = torch.randperm(len(images), generator=generator, device="cpu", pin_memory=images.is_cuda)[:count]
        return chosen.to(images.device, non_blocking=True)

    def _update(self, model: Any, images: Tensor, labels: Any, gradient: Tensor | None) -> None:
        if isinstance(self.perturbation, str) and self.perturbation in FREE:
            assert gradient is not None
            xi = from_gradient(self.perturbation, gradient)
        else:
            source = ATTACKS[self.perturbation] if isinstance(self.perturbation, str) else self.perturbation
            assert source is not None
            xi = source(unwrapped(model), images.detach(), labels)
        self.covariance.update(xi)

    def _omega(self, gradient: Tensor) -> Tensor:
        """Omega of Eq. 11 or 12, from the gradient of the loss, which is minus that of the log-probability."""
        samples = max(1, gradient.shape[0])
        penalty = self.covariance.quadratic_form(gradient).sum() / (2 * samples)
        if self.mean_correction:
            mean = self.covariance.scaled_mean()
            assert mean is not None
            penalty = penalty + (gradient * mean.to(gradient.dtype)).sum() / samples
        return penalty

    def _direction(self, gradient: Tensor) -> Tensor:
        """v: half the derivative of Omega in each sample's gradient, times the batch."""
        direction = self.covariance.product(gradient)
        if self.mean_correction:
            mean = self.covariance.scaled_mean()
            assert mean is not None
            direction = direction + mean.to(direction.dtype)
        return direction

    def _resolved_method(self, model: Any, images: Tensor, labels: Any) -> str:
        """The method to use; before its first use it is tried on a few samples, leaving no trace."""
        if self._working_method is not None:
            return self._working_method
        reasons = []
        for method in METHODS if self.method == "auto" else (self.method,):
            few, some = images.detach(), labels
            with contextlib.suppress(TypeError):  # of labels that cannot be cut: then on all
                few, some = few[:4], select(labels, slice(0, 4))
            few = few.requires_grad_()
            passes = Passes(model, self._losses, some, images.device, True)
            try:
                try_method(method, passes, few)
            except PenaltyGradientError as error:
                if self.method != "auto":
                    raise
                reasons.append(str(error))
                continue
            if self.method == "auto":
                logger.info("SGRLoss: method %r%s", method, "".join(f"; {reason}" for reason in reasons))
            self._samples_interact = method == "finite-difference" and samples_interact(passes, few)
            self._working_method = method
            return method
        raise PenaltyGradientError("; ".join(reasons))

    def _count_finite(self, penalty: Tensor) -> Tensor:
        """Whether the penalty is finite; counted on the device."""
        finite = penalty.detach().isfinite()
        if self.training:
            self.nonfinite += ~finite
            self.nonfinite_in_a_row.mul_(~finite).add_(~finite)
        return finite

    def _finite_or_zero(self, penalty: Tensor, gradient: Tensor) -> Tensor:
        """The penalty, or zero where it is not finite."""
        finite = self._count_finite(penalty)
        if finite.device.type == "cpu" and not torch.compiler.is_compiling():
            return penalty if bool(finite) else torch.zeros_like(penalty)
        # Elsewhere without waiting for the device: nothing flows back from a penalty that is left out.
        if gradient.requires_grad:
            gradient.register_hook(lambda incoming: torch.where(finite, incoming, 0.0))
        return torch.where(finite, penalty, 0.0)

    @_disable_dynamo
    def _stop_if_hopeless(self) -> None:
        """Raise after too many penalties in a row that were not finite; off the CPU looks only now and then."""
        on_cpu = self.nonfinite_in_a_row.device.type == "cpu"
        if not self.training or not (on_cpu or self.steps % self.nonfinite_patience == 0):
            return
        if recording():
            return
        in_a_row = int(self.nonfinite_in_a_row)
        if in_a_row < self.nonfinite_patience:
            return
        last = self._last
        evidence = ""
        if last is not None and last.gradient_norm is not None:
            evidence = (
                f"; last cross-entropy {float(last.cross_entropy):.4g}, penalty {float(last.penalty or math.nan):.4g}, "
                f"largest input gradient {float(last.gradient_norm.max()):.4g}"
            )
        raise RuntimeError(f"SGRLoss: {in_a_row} penalties in a row were not finite{evidence}")

    @property
    def last(self) -> StepStatistics:
        """What the last call computed. Reading it waits for the device, and warns of what went wrong.

        Warns:
            RuntimeWarning: If the penalty was negative (Sigma is indefinite) or not finite, or batches did not enter
                the estimate.

        Raises:
            RuntimeError: If there was no call yet.
        """
        last = self.peek()
        self.covariance.warn_if_skipped()
        if last.penalty is not None:
            penalty = float(last.penalty)
            if not math.isfinite(penalty):
                message = f"not finite ({penalty}) and was left out of the loss"
            elif penalty < 0 and not self.mean_correction:
                message = f'negative ({penalty:.3g}), the covariance is indefinite; psd="clip" makes it semidefinite'
            else:
                return last
            warn_caller(f"SGRLoss: the penalty is {message}", RuntimeWarning)
        return last

    def peek(self) -> StepStatistics:
        """What the last call computed, without waiting for the device and without warnings.

        Raises:
            RuntimeError: If there was no call yet.
        """
        if self._last is None:
            raise RuntimeError("last: the criterion has not been called yet")
        return self._last

    def get_extra_state(self) -> Tensor:
        """The step counter, for ``state_dict``; uint8."""
        return torch.tensor([self.steps]).view(torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the step counter."""
        self.steps = int(state.cpu()[:8].clone().view(torch.int64))

    def extra_repr(self) -> str:
        """Settings."""
        return (
            f"strength={self.strength}, perturbation={self.perturbation!r}, method={self.method!r}, "
            f"update_every={self.update_every}, penalty_every={self.penalty_every}, fraction={self.fraction}"
        )
