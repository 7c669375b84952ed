"""SGR in the Hugging Face Trainer: override ``compute_loss``; the criterion rides along in the model's checkpoints."""

from __future__ import annotations

from functools import partial
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
        # compute_loss gives the mean over its batch: the Trainer is to divide it by the gradient accumulation steps
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = False
        if self.args.label_smoothing_factor:
            smoothing = self.args.label_smoothing_factor
            criterion.loss_fn = partial(nn.functional.cross_entropy, reduction="none", label_smoothing=smoothing)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        """SGR loss of a batch."""
        criterion = self.accelerator.unwrap_model(model, keep_torch_compile=False).criterion
        loss = criterion(lambda pixels: model(pixel_values=pixels).logits, inputs["pixel_values"], inputs["labels"])
        return (loss, {"logits": criterion.peek().outputs}) if return_outputs else loss
