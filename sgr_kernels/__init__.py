"""Structured gradient regularization (SGR) for PyTorch."""

from sgr_kernels import backends, functional
from sgr_kernels._version import __version__
from sgr_kernels.backends import use_backend

__all__ = ["__version__", "backends", "functional", "use_backend"]
