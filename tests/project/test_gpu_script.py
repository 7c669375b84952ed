"""benchmarks/gpu.sh, on a machine of stubs: what it runs, and with what in the environment."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
PYTHON = """#!/bin/sh
case "$*" in
*get_device_capability*) echo 9.0 ;;
-c*pytest,*) exit "${NO_PYTEST:-0}" ;;
-c*) ;;
*) echo "arch $TORCH_CUDA_ARCH_LIST, build $SGR_BUILD: $*" ;;
esac
"""
SANITIZER = """#!/bin/sh
echo "caching off: $PYTORCH_NO_CUDA_MEMORY_CACHING"
exit 9
"""


def run(folder: Path, *parts: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script with a stub for python, and a toolkit that has a sanitizer which is not on PATH."""
    stubs = {"python": PYTHON, "nvidia-smi": "#!/bin/sh\n", "cuda/bin/compute-sanitizer": SANITIZER}
    for name, text in stubs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    variables = (
        os.environ
        | {"PATH": "/usr/bin:/bin", "PYTHON": str(folder / "python"), "CUDA_HOME": str(folder / "cuda")}
        | environment
    )
    command = ["bash", str(SCRIPT), str(folder / "out"), *parts]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def test_a_part_that_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    result = run(tmp_path, TORCH_CUDA_ARCH_LIST="7.5 8.0 9.0+PTX")
    assert result.returncode == 1
    logs = {path.stem: path.read_text() for path in (tmp_path / "out").glob("*.log")}
    assert logs["build"].startswith("arch 9.0, build cuda: setup.py build_ext --inplace")
    assert logs["memcheck"] == logs["racecheck"] == "caching off: 1\n"
    assert "bench operators --device cuda" in logs["operators"]
    for name in ("memcheck", "racecheck"):
        assert f"  {name} " in result.stdout
    assert result.stdout.count("failed, status 9") == 2
    assert {"gpu-tests", "tests", "step"} <= logs.keys()


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    result = run(tmp_path, "gpu-tests", "tests", NO_PYTEST="1")
    assert result.stdout.count("left out: pytest") == 2
    assert not (tmp_path / "out" / "build.log").exists()


def test_unknown_parts_are_refused(tmp_path: Path) -> None:
    result = run(tmp_path, "operator")
    assert result.returncode == 2
    assert "expected of build gpu-tests tests triton memcheck racecheck operators step, got operator" in result.stderr


@pytest.mark.parametrize("parts", [[], ["build"]])
def test_without_a_gpu_nothing_runs(tmp_path: Path, parts: list[str]) -> None:
    result = run(tmp_path, *parts, PYTHON="false")
    assert result.returncode == 2
    assert "there is no CUDA device" in result.stderr
