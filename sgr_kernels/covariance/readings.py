"""What is read off a covariance function's values: its profile against displacement, and its decay length."""

from __future__ import annotations

import torch
from torch import Tensor

from sgr_kernels.covariance.layout import Layout


def profile(values: Tensor, layout: Layout) -> Tensor:
    """Covariance against displacement in whole pixels, (C, C, K); tables are read along their axes."""
    if layout.form == "radial":
        return values
    table = values
    if layout.form == "signed":
        row, column = table.shape[2] // 2, table.shape[3] // 2
        opposite = table.flip(-2, -1)
        table = ((table + opposite) / 2)[..., row:, column:]
    down, across = table[..., :, 0], table[..., 0, :]
    if 1 in layout.image_size:
        return down if layout.image_size[1] == 1 else across
    length = min(down.shape[-1], across.shape[-1])
    longer = down if down.shape[-1] > length else across
    return torch.cat([(down[..., :length] + across[..., :length]) / 2, longer[..., length:]], -1)


def decay_length(values: Tensor, layout: Layout) -> Tensor:
    """First displacement, interpolated, at which the covariance falls to 1/e of its value at zero, (C, C).

    In pixels; infinity where it never falls so far, NaN where it is zero at zero displacement.
    """
    f = profile(values, layout)
    relative = torch.cat([f / f[..., :1], torch.zeros_like(f[..., :1])], -1)
    level = 1 / torch.e
    first = (relative <= level).to(torch.int8).argmax(-1, keepdim=True)
    below, above = relative.gather(-1, first), relative.gather(-1, (first - 1).clamp(min=0))
    length = first - 1 + (above - level) / (above - below)
    # A covariance that ends before the image does is zero from there on; of another the rest is not known.
    length = torch.where(first == layout.full_length, torch.inf, length)
    return torch.where(f[..., :1] == 0, torch.nan, length).squeeze(-1)
