"""The compiled kernels: the only place that imports the binary, and what it was built with.

A binary that is absent or fails to load never breaks the package: the other backends serve.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from types import ModuleType
from typing import TypedDict

import torch

NOT_BUILT = (
    "this installation has no compiled kernels; with torch and a C++ compiler installed, "
    "`pip install --no-build-isolation sgr_kernels` from source builds them"
)


class BuildInfo(TypedDict):
    """What is compiled in, and why nothing is if nothing is."""

    kernels: list[str]  # of "cpu" and "cuda"
    instruction_sets: list[str]  # that the CPU kernels can use on this machine, best first
    cuda_architectures: list[str]  # such as "sm_90", "compute_90" (PTX)
    built_with: dict[str, str]  # versions of torch, the C++ compiler and nvcc
    error: str | None  # why there are no kernels


@functools.cache
def load() -> tuple[ModuleType | None, str | None]:
    """The binary, or None and the reason. Its import registers the kernels with PyTorch's dispatcher.

    A binary that exists and fails to load is reported once, as a warning.
    """
    name = "sgr_kernels._C"
    if importlib.util.find_spec(name) is None:
        return None, NOT_BUILT
    try:
        return importlib.import_module(name), None
    except (ImportError, OSError, RuntimeError) as error:
        reason = (
            f"the compiled kernels failed to load under torch {torch.__version__} ({error}); "
            "reinstall sgr_kernels with --no-build-isolation to build them for this torch"
        )
        warnings.warn(f"{reason}. The PyTorch backend serves meanwhile.", RuntimeWarning, stacklevel=2)
        return None, reason


def unavailable(device_type: str) -> str | None:
    """Why there are no compiled kernels for ``"cpu"`` or ``"cuda"`` tensors; None if there are."""
    info = build_info()
    if device_type in info["kernels"]:
        return None
    return info["error"] or f"the compiled kernels were built without {device_type} support"


@functools.cache
def build_info() -> BuildInfo:
    """What the compiled kernels were built with, and for what."""
    binary, error = load()
    if binary is None:
        return {"kernels": [], "instruction_sets": [], "cuda_architectures": [], "built_with": {}, "error": error}
    built_with = dict(binary.build_info())
    architectures = built_with.pop("cuda_architectures")
    return {
        "kernels": ["cpu", "cuda"] if architectures else ["cpu"],
        "instruction_sets": binary.instruction_sets(),
        "cuda_architectures": architectures.split(",") if architectures else [],
        "built_with": {name: version for name, version in built_with.items() if version},
        "error": None,
    }
