"""An exact SGR step as one compiled function: (parameters, images, labels) to loss and gradients, in one graph.

The penalty is written down as the paper does, and ``torch.func`` differentiates it twice. `sgr.SGRLoss` does more: it
learns the covariance, watches for penalties that are not finite, and knows models that cannot be differentiated twice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import sgr_kernels as sgr

Parameters = dict[str, Tensor]


def compiled_step(
    model: nn.Module, covariance: sgr.Covariance, strength: float, backend: str = "inductor"
) -> Callable[[Parameters, Tensor, Tensor], tuple[Parameters, Tensor]]:
    """A function of (parameters, images, labels) that returns (gradients, loss).

    Args:
        model: Maps images (B, C, H, W) to logits; without state that changes, such as BatchNorm's in training mode.
        covariance: Of the perturbations; every call takes it as it is then. Its updates are made outside.
        strength: Of the penalty.
        backend: Of ``torch.compile``.
    """

    def loss(parameters: Parameters, images: Tensor, labels: Tensor) -> Tensor:
        def total(images: Tensor) -> tuple[Tensor, Tensor]:
            logits = torch.func.functional_call(model, parameters, (images,))
            losses = nn.functional.cross_entropy(logits, labels, reduction="none")
            return losses.sum(), losses

        # of the sum: every image's own gradient
        gradient, losses = torch.func.grad(total, has_aux=True)(images)
        penalty = covariance.quadratic_form(gradient).mean() / 2  # Eq. 11
        return losses.mean() + strength * penalty

    return torch.compile(torch.func.grad_and_value(loss), fullgraph=True, backend=backend)


def train(
    model: nn.Module,
    covariance: sgr.Covariance,
    batches: list[tuple[Tensor, Tensor]],
    strength: float = 1.0,
    lr: float = 1e-3,
    backend: str = "inductor",
) -> float:
    """Train on batches of images and labels; returns the last loss."""
    step = compiled_step(model, covariance, strength, backend)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.Adam(parameters.values(), lr)
    for images, labels in batches:
        gradients, loss = step({name: p.detach() for name, p in parameters.items()}, images, labels)
        for name, p in parameters.items():
            p.grad = gradients[name]
        optimizer.step()
    return float(loss)
