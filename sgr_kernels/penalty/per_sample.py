"""Losses of each sample, for `SGRLoss`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sgr_kernels import checks


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
