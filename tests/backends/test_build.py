"""What setup.py builds, leaves out and says, in environments with and without its tools; and the binary's loading."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sgr_kernels.backends import extension

ROOT = Path(__file__).parents[2]


def script() -> ModuleType:
    """setup.py as a module: its definitions, nothing built."""
    spec = importlib.util.spec_from_file_location("sgr_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sgr_setup"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a source distribution holds."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "sgr_kernels").mkdir()
    for name in ("__init__.py", "_version.py"):
        shutil.copy(ROOT / "sgr_kernels" / name, tmp_path / "sgr_kernels" / name)
    return tmp_path


def build(checkout: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py; with PYTHONPATH as given alone, so that "no torch" can be arranged."""
    variables = {"PATH": "/nonexistent", "HOME": str(checkout), **environment}
    arguments = [sys.executable, "setup.py", *(command or ("build_ext",))]
    return subprocess.run(arguments, cwd=checkout, env=variables, capture_output=True, text=True, check=False)


def executable(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def built(checkout: Path) -> list[Path]:
    return list(checkout.glob("build/lib*/sgr_kernels/*.so"))


def test_nothing_without_a_compiler(checkout: Path) -> None:
    result = build(checkout)
    assert result.returncode == 0, result.stderr
    assert "cpu kernels left out: no C++ compiler found" in result.stderr
    assert "cuda kernels left out" in result.stderr
    assert "pure Python package" in result.stderr


def test_nothing_without_torch(checkout: Path) -> None:
    """An isolated build does not see torch."""
    hide = "import importlib.util as u; find = u.find_spec; u.find_spec = lambda n: None if n == 'torch' else find(n)"
    (checkout / "sitecustomize.py").write_text(hide)
    result = build(checkout, PYTHONPATH=str(checkout), CXX=executable(checkout / "cxx", "exit 1"))
    assert result.returncode == 0, result.stderr
    assert "cpu kernels left out: torch is not visible to the build" in result.stderr
    assert "--no-build-isolation" in result.stderr


def test_nothing_when_asked(checkout: Path) -> None:
    result = build(checkout, SGR_BUILD="none", CXX=executable(checkout / "cxx", "exit 1"))
    assert result.returncode == 0, result.stderr
    assert "cpu kernels left out: SGR_BUILD=none" in result.stderr


def test_failing_compiler_falls_back(checkout: Path) -> None:
    result = build(checkout, CXX=executable(checkout / "cxx", "echo out of order >&2; exit 1"))
    assert result.returncode == 0, result.stderr
    assert "cpu kernels left out: their build failed" in result.stderr
    assert "out of order" in result.stdout + result.stderr
    assert not built(checkout)


@pytest.mark.parametrize("options", [[], ["--inplace"]])
def test_failing_build_leaves_no_earlier_binary(checkout: Path, options: list[str]) -> None:
    library = checkout / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "sgr_kernels"
    library.mkdir(parents=True)
    for folder in (library, checkout / "sgr_kernels"):
        (folder / "_C.abi3.so").write_text("of an earlier build")
    result = build(checkout, "build_ext", *options, CXX=executable(checkout / "cxx", "exit 1"))
    assert result.returncode == 0, result.stderr
    assert "cpu kernels left out: their build failed" in result.stderr
    assert not built(checkout)
    assert (checkout / "sgr_kernels" / "_C.abi3.so").exists() == (not options)


# Makes an empty file of whatever it is asked to compile or link.
OBEDIENT = 'while [ "$1" != -o ]; do shift; done; : > "$2"'


def wheel(checkout: Path, **environment: str) -> tuple[str, set[str], dict[str, str]]:
    """The tag of a built wheel, what it holds, and what it says that was left out, and why."""
    result = build(checkout, "bdist_wheel", **environment)
    assert result.returncode == 0, result.stderr
    (path,) = checkout.glob("dist/*.whl")
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith("/WHEEL"))
        tag = path.stem.split("-", 2)[2]
        text = archive.read(metadata).decode()
        assert f"Tag: {tag}" in text
        assert f"Root-Is-Purelib: {str(tag == 'py3-none-any').lower()}" in text
        assert any(name == "sgr_kernels/__init__.py" for name in names)
        return tag, names, json.loads(archive.read("sgr_kernels/_build.json"))["left_out"]


def test_a_wheel_is_tagged_by_what_was_built(checkout: Path) -> None:
    tag, names, left_out = wheel(checkout, CXX=executable(checkout / "cxx", OBEDIENT), CUDA_HOME="/nowhere")
    assert tag.startswith("cp310-abi3-linux")
    assert "sgr_kernels/_C.abi3.so" in names
    assert list(left_out) == ["cuda"]


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        (None, "no C++ compiler found"),
        ("echo out of order >&2; exit 1", "out of order"),
        ("exit 3", "their build failed"),
    ],
)
def test_a_wheel_without_kernels_is_for_any_machine_and_says_why(
    checkout: Path, compiler: str | None, reason: str
) -> None:
    environment = {} if compiler is None else {"CXX": executable(checkout / "cxx", compiler)}
    tag, names, left_out = wheel(checkout, **environment)
    assert tag == "py3-none-any"
    assert not [name for name in names if name.endswith(".so")]
    assert reason in left_out["cpu"]


@pytest.mark.parametrize("command", [["build_ext", "--inplace"], ["build_py"]])
def test_other_builds_keep_the_reason_too(checkout: Path, command: list[str]) -> None:
    compiler = executable(checkout / "cxx", "echo out of order >&2; exit 1")
    build(checkout, *command, **({"CXX": compiler} if "--inplace" in command else {}))
    (note,) = (p for p in checkout.rglob("_build.json"))
    assert (note.parent == checkout / "sgr_kernels") == ("--inplace" in command)
    found = json.loads(note.read_text())["left_out"]["cpu"]
    assert ("out of order" if "--inplace" in command else "no C++ compiler found") in found


def test_an_empty_mode_is_the_usual_one(checkout: Path) -> None:
    result = build(checkout, SGR_BUILD="", CXX=executable(checkout / "cxx", "echo out of order >&2; exit 1"))
    assert result.returncode == 0, result.stderr
    assert "cpu kernels left out: their build failed" in result.stderr


@pytest.mark.parametrize("mode", ["cpu", "cuda"])
def test_kernels_asked_for_are_not_left_out(checkout: Path, mode: str) -> None:
    result = build(checkout, SGR_BUILD=mode, CXX=executable(checkout / "cxx", "echo out of order >&2; exit 1"))
    assert result.returncode != 0
    missing = build(checkout, SGR_BUILD=mode)
    assert missing.returncode != 0
    assert f"SGR_BUILD={mode}: cannot build the cpu kernels: no C++ compiler found" in missing.stderr


def test_unknown_mode_is_an_error(checkout: Path) -> None:
    result = build(checkout, SGR_BUILD="gpu")
    assert result.returncode != 0
    assert "SGR_BUILD: expected auto, cpu, cuda or none, got 'gpu'" in result.stderr


def test_source_distribution_holds_the_sources(checkout: Path) -> None:
    result = build(checkout, "sdist", SGR_BUILD="none")
    assert result.returncode == 0, result.stderr
    (archive,) = checkout.glob("dist/*.tar.gz")
    with tarfile.open(archive) as contents:
        names = {name.partition("/")[2] for name in contents.getnames()}
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in (".cpp", ".h", ".cu", ".cuh")
    }
    assert sources <= names


def test_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = script()
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    default = ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"]
    assert setup.cuda_architectures() == default
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a;12.0+PTX")
    codes = [flag.partition("code=")[2] for flag in setup.cuda_architectures()]
    assert codes == ["sm_86", "sm_90a", "sm_120", "compute_120"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 8.0 9.0 10.0 12.0+PTX")  # as in containers with PyTorch
    codes = [flag.partition("code=")[2] for flag in setup.cuda_architectures()]
    assert codes == ["sm_80", "sm_90", "sm_100", "sm_120", "compute_120"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0;7.5+PTX")
    monkeypatch.setattr(setup, "find_nvcc", lambda: Path("nvcc"))
    monkeypatch.setattr(setup, "find_torch", lambda: (Path("torch"), ""))
    assert "expected an architecture from 8.0 on" in setup.Toolchain.find().missing["cuda"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(ValueError, match=r"TORCH_CUDA_ARCH_LIST: expected .* got 'Hopper'"):
        setup.cuda_architectures()
    assert "got 'Hopper'" in setup.Toolchain.find().missing["cuda"]


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """The kernels, built with address and undefined-behaviour sanitizers, in buffers of exactly the promised sizes."""
    setup = script()
    compiler = setup.Toolchain.find().compiler
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = [compiler, "-std=c++17", "-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    csrc, objects = ROOT / "csrc", []
    for name, (size, options) in setup.INSTRUCTION_SETS.items():
        objects.append(str(tmp_path / f"{name}.o"))
        isa = [f"-DSGR_ISA={name}", f"-DSGR_VECTOR_BYTES={size}", *options]
        subprocess.run([*flags, *isa, "-c", str(csrc / "cpu/kernels.cpp"), "-o", objects[-1]], check=True)
    sources = [ROOT / "tests/native/sanitize.cpp", csrc / "cpu/axis.cpp", csrc / "cpu/select.cpp"]
    program = str(tmp_path / "sanitize")
    subprocess.run([*flags, f"-I{csrc}", *map(str, sources), *objects, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_broken_binary_is_reported_and_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sgr_broken.abi3.so").write_text("not a library")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.warns(RuntimeWarning, match="failed to load under torch .* --no-build-isolation .* PyTorch backend"):
        binary, error = extension._load("sgr_broken")
    assert binary is None
    assert "sgr_broken" in str(error)


@pytest.mark.parametrize("text", ["", "def build_info(): return {'schemas': 'product(Tensor gradient) -> Tensor'}"])
def test_binary_of_other_schemas_is_not_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """As after an update of an editable installation: the dispatcher would pass it other arguments than it takes."""
    name = f"sgr_stale_{len(text)}"
    (tmp_path / f"{name}.py").write_text(text or "def build_info(): return {'torch': '2.11.0'}")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.warns(RuntimeWarning, match="built from another version of sgr_kernels.* --no-build-isolation"):
        binary, error = extension._load(name)
    assert binary is None
    assert "another version" in str(error)


@pytest.mark.parametrize("error", ["SystemError", "KeyError", "OSError"])
def test_whatever_a_binary_raises_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    (tmp_path / f"sgr_raises_{error}.py").write_text(f"raise {error}('no')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.warns(RuntimeWarning, match="failed to load"):
        assert extension._load(f"sgr_raises_{error}")[0] is None


def test_absent_binary_is_no_error() -> None:
    binary, error = extension._load("sgr_kernels._absent")
    assert binary is None
    assert "no compiled kernels" in str(error)


@pytest.mark.parametrize("content", [None, "half a", "[]", '{"left_out": 3}'])
def test_a_lost_note_is_no_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "note").write_text(content)
    assert extension._left_out(tmp_path / "note") == {}


def test_the_reason_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no kernels, and where there are no CUDA kernels."""
    (tmp_path / "note").write_text('{"left_out": {"cpu": "out of order", "cuda": "nvcc not found"}}')
    left_out = extension._left_out(tmp_path / "note")
    monkeypatch.setattr(extension, "_LEFT_OUT", left_out)
    assert extension.build_info()["left_out"] == left_out
    _, error = extension._load("sgr_kernels._absent")
    assert "left out: out of order" in str(error)


def test_build_info() -> None:
    info = extension.build_info()
    if extension.binary is None:
        assert info["error"]
        return
    assert info["error"] is None
    assert "cpu" in info["kernels"]
    assert info["instruction_sets"][-1] == "baseline"
    assert info["built_with"]["torch"].split(".")[0] == torch.__version__.split(".")[0]
    assert bool(info["cuda_architectures"]) == ("cuda" in info["kernels"])
    with pytest.raises(ValueError, match="'sse9'"):
        extension.binary.select_instruction_set("sse9")
