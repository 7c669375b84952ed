"""SGR in an ordinary training loop; the five lines are marked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import sgr_kernels as sgr  # 1


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]], epochs: int = 1, lr: float = 1e-3) -> sgr.SGRLoss:
    """Train on batches of images (B, C, H, W) and labels (B,); returns the criterion."""
    channels, *size = batches[0][0].shape[1:]
    variance = float(torch.cat([images for images, _ in batches]).var(0).mean())
    covariance = sgr.CovarianceFunction(channels, tuple(size), target_variance=variance)  # 2
    criterion = sgr.SGRLoss(covariance, strength=1.0)  # 3
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for _ in range(epochs):
        for images, labels in batches:
            loss = criterion(model, images, labels)  # 4: was cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"cross-entropy {criterion.last.cross_entropy:.3f}, penalty {criterion.last.penalty:.3f}")  # 5
    return criterion
