"""Trainings of a reproduction: each into a folder of its own, several at a time in processes of their own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch

from sgr_kernels.training.datasets import DataSet
from sgr_kernels.training.loop import CHECKPOINT_FILE, Trainer, TrainingError
from sgr_kernels.training.methods import Settings
from sgr_kernels.training.trained import load_model


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
    jobs = min(jobs, len(trainings))
    if jobs <= 1:
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
                with _interrupts_held_back():
                    receiver, process = _start(training, threads=max(1, torch.get_num_threads() // jobs))
                    running[receiver] = training, process
            for receiver in _ready(running):
                training, process = running.pop(receiver)
                try:
                    error = receiver.recv()
                except EOFError:
                    error = None
                process.join()
                if error is None:
                    error = f"its process ended with exit code {process.exitcode}"
                if error:
                    raise TrainingError(f"{training}: {error}")
                say(training.outcome())
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()


def _ready(connections: Iterable[Connection]) -> list[Connection]:
    return [connection for connection in wait(list(connections)) if isinstance(connection, Connection)]


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """No Ctrl-C before the end of the block; a process started within never gets one."""
    resource_tracker.ensure_running()  # its start would let them through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(training: Training, threads: int) -> tuple[Connection, SpawnProcess]:
    """A process that trains, and where it says at its end what went wrong, or ``""``."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    receiver, sender = context.Pipe(duplex=False)
    # Of a slice the whole would be sent; and as bytes, because PyTorch shares tensors through a file in memory, which
    # containers keep small.
    images = DataSet(*(replace(p, images=p.images.clone(), labels=p.labels.clone()) for p in training.data))
    content = pickle.dumps(replace(training, data=images))
    process = context.Process(target=_work, args=(content, threads, os.getpid(), sender), daemon=True)
    process.start()
    sender.close()
    return receiver, process


def _work(content: bytes, threads: int, parent: int, sender: Connection) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # in order, so that no half-written file stays
    torch.set_num_threads(threads)
    training: Training = pickle.loads(content)
    error = ""
    try:
        # A parent that was killed cannot end this process, and another one may soon train the same network.
        training.run(False, stop=lambda: os.getppid() != parent)
    except TrainingError as problem:
        error = str(problem)
    except Exception as problem:
        traceback.print_exc()
        error = f"{type(problem).__name__}: {problem}"
    with contextlib.suppress(BrokenPipeError):
        sender.send(error)
