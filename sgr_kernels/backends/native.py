"""The compiled kernels as a backend: C++ on CPUs, CUDA C++ on NVIDIA GPUs (csrc/)."""

from __future__ import annotations

import torch

from sgr_kernels._extension import build_info
from sgr_kernels.backends.registry import Backend, Request

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Once, at import: a compiler that traces `can_run` sees constants.
_KERNELS = tuple(build_info()["kernels"])
_ERROR = build_info()["error"]


def _can_run(request: Request) -> str | None:
    if request.device.type not in _KERNELS:
        return _ERROR or f"the compiled kernels were built without support for {request.device.type} tensors"
    if request.dtype not in _DTYPES:
        return f"there are no compiled kernels for {request.dtype}"
    return None


BACKEND = Backend("native", _can_run)
