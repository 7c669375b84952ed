"""Backends: ways to compute the operators. ``registry`` chooses, each other file is one way."""

from sgr_kernels.backends import reference
from sgr_kernels.backends.registry import Backend, Request, available, choose, names, register, use_backend

__all__ = ["Backend", "Request", "available", "choose", "names", "register", "use_backend"]

# In the order of preference of backend="auto".
register(Backend("torch", lambda request: None))
register(reference.BACKEND)
