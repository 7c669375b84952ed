"""What users would write without us: the dense product, a chain of real FFTs, a convolution with the whole kernel."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from benchmarks.shapes import Problem, folded, periodic, power_of_two
from benchmarks.timing import Run
from sgr_kernels.toeplitz.geometry import dense_matrix, nearest_bin, radial_from_even

Product = Callable[[Tensor], Tensor]
_DENSE_BYTES = {"cpu": 2 * 2**30, "cuda": 16 * 2**30}
_CONVOLUTION_FLOPS = {"cpu": 1.2e10, "cuda": 2e12}
"""More would take seconds a call."""


class Unsupported(Exception):
    """A provider does not serve a cell; the message says why."""


class _Symmetric(Function):
    """``q = g^T Sigma g`` for a symmetric Sigma given by its product; the backward reuses the product."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, product: Product) -> Tensor:
        v = product(images)
        ctx.save_for_backward(v)
        return inner(images, v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (v,) = ctx.saved_tensors
        return v * (2 * grad)[:, None, None, None], None


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample of a batch."""
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1))


def with_backward(quadratic_form: Product) -> Run:
    """Value and gradient of the sum of a differentiable quadratic form."""

    def run(images: Tensor) -> tuple[Tensor, ...]:
        leaf = images.detach().requires_grad_()
        q = quadratic_form(leaf)
        (grad,) = torch.autograd.grad(q, leaf, torch.ones_like(q))
        return q.detach(), grad

    return run


def _runs(operation: str, product: Product, form: Product | None = None) -> Run:
    """The run of an operation, from a product and, where there is a faster way to it, the quadratic form."""

    def both(images: Tensor) -> tuple[Tensor, ...]:
        v = product(images)
        return inner(images, v), v

    if operation == "q":
        return (lambda images: (form(images),)) if form else lambda images: both(images)[:1]
    return both if operation == "v+q" else with_backward(lambda images: _Symmetric.apply(images, product))


def dense(dtype: torch.dtype) -> Callable[[Problem, str, torch.device], Run]:
    """Matrix product with Sigma built beforehand in ``dtype``; the Gram matrix and its bins for accumulation."""

    def prepare(problem: Problem, operation: str, device: torch.device) -> Run:
        needed = problem.dimension**2 * 4
        limit = _DENSE_BYTES[device.type]
        if needed > limit:
            raise Unsupported(f"the matrix takes {needed / 1e9:.1f} GB, more than {limit / 1e9:.1f} GB")
        if operation == "accumulation":
            return _gram(problem, device, dtype)
        sigma = _sigma(problem, device).to(dtype)

        def product(images: Tensor) -> Tensor:
            return (images.flatten(1).to(dtype) @ sigma).to(images.dtype).view_as(images)

        return _runs(operation, product)

    return prepare


@functools.lru_cache(maxsize=1)
def _sigma(problem: Problem, device: torch.device) -> Tensor:
    """Sigma in float32; kept for the next operation of the same problem."""
    return dense_matrix(problem.covariance(device).table, problem.size)


def _gram(problem: Problem, device: torch.device, dtype: torch.dtype) -> Run:
    pixels, channels, bins = problem.height * problem.width, problem.channels, problem.bins
    position = torch.arange(pixels, device=device)
    y, x = position // problem.width, position % problem.width
    table_bins = nearest_bin(problem.size, device)
    index = table_bins[(y[:, None] - y).abs(), (x[:, None] - x).abs()].flatten().clamp(max=bins)
    counts = torch.bincount(index, minlength=bins + 1)[:bins] * problem.batch

    def run(images: Tensor) -> tuple[Tensor, ...]:
        flat = images.flatten(2).transpose(0, 1).to(dtype)  # (C, B, P)
        blocks = (flat.mT[:, None] @ flat[None]).flatten(0, 1).flatten(1).float()
        sums = blocks.new_zeros(channels**2, bins + 1).index_add_(1, index, blocks)
        return ((sums[:, :bins] / counts).view(channels, channels, bins),)

    return run


def rfft2(compiled: bool) -> Callable[[Problem, str, torch.device], Run]:
    """Pad to powers of two, transform, multiply by the cached real spectrum, transform back, crop."""

    def prepare(problem: Problem, operation: str, device: torch.device) -> Run:
        if compiled and operation != "v+q":
            raise Unsupported("compiled for v+q alone, to bound the time that compiling takes")
        table = problem.covariance(device).table
        reach = (table.shape[2], table.shape[3])
        period = [power_of_two(extent + r - 1) for extent, r in zip(problem.size, reach)]
        if operation == "accumulation":
            return _fft_accumulation(problem, reach, period)
        kernel = torch.fft.rfft2(periodic(table.double(), period)).real.float()
        weight = torch.full((period[1] // 2 + 1,), 2.0, device=device)
        weight[0] = 1.0
        weight[-1] = 1.0
        weight /= period[0] * period[1]

        def mix(images: Tensor) -> tuple[Tensor, Tensor]:
            z = torch.view_as_real(torch.fft.rfft2(images, s=period))  # (B, C, Ph, Pw/2+1, 2)
            if problem.channels > 4:
                return z, torch.einsum("cdkl,ndklr->ncklr", kernel, z)
            rows = []
            for c in range(problem.channels):
                row = z[:, 0] * kernel[c, 0, ..., None]
                for d in range(1, problem.channels):
                    row = torch.addcmul(row, z[:, d], kernel[c, d, ..., None])
                rows.append(row)
            return z, torch.stack(rows, 1) if len(rows) > 1 else rows[0][:, None]

        def product(images: Tensor) -> Tensor:
            mixed = torch.view_as_complex(mix(images)[1])
            return torch.fft.irfft2(mixed, s=period)[..., : problem.height, : problem.width]

        def form(images: Tensor) -> Tensor:
            z, mixed = mix(images)
            return ((z * mixed).sum((1, 2, 4)) @ weight[:, None])[:, 0]

        run = _runs(operation, product, form)
        return _compiled(run, problem, device) if compiled else run

    return prepare


def _compiled(run: Run, problem: Problem, device: torch.device) -> Run:
    call = torch.compile(run, dynamic=False)
    images = problem.images(device)

    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of inductor: complex numbers are left to eager kernels
            call(images)
    except Exception as error:  # whatever a compiler raises
        raise Unsupported(f"torch.compile failed: {str(error).splitlines()[0]}") from error
    return call


def _fft_accumulation(problem: Problem, reach: tuple[int, int], period: list[int]) -> Run:
    def run(images: Tensor) -> tuple[Tensor, ...]:
        z = torch.view_as_real(torch.fft.rfft2(images, s=period))
        channels = range(problem.channels)
        # The imaginary part of the cross spectrum is odd in the displacement: folding cancels it.
        power = torch.stack([(z[:, c] * z[:, d]).sum((0, 3)) for c in channels for d in channels])
        sums = folded(torch.fft.irfft2(power.unflatten(0, (problem.channels, -1)), s=period), reach)
        return (radial_from_even(sums, problem.size, problem.bins) / problem.batch,)

    return run


def conv2d(problem: Problem, operation: str, device: torch.device) -> Run:
    """Convolution with the whole kernel, (C, C, 2R+1, 2R+1)."""
    if operation == "accumulation":
        raise Unsupported("a convolution with the covariance estimates none")
    table = problem.covariance(device).table
    h, w = table.shape[2:]
    flops = 2.0 * problem.batch * problem.dimension * problem.channels * (2 * h - 1) * (2 * w - 1)
    limit = _CONVOLUTION_FLOPS[device.type]
    if flops > limit:
        raise Unsupported(f"{flops / 1e12:.1f} Tflop, more than {limit / 1e12:.1f} Tflop")
    kernel = periodic(table, [2 * h - 1, 2 * w - 1]).roll((h - 1, w - 1), (2, 3))

    def product(images: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(images, kernel, padding=(h - 1, w - 1))

    return _runs(operation, product)
