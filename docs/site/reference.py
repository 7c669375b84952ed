"""The docstrings of all that docs/api.md lists, below that list and in its order."""

from __future__ import annotations

import re
import types
from typing import Any

import names

PAGE = "docs/api"

_WITHOUT = "   :exclude-members: extra_repr, get_extra_state, set_extra_state, register_counter, warn_if_skipped\n"

RETURNED = (
    "sgr_kernels.penalty.statistics.StepStatistics",
    "sgr_kernels.covariance.base.LogDeterminant",
    "sgr_kernels.evaluation.sanity.Check",
    "sgr_kernels.evaluation.diagnose.StrengthRow",
    "sgr_kernels.evaluation.diagnose.SampledCovariance",
    "sgr_kernels.attacks.noise.NoiseCovariance",
    "sgr_kernels.training.images.DataSet",
    "sgr_kernels.training.images.DataError",
    "sgr_kernels.training.network.Source",
    "sgr_kernels.training.network.NetworkError",
    "sgr_kernels.training.processes.Processes",
    "sgr_kernels.training.checkpoint.CheckpointError",
    "sgr_kernels.training.checkpoint.TrainingError",
)
"""What public functions take, return and raise without exporting it; a type that is missing here fails the build."""


def entries(page: str) -> list[tuple[str, list[str]]]:
    """Names by group, as the page lists them."""
    parts = re.split(r"^\*\*(.+)\*\*$", page, flags=re.MULTILINE)[1:]
    return [
        (group, re.findall(r"^- `sgr\.([\w.]+)`:", listed, re.MULTILINE))
        for group, listed in zip(parts[::2], parts[1::2])
    ]


def directive(name: str) -> str:
    """The directive that documents a name; nothing for one that another name's entry documents, and for numbers."""
    thing = names.resolve(name)
    if isinstance(thing, types.ModuleType):
        return f".. automodule:: {thing.__name__}\n"
    if names.targets().get(name) != f"sgr_kernels.{name}":
        return ""
    if isinstance(thing, dict):
        value = ", ".join(f"{option}={value!r}" for option, value in thing.items())
        module, _, constant = f"sgr_kernels.{name}".rpartition(".")
        return f".. py:data:: {constant}\n   :module: {module}\n\n   ``{value}``\n"
    if not isinstance(thing, type):
        return f".. autofunction:: sgr_kernels.{name}\n"
    kind = "autoexception" if issubclass(thing, Exception) else "autoclass"
    members = "" if issubclass(thing, Exception) else f"   :members:\n   :inherited-members: Module, dict\n{_WITHOUT}"
    return f".. {kind}:: sgr_kernels.{name}\n{members}"


def _append(app: Any, page: str, source: list[str]) -> None:
    if page == PAGE:
        for group, listed in entries(source[0]):
            body = "\n".join(filter(None, map(directive, listed)))
            if body:
                source[0] += f"\n## {group}\n\n```{{eval-rst}}\n{body}```\n"
        body = "\n".join(f".. autoclass:: {name}\n   :members:\n" for name in RETURNED)
        source[0] += f"\n## What these take and return\n\n```{{eval-rst}}\n{body}```\n"


def setup(app: Any) -> dict[str, bool]:
    """Of Sphinx."""
    app.connect("source-read", _append)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
