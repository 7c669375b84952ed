"""Structured gradient regularization (SGR) for PyTorch."""

from sgr_kernels._version import __version__

__all__ = ["__version__"]
