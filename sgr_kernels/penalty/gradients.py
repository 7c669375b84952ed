"""Gradients of a pass: those of the images with a graph or without, and all of them from one backward."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.graph import get_gradient_edge

_NO_PATH = "model: its loss has no path to the images; the penalty needs their gradient"


def input_gradient(
    losses: Tensor,
    images: Tensor,
    create_graph: bool = False,
    shares: Tensor | None = None,
    retain_graph: bool = False,
) -> Tensor:
    """Gradient of every sample's loss in its image: that of the SUM, since samples do not share pixels.

    The graph is freed, unless the gradient is to have one.

    Args:
        losses: (B,).
        images: What to differentiate in.
        create_graph: Whether the gradient is to have a graph.
        shares: Of samples drawn from a batch: how much each stands for, (B,). It matters where samples are coupled,
            so that a sample's image changes the losses of others, of which those drawn stand for all.
        retain_graph: Whether the losses are to be differentiated again.

    Raises:
        ValueError: If the loss does not depend on the images.
    """
    gradient, weights = None, torch.ones_like(losses) if shares is None else shares.to(losses.dtype)
    weights = torch.where(weights > 0, weights, 1)
    if losses.requires_grad:
        (gradient,) = torch.autograd.grad(
            losses,
            images,
            weights,
            retain_graph=retain_graph or create_graph,
            create_graph=create_graph,
            allow_unused=True,
        )
    if gradient is None:
        raise ValueError(_NO_PATH)
    return gradient if shares is None else gradient / weights.to(gradient.dtype).view(-1, *(1,) * (gradient.dim() - 1))


@dataclass
class SpentPass:
    """A forward pass after its one backward, of ``sum_b u_b l_b``; the graph is freed.

    Attributes:
        gradient: Of each sample's loss in its image.
        leaves: What the losses depend on.
        gradients: Of ``sum_b u_b l_b`` in the leaves.
        rounding: The coarsest rounding unit between images and losses.
    """

    gradient: Tensor
    leaves: tuple[Tensor, ...]
    gradients: list[Tensor]
    rounding: float


@_disable_dynamo
def spend(losses: Tensor, images: Tensor, origin: Tensor | None, weights: Tensor | float) -> SpentPass:
    """Differentiate ``sum_b u_b l_b`` once, in the images and in all that the losses depend on.

    Args:
        losses: (B,).
        images: What the gradient g is wanted in; a leaf.
        origin: What the images are a copy of, if the loss is to have a gradient in them, too.
        weights: u, (B,) or one for all, powers of two, which cost no rounding when they are divided out of g.

    Raises:
        ValueError: If the losses do not depend on the images.
    """
    if not losses.requires_grad:
        raise ValueError(_NO_PATH)
    found, rounding = leaves(losses, images), coarsest_rounding(losses, images)
    seed = weights.to(losses.dtype) if isinstance(weights, Tensor) else torch.full_like(losses, weights)
    with hooks_withheld(found):
        scaled, *gradients = torch.autograd.grad(losses, (images, *found), seed, allow_unused=True)
    if scaled is None:
        raise ValueError(_NO_PATH)
    gradient = scaled
    if isinstance(weights, Tensor) or weights != 1:
        gradient = scaled / seed.to(scaled.dtype).view(-1, *(1,) * (scaled.dim() - 1))
    pairs = [(leaf, value) for leaf, value in zip(found, gradients) if value is not None]
    if origin is not None:
        pairs.append((origin, scaled))
    return SpentPass(gradient, tuple(leaf for leaf, _ in pairs), [value for _, value in pairs], rounding)


def leaves(value: Tensor, without: Tensor | None = None) -> list[Tensor]:
    """The leaves that a graph ends in, whoever owns them; but not a given one."""
    nodes = graph_nodes(value, {get_gradient_edge(without).node} if without is not None else ())
    return [node.variable for node in nodes if node.name() == "torch::autograd::AccumulateGrad"]


def coarsest_rounding(losses: Tensor, images: Tensor) -> float:
    """The coarsest rounding unit between images and losses; a model may well compute in less than both."""
    # Of what flows between nodes; a node may have other outputs, which nothing flows back from.
    edges = [edge for node in graph_nodes(losses, {get_gradient_edge(images).node}) for edge in node.next_functions]
    dtypes = {images.dtype, losses.dtype, *(node._input_metadata[index].dtype for node, index in edges if node)}
    if torch.is_autocast_enabled(images.device.type):
        dtypes.add(torch.get_autocast_dtype(images.device.type))
    return max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)


def may_be_retained(losses: Tensor) -> bool:
    """Whether a graph may be gone through twice: a compiled one gives its buffers away the first time."""
    return not any("CompiledFunction" in node.name() for node in graph_nodes(losses))


def graph_nodes(value: Tensor, without: Collection[Any] = ()) -> Iterator[Any]:
    """The nodes of the graph behind a value, each once; not beyond those left out."""
    seen: set[Any] = {None, *without}
    stack: list[Any] = [value.grad_fn]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            yield node
            stack.extend(following for following, _ in node.next_functions)


@contextlib.contextmanager
def hooks_withheld(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Keep hooks of parameters for the loss's whole gradient, from a part of it or a trial."""
    kept = [(hooks, dict(hooks)) for leaf in tensors if (hooks := leaf._backward_hooks)]
    for hooks, _ in kept:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, entries in kept:
            hooks.update(entries)


class _Substitute(torch.autograd.Function):
    """A value with the gradient of another scalar, plus ``factor`` times given gradients of given leaves."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, scalar: Tensor | None, factor: Tensor, gradients: list[Tensor], *leaves: Tensor
    ) -> Tensor:
        ctx.factor, ctx.gradients = factor, gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        if ctx.gradients is None:
            raise RuntimeError("SGRLoss: a second backward of one loss; pass retain_graph=True to the first")
        scale, by_scalar = incoming * ctx.factor, incoming if ctx.needs_input_grad[1] else None
        # Where no other backward will follow, the gradients become the answer: another copy would be a model's size.
        last = not torch._C._autograd._get_current_graph_task_keep_graph()
        own = _in_one_piece_each(ctx.gradients) if last else [False] * len(ctx.gradients)
        found = [_scaled(gradient, scale, mine) for gradient, mine in zip(ctx.gradients, own)]
        if last:
            ctx.gradients = None
        return None, by_scalar, None, None, *found


def _in_one_piece_each(gradients: list[Tensor]) -> list[bool]:
    """Which of them share memory with no other, nor within themselves."""
    seen: Counter[int] = Counter(
        gradient.untyped_storage().data_ptr() for gradient in gradients if gradient.layout == torch.strided
    )
    return [
        g.layout == torch.strided and g.is_contiguous() and seen[g.untyped_storage().data_ptr()] == 1 for g in gradients
    ]


def _scaled(gradient: Tensor, scale: Tensor, in_place: bool) -> Tensor:
    """Their product, but zero times NaN is zero: a penalty left out leaves nothing behind."""
    scale = scale.to(gradient.device, gradient.dtype)
    product = gradient.mul_(scale) if in_place else gradient * scale
    return product if product.layout != torch.strided else product.masked_fill_(scale == 0, 0.0)


@_disable_dynamo
def substitute(value: Tensor, scalar: Tensor | None, factor: Tensor, spent: SpentPass) -> Tensor:
    """``value``, with the gradient of ``scalar + factor * sum_b u_b l_b(x_b)``."""
    scalar = None if scalar is None else scalar.to(value.dtype)
    return _Substitute.apply(value.detach(), scalar, factor, spent.gradients, *spent.leaves)


class _Once(torch.autograd.Function):
    """The identity, with one derivative."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> Tensor:
        refuse_second_order()
        return incoming


def differentiable_once(value: Tensor) -> Tensor:
    """A value of which a further derivative would be silently wrong, and is refused."""
    return _Once.apply(value)


def refuse_second_order() -> None:
    """Raise inside a backward that is to have a graph (``create_graph=True``)."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "method: this loss cannot be differentiated twice (create_graph=True): parts of its gradient are numbers "
            'already; only method="double-backward" on the whole batch (fraction=1) has further derivatives'
        )
