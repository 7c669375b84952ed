"""Peak memory of one call beyond what was held before it, outputs included."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import Run

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""An allocator that returns freed blocks at once: without it the peak of a process hides in what was freed before."""


def _kilobytes(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1])


def supported(device: torch.device) -> bool:
    """Whether the peak can be told here: on CUDA devices, and of a Linux process with `ENVIRONMENT`."""
    return device.type == "cuda" or (
        Path("/proc/self/clear_refs").exists() and ENVIRONMENT.items() <= os.environ.items()
    )


def peak(run: Run, images: Tensor) -> int:
    """Bytes at the peak of one call above those held before."""
    run(images)
    if images.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(images.device)
        before = torch.cuda.memory_allocated(images.device)
        run(images)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(images.device) - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _kilobytes("VmRSS")
    run(images)
    return (_kilobytes("VmHWM") - before) * 1024
