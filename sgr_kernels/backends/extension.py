"""The compiled kernels: the only place that imports the binary, and what it was built with.

A binary that is absent or fails to load never breaks the package: the other backends serve.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import TypedDict

import torch

from sgr_kernels.backends.schemas import CUDA_SCHEMAS, SCHEMAS
from sgr_kernels.checks.caller import warn_caller

_NOT_BUILT = (
    "this installation has no compiled kernels; installing sgr_kernels from source with --no-build-isolation, "
    "where torch and a C++ compiler are, builds them"
)


class BuildInfo(TypedDict):
    """What is compiled in, and why nothing is if nothing is."""

    kernels: list[str]
    """Device types with kernels, of ``"cpu"`` and ``"cuda"``."""
    instruction_sets: list[str]
    """What the CPU kernels can use on this machine, best first."""
    cuda_architectures: list[str]
    """Such as ``"sm_90"``, or ``"compute_90"`` for PTX."""
    built_with: dict[str, str]
    """Versions of torch, the C++ compiler and nvcc."""
    error: str | None
    """Why there are no kernels."""
    left_out: dict[str, str]
    """Device types whose kernels the build left out, and why."""


def _left_out(note: Path) -> dict[str, str]:
    """What the build noted; nothing where there is no note, as in a checkout that was never built."""
    try:
        reasons = json.loads(note.read_text())["left_out"]
        return {str(kind): str(reason) for kind, reason in reasons.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


_LEFT_OUT = _left_out(Path(__file__).parents[1] / "_build.json")


def _load(name: str) -> tuple[ModuleType | None, str | None]:
    """The binary, or None and the reason. Importing it registers the kernels with PyTorch's dispatcher."""
    if importlib.util.find_spec(name) is None:
        reason = _LEFT_OUT.get("cpu")
        return None, _NOT_BUILT + (f" (this build's were left out: {reason})" if reason else "")
    try:
        module = importlib.import_module(name)
    except Exception as error:  # whatever it is, the package goes on
        return None, _report(f"failed to load under torch {torch.__version__} ({error})")
    # The dispatcher would hand an older binary the arguments of another schema, unchecked.
    info = module.build_info()
    agreed = info.get("schemas") == _text(SCHEMAS)
    if not agreed or (info.get("cuda_architectures") and info.get("cuda_schemas") != _text(CUDA_SCHEMAS)):
        return None, _report("were built from another version of sgr_kernels")
    return module, None


def _text(schemas: dict[str, str]) -> str:
    return "\n".join(operator + schema for operator, schema in schemas.items())


def _report(problem: str) -> str:
    reason = f"the compiled kernels {problem}; reinstalling sgr_kernels with --no-build-isolation builds them anew"
    warn_caller(f"{reason}. The PyTorch backend serves meanwhile.", RuntimeWarning)
    return reason


binary, _error = _load("sgr_kernels._C")


def build_info() -> BuildInfo:
    """What the compiled kernels were built with, and for what."""
    if binary is None:
        return {
            "kernels": [],
            "instruction_sets": [],
            "cuda_architectures": [],
            "built_with": {},
            "error": _error,
            "left_out": dict(_LEFT_OUT),
        }
    built_with: dict[str, str] = dict(binary.build_info())
    architectures = built_with.pop("cuda_architectures")
    del built_with["schemas"]
    return {
        "kernels": ["cpu", "cuda"] if architectures else ["cpu"],
        "instruction_sets": binary.instruction_sets(),
        "cuda_architectures": architectures.split(",") if architectures else [],
        "built_with": {name: version for name, version in built_with.items() if version},
        "error": None,
        "left_out": dict(_LEFT_OUT),
    }
