"""Warnings that point at the line of the user's code that called the package."""

from __future__ import annotations

import sys
import warnings

_PASSED_THROUGH = ("sgr_kernels", "torch", "contextlib", "functools", "importlib")


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, naming the innermost line that is neither this package's nor of what its calls pass through."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED_THROUGH:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
