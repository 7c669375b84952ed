"""Three ways to the penalty's gradient in the parameters.

With ``v = Sigma g`` held constant, ``grad_theta Omega = mean_b grad_theta (v_b . grad_x l_b)``: the gradient of each
loss's slope along v. The slope is had by differentiating twice, by a forward-mode tangent, or by a difference of
losses. All three give the slope with a graph to the parameters; the *value* of the penalty always comes from g itself.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.attention
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_map_only

from sgr_kernels import checks
from sgr_kernels.penalty.finite_difference import (
    difference,
    difference_noise,
    graph_nodes,
    hooks_withheld,
    moved,
    relative_step,
    scale_of_steps,
    spend,
)
from sgr_kernels.penalty.layers.convolution import DifferentiableTwice
from sgr_kernels.penalty.layers.forward_rules import DifferentiableForwardMode
from sgr_kernels.toeplitz.constants import wide_dtype

METHODS = ("double-backward", "forward-mode", "finite-difference")

_COMPILED = "_orig_mod."
"""What ``torch.compile`` puts before the names of a model's buffers."""

_REMEDIES = {
    "double-backward": 'use method="forward-mode" or "finite-difference"',
    "forward-mode": 'use method="double-backward" or "finite-difference"',
    "finite-difference": 'use method="double-backward" or "forward-mode"',
}


class PenaltyGradientError(RuntimeError):
    """A model does not support the method that was asked for; the message names the remedy."""


@dataclass
class Pass:
    """A forward pass: what the model returned, and the loss of each sample."""

    outputs: Any
    losses: Tensor


def unwrapped(model: Any) -> Any:
    """The module inside DistributedDataParallel: extra passes must not start its gradient reduction again."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.module
    return model


def refuse_static_graph(model: Any) -> None:
    """Raise where gradients of the images alone would pass for a whole backward, after which nothing is reduced.

    Raises:
        PenaltyGradientError: If the model is DistributedDataParallel with a static graph.
    """
    if any(isinstance(m, nn.parallel.DistributedDataParallel) and m.static_graph for m in (model, uncompiled(model))):
        raise PenaltyGradientError(
            "model: DistributedDataParallel(static_graph=True) takes the penalty's backward for the step's and would "
            "not reduce the gradients; use static_graph=False"
        )


def uncompiled(model: Any) -> Any:
    """The module inside ``torch.compile``, which supports neither a second backward nor forward mode."""
    return getattr(unwrapped(model), "_orig_mod", unwrapped(model))


def is_compiled(model: Any) -> bool:
    """Whether a model is the product of ``torch.compile``."""
    return uncompiled(model) is not unwrapped(model)


def _is_sharded(model: Any) -> bool:
    """Whether a model holds modules of FSDP, which frees and gathers their parameters around each pass."""
    if not torch.distributed.is_available() or not isinstance(model, nn.Module):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())


class Passes:
    """The forward passes of one step.

    The first runs as a plain training step would run it. The others start from the same random numbers (dropout masks)
    and buffers (of spectral normalization, for one) and leave no trace in either, such as BatchNorm's statistics.
    """

    def __init__(
        self, model: Any, evaluate: Callable[[Any, Any], Tensor], labels: Any, device: torch.device, replays: bool
    ) -> None:
        self.model, self.evaluate, self.labels = model, evaluate, labels
        self._replays = replays
        self._random = [torch.get_rng_state()] if replays else []
        if replays and device.type == "cuda":
            self._random.append(torch.cuda.get_rng_state(device))
        self._buffers: dict[str, Tensor] = {}
        if replays and isinstance(model, nn.Module):
            named = unwrapped(model).named_buffers()
            self._buffers = {name.removeprefix(_COMPILED): buffer.clone() for name, buffer in named}
        self._called: dict[nn.Module, dict[str, Tensor | None]] = {}

    @_disable_dynamo(recursive=False)
    def first(self, images: Tensor) -> Pass:
        """The plain pass."""
        hidden = self._replays and not isinstance(self.model, nn.Module) and not torch.compiler.is_compiling()
        with _before_modules(self._remember) if hidden else contextlib.nullcontext():
            outputs = self.model(images)
        return Pass(outputs, self.evaluate(outputs, self.labels))

    @_disable_dynamo(recursive=False)
    def again(self, images: Tensor, compiled: bool = True) -> Pass:
        """A further pass over images that may have moved."""
        outputs = self.run(images, compiled)
        return Pass(outputs, self.evaluate(outputs, self.labels))

    @property
    def modules(self) -> list[nn.Module]:
        """The model, or what modules a callable turned out to call."""
        return [self.model] if isinstance(self.model, nn.Module) else list(self._called)

    @_disable_dynamo(recursive=False)
    def run(self, images: Tensor, compiled: bool = True) -> Any:
        """The outputs of a further pass; ``compiled=False`` looks inside a compiled model."""
        model = unwrapped(self.model) if compiled else uncompiled(self.model)
        with torch.random.fork_rng([images.device.index] if images.is_cuda else []):
            torch.set_rng_state(self._random[0])
            if images.is_cuda:
                torch.cuda.set_rng_state(self._random[1], images.device)
            if isinstance(model, nn.Module):
                copies = {
                    name: self._buffers.get(name.removeprefix(_COMPILED), buffer).clone()
                    for name, buffer in model.named_buffers()
                }
                return torch.func.functional_call(model, copies, (images,))
            if torch.compiler.is_compiling():
                return model(images)
            with self._lent_buffers():
                return model(images)

    def _remember(self, module: nn.Module) -> None:
        """Keep what the buffers of a module were before it was called."""
        for part in module.modules():
            if part not in self._called:
                self._called[part] = {
                    name: None if buffer is None else buffer.clone() for name, buffer in part._buffers.items()
                }

    @contextlib.contextmanager
    def _lent_buffers(self) -> Iterator[None]:
        """Modules inside a callable work on copies of their buffers."""
        own: dict[nn.Module, Any] = {}

        def lend(module: nn.Module) -> None:
            self._remember(module)
            for part in module.modules():
                if part not in own and not isinstance(part, torch.jit.ScriptModule):
                    own[part] = part._buffers
                    part._buffers = {
                        name: None if buffer is None else buffer.clone() for name, buffer in self._called[part].items()
                    }

        try:
            with _before_modules(lend):
                yield
        finally:
            for part, buffers in own.items():
                part._buffers = buffers


@contextlib.contextmanager
def _before_modules(action: Callable[[nn.Module], None]) -> Iterator[None]:
    """Do something with each module that this thread is about to call."""
    thread = threading.get_ident()

    def hook(module: nn.Module, arguments: Any) -> None:
        if threading.get_ident() == thread:
            action(module)

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def input_gradient(
    model: Any,
    losses: Tensor,
    images: Tensor,
    create_graph: bool,
    rules: DifferentiableTwice | None,
    retain: bool,
) -> Tensor:
    """Gradient of every sample's loss in its image: that of the SUM, since samples do not share pixels.

    Args:
        model: Named in errors.
        losses: (B,).
        images: What to differentiate in.
        create_graph: Whether the gradient is to have a graph.
        rules: Under which the losses were computed, if so.
        retain: Whether the graph is to serve another backward.

    Raises:
        ValueError: If the loss does not depend on the images.
        PenaltyGradientError: If a graph was asked for and the model has none to give.
    """
    gradient = None
    if losses.requires_grad:
        if rules is not None:
            rules.skipped = True
        try:
            (gradient,) = torch.autograd.grad(
                losses.sum(), images, create_graph=create_graph, retain_graph=retain, allow_unused=True
            )
        except RuntimeError as error:
            if not create_graph:
                raise
            raise PenaltyGradientError(
                f"method: the model cannot be differentiated twice ({error}); {_REMEDIES['double-backward']}"
            ) from error
        finally:
            if rules is not None:
                rules.skipped = False
    if gradient is None:
        raise ValueError("model: its loss has no path to the images; the penalty needs their gradient")
    trainable = isinstance(model, nn.Module) and any(p.requires_grad for p in model.parameters())
    if create_graph and trainable and not gradient.requires_grad:
        raise PenaltyGradientError(
            "method: the model's input gradient has no graph, so the penalty would train nothing; "
            + _REMEDIES["double-backward"]
        )
    return gradient


def slope_forward_mode(passes: Passes, images: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and their slopes along ``direction``, both (B,): a forward-mode tangent of the model's outputs.

    The tangent stops at the outputs. From there the slope is the loss's own gradient times the tangent, because
    loss functions have forward-mode derivatives of which the backward fails (``log_softmax``).

    Raises:
        PenaltyGradientError: If a part of the model has no forward-mode derivative, or drops the tangent.
    """
    primals: list[Tensor] = []
    tangents: list[Tensor] = []

    def split(output: Tensor) -> Tensor:
        primal, tangent = forward_ad.unpack_dual(output)
        if tangent is not None:
            primals.append(primal)
            tangents.append(tangent)
        return primal

    with forward_ad.dual_level(), DifferentiableForwardMode():
        try:
            outputs = passes.run(forward_ad.make_dual(images, direction), compiled=False)
        except (NotImplementedError, RuntimeError) as error:
            raise PenaltyGradientError(
                f"method: the model has no forward-mode derivative ({error}); {_REMEDIES['forward-mode']}"
            ) from error
        outputs = tree_map_only(Tensor, split, outputs)
    if not tangents:
        raise PenaltyGradientError(f"method: the model drops forward-mode tangents; {_REMEDIES['forward-mode']}")
    losses = passes.evaluate(outputs, passes.labels)
    gradients = torch.autograd.grad(losses.sum(), primals, create_graph=True, allow_unused=True)
    slopes = [
        (gradient * tangent).flatten(1).sum(1) if gradient.dim() > 1 else gradient * tangent
        for gradient, tangent in zip(gradients, tangents)
        if gradient is not None
    ]
    return losses, torch.stack(slopes).sum(0)


def try_method(method: str, passes: Passes, images: Tensor) -> None:
    """Go through a method's motions on a few images, and through the backward; waits for the device.

    Raises:
        PenaltyGradientError: If a derivative is missing, or the slope along g is not ``g . g`` to first order.
    """
    if is_compiled(passes.model) and method == "double-backward":
        raise PenaltyGradientError(
            "method: torch.compile cannot differentiate a model twice; "
            'use method="finite-difference", or pass the uncompiled model'
        )
    if _is_sharded(passes.model) and method == "double-backward":
        raise PenaltyGradientError(
            "method: fully sharded parameters are freed before the second backward; " + _REMEDIES[method]
        )
    with differentiable_twice(method == "double-backward") as rules:
        losses = passes.again(images, compiled=method != "forward-mode").losses
    step = relative_step(losses, images) if losses.requires_grad else 0.0
    gradient = input_gradient(
        passes.model, losses, images, method == "double-backward", rules, retain=method == "double-backward"
    )
    images = images.detach()
    if method == "double-backward" and any(node.name() == "torch::autograd::Error" for node in graph_nodes(gradient)):
        # autograd.grad passes by such a node in silence where it does not lead to what is asked for.
        raise PenaltyGradientError(
            f"method: a part of the model can be differentiated only once (once_differentiable); {_REMEDIES[method]}"
        )
    # BatchNorm in training mode couples the samples: what holds is the sum of the slopes over the batch.
    direction = gradient.detach()
    expected = float(direction.square().sum())
    noise = 0.0
    if method == "double-backward":
        slope = (gradient * direction).sum()
    elif method == "forward-mode":
        slope = slope_forward_mode(passes, images, direction)[1].sum()
    else:
        losses = passes.again(images).losses.detach()
        ones = torch.ones_like(losses, dtype=wide_dtype(losses.device))
        sides = difference(scale_of_steps(images, direction, ones, step), ones, 1.0, with_loss=False)
        ahead = passes.again(moved(images, direction, sides.steps)).losses
        slope = len(images) * ((sides.ahead * ahead).sum() + sides.behind * losses.sum())
        noise = float(difference_noise(step, sides.steps, losses))
    model = passes.model
    parameters = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
    if parameters and slope.requires_grad:
        try:
            with hooks_withheld(parameters):
                torch.autograd.grad(slope, parameters, allow_unused=True)
        except RuntimeError as error:
            raise PenaltyGradientError(
                f"method: the {method} slope has no backward ({error}); {_REMEDIES[method]}"
            ) from error
    found = float(slope.detach())
    if math.isfinite(expected) and not abs(found - expected) <= 0.2 * expected + noise:
        raise PenaltyGradientError(
            f"method: the {method} slope along the gradient is {found:.4g}, and should be {expected:.4g}; "
            + _REMEDIES[method]
        )


def samples_interact(passes: Passes, images: Tensor) -> bool:
    """Whether the weight of one sample's loss changes the gradient in another's image, tried on a few."""
    found = []
    for period in (1, 2):
        losses = passes.again(images).losses
        found.append(spend(losses, images, None, 4.0 ** (torch.arange(len(images), device=images.device) % period)))
    first, second = (pass_.gradient.detach() for pass_ in found)
    return bool((first - second).norm() > 1e-3 * first.norm())


@contextlib.contextmanager
def differentiable_twice(active: bool) -> Iterator[DifferentiableTwice | None]:
    """Run fused attention, which has no second derivative, as its definition, and convolutions with a fast one."""
    if not active or torch.compiler.is_compiling():
        yield None
        return
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), DifferentiableTwice() as rules:
        yield rules


def select(labels: Any, index: Tensor | slice) -> Any:
    """Labels of a part of the batch."""
    if isinstance(labels, Tensor):
        return labels[index]
    if type(labels) in (list, tuple) and all(isinstance(item, Tensor) for item in labels):
        return type(labels)(item[index] for item in labels)
    if isinstance(labels, dict) and all(isinstance(item, Tensor) for item in labels.values()):
        return {key: item[index] for key, item in labels.items()}
    raise TypeError(
        f"labels: expected tensors, or a list, tuple or dict of them, for fraction < 1, got {checks.describe(labels)}"
    )
