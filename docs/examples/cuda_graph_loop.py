"""A training loop whose steps are captured as CUDA graphs: on a GPU a step is one launch, elsewhere it runs as ever."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import sgr_kernels as sgr
from sgr_kernels.training.cuda_graphs import StepGraphs, graphs_on


def train(
    model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], epochs: int, device: str = "cpu", lr: float = 1e-3
) -> StepGraphs:
    """Train on batches of images and labels; returns what captured the steps, and why it did not capture some."""
    model.to(device).train()
    channels, *size = batches[0][0].shape[1:]
    covariance = sgr.CovarianceFunction(channels, tuple(size), target_variance=0.06)
    criterion = sgr.SGRLoss(covariance, strength=1.0).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr)

    def gradients(parts: Sequence[tuple[Tensor, ...]]) -> None:
        """All that a graph replays: no values asked for, no decisions."""
        for images, labels in parts:
            criterion(model, images, labels).backward()

    step = StepGraphs(model, criterion, gradients, graphs_on(device))
    for _ in range(epochs):
        for images, labels in batches:
            step([(images.to(device), labels.to(device))])
            optimizer.step()
    return step
