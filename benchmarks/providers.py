"""Ways to compute the operators: ours, and the peers that users would write without us.

Everybody does the same job: float32 in, float32 out, with whatever depends on the covariance alone built beforehand.
Peers get what our backward has, that the gradient of q is 2 Sigma g and Sigma g is known already, and choose the
fastest way to q. ``sgr reference`` forms Sigma anew in each call; it is asked of tiny images alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import sgr_kernels as sgr
from benchmarks import peers
from benchmarks.peers import Unsupported
from benchmarks.shapes import Problem
from benchmarks.timing import Run
from sgr_kernels import backends, functional, ops

TOLERANCES = {
    "highest": {"v": 5e-6, "q": 1e-6, "f": 1e-6, "tail": 2e-5},
    "high": {"v": 1e-2, "q": 5e-3, "f": 2e-4, "tail": 4e-3},
    "medium": {"v": 6e-2, "q": 3e-2, "f": 5e-3, "tail": 1e-1},
}
"""Errors beyond which an answer is wrong, by precision: float32, TF32, bfloat16."""
_BACKENDS = ("auto", "native", "triton", "torch", "reference")
_LARGEST_REFERENCE = 256


@dataclass(frozen=True)
class Provider:
    """A way to compute; ``prepare(problem, operation, device)`` returns the call or raises `Unsupported`."""

    name: str
    kind: str  # "ours", "peer", or "bound"
    prepare: Callable[[Problem, str, torch.device], Run]
    precision: str = "highest"

    def build(self, problem: Problem, operation: str, device: torch.device) -> Run:
        """The call, in this provider's precision and without autograd where the operation needs none.

        Raises:
            Unsupported: If there is no such call; the message says why.
        """
        if device.type != "cuda" and self.precision == "high":
            raise Unsupported("TF32 is a format of GPUs")
        run = self.prepare(problem, operation, device)
        graph = operation == "forward+backward"

        def call(images: Tensor) -> tuple[Tensor, ...]:
            with precision(self.precision), torch.set_grad_enabled(graph):
                return run(images)

        return call

    def correct(self, error: dict[str, float]) -> bool:
        """Whether errors are within `TOLERANCES`; the tail of a covariance function is asked of ours alone."""
        limits = TOLERANCES[self.precision]
        return all(e <= limits[name] for name, e in error.items() if name != "tail" or self.kind == "ours")


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """Precision of float32 products, matrix products' and convolutions' alike."""
    before, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    if before == name and convolutions == (name != "highest"):
        yield
        return
    torch.set_float32_matmul_precision(name)
    torch.backends.cudnn.allow_tf32 = name != "highest"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolutions


def _ours(backend: str) -> Callable[[Problem, str, torch.device], Run]:
    """Our operators through the public interface; v+q by the registered operator beneath, which returns both."""

    def prepare(problem: Problem, operation: str, device: torch.device) -> Run:
        covariance = problem.covariance(device)
        if backend == "reference" and (operation == "v+q" or problem.dimension > _LARGEST_REFERENCE):
            raise Unsupported(f"measured for q, up to a dimension of {_LARGEST_REFERENCE}")
        operator = "cross_spectrum" if operation == "accumulation" else "quadratic_form"
        images = torch.empty(1, device=device).expand(problem.batch, problem.channels, *problem.size)
        request = functional.operators.request(operator, images, "even")
        try:
            with backends.use_backend(backend):  # also "auto", whatever SGR_BACKEND says
                chosen = backends.choose(backend, request)
        except (ValueError, RuntimeError) as error:
            raise Unsupported(str(error)) from error

        def accumulation(images: Tensor) -> tuple[Tensor, ...]:
            with backends.use_backend(backend):
                return (sgr.functional.displacement_covariance(images, max_displacement=problem.max_displacement),)

        def q(images: Tensor) -> tuple[Tensor, ...]:
            with backends.use_backend(backend):
                return (covariance.quadratic_form(images),)

        def both(images: Tensor) -> tuple[Tensor, ...]:
            level = torch.get_float32_matmul_precision() if images.is_cuda else "highest"
            return ops.call("quadratic_form", chosen, images, covariance.spectrum, True, level)

        runs: dict[str, Run] = {"q": q, "v+q": both, "accumulation": accumulation}
        runs["forward+backward"] = peers.with_backward(lambda images: q(images)[0])
        return runs[operation]

    return prepare


def _copy(problem: Problem, operation: str, device: torch.device) -> Run:
    return lambda images: (images.clone(),)


def all_providers(device: torch.device) -> list[Provider]:
    """Every provider for a device; on CPUs products are float32 whatever the precision, so ours come once."""
    ours = [Provider(f"sgr {name}", "ours", _ours(name)) for name in _BACKENDS]
    if device.type == "cuda":
        ours += [
            Provider(f"sgr {name} {label}", "ours", _ours(name), level)
            for label, level in (("tf32", "high"), ("bf16", "medium"))
            for name in ("native", "triton")
        ]
    return [
        Provider("copy", "bound", _copy),
        *ours,
        Provider("dense", "peer", peers.dense(torch.float32)),
        Provider("dense tf32", "peer", peers.dense(torch.float32), "high"),
        Provider("dense bf16", "peer", peers.dense(torch.bfloat16), "medium"),
        Provider("rfft2", "peer", peers.rfft2(compiled=False)),
        Provider("rfft2 compiled", "peer", peers.rfft2(compiled=True)),
        Provider("conv2d", "peer", peers.conv2d),
    ]


def named(names: list[str] | None, device: torch.device) -> list[Provider]:
    """Providers by name, in the order of `all_providers`; None means all.

    Raises:
        ValueError: If there is no provider of a name.
    """
    providers = all_providers(device)
    known = [p.name for p in providers]
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise ValueError(f"providers: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    return [p for p in providers if names is None or p.name in names]
