"""Trainings of a reproduction: each into a folder of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sgr_kernels.training.checkpoint import TrainingError
from sgr_kernels.training.datasets import DataSet
from sgr_kernels.training.loop import CHECKPOINT_FILE, Trainer
from sgr_kernels.training.methods import Settings
from sgr_kernels.training.trained import load_model

_CHECKPOINT_EVERY = 1000  # steps, beside each epoch's end


@dataclass(frozen=True)
class Training:
    """A network to be trained.

    Attributes:
        name: For people.
        settings: What to train and how.
        data: To train on, and test images for the log.
        epochs: Of the whole training.
        folder: Of its checkpoint.
        device: Where to train.
    """

    name: str
    settings: Settings
    data: DataSet
    epochs: int
    folder: Path
    device: torch.device

    def __str__(self) -> str:
        strength = f", strength {self.settings.strength:g}" if self.settings.strength else ""
        return f"{self.name} (seed {self.settings.seed}{strength})"

    def begun(self) -> bool:
        """Whether there is a checkpoint."""
        return (self.folder / CHECKPOINT_FILE).is_file()

    def done(self) -> bool:
        """Whether all epochs are."""
        return self.begun() and load_model(self.folder)[1]["position"]["epoch"] >= self.epochs

    def run(self, progress: bool | None) -> None:
        """Train, from the checkpoint if there is one (`Trainer.run`)."""
        trainer = Trainer(self.settings, self.data, device=self.device)
        if self.begun():
            trainer.resume(self.folder)
        # Where a step takes less than a millisecond, writing it down takes as long as fifty.
        trainer.run(self.epochs, out=self.folder, checkpoint_every=_CHECKPOINT_EVERY, progress=progress)

    def announcement(self) -> str:
        """Said at the start."""
        return f"training {self}: {self.epochs} epochs, {len(self.data.train):,} images"

    def outcome(self) -> str:
        """Said at the end."""
        history = load_model(self.folder)[1]["history"]
        seconds = sum(record["seconds"] for record in history)
        return f"trained {self}: {seconds:.0f} s, accuracy {100 * history[-1]['test_accuracy']:.1f} %"

    def detached(self) -> Training:
        """The same, to be sent: of a slice the whole would be."""
        parts = (replace(part, images=part.images.clone(), labels=part.labels.clone()) for part in self.data)
        return replace(self, data=DataSet(*parts))

    def failure(self, error: str) -> TrainingError:
        """What is raised where its process says an error."""
        return TrainingError(f"{self}: {error}")
