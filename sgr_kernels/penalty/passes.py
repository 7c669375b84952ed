"""The forward passes of a training step: what each starts from, and what it leaves behind."""

from __future__ import annotations

import contextlib
import copy
import random
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from sgr_kernels import checks
from sgr_kernels.penalty.layers.batch_norm import PartOfBatch, batch_statistics
from sgr_kernels.penalty.wrappers import (
    has_compiled_part,
    in_eager_mode,
    is_compiled,
    modules_in,
    opened,
    uncompiled,
    unwrapped,
)
from sgr_kernels.toeplitz.constants import recording

Evaluate = Callable[[Any, Any], Tensor]
"""Losses of each sample, (B,), from outputs and labels."""


@dataclass
class Pass:
    """A forward pass: what the model returned, and the loss of each sample."""

    outputs: Any
    losses: Tensor


class Passes:
    """The forward passes of one step.

    The first runs as a plain training step would run it. The others start from the same random numbers (dropout masks)
    and buffers (of spectral normalization, for one) and leave no trace in either, such as BatchNorm's statistics.

    Args:
        model: Maps images to outputs.
        evaluate: Losses of each sample.
        labels: What ``evaluate`` takes beside the outputs.
        device: The images'.
        replays: Whether there will be passes after the first.
    """

    def __init__(self, model: Any, evaluate: Evaluate, labels: Any, device: torch.device, replays: bool) -> None:
        self.model, self.evaluate, self.labels = model, evaluate, labels
        self._replays, self._compiled = replays, is_compiled(model) or has_compiled_part(model)
        self._random = _RandomStreams(device) if replays else None
        self._buffers: dict[nn.Module, dict[str, Tensor | None]] = {}
        self._statistics: dict[nn.Module, dict[str, Tensor]] = {}
        self._shares: Tensor | None = None
        self._samples = 0
        self._first_of_part: dict[int, tuple[Tensor, Tensor]] = {}
        self._known = [uncompiled(model)] if isinstance(model, nn.Module) else []
        if replays and not self._known:
            # Compiled code bears no hooks: of a callable with some, what it plainly refers to.
            modules = modules_in(opened(model))
            if is_compiled(model) or any(map(is_compiled, modules)):
                self._known = [opened(module) for module in modules]
        if replays:
            for module in self._known:
                self._remember(module)

    @_disable_dynamo(recursive=False)
    def first(self, images: Tensor, inside: bool = False) -> Pass:
        """The plain pass; ``inside`` looks into a compiled model."""
        model = opened(self.model) if inside else self.model
        eager = in_eager_mode() if inside else contextlib.nullcontext()
        hidden = self._replays and not self._known and not torch.compiler.is_compiling()
        # A compiled model draws where nobody sees it; what it calls by itself can be watched.
        watch = _NoDraws(self._compiled and not inside) if self._replays and recording() else contextlib.nullcontext()
        with eager, _before_modules(self._remember) if hidden else contextlib.nullcontext(), watch:
            outputs = model(self._own(images))
        return Pass(outputs, self._one_a_sample(images, self.evaluate(outputs, self.labels)))

    @_disable_dynamo(recursive=False)
    def again(self, images: Tensor, inside: bool = False) -> Pass:
        """A further pass over images that may have moved."""
        outputs = self.run(images, inside)
        return Pass(outputs, self._one_a_sample(images, self.evaluate(outputs, self.labels)))

    def _own(self, images: Tensor) -> Tensor:
        """A copy, for models may write into their input; what is compiled takes the leaf that it was compiled for."""
        return images if self._compiled or torch.compiler.is_compiling() else images.clone()

    def _one_a_sample(self, images: Tensor, losses: Tensor) -> Tensor:
        if len(losses) != len(images):
            raise ValueError(f"loss_fn: expected one loss per sample, ({len(images)},), got {checks.describe(losses)}")
        return losses

    @property
    def modules(self) -> list[nn.Module]:
        """The model, or what modules a callable turned out to call."""
        return [self.model] if isinstance(self.model, nn.Module) else list(self._buffers)

    def replayed(self) -> contextlib.AbstractContextManager[None]:
        """While active, the random numbers of the first pass."""
        assert self._random is not None
        return self._random.replayed()

    @_disable_dynamo(recursive=False)
    def run(self, images: Tensor, inside: bool = False) -> Any:
        """The outputs of a further pass."""
        images = self._own(images)
        model = uncompiled(self.model) if inside else unwrapped(self.model)
        with self.replayed(), in_eager_mode() if inside else contextlib.nullcontext():
            if torch.compiler.is_compiling() and not isinstance(model, nn.Module):
                return model(images)
            whole = not inside and is_compiled(model)
            with self._lent_buffers({} if whole else self._statistics), self._part_of_batch(whole):
                return model(images)

    def part(self, index: Tensor, shares: Tensor, samples: int) -> Passes:
        """The further passes of some of so many samples, of given weights in a mean over all.

        BatchNorm goes by the statistics of the first pass (`PartOfBatch`); in a compiled model that is not looked into
        by the part's own.
        """
        part = copy.copy(self)
        part.labels = select(self.labels, index, samples)
        found = {module: batch_statistics(module, before) for module, before in self._buffers.items()}
        part._statistics = {module: statistics for module, statistics in found.items() if statistics is not None}
        part._shares, part._samples, part._first_of_part = shares, samples, {}
        return part

    @property
    def coupled(self) -> bool:
        """Whether BatchNorm makes each sample's loss a function of the others' images."""
        return bool(self._statistics) or any(map(couples_samples, self.modules))

    def _part_of_batch(self, whole: bool) -> contextlib.AbstractContextManager[Any]:
        if whole or not self._statistics or self._shares is None:
            return contextlib.nullcontext()
        means = [statistics["running_mean"] for statistics in self._statistics.values()]
        return PartOfBatch(means, self._shares, self._samples, self._first_of_part)

    def _remember(self, module: nn.Module) -> None:
        """Keep what the buffers of a module were before it was called."""
        for part in opened(module).modules():
            if part not in self._buffers:
                self._buffers[part] = {name: _clone(buffer) for name, buffer in part._buffers.items()}

    @contextlib.contextmanager
    def _lent_buffers(self, statistics: dict[nn.Module, dict[str, Tensor]]) -> Iterator[None]:
        """Modules work on copies of their buffers, or on given statistics."""
        # As they are now: inside a callable a module may hold others for a while (functional_call).
        parts = [part for module in modules_in(opened(self.model)) for part in module.modules()]
        own = {part: (dict(part._buffers), part.training) for part in (*parts, *self._buffers)}
        lent: set[nn.Module] = set()

        def lend(module: nn.Module) -> None:
            self._remember(module)
            for part in opened(module).modules():
                if part not in lent and not isinstance(part, torch.jit.ScriptModule):
                    lent.add(part)
                    own.setdefault(part, (dict(part._buffers), part.training))
                    part._buffers.update({name: _clone(buffer) for name, buffer in self._buffers[part].items()})
                    if part in statistics:
                        part._buffers.update(statistics[part])
                        part.training = False

        try:
            if self._known:
                for module in self._known:
                    lend(module)
                yield
            else:
                with _before_modules(lend):
                    yield
        finally:
            for part in lent:
                part._buffers.update(own[part][0])
                part.training = own[part][1]


def couples_samples(model: Any) -> bool:
    """Whether BatchNorm in training mode makes each sample's loss a function of the others' images."""
    return isinstance(model, nn.Module) and any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)
        for module in model.modules()
    )


def _clone(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None else buffer.clone()


class _RandomStreams:
    """The global random streams as they were: PyTorch's, Python's and NumPy's, all of which models draw from."""

    def __init__(self, device: torch.device) -> None:
        # The state of a device's stream cannot be read while a CUDA graph captures; `_NoDraws` sees to it.
        self._devices = [device] if device.type == "cuda" and not recording() else []
        self._states = self._read()

    def _read(self) -> tuple[Any, ...]:
        numpy = sys.modules.get("numpy")
        cuda = [torch.cuda.get_rng_state(device) for device in self._devices]
        return torch.get_rng_state(), cuda, random.getstate(), numpy and numpy.random.get_state()

    def _write(self, states: tuple[Any, ...]) -> None:
        cpu, cuda, python, numpy = states
        torch.set_rng_state(cpu)
        for device, state in zip(self._devices, cuda):
            torch.cuda.set_rng_state(state, device)
        random.setstate(python)
        if numpy is not None:
            sys.modules["numpy"].random.set_state(numpy)

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Begin at the remembered state, and end where things stood."""
        now = self._read()
        self._write(self._states)
        try:
            yield
        finally:
            self._write(now)


class _NoDraws(TorchDispatchMode):
    """Refuses to draw random numbers: of a pass that is to be repeated, while a CUDA graph captures."""

    def __init__(self, unseen: bool) -> None:
        super().__init__()
        if unseen:
            self._refuse("a compiled model's")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in function.tags and not _drops_nothing(function, args, kwargs or {}):
            self._refuse(f"the model's ({function})")
        return function(*args, **(kwargs or {}))

    def _refuse(self, whose: str) -> None:
        raise RuntimeError(
            f"method: this one repeats the forward pass, and {whose} random numbers cannot be repeated while a CUDA "
            "graph captures; double-backward with fraction=1 needs no repetition"
        )


def _drops_nothing(function: Any, args: Any, kwargs: Any) -> bool:
    """Whether it is attention that could draw and does not."""
    names = [argument.name for argument in function._schema.arguments]
    given = {**dict(zip(names, args)), **kwargs}
    return "dropout_p" in names and given.get("dropout_p", 0.0) == 0


@contextlib.contextmanager
def _before_modules(action: Callable[[nn.Module], None]) -> Iterator[None]:
    """Do something with each module that this thread is about to call."""
    thread = threading.get_ident()

    def hook(module: nn.Module, arguments: Any) -> None:
        # A compiled model is seen when it is called; what a compiler traces inside needs no look.
        if not torch.compiler.is_compiling() and threading.get_ident() == thread:
            action(module)

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def select(labels: Any, index: Tensor, samples: int) -> Any:
    """Labels of a part of the batch: of tensors with an entry for each sample those entries, others as they are."""
    if labels is None or isinstance(labels, (bool, int, float)):
        return labels
    if isinstance(labels, Tensor):
        return labels[index] if labels.dim() > 0 and len(labels) == samples else labels
    if type(labels) in (list, tuple) and any(isinstance(item, Tensor) for item in labels):
        return type(labels)(select(item, index, samples) for item in labels)
    if isinstance(labels, dict):
        return {key: select(item, index, samples) for key, item in labels.items()}
    raise TypeError(
        f"labels: expected tensors, or a list, tuple or dict of them, for fraction < 1, got {checks.describe(labels)}"
    )
