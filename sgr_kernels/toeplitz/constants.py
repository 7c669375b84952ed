"""Small constant tensors (bins, bases), built once per size and device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

P = ParamSpec("P")


def tracing() -> bool:
    """Whether a compiler traces, or a dispatch mode (fake tensors, say) stands in for the calls made now."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def recording() -> bool:
    """Whether a CUDA graph records the calls made now: nothing may ask the device for a value then."""
    # A build with CUDA may run where there is no driver, and asking for the stream would look for one.
    return not tracing() and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def at_hand(tensor: Tensor) -> bool:
    """Whether a tensor's values can be asked for without waiting: on the CPU, unless someone compiles or records."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not recording()


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Make tensors that may outlive the call: no wrappers of ``torch.func``, of modes or of inference, no graph."""
    with (
        temporarily_clear_interpreter_stack(),
        torch._C.DisableTorchFunction(),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        yield


def constant(build: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Remember what ``build`` returns for its (hashable) arguments.

    While something traces, nothing is remembered: a compiler folds constants itself, a traced or fake tensor must not
    outlive its trace, nor a real one enter it. Nor is what a CUDA graph records, which has no values before a replay;
    what it uses of earlier ones is never forgotten, for it will read their memory.
    What is remembered is built outside every mode and transform, as `plainly` says.
    """
    memory: dict[object, Tensor] = {}
    captured: dict[object, Tensor] = {}

    @functools.wraps(build)
    def get(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        if tracing():
            return build(*args, **kwargs)
        key = (args, tuple(kwargs.items()))
        value = captured.get(key, memory.get(key))
        if value is not None and recording():
            captured[key] = value
        if value is None:
            with plainly():
                value = build(*args, **kwargs)
            if recording():
                return value
            while len(memory) >= 64:
                memory.pop(next(iter(memory)))
            memory[key] = value
        return value

    return get


def wide_dtype(device: torch.device) -> torch.dtype:
    """The widest floating-point type of a device: float64, or float32 where there is none."""
    return torch.float32 if device.type in ("mps", "xpu") else torch.float64
