"""The penalty's gradient by a one-sided difference along ``v = Sigma g``, from two plain passes.

The slope ``(l_b(x_b + h_b v_b) - l_b(x_b)) / h_b`` enters the loss with weight w, so that what is to be differentiated
is

    mean_b  (1 + w / h_b) l_b(x_b + h_b v_b)  -  (w / h_b) l_b(x_b),

or rather, with ``h_b = w / (1 + w q_b)``, so that cross-entropy's own term may be taken ahead as well without an error,

    mean_b  (1 + w q_b) l_b(x_b + h_b v_b)  -  w q_b l_b(x_b).

If ``q_b = c u_b`` with u_b known after the first forward pass, the backward that gives g also gives the parameters'
gradients of the second term, up to the factor ``-w c``. Then the first pass's graph is gone before the second one
begins: the time of two clean steps, and the memory of little more than one.

On smooth networks this is the exact gradient up to rounding. At kinks of ReLU and max-pooling a step of finite length
sees curvature that the exact derivative drops. On the Carlini-Wagner network, batches of 128 digits, strength 1, the
cosine between the parameters' gradients by differences in float32 and the exact ones is 1.00 untrained, where the
penalty hardly counts, and 0.68 after an epoch with it (the penalty's alone: 0.04 and 0.33); in float64, whose steps
are shorter, 1.00 and 1.00 (0.98 and 1.00). ``sgr bench agreement`` measures it; see benchmarks/results/README.md.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd.graph import get_gradient_edge

from sgr_kernels.toeplitz.constants import wide_dtype


@dataclass
class SpentPass:
    """A forward pass after its one backward, of ``sum_b u_b l_b``; the graph is freed.

    Attributes:
        gradient: Of each sample's loss in its image.
        weights: u, (B,), powers of two.
        leaves: What the losses depend on.
        gradients: Of ``sum_b u_b l_b`` in the leaves.
        step: Length of a finite-difference step relative to the image: the root of the pass's rounding unit.
    """

    gradient: Tensor
    weights: Tensor
    leaves: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    step: float


def relative_step(losses: Tensor, images: Tensor) -> float:
    """The root of the coarsest rounding unit between images and losses; a model may well compute in less than both."""
    # Of what flows between nodes; a node may have other outputs, which nothing flows back from.
    edges = [edge for node in graph_nodes(losses, {get_gradient_edge(images).node}) for edge in node.next_functions]
    dtypes = {images.dtype, losses.dtype, *(node._input_metadata[index].dtype for node, index in edges if node)}
    if torch.is_autocast_enabled(images.device.type):
        dtypes.add(torch.get_autocast_dtype(images.device.type))
    return max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point) ** 0.5


def couples_samples(model: Any) -> bool:
    """Whether BatchNorm in training mode makes each sample's loss a function of the others' images."""
    return isinstance(model, nn.Module) and any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)
        for module in model.modules()
    )


def _norms(values: Tensor) -> Tensor:
    return values.detach().float().flatten(1).norm(dim=1)


def _root_mean_square(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


def _reach(images: Tensor) -> Tensor:
    """Norm of each image, (B,); a dark one has at least a tenth of the batch's, or a thousandth of a unit per pixel."""
    norms = _norms(images)
    return norms.maximum(0.1 * _root_mean_square(norms)).clamp(min=1e-3 * math.sqrt(images[0].numel()))


def sample_weights(losses: Tensor, images: Tensor, coupled: bool) -> Tensor:
    """The u_b, (B,): about proportional to what ``|v_b| / |x_b|`` will be, with mean square about 1.

    A cross-entropy's gradient is proportional to ``1 - phi_y = 1 - exp(-l)``. Powers of two cost no rounding when they
    are divided out of g. All ones where samples are coupled: with different ones g would not be that of the sum.
    """
    wide = wide_dtype(losses.device)
    if coupled or len(losses) == 0:
        return torch.ones_like(losses, dtype=wide)
    weights = (-torch.expm1(-losses.detach().float())).clamp(min=1e-2) / _reach(images)
    return torch.exp2(torch.log2(weights / _root_mean_square(weights)).round()).to(wide)


@_disable_dynamo
def spend(losses: Tensor, images: Tensor, origin: Tensor | None, weights: Tensor) -> SpentPass:
    """Differentiate ``sum_b u_b l_b`` once, in the images and in all that the losses depend on.

    Args:
        losses: (B,).
        images: What the gradient g is wanted in; a leaf.
        origin: What the images are a copy of, if the loss is to have a gradient in them, too.
        weights: u, (B,).

    Raises:
        ValueError: If the losses do not depend on the images.
    """
    leaves = _leaves(losses, images) if losses.requires_grad else []
    step = relative_step(losses, images) if losses.requires_grad else 0.0
    with hooks_withheld(leaves):
        scaled, *gradients = (
            torch.autograd.grad(losses, (images, *leaves), weights.to(losses.dtype), allow_unused=True)
            if losses.requires_grad
            else (None,)
        )
    if scaled is None:
        raise ValueError("model: its loss has no path to the images; the penalty needs their gradient")
    gradient = scaled / weights.to(scaled.dtype).view(-1, *(1,) * (scaled.dim() - 1))
    pairs = [(leaf, value) for leaf, value in zip(leaves, gradients) if value is not None]
    if origin is not None:
        pairs.append((origin, scaled))
    return SpentPass(gradient, weights, tuple(leaf for leaf, _ in pairs), tuple(value for _, value in pairs), step)


def _leaves(losses: Tensor, images: Tensor) -> list[Tensor]:
    """The leaves that a graph ends in, whoever owns them; but not the images."""
    nodes = graph_nodes(losses, {get_gradient_edge(images).node})
    return [node.variable for node in nodes if node.name() == "torch::autograd::AccumulateGrad"]


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
def hooks_withheld(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Keep hooks of parameters for the loss's whole gradient, from a part of it or a trial."""
    kept = [(hooks, dict(hooks)) for leaf in leaves if (hooks := leaf._backward_hooks)]
    for hooks, _ in kept:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, entries in kept:
            hooks.update(entries)


def scale_of_steps(images: Tensor, direction: Tensor, weights: Tensor, step: float) -> Tensor:
    """The c of ``q_b = c u_b``: steps are about ``step |x_b| / |v_b|``; zero along a zero direction."""
    if len(images) == 0:
        return weights.new_zeros(())
    wanted = _norms(direction) / _reach(images)
    return _root_mean_square(wanted) / (_root_mean_square(weights) * step)


def moved(images: Tensor, direction: Tensor, steps: Tensor) -> Tensor:
    """``x_b + h_b v_b``."""
    shape = (-1, *(1,) * (images.dim() - 1))
    return images + (steps.to(direction.dtype).view(shape) * direction).to(images.dtype)


@dataclass
class Difference:
    """Steps of a difference and the weights with which its two sides enter the loss.

    Attributes:
        steps: h, (B,).
        ahead: Of ``l_b(x_b + h_b v_b)``, (B,).
        behind: Of ``sum_b u_b l_b(x_b)``, ().
    """

    steps: Tensor
    ahead: Tensor
    behind: Tensor


def difference(scale: Tensor, weights: Tensor, weight: float, with_loss: bool) -> Difference:
    """What makes ``mean_b [l_b] + weight * slope_b`` of the two sides; the l_b only if ``with_loss``."""
    samples = max(1, len(weights))
    slopes = weight * scale * weights
    ahead = slopes + float(with_loss)
    steps = torch.where(ahead > 0, weight / torch.where(ahead > 0, ahead, 1), 0)
    return Difference(steps, ahead / samples, -weight * scale / samples)


class _Substitute(torch.autograd.Function):
    """A value with the gradient of another scalar, plus ``factor`` times given gradients of given leaves."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, scalar: Tensor, factor: Tensor, gradients: tuple[Tensor, ...], *leaves: Tensor
    ) -> Tensor:
        ctx.factor, ctx.gradients = factor, gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "method: the loss by finite differences cannot be differentiated twice (create_graph=True); "
                'use method="double-backward" or "forward-mode"'
            )
        scale = incoming * ctx.factor
        return None, incoming, None, None, *(_scaled(gradient, scale) for gradient in ctx.gradients)


def _scaled(gradient: Tensor, scale: Tensor) -> Tensor:
    """Their product, but zero times NaN is zero: a penalty left out leaves nothing behind."""
    scale = scale.to(gradient.device)
    product = gradient * scale
    return product if product.layout != torch.strided else torch.where(scale == 0, 0.0, product)


@_disable_dynamo
def substitute(value: Tensor, scalar: Tensor, factor: Tensor, spent: SpentPass) -> Tensor:
    """``value``, with the gradient of ``scalar + factor * sum_b u_b l_b(x_b)``."""
    return _Substitute.apply(value.detach(), scalar.to(value.dtype), factor, spent.gradients, *spent.leaves)


def difference_noise(step: float, steps: Tensor, losses: Tensor) -> Tensor:
    """Rounding error to expect of the slopes, summed over the batch."""
    rounding = step**2 * (1 + losses.detach().abs())
    return 20 * torch.where(steps > 0, rounding / torch.where(steps > 0, steps, 1), 0).sum()
