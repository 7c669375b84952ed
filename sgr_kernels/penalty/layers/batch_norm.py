"""BatchNorm on a part of a batch: normalized by the statistics of the whole, as constants."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def batch_statistics(module: nn.Module, before: dict[str, Tensor | None]) -> dict[str, Tensor] | None:
    """The mean and variance by which a BatchNorm has normalized its last batch, read off its running ones.

    The running statistics are ``r' = r + f (s - r)``, with f the momentum or one over the number of batches, so that
    ``s = r + (r' - r) / f``. The variance is the unbiased one, larger by ``n / (n - 1)`` than what normalized n values.
    Where a module saw no batch or several, the running statistics serve.

    Args:
        module: Any module.
        before: Its buffers as they were before it saw the batch.

    Returns:
        What ``running_mean`` and ``running_var`` would have to be; None for other modules, in evaluation mode, and
        without running statistics.
    """
    if not isinstance(module, nn.modules.batchnorm._BatchNorm) or not module.training or module.momentum == 0:
        return None
    count, earlier = module.num_batches_tracked, before.get("num_batches_tracked")
    if module.running_mean is None or count is None or earlier is None:
        return None
    factor = 1 / count.clamp(min=1) if module.momentum is None else module.momentum
    found = {}
    for name in ("running_mean", "running_var"):
        now, then = getattr(module, name), before[name]
        assert then is not None
        found[name] = torch.where(count - earlier == 1, then + (now - then) / factor, now)
    return found
