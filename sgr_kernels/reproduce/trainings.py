"""Trainings of a reproduction: each into a folder of its own, several at a time in processes of their own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch

from sgr_kernels.training.datasets import DataSet
from sgr_kernels.training.loop import CHECKPOINT_FILE, Trainer, TrainingError, load_model
from sgr_kernels.training.methods import Settings


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

    def run(self, progress: bool | None, stop: Callable[[], bool] = lambda: False) -> None:
        """Train, from the checkpoint if there is one (`Trainer.run`)."""
        trainer = Trainer(self.settings, self.data, device=self.device)
        if self.begun():
            trainer.resume(self.folder)
        trainer.run(self.epochs, out=self.folder, progress=progress, stop=stop)

    def announcement(self) -> str:
        """Said at the start."""
        return f"training {self}: {self.epochs} epochs, {len(self.data.train):,} images"

    def outcome(self) -> str:
        """Said at the end."""
        history = load_model(self.folder)[1]["history"]
        seconds = sum(record["seconds"] for record in history)
        return f"trained {self}: {seconds:.0f} s, accuracy {100 * history[-1]['test_accuracy']:.1f} %"


def run_all(trainings: Sequence[Training], jobs: int, say: Callable[[str], None], progress: bool | None) -> None:
    """Run all trainings, ``jobs`` at a time. One at a time runs in this process, with all its threads.

    Raises:
        TrainingError: If one of them fails. Those that were running with it are stopped and can be resumed.
    """
    if jobs == 1 or len(trainings) == 1:
        for training in trainings:
            say(training.announcement())
            training.run(progress)
            say(training.outcome())
        return
    left = list(trainings)
    running: dict[Connection, tuple[Training, SpawnProcess]] = {}
    try:
        while left or running:
            while left and len(running) < jobs:
                training = left.pop(0)
                say(training.announcement())
                receiver, process = _start(training, threads=max(1, torch.get_num_threads() // jobs))
                running[receiver] = training, process
            for receiver in _ready(running):
                training, process = running.pop(receiver)
                try:
                    error = receiver.recv()
                except EOFError:
                    error = "its process was killed"
                process.join()
                if error:
                    raise TrainingError(f"{training}: {error}")
                say(training.outcome())
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()


def _ready(connections: Iterable[Connection]) -> list[Connection]:
    return [connection for connection in wait(list(connections)) if isinstance(connection, Connection)]


def _start(training: Training, threads: int) -> tuple[Connection, SpawnProcess]:
    """A process that trains, and where it says at its end what went wrong, or ``""``."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    receiver, sender = context.Pipe(duplex=False)
    # As bytes: PyTorch would share the images through a file in memory, which containers keep small.
    process = context.Process(target=_work, args=(pickle.dumps(training), threads, os.getpid(), sender), daemon=True)
    process.start()
    sender.close()
    return receiver, process


def _work(training: bytes, threads: int, parent: int, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent, interrupted from the same keyboard, ends this process
    torch.set_num_threads(threads)
    error = ""
    try:
        # A parent that was killed cannot end this process, and another one may soon train the same network.
        pickle.loads(training).run(False, stop=lambda: os.getppid() != parent)
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"
    with contextlib.suppress(BrokenPipeError):
        sender.send(error)
