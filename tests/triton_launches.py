"""The launches that an operator makes, recorded instead of made, and compiled for GPUs that need not be there."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sgr_kernels.backends.triton_spectral import launch, staged_launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_POINTERS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
_OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Launch:
    """A kernel and what its compilation depends on, as Triton itself sees a call's arguments."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in (*self.constants, *self.options))})"

    @staticmethod
    def of(kernel: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Launch:
        options = {k: v for k, v in keywords.items() if k in _OPTIONS}
        values = dict(zip(kernel.arg_names, arguments))
        values |= {k: v for k, v in keywords.items() if k not in options}
        signature, constants, divisible = {}, {}, []
        for place, parameter in enumerate(kernel.params):
            value = values[parameter.name]
            if parameter.is_constexpr or (type(value) is int and value == 1):
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[parameter.name] = f"*{_POINTERS[value.dtype]}"
                divisible.append(place)
            elif isinstance(value, float):
                signature[parameter.name] = "fp32"
            else:
                signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
                if value % 16 == 0 and not parameter.do_not_specialize:
                    divisible.append(place)
        return Launch(
            kernel, tuple(signature.items()), tuple(constants.items()), tuple(divisible), tuple(options.items())
        )


def launches(call: Callable[[], Any]) -> list[Launch]:
    """The different launches of a call to `launch`'s operators, in their order."""
    return list(dict.fromkeys(made for made, _ in recorded(call)))


def recorded(call: Callable[[], Any]) -> list[tuple[Launch, int]]:
    """All launches of a call, in their order, each with the bytes of the tensors that it takes."""
    found: list[tuple[Launch, int]] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            assert all(0 < size < 2**31 for size in grid)
            assert all(size < 2**16 for size in grid[1:])
            return self.record

        def record(self, *args: Any, **kwargs: Any) -> None:
            touched = sum(a.numel() * a.itemsize for a in args if isinstance(a, Tensor))
            found.append((Launch.of(self.kernel, args, kwargs), touched))

    with patch.object(launch, "wrap_triton", Recorder), patch.object(staged_launch, "wrap_triton", Recorder):
        call()
    return found


@dataclass(frozen=True)
class MachineCode:
    """What became of a kernel."""

    shared: int
    """Bytes of shared memory of a block."""
    registers: int
    local: int
    """Bytes of stack and local memory of a thread."""
    opcodes: Counter[str]


@functools.cache
def machine_code(launch: Launch, architecture: int, folder: Path) -> MachineCode:
    """Compile a launch for compute capability ``architecture`` (80 is 8.0)."""
    attributes = {(place,): [["tt.divisibility", 16]] for place in launch.divisible}
    source = ASTSource(launch.kernel, dict(launch.signature), dict(launch.constants), attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(launch.options))
    binary = folder / f"{os.getpid()}.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    # cuobjdump has nvdisasm analyse and encode the code, too, of which nothing is asked.
    usage, code = (
        subprocess.run([TOOLS / tool, *options, binary], capture_output=True, text=True, check=True).stdout
        for tool, *options in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c", "-ndf"))
    )
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", code, re.MULTILINE)
    return MachineCode(
        compiled.metadata.shared, resources["REG"], resources["STACK"] + resources["LOCAL"], Counter(opcodes)
    )
