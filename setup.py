"""Build script: compiles csrc/ as far as this environment allows, and says what it left out and why.

``SGR_BUILD=auto`` (default) builds the CPU kernels where torch and a C++ compiler are found, the CUDA kernels
where nvcc is found too (whether or not there is a GPU), and falls back to pure Python where a build fails;
``cpu`` and ``cuda`` ask for kernels and fail without them; ``none`` builds pure Python.
Everything declarative is in pyproject.toml.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    sys.exit(f"sgr_kernels: the build needs setuptools 77 or later, found {setuptools.__version__}")

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
MINIMUM_TORCH = (2, 11)
MINIMUM_ARCHITECTURE = 8  # tensor cores for tf32 and bf16
TORCH_TARGET_VERSION = "0x020b000000000000"  # the stable ABI of 2.11: the binary loads under that and later ones
LIMITED_API = "0x030a0000"  # Python 3.10

COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden"]
# csrc/cpu/kernels.cpp is compiled once for each: the bytes of a vector, and the compiler's flags.
INSTRUCTION_SETS = {"baseline": (16, [])}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = (32, ["-mavx2", "-mfma"])
    INSTRUCTION_SETS["avx512"] = (
        64,
        ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"],
    )


def say(message: str) -> None:
    print(f"sgr_kernels: {message}", file=sys.stderr, flush=True)


LEFT_OUT: dict[str, str] = {}
"""Kernels that this build leaves out, and why."""


def leave_out(kind: str, reason: str) -> None:
    """Say so, and remember it for the note that goes with the package: installers hide what a build says."""
    say(f"{kind} kernels left out: {reason}")
    LEFT_OUT[kind] = reason[:2000]


def write_note(package: Path) -> None:
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build.json").write_text(json.dumps({"left_out": LEFT_OUT}) + "\n")


@dataclass
class Toolchain:
    """What the environment offers; ``missing`` says why something cannot be built."""

    torch: Path | None = None
    compiler: str | None = None
    nvcc: Path | None = None
    missing: dict[str, str] = field(default_factory=dict)

    @classmethod
    def find(cls) -> Toolchain:
        found = cls()
        found.torch, problem = find_torch()
        found.compiler = next(filter(None, map(shutil.which, [os.environ.get("CXX", ""), "c++", "g++"])), None)
        if found.torch is None:
            found.missing["cpu"] = problem
        elif found.compiler is None:
            found.missing["cpu"] = "no C++ compiler found (CXX, c++, g++)"
        found.nvcc = find_nvcc()
        if "cpu" in found.missing:
            found.missing["cuda"] = found.missing["cpu"]
        elif not cuda_sources():
            found.missing["cuda"] = "no CUDA sources in csrc/cuda"
        elif found.nvcc is None:
            found.missing["cuda"] = "nvcc not found (CUDA_HOME, PATH, /usr/local/cuda)"
        else:
            try:
                cuda_architectures()
            except ValueError as error:
                found.missing["cuda"] = str(error)
        return found


def find_torch() -> tuple[Path | None, str]:
    """The directory of an installed torch with the stable ABI's headers, or None and the reason."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None, "torch is not visible to the build (install it first and pass --no-build-isolation)"
    version = importlib.metadata.version("torch")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < MINIMUM_TORCH:
        return None, f"torch {version} is older than {'.'.join(map(str, MINIMUM_TORCH))}"
    directory = Path(spec.submodule_search_locations[0])
    if not (directory / "include/torch/csrc/stable/library.h").is_file():
        return None, f"torch {version} comes without the stable ABI's headers"
    return directory, ""


def find_nvcc() -> Path | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [Path(home, "bin/nvcc") for home in homes if home]
    on_path = shutil.which("nvcc")
    candidates += [Path(on_path)] if on_path else []
    candidates += [Path("/usr/local/cuda/bin/nvcc")]
    return next((path for path in candidates if path.is_file()), None)


def cuda_sources() -> list[Path]:
    return sorted((CSRC / "cuda").glob("*.cu"))


def cuda_architectures() -> list[str]:
    """``TORCH_CUDA_ARCH_LIST`` ("8.0;9.0a+PTX") as nvcc's -gencode values; default: sm_80, sm_90 and PTX.

    Leaves out what the kernels cannot be compiled for: such lists (those of containers, say) are PyTorch's, not ours.
    """
    flags = []
    for item in re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or "8.0;9.0+PTX"):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", item)
        if match is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST: expected entries such as 8.0, 9.0a or 9.0+PTX, got {item!r}")
        if int(match[1]) < MINIMUM_ARCHITECTURE:
            continue
        number = match[1] + match[2]
        flags.append(f"arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"arch=compute_{number},code=compute_{number}")
    if not flags:
        raise ValueError(f"TORCH_CUDA_ARCH_LIST: expected an architecture from {MINIMUM_ARCHITECTURE}.0 on")
    return flags


def wanted_build() -> str:
    return os.environ.get("SGR_BUILD") or "auto"


def choose(found: Toolchain) -> list[str]:
    """The kernels to build: of ``cpu`` and ``cuda``, those wanted and possible."""
    mode = wanted_build()
    if mode not in ("auto", "cpu", "cuda", "none"):
        raise ValueError(f"SGR_BUILD: expected auto, cpu, cuda or none, got {mode!r}")
    wanted = {"auto": ["cpu", "cuda"], "cpu": ["cpu"], "cuda": ["cpu", "cuda"], "none": []}[mode]
    for kind in wanted:
        if kind in found.missing and mode != "auto":
            raise RuntimeError(f"SGR_BUILD={mode}: cannot build the {kind} kernels: {found.missing[kind]}")
    for kind in ("cpu", "cuda"):
        if kind not in wanted:
            leave_out(kind, f"SGR_BUILD={mode}")
        elif kind in found.missing:
            leave_out(kind, found.missing[kind])
    return [kind for kind in wanted if kind not in found.missing]


class BuildKernels(build_ext):
    """Compiles each source as its kind demands and links everything into one limited-API module."""

    found: Toolchain
    kinds: list[str]

    def run(self) -> None:
        if (
            self.inplace and self.extensions
        ):  # super() hides this from build_extension, and copies afterwards what has been built
            for binary in (ROOT / "sgr_kernels").glob("_C.*.so"):
                binary.unlink()
        super().run()
        if self.extensions:  # a later word than the other files', which are copied first
            write_note(ROOT / "sgr_kernels" if self.inplace else Path(self.build_lib, "sgr_kernels"))

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # what is left out now must not stay from an earlier build
        try:
            self.build_module(target, self.kinds)
        except CompileError as error:
            if not ext.optional:
                raise
            leave_out(self.kinds[-1], f"their build failed: {error}")
            if self.kinds == ["cpu"]:
                Wheel.pure = True
                raise  # which setuptools reports, and goes on
            self.kinds = ["cpu"]
            self.build_extension(ext)

    def build_module(self, target: Path, kinds: list[str]) -> None:
        jobs = self.cpu_jobs("cuda" in kinds) + (self.cuda_jobs() if "cuda" in kinds else [])
        objects = [Path(command[-1]) for command in jobs]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_object, jobs))
        # nvcc knows where its own libraries are. libtorch brings those of CUDA into scope where there are any.
        linker = [str(self.found.nvcc), "-ccbin", self.found.compiler] if "cuda" in kinds else [self.found.compiler]
        libraries = [f"-L{self.found.torch / 'lib'}", "-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
        run([*linker, "-shared", *map(str, objects), *libraries, "-o", str(target)])
        say(f"built {' and '.join(kinds)} kernels for torch >= {'.'.join(map(str, MINIMUM_TORCH))}")

    def object_path(self, source: Path, variant: str = "") -> str:
        return str(Path(self.build_temp, variant, source.relative_to(ROOT).with_suffix(source.suffix + ".o")))

    @property
    def includes(self) -> list[str]:
        return ["-isystem", str(self.found.torch / "include"), f"-I{sysconfig.get_paths()['include']}"]

    def cpu_jobs(self, with_cuda: bool) -> list[list[str]]:
        kernels = CSRC / "cpu" / "kernels.cpp"
        defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", f"-DPy_LIMITED_API={LIMITED_API}"]
        if with_cuda:
            names = ",".join(flag.rpartition("=")[2] for flag in cuda_architectures())
            defines += [f'-DSGR_CUDA_ARCHITECTURES="{names}"', f'-DSGR_CUDA_COMPILER="{nvcc_version(self.found.nvcc)}"']
        jobs = []
        for source in [CSRC / "register.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]:
            if source != kernels:
                jobs.append([self.found.compiler, *COMMON, *defines, *self.includes, "-c", str(source), "-o"])
                jobs[-1].append(self.object_path(source))
        for name, (size, flags) in INSTRUCTION_SETS.items():
            isa = [f"-DSGR_ISA={name}", f"-DSGR_VECTOR_BYTES={size}", *flags]
            jobs.append([self.found.compiler, *COMMON, *isa, "-c", str(kernels), "-o", self.object_path(kernels, name)])
        return jobs

    def cuda_jobs(self) -> list[list[str]]:
        flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DUSE_CUDA"]
        flags += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-ccbin", self.found.compiler]
        for architecture in cuda_architectures():
            flags += ["-gencode", architecture]
        return [
            [str(self.found.nvcc), *flags, *self.includes, "-c", str(source), "-o", self.object_path(source)]
            for source in cuda_sources()
        ]


class CopyPython(build_py):
    """Copies the package and, beside it, a note on the kernels that are left out."""

    def run(self) -> None:
        super().run()
        write_note(ROOT / "sgr_kernels" if self.editable_mode else Path(self.build_lib, "sgr_kernels"))


class Wheel(bdist_wheel):
    """Tagged by what was built, not by what was meant to be: one without kernels is for any machine."""

    pure = False

    def run_command(self, command: str) -> None:
        super().run_command(command)
        if command == "build" and self.pure:
            self.root_is_pure, self.distribution.ext_modules = True, None


def nvcc_version(nvcc: Path) -> str:
    output = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"release (\S+),", output)
    return match[1] if match else "unknown"


def compile_object(command: list[str]) -> None:
    """Compile, unless the object is newer than source and headers and was made so before, for the same torch."""
    source, target = Path(command[-3]), Path(command[-1])
    folder = "cuda" if source.suffix == ".cu" else "cpu"
    headers = [path for place in (CSRC, CSRC / folder) for path in place.iterdir() if path.suffix in (".h", ".cuh")]
    newest = max(path.stat().st_mtime for path in [source, *headers])
    recipe = target.with_suffix(".txt")
    text = f"torch {importlib.metadata.version('torch')}: {' '.join(command)}"
    if target.exists() and target.stat().st_mtime > newest and recipe.exists() and recipe.read_text() == text:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    run(command)
    recipe.write_text(text)


def run(command: list[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CompileError(f"{command[0]}: {error}") from error
    if result.returncode != 0:
        raise CompileError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")


if __name__ == "__main__":
    BuildKernels.found = Toolchain.find()
    BuildKernels.kinds = choose(BuildKernels.found)
    commands = {"build_ext": BuildKernels, "build_py": CopyPython, "bdist_wheel": Wheel}
    if BuildKernels.kinds:
        optional = wanted_build() == "auto"
        sources = [str(path.relative_to(ROOT)) for path in [CSRC / "register.cpp", *sorted(CSRC.glob("cpu/*.cpp"))]]
        setup(
            ext_modules=[Extension("sgr_kernels._C", sources, py_limited_api=True, optional=optional)],
            cmdclass=commands,
            options={"bdist_wheel": {"py_limited_api": "cp310"}},
        )
    else:
        say("pure Python package: the plain PyTorch backend serves")
        setup(cmdclass=commands)
