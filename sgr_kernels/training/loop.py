"""The training loop: resumable between any two steps to the same weights as a run without a break."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from sgr_kernels.attacks.inputs import check_labels
from sgr_kernels.attacks.objective import logits_of
from sgr_kernels.checks import check_floating_point
from sgr_kernels.training import checkpoint
from sgr_kernels.training.batches import Augmentation, Batches
from sgr_kernels.training.checkpoint import TrainingError
from sgr_kernels.training.datasets import DataSet
from sgr_kernels.training.methods import Settings, build_criterion, weight_decay
from sgr_kernels.training.models import CarliniWagner, carlini_wagner
from sgr_kernels.training.processes import Processes
from sgr_kernels.training.records import claimed
from sgr_kernels.training.state import require_sound, settings_of

CHECKPOINT_FILE = "checkpoint.safetensors"
HISTORY_FILE = "history.json"

_ALONE = Processes()


class Trainer:
    """A training in progress: network, criterion, optimizer, position in the data, history.

    Seeds torch's default generators with ``settings.seed``: everything random in a training follows from it.

    Args:
        settings: What to train and how.
        data: Training and test images.
        device: Where to train.
        processes: Those that train together, each on its part of every batch; all must make the same calls. The result
            is that of one process up to rounding, and the first one writes.

    Attributes:
        model: The network.
        criterion: The method's loss.
        epoch, step: Position: whole epochs done, and steps done in the current one.
        history: One record per finished epoch.
    """

    def __init__(
        self,
        settings: Settings,
        data: DataSet,
        *,
        device: torch.device | str = "cpu",
        processes: Processes = _ALONE,
    ) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.device, self.processes = settings, torch.device(device), processes
        self.model: CarliniWagner = _network(settings).to(device)
        self.criterion: Any = build_criterion(settings, data.train).to(device)
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=settings.learning_rate, weight_decay=weight_decay(settings)
        )
        fill = 0.5 if settings.architecture == "cifar10" else 0.0
        self.batches = Batches(
            data.train,
            settings.batch_size,
            device=device,
            seed=settings.seed,
            shuffle=True,
            augmentation=Augmentation(fill=fill, flip=settings.flip) if settings.augment else None,
            processes=processes,
        )
        self.test_batches = Batches(data.test, 100, device=device, processes=processes)
        self.data_name, self.data_digest = data.train.name, data.train.digest()
        self.epoch = self.step = 0
        self.history: list[dict[str, Any]] = []
        self._totals = self._no_totals()
        self._seconds = 0.0
        self._epochs: int | None = None  # of the whole training, since its first step
        self._network: nn.Module = self.model if processes.size == 1 else DistributedDataParallel(self.model)

    def run(
        self,
        epochs: int,
        *,
        out: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 200,
        progress: bool | None = None,
        on_epoch: Callable[[dict[str, Any]], None] = lambda record: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Train until ``epochs`` epochs are done, counted from the beginning.

        Args:
            epochs: Epochs in all, those before a resumption included. A learning rate that falls does so over all of
                them, so that such a training goes on with the same number only.
            out: Folder for checkpoint and history; None: nothing is written.
            checkpoint_every: Steps between checkpoints within an epoch; one is written at each epoch's end as well.
            progress: Whether to show a progress bar; None: where standard error is a terminal.
            on_epoch: Called with each finished epoch's record.
            stop: Asked after each step; True ends the training there, with a checkpoint.

        Returns:
            Whether all epochs are done, which is False only where ``stop`` ended it.

        Raises:
            TrainingError: if the loss is no longer finite; the last checkpoint, from before, is kept. Or if the
                learning rate has begun to fall over another number of epochs, or another training writes into ``out``.
        """
        if self.settings.schedule != "constant" and self._epochs not in (None, epochs):
            raise TrainingError(
                f"epochs: this is a training of {self._epochs} epochs, over which its learning rate falls along a "
                f"{self.settings.schedule}; got {epochs}"
            )
        self._epochs = epochs
        if out is None:
            return self._run(epochs, None, checkpoint_every, progress, on_epoch, stop)
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        with claimed(folder) if self.processes.first else nullcontext():
            return self._run(epochs, folder, checkpoint_every, progress, on_epoch, stop)

    def _run(
        self,
        epochs: int,
        folder: Path | None,
        checkpoint_every: int,
        progress: bool | None,
        on_epoch: Callable[[dict[str, Any]], None],
        stop: Callable[[], bool],
    ) -> bool:
        progress = progress if self.processes.first else False
        steps = len(self.batches)
        disable = None if progress is None else not progress
        initial = self.epoch * steps + self.step
        with tqdm(total=epochs * steps, initial=initial, disable=disable, unit="step", leave=False) as bar:
            clock = time.perf_counter()
            while self.epoch < epochs:
                for images, labels in self.batches.epoch(self.epoch, self.step):
                    self._set_learning_rate((self.epoch * steps + self.step) / (epochs * steps))
                    self._train_step(images, labels)
                    self._seconds += time.perf_counter() - clock
                    bar.update()
                    stopped = self.processes.any(stop(), self.device)
                    epoch_done = self.step == steps
                    if epoch_done:
                        self._finish_epoch()
                    if folder is not None and (stopped or epoch_done or self.step % checkpoint_every == 0):
                        self.save(folder)
                    if epoch_done:
                        on_epoch(self.history[-1])
                    if stopped:
                        return self.epoch >= epochs
                    clock = time.perf_counter()
        return True

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``checkpoint.safetensors`` and ``history.json`` into an existing folder, each atomically."""
        state = self.state_dict()
        self._require_finite(state["totals"])
        if not self.processes.first:
            return
        checkpoint.save(Path(folder) / CHECKPOINT_FILE, state)
        history = {"settings": asdict(self.settings), "data": self.data_name, "epochs": self.history}
        checkpoint.write_atomically(Path(folder) / HISTORY_FILE, (json.dumps(history, indent=2) + "\n").encode())

    def resume(self, path: str | os.PathLike[str]) -> None:
        """Continue where a checkpoint, given as its file or folder, left off.

        Raises:
            FileNotFoundError: if there is none.
            CheckpointError: if it is damaged, newer than this package, or of another training.
        """
        self.load_state_dict(checkpoint.load(checkpoint_file(path)))

    def state_dict(self) -> dict[str, Any]:
        """Everything the rest of the training depends on, on whatever number of processes."""
        return {
            "settings": asdict(self.settings),
            "data": {"name": self.data_name, "digest": self.data_digest},
            "model": self.model.state_dict(),
            "criterion": self.criterion.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": checkpoint.rng_state(self.device),
            "position": {"epoch": self.epoch, "step": self.step},
            "epochs": self._epochs,
            "totals": self.processes.total(self._totals),
            "seconds": self._seconds,
            "history": self.history,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            CheckpointError: if it is of other settings, other data, or another model, or makes no sense; nothing has
                changed then.
        """
        differences = self.settings.differences(settings_of(state))
        if differences:
            raise checkpoint.CheckpointError(f"the checkpoint was trained with other settings ({differences[0]})")
        if state["data"]["digest"] != self.data_digest:
            raise checkpoint.CheckpointError(
                f"the checkpoint was trained on other data ({state['data']['name']}, not this {self.data_name})"
            )
        require_sound(state, self.model, self.criterion, self.optimizer, len(self.batches))
        checkpoint.restore_rng(state["rng"], self.device)
        self.model.load_state_dict(state["model"])
        self.criterion.load_state_dict(state["criterion"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step = state["position"]["epoch"], state["position"]["step"]
        self._epochs = state.get("epochs")
        self.history = list(state["history"])
        self._seconds = state["seconds"]
        # The sums of all processes so far are kept by the first.
        self._totals = state["totals"].to(self.device) if self.processes.first else self._no_totals()

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        self._seed_others()
        self.model.train()
        self.criterion.train()
        loss = self.criterion(self._network, images, labels)
        self.optimizer.zero_grad()
        # DistributedDataParallel takes the mean over processes, whose parts of the batch may differ.
        (loss * (self.processes.size * len(labels) / self.batches.count(self.step))).backward()
        self.optimizer.step()
        self.step += 1
        last = self.criterion.peek()
        correct = (last.outputs.argmax(1) == labels).sum()
        count = len(labels)
        penalty = loss.new_full((), torch.nan) if last.penalty is None else last.penalty
        penalized = penalty.isfinite() * count
        sums = [loss.detach() * count, last.cross_entropy * count, correct, penalty.nan_to_num(0, 0, 0) * penalized]
        self._totals += torch.stack([s.double() for s in (*sums, correct.new_tensor(count), penalized)])

    def _set_learning_rate(self, done: float) -> None:
        """Adam's, where a share of the training is done."""
        factor = (1 + math.cos(math.pi * done)) / 2 if self.settings.schedule == "cosine" else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = factor * self.settings.learning_rate

    def _finish_epoch(self) -> None:
        totals = self.processes.total(self._totals)
        self._require_finite(totals)
        self.criterion.last  # noqa: B018  (reading it warns of what went wrong, and waits for the device)
        loss, cross_entropy, correct, penalty, seen, penalized = totals.tolist()
        self.epoch, self.step = self.epoch + 1, 0
        self.history.append(
            {
                "epoch": self.epoch,
                "loss": loss / seen,
                "cross_entropy": cross_entropy / seen,
                "penalty": penalty / max(1, penalized),
                "train_accuracy": correct / seen,
                "test_accuracy": accuracy(self.model, self.test_batches, self.processes),
                "seconds": round(self._seconds, 2),
            }
        )
        self._totals, self._seconds = self._no_totals(), 0.0

    def _require_finite(self, totals: Tensor) -> None:
        if not bool(totals.isfinite().all()):
            raise TrainingError(
                f"the loss is no longer finite (epoch {self.epoch + 1}, step {self.step}): "
                "try a smaller strength or learning rate"
            )

    def _seed_others(self) -> None:
        """Let what is drawn at random (starts of attacks) differ between processes; the first draws as one alone.

        Only the first one's random state is in a checkpoint; that of the others follows from the position.
        """
        if not self.processes.first:
            torch.manual_seed(hash((self.settings.seed, self.processes.rank, self.epoch, self.step)) % 2**63)

    def _no_totals(self) -> Tensor:
        """Sums over the epoch's samples of loss, cross-entropy, hits and penalty; samples seen and penalized."""
        return torch.zeros(6, dtype=torch.float64, device=self.device)


def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], processes: Processes = _ALONE) -> float:
    """Share of images whose largest logit is at the label; the model is in evaluation mode meanwhile.

    Several processes each bring their part of the images.

    Raises:
        TypeError: labels that are not integers.
        ValueError: outputs that are not logits (B, classes), or labels out of range.
    """
    training = model.training
    model.eval()
    correct, seen = 0, 0
    try:
        with torch.no_grad():
            for images, labels in batches:
                check_floating_point("images", images)
                logits = logits_of(model, images)
                check_labels(labels, *logits.shape)
                correct += int((logits.argmax(1) == labels).sum())
                seen += len(labels)
    finally:
        model.train(training)
    parameter = next(model.parameters(), None)
    device = None if parameter is None else parameter.device
    correct, seen = processes.total(torch.tensor([correct, seen], device=device)).tolist()
    return correct / seen


def checkpoint_file(path: str | os.PathLike[str]) -> Path:
    """The checkpoint meant by a path: the file itself, or the one in a training's folder."""
    path = Path(path)
    return path / CHECKPOINT_FILE if path.is_dir() else path


def _network(settings: Settings) -> CarliniWagner:
    return carlini_wagner(settings.architecture, settings.activation, settings.pooling)


def load_model(path: str | os.PathLike[str]) -> tuple[CarliniWagner, dict[str, Any]]:
    """The trained network of a checkpoint (its file or folder), in evaluation mode, and the whole state.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        CheckpointError: if it is damaged, edited out of shape, or newer than this package.
    """
    state = checkpoint.load(checkpoint_file(path))
    model = _network(settings_of(state))
    checkpoint.load_module(model, state["model"], "model")
    return model.eval(), state
