"""What a criterion keeps of its steps: the last one's statistics, and counts of penalties that were not finite."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # like torch.compiler.disable, but importing the compiler on first use

from sgr_kernels.checks import warn_caller
from sgr_kernels.covariance import Covariance
from sgr_kernels.covariance.counters import Counting
from sgr_kernels.penalty.norms import NormPenalty
from sgr_kernels.penalty.outputs import detached, map_tensors
from sgr_kernels.penalty.way import Outcome
from sgr_kernels.toeplitz.constants import at_hand, recording


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

    def __str__(self) -> str:
        """The numbers on one line; reading them waits for the device."""
        shown = {"loss": self.loss, "cross_entropy": self.cross_entropy, "penalty": self.penalty}
        if self.gradient_norm is not None:
            shown["mean gradient norm"] = self.gradient_norm.mean()
        numbers = {name: "none" if value is None else f"{float(value):.4g}" for name, value in shown.items()}
        numbers |= {"strength": f"{self.strength:g}", "nonfinite_penalties": str(int(self.nonfinite_penalties))}
        return ", ".join(f"{name} {value}" for name, value in numbers.items())


class Criterion(Counting):
    """A criterion that remembers its last step, and whose steps can be replayed by a CUDA graph.

    Attributes:
        steps: Training steps taken.
        remembered: What the last call computed; None before the first. After a replay the next one rewrites it, and
            `peek` copies it before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.remembered: StepStatistics | None = None
        self._rewritten: StepStatistics | None = None

    def peek(self) -> StepStatistics:
        """What the last call computed, without waiting for the device and without warnings.

        Raises:
            RuntimeError: If there was no call yet.
        """
        if self.remembered is None:
            raise RuntimeError("peek: the criterion has not been called yet")
        if self.remembered is self._rewritten:
            self.remembered, self._rewritten = map_tensors(Tensor.clone, self.remembered), None
        return self.remembered

    @property
    def last(self) -> StepStatistics:
        """What the last call computed."""
        return self.peek()

    def kind(self) -> Hashable:
        """What it decides on the host about the next training step: a graph serves the steps of one kind.

        Its settings and those of its parts, as far as they are numbers and names.
        """
        return tuple(
            value
            for module in self.modules()
            for name, value in vars(module).items()
            if isinstance(value, (bool, int, float, str)) and name[0] != "_" and name not in ("steps", "strength")
        )

    def generators(self) -> list[torch.Generator]:
        """Those that its steps draw from on a device, beside the default one; a graph has to know them."""
        return []

    def before_step(self) -> None:
        """Draw on the host what a step is to be made with, be it replayed or not."""

    def before_replay(self) -> None:
        """Do what a call does on the host before its kernels."""

    def after_replay(self, captured: StepStatistics | None) -> None:
        """Do what it does after them; the statistics are those of the captured call, which a replay rewrites."""
        self.remembered = self._rewritten = captured


class Recorded(Criterion):
    """A criterion's memory of its steps.

    Attributes:
        steps: Training steps taken; the cadences count them.
        nonfinite: Steps whose penalty was not finite and left out, int64.
    """

    nonfinite: Tensor
    nonfinite_in_a_row: Tensor
    covariance: Covariance | NormPenalty
    mean_correction: bool

    def __init__(self, nonfinite_patience: int) -> None:
        super().__init__()
        self.nonfinite_patience = nonfinite_patience
        self.register_counter("nonfinite")
        self.register_counter("nonfinite_in_a_row")

    def _record(self, outcome: Outcome, strength: float) -> None:
        gradient = outcome.gradient
        self.remembered = StepStatistics(
            loss=outcome.loss.detach(),
            cross_entropy=outcome.cross_entropy.detach(),
            penalty=None if outcome.penalty is None else outcome.penalty.detach(),
            strength=strength,
            outputs=detached(outcome.outputs),
            gradient_norm=None if gradient is None else gradient.detach().flatten(1).norm(dim=1),
            nonfinite_penalties=self.nonfinite,
        )

    def _count_finite(self, penalty: Tensor) -> Tensor:
        """Whether the penalty is finite; counted on the device."""
        finite = penalty.detach().isfinite()
        if self.training:
            self.nonfinite += ~finite
            self.nonfinite_in_a_row.mul_(~finite).add_(~finite)
        return finite

    @_disable_dynamo
    def _stop_if_hopeless(self) -> None:
        """Raise after too many penalties in a row that were not finite; off the CPU looks only now and then."""
        if not self.training or recording():
            return
        if not at_hand(self.nonfinite_in_a_row) and self.steps % self.nonfinite_patience:
            return
        in_a_row = int(self.nonfinite_in_a_row)
        if in_a_row < self.nonfinite_patience:
            return
        last = self.remembered
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

    def get_extra_state(self) -> Tensor:
        """The step counter, for ``state_dict``; uint8."""
        return torch.tensor([self.steps]).view(torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the step counter."""
        self.steps = int(state.cpu()[:8].clone().view(torch.int64))
