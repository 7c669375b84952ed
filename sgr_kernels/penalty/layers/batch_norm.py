"""BatchNorm on a part of a batch: the values of the whole batch's statistics, the derivatives of the part's.

The whole batch's statistics are known from its own pass. The derivatives of the penalty also go through them: weights
that BatchNorm makes scale-free would otherwise be drawn to zero. So the part is normalized by its own statistics, its
samples weighted as they stand for the whole, and brought to the whole's values by constants:

    y = (s_p / s) (x - m_p) / s_p + (m_p - m) / s,    of which (m_p, s_p) in the constants are those of the first pass.

In each direction that is a projection, as BatchNorm's own derivative is, however few the samples; an unbiased estimate
of the whole's derivative is none, and grows without bound from layer to layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def batch_statistics(module: nn.Module, before: dict[str, Tensor | None]) -> dict[str, Tensor] | None:
    """The mean and variance by which a BatchNorm has normalized its last batch, read off its running ones.

    The running statistics are ``r' = r + f (s - r)``, with f the momentum or one over the number of batches, so that
    ``s = r + (r' - r) / f``. The variance is the unbiased one. Where a module saw no batch or several, the running
    statistics serve.

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
    if module.running_mean is None or count is None or earlier is None or module.running_mean.dtype.itemsize < 4:
        return None
    factor = 1 / count.clamp(min=1) if module.momentum is None else module.momentum
    found = {}
    for name in ("running_mean", "running_var"):
        now, then = getattr(module, name), before[name]
        assert then is not None
        found[name] = torch.where(count - earlier == 1, then + (now - then) / factor, now)
    found["running_var"] = found["running_var"].clamp(min=0)  # a difference of near ones
    return found


def is_too_coarse(module: nn.Module) -> bool:
    """Whether a BatchNorm in training mode keeps running statistics of which its batch's cannot be read off."""
    running = getattr(module, "running_mean", None)
    coarse = isinstance(running, Tensor) and running.dtype.itemsize < 4
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and coarse


class PartOfBatch(TorchFunctionMode):
    """While active, BatchNorm by statistics of a whole batch follows what a part of it does.

    Args:
        statistics: Means and variances of the whole, (C,), as modules in evaluation mode would pass them.
        shares: Weight of each sample of the part in an estimate of the whole's mean, (B,).
        samples: In the whole.
        first: Means and inverse deviations of the part at its first pass, by the same; filled there.
    """

    def __init__(
        self, statistics: list[Tensor], shares: Tensor, samples: int, first: dict[int, tuple[Tensor, Tensor]]
    ) -> None:
        self._known = {id(mean) for mean in statistics}
        self._shares, self._samples, self._first = shares, samples, first

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Normalize a part; everything else as it is."""
        if func is F.batch_norm and len(args) > 2 and id(args[1]) in self._known:
            return self._normalized(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _normalized(
        self,
        x: Tensor,
        mean: Tensor,
        variance: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        shape, inside = (1, -1, *(1,) * (x.dim() - 2)), tuple(range(2, x.dim()))
        # Where the samples are folded into others (frames, views), nothing tells which is whose: all weigh alike.
        shares = self._shares if len(self._shares) == len(x) else torch.ones_like(self._shares[:1]).expand(len(x))
        shares = (shares / shares.sum()).to(x.dtype)[:, None]

        def over_part(values: Tensor) -> Tensor:
            return (shares * (values.mean(inside) if inside else values)).sum(0)

        own_mean = over_part(x)
        centred = x - own_mean.view(shape)
        own_scale = (over_part(centred.square()) + eps).rsqrt()
        first_mean, first_scale = self._first.setdefault(id(mean), (own_mean.detach(), own_scale.detach()))
        count = self._samples * x[0, 0].numel() * len(x) // len(self._shares)
        scale = (variance * (1 - 1 / count) + eps).rsqrt()  # running variances are the unbiased ones
        result = centred * (own_scale * scale / first_scale).view(shape) + ((first_mean - mean) * scale).view(shape)
        result = result if weight is None else result * weight.view(shape)
        return result if bias is None else result + bias.view(shape)
