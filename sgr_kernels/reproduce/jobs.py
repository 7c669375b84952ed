"""Tasks of a reproduction, several at a time in processes of their own."""

from __future__ import annotations

import contextlib
import gc
import io
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch

from sgr_kernels.training.checkpoint import TrainingError

_SHARED = "shared"
_PATIENCE = 5.0  # seconds for a process to end in order
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


class Workers:
    """Processes that do tasks, kept for the next ones: bringing PyTorch up, and a GPU, takes each some seconds."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []
        weakref.finalize(self, _end, self._workers)

    def __reduce__(self) -> Any:
        """Without the processes, which belong to this one."""
        return Workers, ()

    def run(
        self,
        tasks: Sequence[Task],
        jobs: int,
        say: Callable[[str], None],
        progress: bool | None = None,
        watch: Callable[[], None] | None = None,
        then: Callable[[Task], Sequence[Task]] = lambda task: (),
        shared: Any = None,
    ) -> None:
        """Run all tasks, ``jobs`` at a time. One at a time runs in this process, with all its threads.

        Args:
            tasks: What to do.
            jobs: At a time; so many processes there will be, if there is a task.
            say: Told when a task begins and ends.
            progress: Whether a task that runs in this process shows a bar.
            watch: Called now and then while others run.
            then: What a task that is done makes possible; that comes first.
            shared: An object that tasks refer to; it is sent to each process once.

        Raises:
            Exception: A task's failure. Those that were running with it are stopped.
        """
        if jobs <= 1:
            left = list(tasks)
            while left:
                task = left.pop(0)
                say(task.announcement())
                task.run(progress)
                say(task.outcome())
                left[:0] = then(task)
            return
        try:
            self._share_out(tasks, jobs, say, watch, then, shared)
        except BaseException:
            _end(self._workers)
            raise

    def _share_out(
        self,
        tasks: Sequence[Task],
        jobs: int,
        say: Callable[[str], None],
        watch: Callable[[], None] | None,
        then: Callable[[Task], Sequence[Task]],
        shared: Any,
    ) -> None:
        dead = [worker for worker in self._workers if not worker.process.is_alive()]
        self._workers[:] = [worker for worker in self._workers if worker not in dead]
        _end(dead)
        # All at once, so that none waits for another's imports.
        while tasks and len(self._workers) < jobs:
            with _interrupts_held_back():
                self._workers.append(_Worker())
        threads = max(1, torch.get_num_threads() // jobs)
        left, idle = list(tasks), self._workers[:jobs]
        running: dict[Connection, tuple[Task, _Worker]] = {}
        while left or running:
            while left and idle:
                task, worker = left.pop(0), idle.pop(0)
                say(task.announcement())
                worker.begin(task, threads, shared)
                running[worker.connection] = task, worker
            for connection in _ready(running, None if watch is None else _LOOK):
                task, worker = running.pop(connection)
                error = worker.end()
                if error:
                    raise task.failure(error)
                say(task.outcome())
                left[:0] = then(task)
                idle.append(worker)
            if watch is not None:
                watch()


class _Worker:
    """A process that does tasks, and says of each what went wrong, or ``""``."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(os.getpid(), theirs), daemon=True)
        self.process.start()
        theirs.close()
        self._shared: Callable[[], Any] = lambda: None  # a weak reference: the object owns its processes

    def begin(self, task: Task, threads: int, shared: Any) -> None:
        """Give it a task, which may refer to a shared object."""
        # As bytes, because PyTorch shares tensors through a file in memory, which containers keep small.
        known = shared is None or self._shared() is shared
        content = io.BytesIO()
        _Pickler(content, shared).dump(task.detached())
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `end` says how it ended
            self.connection.send((None if known else pickle.dumps(shared), content.getvalue(), threads))
        if not known:
            self._shared = weakref.ref(shared)

    def end(self) -> str:
        """What went wrong with the task."""
        try:
            error: str = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return f"its process ended with exit code {self.process.exitcode}"
        return error


def _end(workers: list[_Worker]) -> None:
    """Stop processes, whatever they do, and forget them."""
    for worker in workers:
        worker.process.terminate()
        worker.connection.close()
    for worker in workers:
        worker.process.join(_PATIENCE)
        if worker.process.is_alive():  # the exit was caught by what it ran, a library that tries an import, say
            worker.process.kill()
            worker.process.join()
    workers.clear()


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


class _Pickler(pickle.Pickler):
    """All but the shared object, which the other process has."""

    def __init__(self, file: io.BytesIO, shared: Any) -> None:
        super().__init__(file)
        self._shared = shared

    def persistent_id(self, value: Any) -> str | None:
        """Its name there."""
        return _SHARED if value is self._shared and value is not None else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, shared: Any) -> None:
        super().__init__(file)
        self._shared = shared

    def persistent_load(self, name: str) -> Any:
        """What is meant by it here."""
        assert name == _SHARED
        return self._shared


def _work(parent: int, connection: Connection) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # in order, so that no half-written file stays
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    shared: Any = None
    while True:
        try:
            brought, content, threads = connection.recv()
        except EOFError:
            return
        torch.set_num_threads(threads)
        if brought is not None:
            shared = pickle.loads(brought)
        task: Task = _Unpickler(io.BytesIO(content), shared).load()
        error = ""
        try:
            task.run(False)
        except TrainingError as problem:
            error = str(problem)
        except Exception as problem:
            traceback.print_exc()
            error = f"{type(problem).__name__}: {problem}"
        del brought, content, task
        _give_memory_back()
        with contextlib.suppress(BrokenPipeError):
            connection.send(error)


def _give_memory_back() -> None:
    """For the next task, here or in another process: what cycles hold, CUDA graphs say, and what the allocator does."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _end_with(parent: int) -> None:
    """A parent that was killed cannot end this process, and another one may soon do the same."""
    while os.getppid() == parent:
        time.sleep(_LOOK)
    os.kill(os.getpid(), signal.SIGTERM)
