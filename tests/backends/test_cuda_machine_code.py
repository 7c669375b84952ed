"""The machine code of the CUDA kernels, on any machine: registers, local memory, tensor-core instructions.

Looks at the package's own binary where it holds CUDA kernels as new as their sources, and compiles them otherwise.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sgr_kernels.backends import extension

KERNELS = Path(__file__).parents[2] / "csrc" / "cuda"
ARCHITECTURES = ("sm_80", "sm_90")
INSTRUCTIONS = {"Highest": "HMMA.16816.F32 ", "High": "HMMA.1688.F32.TF32", "Medium": "HMMA.16816.F32.BF16"}
INCLUDE = str(Path(torch.__file__).parent / "include")
FLAGS = ["-std=c++17", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", INCLUDE]

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Kernel:
    """A fused kernel in one architecture's code."""

    file: Path
    architecture: str
    symbol: str
    registers: int
    stack: int
    """Bytes of local memory, where spilled registers go."""

    @property
    def name(self) -> str:
        """``fused_product`` or ``fused_cross_spectrum``."""
        match = re.search(r"\d(fused_(?:product|cross_spectrum))I", self.symbol)
        return match[1] if match else "another"

    @property
    def precision(self) -> str:
        match = re.search(r"\d(Highest|High|Medium)E", self.symbol)
        return match[1] if match else ""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Channels, images and blocks of a product; channels and blocks of a cross spectrum."""
        return tuple(map(int, re.findall(r"Li(\d+)E", self.symbol)))


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


def compile_kernels(nvcc: str, directory: Path) -> list[Path]:
    """Object files of all .cu files, compiled anew when a source has changed."""
    sources = sorted(KERNELS.glob("*.cu"))
    inputs = [*KERNELS.iterdir(), *KERNELS.parent.glob("*.h")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(inputs))).hexdigest()[:16]
    flags = [*FLAGS]
    for architecture in ARCHITECTURES:
        flags += ["-gencode", f"arch={architecture.replace('sm', 'compute')},code={architecture}"]

    def compile_one(source: Path) -> Path:
        target = directory / f"{source.stem}-{digest}.o"
        if not target.exists():
            partial = target.with_suffix(".partial.o")
            command = [nvcc, *flags, "-Xcompiler", "-fPIC", "-c", str(source), "-o", str(partial)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr
            partial.rename(target)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


FAILING_LAUNCH = """
#include <cstdio>
#include "launch.h"
__global__ void lonely(int* x) { *x = 1; }
int main() {
  lonely<<<7, 2048, 1024>>>(nullptr);  // more threads than a block may have
  try {
    sgr::cuda::check_launch(cudaGetLastError(), lonely, 7, 1, 2048, 1024);
  } catch (const std::exception& error) {
    std::printf("%s, then %d", error.what(), cudaGetLastError());
  }
}
"""


def test_a_failed_launch_names_kernel_grid_and_shared_memory(tmp_path: Path) -> None:
    """Without a driver every launch fails, and the kernel has no name."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc")
    source, program = tmp_path / "program.cu", tmp_path / "program"
    source.write_text(FAILING_LAUNCH)
    subprocess.run([nvcc, *FLAGS, "-arch=compute_80", f"-I{KERNELS}", str(source), "-o", str(program)], check=True)
    said = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    name = "lonely" if torch.cuda.is_available() else "kernel of an unknown name"
    assert re.search(rf"{name}\S* on 7 x 1 blocks of 2048 threads with 1024 bytes of shared memory: CUDA error", said)
    assert said.endswith(", then 0") or not torch.cuda.is_available()


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    found = find_cuobjdump()
    if found is None:
        pytest.skip("no cuobjdump found (CUDA toolkit, or Triton)")
    return found


@pytest.fixture(scope="module")
def files(request: pytest.FixtureRequest) -> list[Path]:
    """What holds the machine code."""
    info = extension.build_info()
    if extension.binary is not None and set(ARCHITECTURES) <= set(info["cuda_architectures"]):
        binary = Path(str(extension.binary.__file__))
        if binary.stat().st_mtime >= max(path.stat().st_mtime for path in KERNELS.iterdir()):
            return [binary]
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        pytest.skip("the package was built without CUDA kernels, and there is no nvcc to compile them")
    return compile_kernels(nvcc, Path(request.config.cache.mkdir("cuda-machine-code")))


@pytest.fixture(scope="module")
def compiled(files: list[Path], cuobjdump: str) -> list[Kernel]:
    """All kernels, of both architectures."""
    found = []
    for file in files:
        command = [cuobjdump, "-res-usage", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        architecture = ""
        pattern = r"arch = (sm_\d+)|Function (\S+):\s*REG:(\d+) STACK:(\d+)"
        for match in re.finditer(pattern, text):
            if match[1]:
                architecture = match[1]
            else:
                found.append(Kernel(file, architecture, match[2], int(match[3]), int(match[4])))
    return found


def test_every_kernel_is_there_for_both_architectures(compiled: list[Kernel]) -> None:
    products = {(p, c, b) for p in INSTRUCTIONS for c in (1, 2, 3, 4) for b in (1, 2)}
    sums = {(p, c, b) for p in ("Highest", "High") for c in (1, 2, 3, 4) for b in (1, 2)}
    for architecture in ARCHITECTURES:
        here = [k for k in compiled if k.architecture == architecture]
        assert {(k.precision, k.sizes[0], k.sizes[2]) for k in here if k.name == "fused_product"} == products
        assert {(k.precision, *k.sizes) for k in here if k.name == "fused_cross_spectrum"} == sums
        for name in (
            "analyse",
            "synthesise",
            "mix_channels",
            "correlate_channels",
            "arrange_spectrum",
            "fourier_rows",
            "fourier_columns",
            "fourier_rows_back",
            "update_covariance",
        ):
            assert any(name in k.symbol for k in here)


def test_registers_stay_out_of_memory(compiled: list[Kernel]) -> None:
    """No spills, but for a few words of the 64-pixel kernels of four channels, and of three without symmetry."""
    for kernel in compiled:
        allowed = 0
        if kernel.name == "fused_product" and kernel.sizes[2] == 2:
            allowed = 16 if kernel.sizes[0] == 4 or (kernel.sizes[0] == 3 and "Lb0E" in kernel.symbol) else 0
        assert kernel.stack <= allowed, kernel


def test_three_blocks_of_small_images_fit_a_multiprocessor(compiled: list[Kernel]) -> None:
    for kernel in compiled:
        if kernel.name == "fused_product" and kernel.sizes[0] <= 3 and kernel.sizes[2] == 1:
            assert kernel.registers <= 168, kernel


def test_two_blocks_of_fourier_transforms_fit_a_multiprocessor(compiled: list[Kernel]) -> None:
    """Of 14 warps for a square of 4, of 16 for one of 8, whose columns have 512 threads a multiprocessor in all."""
    for kernel in compiled:
        match = re.search(r"\d(fourier_(?:rows|rows_back|columns))ILi([48])E", kernel.symbol)
        if match:
            limits = {"4": 72, "8": 128 if match[1] == "fourier_columns" else 64}
            assert kernel.registers <= limits[match[2]], kernel


def instructions(kernel: Kernel, cuobjdump: str) -> str:
    command = [cuobjdump, "-sass", "-arch", kernel.architecture, "-fun", kernel.symbol, str(kernel.file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("precision", INSTRUCTIONS)
def test_tensor_cores_do_the_products(
    compiled: list[Kernel], cuobjdump: str, precision: str, architecture: str
) -> None:
    chosen = [
        k
        for k in compiled
        if (k.architecture, k.precision, k.name) == (architecture, precision, "fused_product")
        and (k.sizes[0], k.sizes[2]) == (3, 1)
    ]
    assert len(chosen) == 2
    for kernel in chosen:
        code = instructions(kernel, cuobjdump)
        # Per warp: 3 channels x (U, Z, W in a loop, V) x two 16x8 halves, once for each partial product.
        products = {"Highest": 3, "High": 2, "Medium": 1}[precision]
        assert code.count(INSTRUCTIONS[precision]) >= 3 * 3 * 2 * products
        assert "LDL" not in code
        assert "DFMA" not in code


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sums_over_images_use_no_atomics_in_device_memory(
    compiled: list[Kernel], cuobjdump: str, architecture: str
) -> None:
    chosen = [k for k in compiled if k.architecture == architecture and k.name == "fused_cross_spectrum"]
    for kernel in [k for k in chosen if k.precision == "Highest" and k.sizes == (3, 1)]:
        code = instructions(kernel, cuobjdump)
        assert INSTRUCTIONS["Highest"] in code
        # What counts the blocks that have come is none of the sums.
        assert all(".INC." in name for name in re.findall(r"\b(?:ATOMG|RED)\.\S+", code))
