"""Losses of each sample, for `SGRLoss`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sgr_kernels import checks
from sgr_kernels.toeplitz.constants import at_hand


def cross_entropy_per_sample(outputs: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each sample, ``-log phi_y``.

    Args:
        outputs: Logits, (B, classes).
        targets: Class indices (B,), or class probabilities (B, classes).
        label_smoothing: Share of each target's probability that is spread evenly over all classes.

    Returns:
        (B,).

    Raises:
        TypeError: If outputs or targets are not tensors.
        ValueError: If shapes do not fit, or (on a CPU, where the check is free) an index is out of range.
    """
    _expect_tensor(outputs, "outputs: expected logits (B, classes)", "; loss_fn takes other outputs")
    _expect_tensor(targets, "labels: expected a tensor of classes or of probabilities")
    if outputs.dim() != 2:
        raise ValueError(f"outputs: expected logits (B, classes), got {checks.describe(outputs)}")
    if targets.is_floating_point():
        if targets.shape != outputs.shape:
            raise ValueError(f"labels: expected probabilities {tuple(outputs.shape)}, got {checks.describe(targets)}")
    else:
        if targets.shape != outputs.shape[:1]:
            raise ValueError(f"labels: expected indices of shape ({outputs.shape[0]},), got {checks.describe(targets)}")
        if targets.numel() and at_hand(targets):
            low, high = int(targets.min()), int(targets.max())
            if low < 0 or high >= outputs.shape[1]:
                hint = "; leave samples that are to be ignored out of the batch" if low == -100 else ""
                raise ValueError(f"labels: expected classes 0 to {outputs.shape[1] - 1}, got {low} to {high}{hint}")
    return nn.functional.cross_entropy(outputs, targets, reduction="none", label_smoothing=label_smoothing)


def _expect_tensor(value: Any, expectation: str, hint: str = "") -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{expectation}, got {checks.describe(value)}{hint}")
