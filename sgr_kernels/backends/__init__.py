"""Backends: ways to compute the operators. ``registry`` chooses, each other file is one way."""

from sgr_kernels.backends import native, reference, triton_spectral
from sgr_kernels.backends.extension import BuildInfo, build_info
from sgr_kernels.backends.registry import Backend, Request, available, choose, names, register, use_backend

__all__ = [
    "Backend",
    "BuildInfo",
    "Request",
    "available",
    "build_info",
    "choose",
    "names",
    "register",
    "use_backend",
]

# In the order of preference of backend="auto".
register(native.BACKEND)
register(triton_spectral.BACKEND)
register(Backend("torch", lambda request: None))
register(reference.BACKEND)
