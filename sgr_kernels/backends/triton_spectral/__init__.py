"""The Triton kernels as a backend, for NVIDIA GPUs. Triton itself is imported when the first request is weighed.

Under ``TRITON_INTERPRET=1`` (set before the first use) the kernels run on CPU tensors, slowly: for tests.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from types import ModuleType
from typing import Any

import torch
from torch._library.triton import set_wrap_triton_enabled
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from sgr_kernels.backends import torch_spectral
from sgr_kernels.backends.native import fft_expected_faster
from sgr_kernels.backends.registry import Backend, Request
from sgr_kernels.backends.triton_spectral.plan import Columns

logger = logging.getLogger("sgr_kernels")

OPERATORS = ("product", "quadratic_form", "cross_spectrum")
OF_ARRANGED = ("arrange", "arranged_quadratic_form")  # of a spectrum in the kernels' order
_OLDEST_TRITON = (3, 6)
_OLDEST_GPU = (8, 0)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Sides of images that PyTorch's FFT is expected to be faster for: of those whose columns fit registers, which go over
# memory three times, and of others, which do so once for each step.
_FFT_FROM, _FFT_FROM_IN_STEPS = 640, 512

_obstacles: dict[torch.device, str | None] = {}
_failure: str | None = None  # why the kernels stopped working during this process


def interpreting() -> bool:
    """Whether Triton interprets kernels instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _obstacle(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return f"Triton kernels run on NVIDIA GPUs (and on CPUs under TRITON_INTERPRET=1), not on {device.type} tensors"
    if torch.version.hip is not None:
        return "the Triton kernels are made for NVIDIA GPUs, and this torch is built for AMD's"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "this torch sees no CUDA device"
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({_first_line(error)})"
    if tuple(int(number) for number in triton.__version__.split(".")[:2]) < _OLDEST_TRITON:
        return f"Triton {triton.__version__} is too old; {'.'.join(map(str, _OLDEST_TRITON))} or newer is needed"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < _OLDEST_GPU:
            name = torch.cuda.get_device_name(device)
            return f"{name} has compute capability {capability[0]}.{capability[1]}; 8.0 or newer is needed"
    try:
        with _disable_current_modes():  # a fake tensor would prove nothing
            importlib.import_module(f"{__name__}.probe").run(device)
    except Exception as error:
        return f"Triton cannot compile or launch a kernel ({_first_line(error)})"
    return None


def _unavailable(device: torch.device) -> str | None:
    """As `_obstacle`, found out once for each device; where there is a GPU, told once."""
    if device not in _obstacles:
        _obstacles[device] = _obstacle(device)
        if _obstacles[device] is not None and device.type == "cuda" and torch.cuda.is_available():
            logger.warning("backend 'triton' is left out: %s", _obstacles[device])
    return _obstacles[device]


# As torch.compiler.assume_constant_result does, which imports all of the compiler.
_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _can_run(request: Request) -> str | None:
    reason = _failure or _unavailable(request.device)
    if reason is None and request.dtype not in _DTYPES:
        return f"there are no Triton kernels for {request.dtype}"
    return reason


def _by_name_only(request: Request) -> bool:
    if request.device.type == "cpu":
        return True
    size, signed = request.size, request.form == "signed"
    fits = request.dtype != torch.float64 and Columns.fitting(size, size, request.channels, signed) is not None
    return fft_expected_faster(request, _FFT_FROM if fits else _FFT_FROM_IN_STEPS)


BACKEND = Backend("triton", _can_run, by_name_only=_by_name_only)


@functools.cache
def _launchers() -> ModuleType:
    return importlib.import_module(f"{__name__}.launch")


def _run(operator: str, *args: Any) -> Any:
    """Run an operator's kernels; where Triton's cache cannot be written, tell so and let PyTorch serve."""
    global _failure
    if _failure is None:
        try:
            # Triton launches on the current device, wherever the tensors are.
            with set_wrap_triton_enabled(False), torch.cuda.device_of(args[0]):
                return getattr(_launchers(), operator)(*args)
        except OSError as error:
            _failure = f"Triton cannot store a compiled kernel ({_first_line(error)})"
            logger.warning("backend 'triton' is left out: %s", _failure)
    if operator == "arrange":
        return None  # which nobody will read
    if operator == "arranged_quadratic_form":
        return torch_spectral.quadratic_form(*args[:2], *args[3:])
    return getattr(torch_spectral, operator)(*args)


def _decompose(operator: str, mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Show a compiler the kernels of an operator instead of the operator, as `torch.library.triton_op` does."""
    opaque = interpreting() or not torch._functorch.config.decompose_custom_triton_ops
    if opaque or any(not issubclass(kind, (torch._subclasses.FakeTensor, FunctionalTensor)) for kind in types):
        return mode.__torch_dispatch__(op, types, args, kwargs)
    with mode:
        return getattr(_launchers(), operator)(*args)


def register_operators(library: torch.library.Library) -> None:
    """Give the operators of this backend, defined in ``library``, their kernels."""
    for operator in (*OPERATORS, *OF_ARRANGED):
        for key in ("CPU", "CUDA"):
            library.impl(f"triton_{operator}", functools.partial(_run, operator), key)
    for operator in OPERATORS:
        torch.library.register_torch_dispatch(
            f"{library.ns}::triton_{operator}",
            FunctionalTensorMode,
            functools.partial(_decompose, operator),
            lib=library,
        )
