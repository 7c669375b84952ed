"""What a measurement was made with."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from sgr_kernels import backends
from sgr_kernels._version import __version__

_CHECKOUT = Path(__file__).parents[2]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.cache
def _commit() -> str:
    """Of the checkout, or as ``SGR_COMMIT`` has it where a copy travels without its history."""
    if "SGR_COMMIT" in os.environ:
        return os.environ["SGR_COMMIT"]
    if not (_CHECKOUT / "csrc").is_dir():  # installed, perhaps within a checkout of something else
        return "unknown"
    command = ["git", "-C", str(_CHECKOUT), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return "unknown"
    return result.stdout.strip() or "unknown"


def describe(device: torch.device) -> dict[str, Any]:
    """Device, threads, versions and commit."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "python": platform.python_version(),
        "sgr_kernels": __version__,
        "commit": _commit(),
        "backends": backends.available(device),
    }
