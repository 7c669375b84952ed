"""The compiled kernels as a backend: C++ on CPUs, CUDA C++ on NVIDIA GPUs (csrc/)."""

from __future__ import annotations

import math
import re

import torch

from sgr_kernels.backends.extension import build_info
from sgr_kernels.backends.registry import Backend, Request
from sgr_kernels.toeplitz.geometry import Size
from sgr_kernels.toeplitz.spectrum import frequency_counts

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Once, at import: a compiler that traces `can_run` sees constants.
_KERNELS = tuple(build_info()["kernels"])
_ARCHITECTURES = tuple(build_info()["cuda_architectures"])
_ERROR = build_info()["error"]

_obstacles: dict[torch.device, str | None] = {}


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture runs on GPUs of a compute capability.

    Machine code (``sm_80``) does on those of its major version from its minor version on, PTX (``compute_80``) on all
    from its version on; with a suffix, ``a`` or ``f``, both are bound to their version or its major part.
    """
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
    if match is None:
        return False
    version, suffix = (int(match[2]), int(match[3])), match[4]
    if suffix == "a":
        return capability == version
    same_major = capability[0] == version[0]
    return capability >= version and (same_major or (match[1] == "compute" and not suffix))


def _obstacle(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot run on a GPU; found out once for each."""
    if not torch.cuda.is_available():
        return "this torch sees no CUDA device"
    if device not in _obstacles:
        capability = torch.cuda.get_device_capability(device)
        served = any(runs_on(architecture, capability) for architecture in _ARCHITECTURES)
        _obstacles[device] = (
            None
            if served
            else (
                f"the compiled kernels are for {', '.join(_ARCHITECTURES)}, and {device} has compute capability "
                f"{capability[0]}.{capability[1]}; TORCH_CUDA_ARCH_LIST chooses what the build compiles (from 8.0 on)"
            )
        )
    return _obstacles[device]


# As torch.compiler.assume_constant_result does, which would import the compiler.
_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _can_run(request: Request) -> str | None:
    if request.device.type not in _KERNELS:
        return _ERROR or f"the compiled kernels were built without support for {request.device.type} tensors"
    if request.dtype not in _DTYPES:
        return f"there are no compiled kernels for {request.dtype}"
    return _obstacle(request.device) if request.device.type == "cuda" else None


# Numbers of frequencies for which the CUDA kernels have Fourier transforms, and the square that each is a multiple of.
# `fourier_side` (csrc/cuda/fourier.cuh) has the rule; a test holds this beside it.
_RADICES = {64: (*range(2, 11), 12, 14, 15, 16), 16: (*range(2, 11), 12, 14)}
_SQUARES = {square * radix: square for square, radices in _RADICES.items() for radix in radices}
_FUSED = 64
_TRANSFORMED_CHANNELS = 3

# Sides of images on GPUs. By counts (benchmarks/results/cuda-static.json, `test_choice`): instructions of products of
# matrices grow with the cube of a side, the passes over memory of a Fourier transform with its square. An A100 issues
# two thirds of an H100's instructions and moves half to two thirds of its bytes: the same sides serve both.
_FFT_FROM = 512


def frequencies(request: Request, displacements: Size) -> Size:
    """Numbers of odd frequencies (Fh, Fw) to take for a table of so many displacements (h, w), zero included.

    The fewest that are exact; on GPUs, where more of them have Fourier transforms in the compiled kernels, so many.
    """
    fewest = frequency_counts(request.size, displacements)
    if request.device.type != "cuda" or _can_run(request) is not None:
        return fewest
    return transformed(request, fewest) or fewest


def transformed(request: Request, fewest: Size) -> Size | None:
    """The next numbers from ``fewest`` on by which the CUDA kernels transform large images; None where they do not."""
    if request.dtype == torch.float64 or request.channels > _TRANSFORMED_CHANNELS or request.form != "even":
        return None
    if max(*request.size, *fewest) <= _FUSED or max(fewest) > max(_SQUARES):
        return None
    rows, columns = (min(length for length in _SQUARES if length >= least) for least in fewest)
    square = _SQUARES[rows]
    shared = 256 * (math.isqrt(square) + 1) * request.channels * (rows // square) + 128  # of a block of columns
    return (rows, columns) if shared <= _shared_memory(request.device) else None


def fft_expected_faster(request: Request, sides: int) -> bool:
    """Whether PyTorch's chain of rfft2 is expected to beat products of matrices on GPUs: where sides average ``sides``.

    None of it is measured yet.
    """
    if request.device.type != "cuda" or request.operator == "cross_spectrum" or request.form != "even":
        return False
    return sum(request.size) >= 2 * sides


def _shared_memory(device: torch.device) -> int:
    """Bytes that a block of threads may have; those of an H100 where there is no GPU to ask."""
    if not torch.cuda.is_available():
        return 227 << 10
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


_shared_memory._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _slow(request: Request) -> bool:
    """Whether PyTorch's FFT is faster than the CPU kernels, which split an axis in two levels at most.

    Measured: for signals from 4,096 samples on, or of some hundreds that do not split well (a prime 509), and for
    images with a side of thousands that does not (2,039 is about the same, 4,093 several times slower).
    """
    if request.device.type == "cuda":
        # By counts transforms take a sixth of that chain's time, which moves an image's bytes thirty times as often.
        return fft_expected_faster(request, _FFT_FROM) and transformed(request, request.size) is None
    if request.device.type != "cpu" or max(request.size) < 509:
        return False
    operations = max(map(_operations, request.size))
    return max(request.size) >= 4096 or operations > 250 if min(request.size) == 1 else operations > 1500


def _operations(extent: int) -> int:
    """Multiply-adds for a pixel and an axis, with the best split: as csrc/cpu/axis.cpp counts them."""
    lengths = [n for n in range(2, min(extent, 512) + 1) if extent % n == 0]
    return min([extent // 2, *(extent // (2 * n) + n + 24 for n in lengths)])


BACKEND = Backend("native", _can_run, by_name_only=_slow)
