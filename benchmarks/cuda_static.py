"""What the CUDA kernels cost, counted without a GPU: ``sgr bench cuda-static``.

From the machine code (registers, spills, instructions that a warp issues) and from executing the schedule on the
emulated device (launches, bytes of device memory), for the headline shapes; and the least time that each count allows.
Needs nvcc, cuobjdump (the toolkit's, or Triton's) and g++. Counts are exact up to what is said here: instructions are
those of four warps of a block, of all where they differ, of three blocks where a block has one turn, times all, and of
the busiest of a warp's first, middle and last thread where loops depend on tables; bytes of images above 64 pixels
are those of one and two images, extrapolated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.sass import Instruction, Machine, Walk, parse, walk
from sgr_kernels.backends import Request, native
from sgr_kernels.toeplitz.geometry import Size

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "csrc" / "cuda"
EMULATION = ROOT / "tests" / "emulation"
RESULT = Path(__file__).parent / "results" / "cuda-static.json"
# Up to 64 pixels v+q finds its spectrum arranged, as a covariance has it; "given" is one that is not.
OPERATIONS = {"v+q": 5, "v+q given": 1, "accumulation": 3, "update": 4}
CASES = [
    ("v+q", (128, 1, 28, 28)),
    ("v+q", (1024, 1, 28, 28)),
    ("v+q", (128, 3, 32, 32)),
    ("v+q", (1024, 3, 32, 32)),
    ("v+q", (256, 3, 64, 64)),
    ("v+q", (64, 3, 224, 224)),
    ("v+q", (8, 3, 512, 512)),
    ("accumulation", (1024, 3, 32, 32)),
    ("update", (1024, 3, 32, 32)),
]
# Of these, instructions alone: images whose frequencies are rounded up, and what may be faster by PyTorch's rfft2.
BY_INSTRUCTIONS = [
    ("v+q", (64, 3, 65, 65)),
    ("v+q", (64, 3, 100, 100)),
    ("v+q", (8, 3, 300, 300)),
    ("v+q", (64, 1, 1, 1024)),
    ("v+q", (8, 4, 512, 512)),
    ("v+q", (8, 3, 1024, 1024)),
]
SAMPLED_BLOCKS = 3
TURN = 12  # images that a block takes in whole turns: it has one to four at a time

# Where the parameters of a kernel begin in the constant bank; registers, shared memory and warps of a multiprocessor.
PARAMETERS = {"sm_80": 0x160, "sm_90": 0x210}
SHARED_MEMORY = {"sm_80": 164 << 10, "sm_90": 228 << 10}
SCHEDULERS = 4


@dataclass(frozen=True)
class Device:
    """Assumed of a GPU, to be replaced by measurements."""

    multiprocessors: int
    clock: float
    tensor_cycles: float
    """Of a scheduler, for a tensor-core instruction of 2048 (fp16) or 1024 (tf32) products."""
    l2_bytes: float
    """A second, as all that follow."""
    memory_bytes: dict[str, float]


DEVICES = {
    "sm_80": Device(108, 1.41e9, 8, 4.5e12, {"A100": 1.555e12, "A100 of 80 GB": 2.0e12}),
    "sm_90": Device(132, 1.755e9, 6.5, 5.5e12, {"H100": 3.0e12, "H200": 4.3e12}),
}
DOUBLE_CYCLES = {"sm_80": 4, "sm_90": 2}  # of a scheduler, for a multiply-add of a warp in float64
LAUNCH = 1.2e-6  # seconds of a kernel that does nothing


@dataclass
class Launch:
    """One kernel launch of a call."""

    kernel: str
    symbol: str
    grid: tuple[int, int]
    threads: int
    shared: int
    parameters: bytes
    bytes: Counter[str]
    constants: dict[int, int] = field(default_factory=dict)
    """Words of tables in device memory, by address."""

    @property
    def blocks(self) -> int:
        """Blocks of threads."""
        return self.grid[0] * self.grid[1]

    @property
    def name(self) -> str:
        """Without namespaces and parameters."""
        text = re.sub(r"sgr::cuda::", "", self.kernel.removeprefix("void "))
        return re.sub(r" (?=>)", "", text[: text.rindex("(")])


@dataclass
class Code:
    """A kernel's machine code for one architecture."""

    registers: int
    stack: int
    instructions: list[Instruction]


@dataclass
class Tools:
    """The programs that count, and what they have built in ``directory``."""

    directory: Path
    cuobjdump: str = field(default_factory=lambda: find_cuobjdump() or "")
    nvcc: str = field(default_factory=lambda: shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc") or "")

    def missing(self) -> str | None:
        """Why nothing can be counted; None where it can."""
        needed = {"nvcc": self.nvcc, "cuobjdump": self.cuobjdump, "g++": shutil.which("g++")}
        absent = [name for name, path in needed.items() if not path]
        return f"not found: {', '.join(absent)}" if absent else None

    def build_tally(self) -> Path:
        """Compile the emulated device that counts."""
        target = self.directory / "tally"
        flags = ["-std=c++17", "-O1", "-DSGR_COUNT_ONLY", "-fno-threadsafe-statics", f"-I{EMULATION}", f"-I{KERNELS}"]
        source, partial = str(EMULATION / "tally.cpp"), str(target.with_suffix(".o"))
        subprocess.run(["g++", *flags, "-fsanitize=thread", "-c", source, "-o", partial], check=True)
        subprocess.run(["g++", "-rdynamic", partial, "-ldl", "-o", str(target)], check=True)
        return target

    def launches(
        self,
        operation: str,
        shape: tuple[int, ...],
        architecture: str,
        resident: dict[str, int] | None = None,
        execute: bool = False,
    ) -> list[Launch]:
        """The launches of a call; their bytes where it is executed."""
        blocks = [text for pair in (resident or {}).items() for text in map(str, pair)]
        numbers = [OPERATIONS[operation], *shape, *frequencies(shape), int(execute), SHARED_MEMORY[architecture] - 1024]
        command = [str(self.directory / "tally"), *map(str, numbers), *blocks]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found: list[Launch] = []
        constants: dict[int, int] = {}
        for line in text.splitlines():
            if line.startswith("constants\t"):
                address, *words = map(int, line.split("\t")[1:])
                constants |= {address + 4 * i: word & 0xFFFFFFFF for i, word in enumerate(words)}
                continue
            kernel, symbol, x, y, threads, shared, parameters, *counts = line.split("\t")
            names = ("read", "written", "distinct read", "distinct written")
            by_name = Counter({name: int(count) for name, count in zip(names, counts)})
            sizes = (int(x), int(y)), int(threads), int(shared)
            found.append(Launch(kernel, symbol, *sizes, bytes.fromhex(parameters), by_name, constants))
        return found

    def compile(self, launches: list[Launch], architecture: str) -> dict[str, Code]:
        """The machine code of the launched kernels, by symbol."""
        symbols = {launch.symbol: launch for launch in launches}
        with ThreadPoolExecutor(2) as pool:
            codes = pool.map(lambda launch: self._compile_one(launch, architecture), symbols.values())
        return dict(zip(symbols, codes))

    def _compile_one(self, launch: Launch, architecture: str) -> Code:
        stem = self.directory / f"{architecture}-{re.sub(r'[^A-Za-z0-9]+', '-', launch.name)}"
        source, target = stem.with_suffix(".cu"), stem.with_suffix(".cubin")
        if not target.exists():
            name = launch.kernel.removeprefix("void ")
            name = name[: name.rindex("(")]
            source.write_text(f'#include "update_schedule.cuh"\nvoid* instance() {{ return (void*)&{name}; }}\n')
            flags = ["-std=c++17", "-O3", f"-arch={architecture}", f"-I{KERNELS}", "-cubin"]
            subprocess.run([self.nvcc, *flags, str(source), "-o", str(target)], check=True)
        usage = self._dump("-res-usage", target)
        numbers = re.search(rf"Function {launch.symbol}:\s*REG:(\d+) STACK:(\d+)", usage)
        assert numbers is not None, usage
        return Code(int(numbers[1]), int(numbers[2]), parse(self._dump("-sass", target, "-fun", launch.symbol)))

    def _dump(self, what: str, file: Path, *more: str) -> str:
        command = [self.cuobjdump, what, *more, str(file)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def frequencies(shape: tuple[int, ...]) -> Size:
    """Numbers of frequencies that the operators take on a GPU for images of a shape and a covariance across them."""
    batch, channels, height, width = shape
    device, size = torch.device("cuda"), (height, width)
    return native.transformed(Request("product", device, torch.float32, batch, channels, size, "even"), size) or size


def find_cuobjdump() -> str | None:
    """The toolkit's, or the one that Triton brings."""
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        candidate = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(candidate) if candidate.exists() else None
    return found


def resident_blocks(launch: Launch, code: Code, architecture: str) -> int:
    """Blocks that a multiprocessor holds at a time."""
    warps = launch.threads // 32
    by_registers = 65536 // (-(-code.registers * 32 // 256) * 256 * warps)
    by_shared = SHARED_MEMORY[architecture] // (-(-launch.shared // 1024) * 1024 + 1024)
    return min(by_registers, by_shared, 64 // warps, 32)


def walk_warp(launch: Launch, code: Code, architecture: str, block: int, warp: int) -> Walk:
    """What one warp issues: its busiest thread where threads differ."""
    constants = bytearray(PARAMETERS[architecture])
    constants[0:4] = launch.threads.to_bytes(4, "little")
    constants[12:16] = launch.grid[0].to_bytes(4, "little")
    constants[16:20] = launch.grid[1].to_bytes(4, "little")
    place = block % launch.grid[0], block // launch.grid[0]
    walks = [
        walk(
            code.instructions, Machine(bytes(constants) + launch.parameters, 32 * warp + lane, place, launch.constants)
        )
        for lane in ((0, 16, 31) if launch.constants else (0,))
    ]
    return max(walks, key=lambda found: found.issued)


def sampled_warps(launch: Launch) -> list[int]:
    """The outer and the middle ones; all of kernels whose warps do not do alike."""
    count = launch.threads // 32
    if launch.name.startswith("fourier"):
        return [*range(count)]
    return sorted({0, (count - 1) // 2, count // 2, count - 1})


def walk_launch(launch: Launch, code: Code, architecture: str) -> dict[str, float]:
    """What all warps issue, from a sample."""
    count = min(launch.blocks, SAMPLED_BLOCKS)
    blocks = {round(i * (launch.blocks - 1) / max(count - 1, 1)) for i in range(count)}
    warps = sampled_warps(launch)
    walks = [walk_warp(launch, code, architecture, block, warp) for block in sorted(blocks) for warp in warps]
    scale = launch.blocks * (launch.threads // 32) / len(walks)
    return {
        "instructions": scale * sum(w.issued for w in walks),
        "tensor-core instructions": scale * sum(w.tensor for w in walks),
        "float64 instructions": scale * sum(w.double for w in walks),
        "guessed branches": sum(w.guesses for w in walks),
    }


def walk_images(shape: tuple[int, ...], launch: Launch, code: Code, architecture: str) -> dict[str, float]:
    """Of a kernel whose blocks go through images: what all warps issue; the slowest's for an image and around them."""
    before = struct.pack("<qiii", *shape)  # Geometry begins so
    assert launch.parameters.count(before) == 1

    def walks(images: int) -> list[Walk]:
        sizes = struct.pack("<qiii", images * launch.grid[0], *shape[1:])
        same = dataclasses.replace(launch, parameters=launch.parameters.replace(before, sizes))
        return [walk_warp(same, code, architecture, 0, warp) for warp in sampled_warps(launch)]

    few, many = walks(TURN), walks(2 * TURN)
    per_image = [(b.issued - a.issued) / TURN for a, b in zip(few, many)]
    around = [2 * a.issued - b.issued for a, b in zip(few, many)]
    tensor = [(b.tensor - a.tensor) / TURN for a, b in zip(few, many)]
    scale = launch.grid[1] * (launch.threads // 32) / len(few)
    return {
        "instructions": scale * (shape[0] * sum(per_image) + launch.grid[0] * sum(around)),
        "tensor-core instructions": scale * shape[0] * sum(tensor),
        "guessed branches": sum(w.guesses for w in few),
        "instructions a warp and image": max(per_image),
        "instructions around them": max(around),
    }


def count_code(shape: tuple[int, ...], launches: list[Launch], codes: dict[str, Code], architecture: str) -> Any:
    """By kernel: registers, shared memory, launches, instructions."""
    kernels: dict[str, dict[str, Any]] = {}
    walked: dict[tuple[str, tuple[int, int]], dict[str, float]] = {}
    for launch in launches:
        code = codes[launch.symbol]
        key = launch.symbol, launch.grid
        if key not in walked:
            fused = launch.name.startswith(("fused_product", "fused_cross_spectrum"))
            arguments = launch, code, architecture
            walked[key] = walk_images(shape, *arguments) if fused else walk_launch(*arguments)
        if launch.name not in kernels:
            kernels[launch.name] = {
                "registers": code.registers,
                "spilled bytes": code.stack,
                "shared bytes": launch.shared,
                "resident blocks": resident_blocks(launch, code, architecture),
                "blocks": launch.blocks,
                "warps": launch.threads // 32,
                "launches": 1,
                **walked[key],
            }
        else:
            known = kernels[launch.name]
            known["launches"] += 1
            for name, amount in walked[key].items():
                known[name] += amount
    return kernels


def count_bytes(
    tools: Tools, operation: str, shape: tuple[int, ...], architecture: str, resident: dict[str, int]
) -> dict[str, float]:
    """Bytes of device memory that a call reads and writes."""
    small = shape[2] * shape[3] <= 64 * 64
    sums = [
        sum(
            (
                found.bytes
                for found in tools.launches(operation, (batch, *shape[1:]), architecture, resident, execute=True)
            ),
            Counter(),
        )
        for batch in ((shape[0],) if small else (1, 2))
    ]
    return dict(sums[0]) if small else {k: sums[0][k] + (sums[1][k] - sums[0][k]) * (shape[0] - 1) for k in sums[0]}


def count(
    tools: Tools, operation: str, shape: tuple[int, ...], architecture: str, with_bytes: bool = True
) -> dict[str, Any]:
    """All counts of a call, and the least times that they allow."""
    launches = tools.launches(operation, shape, architecture)
    codes = tools.compile(launches, architecture)
    resident = {found.symbol: resident_blocks(found, codes[found.symbol], architecture) for found in launches}
    launches = tools.launches(operation, shape, architecture, resident)
    kernels = count_code(shape, launches, codes, architecture)
    moved = count_bytes(tools, operation, shape, architecture, resident) if with_bytes else {}
    needed = 4 * shape[0] * shape[1] * shape[2] * shape[3] * (2 if operation.startswith("v+q") else 1)
    device = DEVICES[architecture]

    def busy(what: str, cycles: float) -> float:
        """Microseconds of the schedulers whose multiprocessors have a block."""
        times = [k.get(what, 0) / min(k["blocks"], device.multiprocessors) for k in kernels.values()]
        return 1e6 * cycles * sum(times) / (SCHEDULERS * device.clock)

    return {
        "launches": len(launches),
        "instructions": sum(kernel["instructions"] for kernel in kernels.values()),
        "tensor-core instructions": sum(kernel["tensor-core instructions"] for kernel in kernels.values()),
        "bytes": moved,
        "floors in us": {
            "issue": busy("instructions", 1),
            "tensor cores": busy("tensor-core instructions", device.tensor_cycles),
            "float64": busy("float64 instructions", DOUBLE_CYCLES[architecture]),
            **({"L2": 1e6 * (moved["read"] + moved["written"]) / device.l2_bytes} if moved else {}),
            "launches": 1e6 * len(launches) * LAUNCH,
            **{f"memory, {name}": 1e6 * needed / rate for name, rate in device.memory_bytes.items()},
        },
        "kernels": kernels,
    }


def label(operation: str, shape: tuple[int, ...]) -> str:
    """How a case is named in the results."""
    return f"{operation} ({','.join(map(str, shape))})"


def report(tools: Tools) -> dict[str, Any]:
    """Counts by architecture and case."""
    tools.build_tally()
    cases = CASES + BY_INSTRUCTIONS
    return {
        architecture: {label(*case): count(tools, *case, architecture, with_bytes=case in CASES) for case in cases}
        for architecture in PARAMETERS
    }


def table(counts: dict[str, Any]) -> str:
    """Markdown: a line per case."""
    lines = ["| case | launches | instructions | MB, all / distinct | least time, us |", "|---|---|---|---|---|"]
    for name, case in counts.items():
        amount = Counter(case["bytes"])
        moved = (amount["read"] + amount["written"]) / 1e6, (amount["distinct read"] + amount["distinct written"]) / 1e6
        floors = ", ".join(f"{what} {time:.3g}" for what, time in case["floors in us"].items())
        lines.append(
            f"| {name} | {case['launches']} | {case['instructions']:.3g} | {moved[0]:.0f} / {moved[1]:.0f} | {floors} |"
        )
    return "\n".join(lines)


def rounded(value: Any) -> Any:
    """With four digits where a number is not whole."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, float):
        return int(value) if value.is_integer() else float(f"{value:.4g}")
    return value


def main(arguments: list[str]) -> None:
    """Count, write JSON, print a table."""
    parser = argparse.ArgumentParser(prog="sgr bench cuda-static", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON (default: %(default)s)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        tools = Tools(Path(directory))
        if problem := tools.missing():
            raise SystemExit(f"cuda-static: {problem}")
        counts = rounded(report(tools))
    options.out.write_text(json.dumps(counts, indent=1) + "\n")
    for architecture, cases in counts.items():
        print(f"{architecture}\n{table(cases)}\n")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
