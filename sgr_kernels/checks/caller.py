"""Warnings that point at the line of the user's code that called the package."""

from __future__ import annotations

import sys
import warnings

_PASSED_THROUGH = ("sgr_kernels", "torch", "contextlib", "functools", "importlib")


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, naming the innermost line that is neither this package's nor of what its calls pass through."""
    frame = sys._getframe()
    while frame.f_back is not None and _module(frame.f_globals).partition(".")[0] in _PASSED_THROUGH:
        frame = frame.f_back
    # Not by a number of frames: warnings.warn leaves out those of imports when it counts.
    seen = frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(
        message, category, frame.f_code.co_filename, frame.f_lineno, _module(frame.f_globals), registry=seen
    )


def _module(namespace: dict[str, object]) -> str:
    return str(namespace.get("__name__", ""))
