"""Records of what was measured: each names the question it answers; and folders, which have one writer at a time."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sgr_kernels.training.checkpoint import TrainingError, write_atomically

_QUESTION = "question"
_ABSENT = "nothing"
_LOCK = ".lock"


def digest(question: Any) -> str:
    """Twelve hex digits that tell questions apart, for names of files and folders."""
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:12]


def difference(asked: Mapping[str, Any], answered: Mapping[str, Any]) -> str | None:
    """The first entry in which two questions differ, as ``"name: the one asked, not the one answered"``; or None."""
    asked = json.loads(json.dumps(asked))  # tuples come back from a file as lists
    return next(_differences(asked, answered), None)


def remembered(path: Path, question: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """What ``measure`` returns, or what an earlier run found that asked the same.

    Args:
        path: Of the record, JSON: the question beside the entries of the answer.
        question: Everything that decides the answer, ready for JSON.
        measure: Gives the answer, ready for JSON.

    Raises:
        ValueError: if the file answers another question, or is no record.
    """
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {_QUESTION: question, **measure()}
        write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())
        return record
    try:
        record = json.loads(path.read_text())
        found = record[_QUESTION]
        differs = difference(question, found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not say what it answers; remove it, or name another folder") from error
    if differs is not None:
        raise ValueError(f"{path} answers another question ({differs}); remove it, or name another folder")
    return record


def require_folder(path: str | os.PathLike[str], name: str = "out") -> None:
    """Expect that a folder is there, or that no file is in its way; nothing is made.

    Raises:
        NotADirectoryError: with the argument's name, if there is a file.
    """
    path = Path(path)
    place = next((place for place in (path, *path.parents) if place.exists()), path)
    if place.exists() and not place.is_dir():
        raise NotADirectoryError(f"{name}: expected a folder, got {path}: {place} is a file")


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Be a folder's only writer; the claim ends with the process at the latest, however that ends.

    Raises:
        TrainingError: if another writer is at work there.
    """
    path = folder / _LOCK
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise TrainingError(
                f"{folder} is being written by process {file.read() or 'unknown'}: name another folder, or wait for it"
            ) from error
        except OSError:
            pass  # some file systems have no locks
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()


def _differences(asked: Mapping[str, Any], answered: Mapping[str, Any]) -> Iterator[str]:
    for name in [*asked, *(name for name in answered if name not in asked)]:
        own, other = asked.get(name, _ABSENT), answered.get(name, _ABSENT)
        if isinstance(own, Mapping) and isinstance(other, Mapping):
            yield from _differences(own, other)
        elif own != other:
            yield f"{name}: {own!r}, not {other!r}"
