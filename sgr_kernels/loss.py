"""The SGR loss: cross-entropy plus the structured gradient penalty, a drop-in criterion."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from sgr_kernels import checks
from sgr_kernels.covariance import Covariance
from sgr_kernels.perturbations import ATTACKS, FREE, Perturbation, check_perturbation, from_gradient

PerSampleLoss = Callable[[Any, Any], Tensor]

# Tells "left out" from None, so that a frozen covariance can go without a source but never silently ignores one.
_DEFAULT_PERTURBATION: Final = "sign (default)"


def cross_entropy_per_sample(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each sample, ``-log phi_y``.

    Args:
        outputs: Logits, (B, classes).
        targets: Class indices (B,), or class probabilities (B, classes).

    Returns:
        (B,).

    Raises:
        ValueError: If shapes do not fit, or (on a CPU, where the check is free) an index is out of range.
    """
    if outputs.dim() != 2:
        raise ValueError(f"outputs: expected logits (B, classes), got {checks.describe(outputs)}")
    if targets.is_floating_point():
        if targets.shape != outputs.shape:
            raise ValueError(f"labels: expected probabilities {tuple(outputs.shape)}, got {checks.describe(targets)}")
    else:
        if targets.shape != outputs.shape[:1]:
            raise ValueError(f"labels: expected indices of shape ({outputs.shape[0]},), got {checks.describe(targets)}")
        if targets.device.type == "cpu" and targets.numel() and not torch.compiler.is_compiling():
            low, high = int(targets.min()), int(targets.max())
            if low < 0 or high >= outputs.shape[1]:
                raise ValueError(f"labels: expected classes 0 to {outputs.shape[1] - 1}, got {low} to {high}")
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


@dataclass(frozen=True)
class StepStatistics:
    """What a call of `SGRLoss` computed; all tensors are detached.

    Attributes:
        loss: Value of the loss.
        cross_entropy: Mean of the per-sample losses.
        penalty: Omega (Eq. 11 or 12), without the strength; None on a step that left it out.
        outputs: What the model returned.
        gradient_norm: Norm of each sample's input gradient, (B,).
    """

    loss: Tensor
    cross_entropy: Tensor
    penalty: Tensor | None
    outputs: Any
    gradient_norm: Tensor | None


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(map(_detached, value))
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    return value


class SGRLoss(nn.Module):
    """Cross-entropy with structured gradient regularization, ``mean_b l_b + strength * Omega`` (paper, Eq. 11).

    ``Omega = 1/2 mean_b g_b^T Sigma g_b``, with g_b the gradient of the b-th log-probability with respect to the
    images. Sigma, and the perturbations it is estimated from, are constants for the backward.

    In training mode the covariance learns from the batch before it is used. Of the model only that changes what a
    cross-entropy step would change: there is one forward pass.

    Args:
        covariance: The metric. A frozen one is used as it is.
        strength: lambda, not negative. Relative to the covariance's ``target_variance`` it is a noise-to-signal
            ratio.
        perturbation: Where the covariance learns from: ``"gradient"`` (the loss gradient) or ``"sign"`` (its sign),
            both free, with the true labels; ``"fgsm"``, ``"pgd"`` or ``"deepfool"``, of the model's own predictions;
            a callable ``(model, images, labels) -> xi``; None for no updates. Left out, it is ``"sign"``, or None
            where the covariance is frozen.
        update_every: Update the covariance on every so-manieth training step.
        penalty_every: Apply the penalty on every so-manieth training step only, with that weight.
        mean_correction: Subtract ``mean_b g_b . mu`` with the running mean perturbation mu (Eq. 12).
        loss_fn: Per-sample loss ``(outputs, labels) -> (B,)``, a negative log-likelihood: soft labels, several
            labels, other heads.

    Raises:
        TypeError: If the covariance is not a `Covariance`.
        ValueError: If an argument is out of range, or a perturbation is named and the covariance is frozen.
    """

    def __init__(
        self,
        covariance: Covariance,
        strength: float = 0.1,
        *,
        perturbation: str | Perturbation | None = _DEFAULT_PERTURBATION,
        update_every: int = 1,
        penalty_every: int = 1,
        mean_correction: bool = False,
        loss_fn: PerSampleLoss = cross_entropy_per_sample,
    ) -> None:
        super().__init__()
        if not isinstance(covariance, Covariance):
            raise TypeError(f"covariance: expected a sgr_kernels covariance module, got {checks.describe(covariance)}")
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength: expected a finite number >= 0, got {strength!r}")
        for name, value in (("update_every", update_every), ("penalty_every", penalty_every)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive int, got {value!r}")
        if perturbation is _DEFAULT_PERTURBATION:
            perturbation = None if covariance.frozen else "sign"
        check_perturbation(perturbation)
        if perturbation is not None and covariance.frozen:
            raise ValueError(f"perturbation: the covariance is frozen and takes no updates, got {perturbation!r}")
        if mean_correction and covariance.scaled_mean() is None:
            raise ValueError(f"mean_correction: {type(covariance).__name__} keeps no mean perturbation")
        self.covariance = covariance
        self.strength = strength
        self.perturbation = perturbation
        self.update_every, self.penalty_every = update_every, penalty_every
        self.mean_correction = mean_correction
        self.loss_fn = loss_fn
        self.steps = 0
        """Training steps taken; the cadences count them."""
        self._last: StepStatistics | None = None

    def forward(self, model: Callable[[Tensor], Any], images: Tensor, labels: Any) -> Tensor:
        """Loss of a batch, ``mean_b l_b + strength * Omega``; a scalar to call ``backward`` on.

        Works under ``torch.no_grad`` for evaluation.

        Args:
            model: Maps images to outputs.
            images: (B, C, H, W) or whatever shape the covariance is of; floating point.
            labels: What ``loss_fn`` takes.

        Raises:
            TypeError: If the images are not floating point.
            ValueError: If the loss is not one number per sample, or does not depend on the images.
        """
        if not isinstance(images, Tensor) or not images.is_floating_point():
            raise TypeError(f"images: expected a real floating-point tensor, got {checks.describe(images)}")
        differentiable = torch.is_grad_enabled()
        step = self.steps if self.training else 0
        with torch.inference_mode(False), torch.enable_grad():
            if images.is_inference():
                images = images.clone()
            x = images if differentiable and images.requires_grad else images.detach().requires_grad_()
            outputs = model(x)
            losses = self.loss_fn(outputs, labels)
            if not isinstance(losses, Tensor) or losses.shape != images.shape[:1]:
                raise ValueError(
                    f"loss_fn: expected one loss per sample, shape ({images.shape[0]},), got {checks.describe(losses)}"
                )
            update = self.training and self.perturbation is not None and step % self.update_every == 0
            penalize = step % self.penalty_every == 0
            needs_gradient = penalize or (update and self.perturbation in FREE)
            gradient = None
            if needs_gradient:
                gradient = _input_gradient(model, losses, x, create_graph=differentiable and penalize)
            if update:
                self._update(model, images, labels, gradient)
            loss = losses.sum() / max(1, losses.shape[0])
            cross_entropy, penalty = loss.detach(), None
            if penalize and gradient is not None:
                penalty = self._penalty(gradient)
                weight = self.penalty_every if self.training else 1
                loss = loss + (self.strength * weight) * penalty
        if self.training:
            self.steps += 1
        self._last = StepStatistics(
            loss=loss.detach(),
            cross_entropy=cross_entropy,
            penalty=None if penalty is None else penalty.detach(),
            outputs=_detached(outputs),
            gradient_norm=None if gradient is None else gradient.detach().flatten(1).norm(dim=1),
        )
        return loss if differentiable else loss.detach()

    def _update(self, model: Any, images: Tensor, labels: Any, gradient: Tensor | None) -> None:
        if isinstance(self.perturbation, str) and self.perturbation in FREE:
            assert gradient is not None
            xi = from_gradient(self.perturbation, gradient)
        else:
            source = ATTACKS[self.perturbation] if isinstance(self.perturbation, str) else self.perturbation
            assert source is not None
            xi = source(model, images.detach(), labels)
        self.covariance.update(xi)

    def _penalty(self, gradient: Tensor) -> Tensor:
        """Omega of Eq. 11 or 12, from the gradient of the loss, which is minus that of the log-probability."""
        samples = max(1, gradient.shape[0])
        penalty = self.covariance.quadratic_form(gradient).sum() / (2 * samples)
        if self.mean_correction:
            mean = self.covariance.scaled_mean()
            assert mean is not None
            penalty = penalty + (gradient * mean.to(gradient.dtype)).sum() / samples
        return penalty

    @property
    def last(self) -> StepStatistics:
        """What the last call computed. Reading it waits for the device, and warns of what went wrong.

        Warns:
            RuntimeWarning: If the penalty was negative (Sigma is indefinite), or batches did not enter the estimate.

        Raises:
            RuntimeError: If there was no call yet.
        """
        if self._last is None:
            raise RuntimeError("last: the criterion has not been called yet")
        self.covariance.warn_if_skipped()
        penalty = self._last.penalty
        if penalty is not None and not self.mean_correction and float(penalty) < 0:
            warnings.warn(
                f"SGRLoss: the penalty is negative ({float(penalty):.3g}), the covariance is indefinite; "
                'psd="clip" makes it positive semidefinite',
                RuntimeWarning,
                stacklevel=2,
            )
        return self._last

    def get_extra_state(self) -> Tensor:
        """The step counter, for ``state_dict``."""
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the step counter."""
        self.steps = int(state)

    def extra_repr(self) -> str:
        """Settings."""
        return f"strength={self.strength}, perturbation={self.perturbation!r}, update_every={self.update_every}"


def _input_gradient(model: Any, losses: Tensor, images: Tensor, create_graph: bool) -> Tensor:
    """Gradient of every sample's loss in its image: that of the SUM, since samples do not share pixels."""
    if not losses.requires_grad:
        raise ValueError("model: its loss has no path to the images; the penalty needs their gradient")
    (gradient,) = torch.autograd.grad(
        losses.sum(), images, create_graph=create_graph, retain_graph=True, allow_unused=True
    )
    if gradient is None:
        raise ValueError("model: its loss has no path to the images; the penalty needs their gradient")
    trainable = isinstance(model, nn.Module) and any(p.requires_grad for p in model.parameters())
    if create_graph and trainable and not gradient.requires_grad:
        raise RuntimeError(
            "model: its input gradient has no graph, so the penalty would train nothing; "
            "a part of the model cannot be differentiated twice"
        )
    return gradient
