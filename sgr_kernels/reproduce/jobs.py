"""Tasks of a reproduction, several at a time in processes of their own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Protocol

import torch

from sgr_kernels.training.checkpoint import TrainingError

_LOOK = 1.0  # seconds between looks at how far tasks are, and whether there is still somebody to work for


class Task(Protocol):
    """What is done in a process of its own, and leaves what it finds on disk."""

    def announcement(self) -> str:
        """Said at the start."""

    def outcome(self) -> str:
        """Said at the end."""

    def run(self, progress: bool | None) -> None:
        """Do it, in this process."""

    def detached(self) -> Task:
        """The same, without what should not be sent to another process."""

    def failure(self, error: str) -> Exception:
        """What is raised where its process says an error."""


def run_all(
    tasks: Sequence[Task],
    jobs: int,
    say: Callable[[str], None],
    progress: bool | None = None,
    watch: Callable[[], None] | None = None,
) -> None:
    """Run all tasks, ``jobs`` at a time. One at a time runs in this process, with all its threads.

    Args:
        tasks: What to do.
        jobs: At a time.
        say: Told when a task begins and ends.
        progress: Whether a task that runs in this process shows a bar.
        watch: Called now and then while others run.

    Raises:
        Exception: A task's failure. Those that were running with it are stopped.
    """
    jobs = min(jobs, len(tasks))
    if jobs <= 1:
        for task in tasks:
            say(task.announcement())
            task.run(progress)
            say(task.outcome())
        return
    left = list(tasks)
    running: dict[Connection, tuple[Task, SpawnProcess]] = {}
    try:
        while left or running:
            while left and len(running) < jobs:
                task = left.pop(0)
                say(task.announcement())
                with _interrupts_held_back():
                    receiver, process = _start(task, threads=max(1, torch.get_num_threads() // jobs))
                    running[receiver] = task, process
            for receiver in _ready(running, None if watch is None else _LOOK):
                task, process = running.pop(receiver)
                try:
                    error = receiver.recv()
                except EOFError:
                    error = None
                process.join()
                if error is None:
                    error = f"its process ended with exit code {process.exitcode}"
                if error:
                    raise task.failure(error)
                say(task.outcome())
            if watch is not None:
                watch()
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()


def _ready(connections: Iterable[Connection], seconds: float | None) -> list[Connection]:
    return [connection for connection in wait(list(connections), seconds) if isinstance(connection, Connection)]


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """No Ctrl-C before the end of the block; a process started within never gets one."""
    resource_tracker.ensure_running()  # its start would let them through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(task: Task, threads: int) -> tuple[Connection, SpawnProcess]:
    """A process that does a task, and where it says at its end what went wrong, or ``""``."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    receiver, sender = context.Pipe(duplex=False)
    # As bytes, because PyTorch shares tensors through a file in memory, which containers keep small.
    content = pickle.dumps(task.detached())
    process = context.Process(target=_work, args=(content, threads, os.getpid(), sender), daemon=True)
    process.start()
    sender.close()
    return receiver, process


def _work(content: bytes, threads: int, parent: int, sender: Connection) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # in order, so that no half-written file stays
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    task: Task = pickle.loads(content)
    error = ""
    try:
        task.run(False)
    except TrainingError as problem:
        error = str(problem)
    except Exception as problem:
        traceback.print_exc()
        error = f"{type(problem).__name__}: {problem}"
    with contextlib.suppress(BrokenPipeError):
        sender.send(error)


def _end_with(parent: int) -> None:
    """A parent that was killed cannot end this process, and another one may soon do the same."""
    while os.getppid() == parent:
        time.sleep(_LOOK)
    os.kill(os.getpid(), signal.SIGTERM)
