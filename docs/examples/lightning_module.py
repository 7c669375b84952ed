"""SGR in Lightning: the criterion is a submodule, so checkpoints carry covariance, counters and cadences."""

from __future__ import annotations

import lightning
import torch
from torch import Tensor, nn

import sgr_kernels as sgr


class Robust(lightning.LightningModule):
    """Any classifier, trained with SGR."""

    def __init__(self, model: nn.Module, covariance: sgr.CovarianceFunction, strength: float = 1.0) -> None:
        super().__init__()
        self.model = model
        self.criterion = sgr.SGRLoss(covariance, strength)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Loss of a batch (images, labels)."""
        loss = self.criterion(self.model, *batch)
        self.log("penalty", self.criterion.peek().penalty)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Log the loss; works under the trainer's inference mode, and leaves the covariance as it is."""
        self.log("validation_loss", self.criterion(self.model, *batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on the model's parameters; the criterion has none."""
        return torch.optim.Adam(self.model.parameters(), 1e-3)
