"""SGR in the Hugging Face Trainer: override ``compute_loss``; the criterion rides along in the model's checkpoints."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Trainer

import sgr_kernels as sgr


class RobustTrainer(Trainer):
    """A Trainer for image classifiers whose batches hold ``pixel_values`` and ``labels``."""

    def __init__(
        self, model: nn.Module, covariance: sgr.CovarianceFunction, strength: float = 1.0, **rest: Any
    ) -> None:
        # fused attention has no second derivative in every kernel: "auto" takes a way that the model supports
        criterion = sgr.SGRLoss(covariance, strength, method="auto")
        model.add_module("criterion", criterion)
        super().__init__(model, **rest)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        """SGR loss of a batch."""
        criterion = self.accelerator.unwrap_model(model).criterion
        loss = criterion(lambda pixels: model(pixel_values=pixels).logits, inputs["pixel_values"], inputs["labels"])
        return (loss, {"logits": criterion.peek().outputs}) if return_outputs else loss
