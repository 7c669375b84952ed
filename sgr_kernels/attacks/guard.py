"""Running someone else's model without leaving traces in it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sgr_kernels.toeplitz.constants import recording

Model = Callable[[Tensor], Tensor]


@contextmanager
def preserve(model: Model, *others: Model) -> Iterator[None]:
    """Puts models in evaluation mode with gradients available, and restores everything on the way out.

    Restored, also after an exception or Ctrl-C: each module's mode; each parameter's ``.grad`` and ``requires_grad``;
    every buffer (a changed one gets its old values back in place, a replaced one is put back); the global random
    streams of Python, NumPy and PyTorch, so that a model which draws random numbers leaves the caller's streams alone.
    Works inside ``torch.no_grad`` and ``torch.inference_mode``. A plain function instead of a module is accepted; only
    the random streams are then kept.

    Args:
        model: a module, or any function from images to logits.
        others: more of them.
    """
    modules = [m for m in (model, *others) if isinstance(m, nn.Module)]
    with ExitStack() as stack:
        stack.enter_context(random_streams(*modules))
        for module in modules:
            stack.enter_context(_module_state(module))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for module in modules:
            module.eval()
        yield


@contextmanager
def random_streams(*models: Model) -> Iterator[None]:
    """Restores the global random streams of Python, NumPy and PyTorch, also those of the models' CUDA devices."""
    modules = [m for m in models if isinstance(m, nn.Module)]
    tensors = (t for module in modules for t in chain(module.parameters(), module.buffers()))
    # A device's stream cannot be read while a CUDA graph captures; what is drawn there then moves it on.
    devices = [] if recording() else sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global stream is meant
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002 - same


def model_device(model: object) -> torch.device | None:
    """The device of a module's first parameter or buffer; None for anything without one."""
    if not isinstance(model, nn.Module):
        return None
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), None)


def ask(model: Model, images: Tensor) -> Any:
    """What the model answers to images of its own: one that normalises its input in place writes into no one else's.

    Gradients reach the images themselves. Whoever runs somebody else's model does it through here.
    """
    return model(images.clone())


def plain(tensor: Tensor) -> Tensor:
    """The tensor outside any graph; a copy if it was made in inference mode, which autograd refuses to save."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


@contextmanager
def _module_state(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.detach().clone(), _version(buffer))
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        for parameter, _, _ in parameters:
            parameter.grad = None  # what a foreign attack's backward() leaves here is dropped
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, grad, requires_grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for module, name, buffer, values, version in buffers:
            module._buffers[name] = buffer
            # An untouched buffer is not written: it may be saved for a backward pass of the caller's.
            if version is None or _version(buffer) != version:
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.copy_(values)


def _version(tensor: Tensor) -> int | None:
    """Counts in-place writes; inference tensors keep no such count."""
    return None if tensor.is_inference() else tensor._version
