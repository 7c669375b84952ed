"""The machine code of the Triton kernels, on any machine: registers, shared memory, tensor-core instructions.

Compiles what the operators launch for the benchmark's shapes, ahead of time, for GPUs that need not be there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets its kernels in this process", allow_module_level=True)

from sgr_kernels.backends.triton_spectral import launch
from sgr_kernels.toeplitz.spectrum import frequency_counts
from tests.triton_launches import Launch, launches, machine_code

pytestmark = pytest.mark.slow

# Of a block, in KiB: 164 and 228 of a multiprocessor less 1 that the system keeps. RTX cards have 99.
SHARED_LIMITS = {80: 163, 90: 227, 100: 227}
TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA", "DMMA")
WITHOUT_PRODUCTS = ("arrange_kernel", "mix_kernel", "gram_kernel")


@dataclass(frozen=True)
class Problem:
    """A call of an operator: its shape, what is asked for, and how."""

    shape: tuple[int, int, int, int]
    operators: tuple[str, ...]
    architectures: tuple[int, ...] = (90,)
    reach: int | None = None
    signed: bool = False
    precision: str = "highest"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        options = [f"reach{self.reach}"] * (self.reach is not None) + ["signed"] * self.signed
        return "-".join(["x".join(map(str, self.shape)), *options, self.precision, str(self.dtype)[6:]])

    def launches(self) -> list[Launch]:
        """What the operators launch, on tensors without data."""
        channels, *size = self.shape[1:]
        table = tuple(n if self.reach is None else min(n, self.reach + 1) for n in size)
        frequencies = frequency_counts((size[0], size[1]), (table[0], table[1]))
        images = torch.empty(self.shape, dtype=self.dtype, device="meta")
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        parts = (4,) if self.signed else ()
        spectrum = torch.empty(*parts, channels, channels, *frequencies, dtype=wide, device="meta")
        other = torch.empty_like(images)
        calls = {
            "v": lambda: launch.product(images, spectrum, self.precision),
            "q": lambda: launch.quadratic_form(images, spectrum, False, self.precision),
            "v+q": lambda: launch.quadratic_form(images, spectrum, True, self.precision),
            "accumulation": lambda: launch.cross_spectrum(images, images, *frequencies, self.signed, self.precision),
            "cross": lambda: launch.cross_spectrum(images, other, *frequencies, self.signed, self.precision),
        }
        return [found for operator in self.operators for found in launches(calls[operator])]


BENCHMARK = ("q", "v+q", "accumulation")
EVERYWHERE = (80, 90, 100)
# With every register of a multiprocessor in use, the compiler puts four words of v alone aside from 9.0 on; other
# orders of the same work and barriers left as much or more. The kernel of v and q, with a sum in addition, spills none.
# The accumulation of two different inputs holds a channel of the second beside the first's.
SPILLED = {
    (90, Problem((256, 3, 64, 64), ("cross",), EVERYWHERE)): 24,
    (100, Problem((256, 3, 64, 64), ("cross",), EVERYWHERE)): 40,
    (90, Problem((256, 3, 64, 64), ("v",), EVERYWHERE)): 16,
    (100, Problem((256, 3, 64, 64), ("v",), EVERYWHERE)): 16,
}
PROBLEMS = [
    Problem((1024, 3, 32, 32), (*BENCHMARK, "v"), EVERYWHERE),
    Problem((256, 3, 64, 64), BENCHMARK, EVERYWHERE),
    Problem((256, 3, 64, 64), ("v",), EVERYWHERE),
    Problem((256, 3, 64, 64), ("cross",), EVERYWHERE),
    Problem((64, 3, 224, 224), ("v+q", "v", "q", "accumulation"), EVERYWHERE),
    Problem((128, 1, 28, 28), ("v+q", "accumulation"), EVERYWHERE, signed=True),
    Problem((128, 1, 28, 28), (*BENCHMARK, "v", "cross")),
    Problem((1024, 3, 32, 32), ("cross",)),
    Problem((256, 1, 64, 64), ("v+q", "accumulation")),
    Problem((8, 3, 512, 512), ("v+q",), EVERYWHERE),
    Problem((8, 3, 1024, 100), ("v+q",), EVERYWHERE),
    Problem((8, 5, 225, 227), ("v+q",), EVERYWHERE),
    Problem((8, 4, 256, 256), ("v+q",)),
    Problem((8, 1, 1024, 512), ("v+q",)),
    Problem((8, 5, 224, 224), ("v+q",), EVERYWHERE),
    Problem((1024, 3, 32, 32), ("v+q", "accumulation"), reach=8),
    Problem((256, 3, 64, 64), ("v+q", "accumulation"), reach=8),
    Problem((64, 3, 224, 224), ("v+q",), reach=16),
    *(Problem((1024, 3, 32, 32), ("v+q", "accumulation"), precision=p) for p in ("high", "medium")),
    *(Problem((256, 3, 64, 64), ("v+q",), EVERYWHERE, precision=p) for p in ("high", "medium")),
    Problem((64, 3, 224, 224), ("v+q",), precision="medium"),
    *(Problem((128, 3, 32, 32), ("v+q",), dtype=d) for d in (torch.bfloat16, torch.float16)),
    Problem((128, 4, 32, 32), ("v+q",)),
    Problem((128, 3, 32, 32), ("v+q", "accumulation"), signed=True),
    Problem((128, 3, 32, 32), ("v+q",), EVERYWHERE, dtype=torch.float64),
]
CASES = [(p, a) for p in PROBLEMS for a in p.architectures]


@pytest.mark.parametrize(("problem", "architecture"), CASES, ids=[f"sm_{a}-{p}" for p, a in CASES])
def test_kernels_keep_to_registers_and_use_tensor_cores(problem: Problem, architecture: int, tmp_path: Path) -> None:
    for kernel in problem.launches():
        code = machine_code(kernel, architecture, tmp_path)
        assert code.local <= SPILLED.get((architecture, problem), 0), f"{kernel}: {code.local} bytes spilled"
        assert code.shared <= SHARED_LIMITS[architecture] << 10, kernel
        products = sum(code.opcodes[name] for name in TENSOR_CORES)
        # For 10.0, Triton multiplies float64 matrices without tensor cores.
        expected = kernel.name not in WITHOUT_PRODUCTS and (problem.dtype != torch.float64 or architecture < 100)
        assert (products > 0) == expected, kernel
        # Sums have a fixed order; sines, quotients and remainders are constants' business.
        assert not set(code.opcodes) & {"ATOM", "ATOMG", "RED", "REDG", "MUFU"}, kernel


def test_every_kernel_is_compiled_for_every_architecture() -> None:
    kernels = {"fused_kernel", "fused_gram_kernel", "forward_kernel", "columns_kernel", "inverse_kernel"}
    kernels |= set(WITHOUT_PRODUCTS)
    for architecture in SHARED_LIMITS:
        compiled = {k.name for p in PROBLEMS if architecture in p.architectures for k in p.launches()}
        assert compiled == kernels
