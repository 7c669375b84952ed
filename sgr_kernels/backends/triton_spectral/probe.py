"""One launch of the smallest kernel, to find out early what stands in the way: compiler, driver, cache folder."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _probe_kernel(target: tl.tensor) -> None:
    tl.store(target, 1.0)


def run(device: torch.device) -> None:
    """Compile and launch a kernel on ``device``.

    Raises:
        Exception: Whatever Triton raises where it cannot.
    """
    target = torch.empty(1, device=device)
    with torch.cuda.device_of(target):  # Triton launches on the current device
        _probe_kernel[(1,)](target)
