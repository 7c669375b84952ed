"""The training loop: resumable between any two steps to the same weights as a run without a break."""

from __future__ import annotations

import json
import os
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from sgr_kernels.evaluation.suite import like_mnist
from sgr_kernels.loss import SGRLoss
from sgr_kernels.training import checkpoint, optimizers
from sgr_kernels.training.batches import Augmentation, batches_of, promised
from sgr_kernels.training.checkpoint import CHECKPOINT_FILE, TrainingError, checkpoint_file
from sgr_kernels.training.criteria import classes
from sgr_kernels.training.cuda_graphs import Parts, StepGraphs, graphs_on, usable
from sgr_kernels.training.images import DataSet, images_of
from sgr_kernels.training.matching import alike
from sgr_kernels.training.methods import Settings, build_criterion, weight_decay
from sgr_kernels.training.network import (
    GIVEN,
    NetworkError,
    classes_of,
    remember,
)
from sgr_kernels.training.processes import Processes
from sgr_kernels.training.records import claimed, require_folder
from sgr_kernels.training.state import data_of, require_sound, settings_of
from sgr_kernels.training.trained import accuracy
from sgr_kernels.training.weights import load_weights

HISTORY_FILE = "history.json"

_ALONE = Processes()
_BLACK, _MID_RANGE = 0.0, 0.5  # what augmentation pads images with


class Trainer:
    """A training in progress: network, criterion, optimizer, position in the data, history.

    Seeds torch's default generators with ``settings.seed``: everything random in a training follows from it.

    Args:
        settings: What to train and how.
        data: Training and test images: `Images`, or any map-style ``Dataset`` or ``DataLoader`` that yields images
            (C, H, W), uint8 or in [0, 1], and labels. A loader's batches and transforms are its own: ``batch_size`` and
            ``augment`` are not for it. Test images have the training images' shape; classes are matched by name.
        model: A network made in Python, images (B, C, H, W) in [0, 1] to logits; ``settings.architecture`` then is
            ``"given"``, and who loads or resumes the training has to make it again.
        device: Where to train.
        processes: Those that train together, each on its part of every batch; all must make the same calls. The result
            is that of one process up to rounding, and the first one writes.
        cuda_graphs: Whether steps are captured as CUDA graphs and replayed, where they can be
            (`sgr_kernels.training.cuda_graphs`), to the same result. None: by one process on a CUDA device.

    Attributes:
        model: The network that the optimizer changes.
        average: The running average of its weights, with ``settings.ema``; it is the trained network then.
        criterion: The method's loss.
        epoch: Whole epochs done.
        step: Steps done in the current one.
        history: One record per finished epoch.
        graphs: What captures and replays steps.

    Raises:
        NetworkError: If the network cannot be made, its weights do not fit, or it does not take these images.
        DataError: If the images are none, of more classes than the network's head, or other ones to test than to train.
        ValueError: If CUDA graphs are asked for elsewhere than in one process on a CUDA device.
    """

    def __init__(
        self,
        settings: Settings,
        data: DataSet | tuple[Any, Any],
        *,
        model: nn.Module | None = None,
        device: torch.device | str = "cpu",
        processes: Processes = _ALONE,
        cuda_graphs: bool | None = None,
    ) -> None:
        if (model is None) == (settings.architecture == GIVEN):
            raise NetworkError(
                f"model: a network made in Python goes with the architecture {GIVEN!r}, got one of the two"
            )
        train, test = (images_of(part) for part in data)
        test = alike(test, train)
        make = settings.network.maker() if model is None else lambda: model  # imports, which may draw random numbers
        torch.manual_seed(settings.seed)
        self.settings, self.device, self.processes = settings, torch.device(device), processes
        self.model: nn.Module = make().to(device)
        remember(settings.network)
        if settings.init_weights is not None:
            load_weights(self.model, settings.init_weights, "init_weights")
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise NetworkError("model: expected a network with parameters to train, got none")
        found = classes_of(self.model, train, device)
        self.average = self._averaged()
        self.criterion: Any = build_criterion(settings, train).to(device)
        self.optimizer = optimizers.build(
            settings.optimizer,
            self.model.parameters(),
            settings.learning_rate,
            weight_decay(settings),
            settings.optimizer_options,
        )
        self._mixup = _mixup(settings.mixup, found)
        fill = _BLACK if like_mnist(train.shape) else _MID_RANGE
        self.batches = batches_of(
            train,
            settings.batch_size,
            device=device,
            seed=settings.seed,
            shuffle=True,
            augmentation=Augmentation(fill=fill, flip=settings.flip) if settings.augment else None,
            processes=processes,
            drop_last=settings.drop_last,
        )
        self.test_batches = batches_of(test, 100, device=device, processes=processes)
        self.data = data_of(train)
        self.epoch = self.step = 0
        self.history: list[dict[str, Any]] = []
        self._totals = self._no_totals()
        self._seconds = 0.0
        self._epochs: int | None = None  # of the whole training, since its first step
        self._network: nn.Module = self.model if processes.size == 1 else DistributedDataParallel(self.model)
        new_graph = graphs_on(self.device) if usable(cuda_graphs, self.device, processes) else None
        self.graphs = StepGraphs(self.model, self.criterion, _Gradients(self), new_graph)

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
            DataError: if a loader yields another number of batches in an epoch than its ``len()`` promises; where it
                yields more, the epoch has been finished, without them.
            NotADirectoryError: if ``out`` is a file.
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
        require_folder(folder)
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
                for images, labels in promised(self.batches, self.epoch, self.step):
                    self._set_learning_rate(self.epoch * steps + self.step, epochs * steps)
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
        history = {"settings": asdict(self.settings), "data": self.data["name"], "epochs": self.history}
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
            "data": self.data,
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "criterion": self.criterion.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": checkpoint.rng_state(self.device),
            "position": {"epoch": self.epoch, "step": self.step},
            "epochs": self._epochs,
            "totals": self.processes.total(self._totals).clone(),
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
        if state["data"]["digest"] != self.data["digest"]:
            raise checkpoint.CheckpointError(
                f"the checkpoint was trained on other data ({state['data']['name']}, not this {self.data['name']})"
            )
        state = {**state, "optimizer": optimizers.moved(state["optimizer"], self.optimizer)}
        parts = (self.settings, self.model, self.average, self.criterion, self.optimizer)
        require_sound(state, *parts, len(self.batches))
        checkpoint.restore_rng(state["rng"], self.device)
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.criterion.load_state_dict(state["criterion"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step = state["position"]["epoch"], state["position"]["step"]
        self._epochs = state.get("epochs")
        self.history = list(state["history"])
        self._seconds = state["seconds"]
        # The sums of all processes so far are kept by the first.
        self._totals.copy_(state["totals"] if self.processes.first else self._no_totals())
        self.graphs.forget()

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        self._seed_others()
        self.model.train()
        self.criterion.train()
        self.graphs(self._parts(images, labels))
        if self.settings.clip_gradient is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_gradient)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        if isinstance(self.criterion, SGRLoss) and not self.criterion.count_calls:
            self.criterion.advance()
        self.step += 1

    def _parts(self, images: Tensor, labels: Tensor) -> Parts:
        """A batch in the parts that it is taken in."""
        parts = list(zip(*(t.tensor_split(self.settings.accumulate) for t in (images, labels))))
        if self.processes.size == 1:  # several have to make the same calls, also with empty parts
            parts = [part for part in parts if len(part[1])] or parts[:1]
        return parts if self._mixup is None else [self._mixup(*part) for part in parts]

    def _compute(self, parts: Parts) -> None:
        """The gradient of a step, and what it adds to the epoch's sums; all that a CUDA graph may replay."""
        whole = self.batches.count(self.step)
        for number, part in enumerate(parts, start=1):
            self._backward(part[0], part[1], whole, last=number == len(parts))

    def _loss(self, network: Any, images: Tensor, labels: Tensor) -> Tensor:
        try:
            loss: Tensor = self.criterion(network, images, labels)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ValueError(
                f"batch_size: the network's BatchNorm has one value a channel in a batch of {len(labels)}, perhaps "
                "the last of an epoch: drop_last leaves that one out; or choose another batch_size, or fewer parts "
                "(accumulate)"
            ) from error
        return loss

    def _backward(self, images: Tensor, labels: Tensor, whole: int, *, last: bool) -> None:
        """Add the gradient of a part of a step's batch, which in all processes has ``whole`` images."""
        network = self._network
        with network.no_sync() if isinstance(network, DistributedDataParallel) and not last else nullcontext():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp == "bf16"):
                loss = self._loss(network, images, labels)
            # DistributedDataParallel takes the mean over processes, whose parts of the batch may differ.
            (loss * (self.processes.size * len(labels) / whole)).backward()
        statistics = self.criterion.peek()
        correct = (statistics.outputs.argmax(1) == classes(labels)).sum()
        count = len(labels)
        penalty = loss.new_full((), torch.nan) if statistics.penalty is None else statistics.penalty
        penalized = penalty.isfinite() * count
        sums = [
            loss.detach() * count,
            statistics.cross_entropy * count,
            correct,
            penalty.nan_to_num(0, 0, 0) * penalized,
        ]
        self._totals += torch.stack([s.double() for s in (*sums, correct.new_full((), count), penalized)])

    def _set_learning_rate(self, step: int, steps: int) -> None:
        chosen = self.settings
        rate = optimizers.learning_rate(chosen.learning_rate, chosen.schedule, chosen.learning_rate_warmup, step, steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _averaged(self) -> AveragedModel | None:
        """A running average, of buffers as well, which begins with the weights after the first step."""
        if self.settings.ema is None:
            return None
        rule = get_ema_multi_avg_fn(self.settings.ema)
        return AveragedModel(self.model, multi_avg_fn=rule, use_buffers=True)

    @property
    def trained(self) -> nn.Module:
        """The network that was trained, which is the average where one is kept."""
        return self.model if self.average is None else self.average.module

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
                "test_accuracy": accuracy(self.trained, self.test_batches, self.processes),
                "seconds": round(self._seconds, 2),
            }
        )
        self._totals.zero_()
        self._seconds = 0.0

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


class _Gradients:
    """A step of a training, which does not keep it: in a circle with it, a device's memory would stay in use."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = weakref.ref(trainer)

    def __call__(self, parts: Parts) -> None:
        trainer = self._trainer()
        assert trainer is not None
        trainer._compute(parts)

    def __reduce__(self) -> tuple[type[_Gradients], tuple[Any]]:
        """A copy is of the training's copy."""
        return _Gradients, (self._trainer(),)


def _mixup(alpha: float, classes: int) -> Any:
    """Mixes two images of a batch and their labels, or None; draws from PyTorch's stream."""
    if not alpha:
        return None
    from torchvision.transforms import v2

    return v2.MixUp(alpha=alpha, num_classes=classes)
