"""benchmarks/versions.sh, with stubs for its environments: what it runs where, and the table it keeps."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
case "$*" in
-c*) echo "2.99.0 | {triton} | 3.11.9" ;;
setup.py*) echo "build $SGR_BUILD" >> {log} ;;
*) echo "interpret $TRITON_INTERPRET, path $PYTHONPATH: $*" >> {log}; ls setup.py sgr_kernels/__init__.py >> {log}
   echo "2 failed, 3 passed in 1.5s"; exit 1 ;;
esac
"""


def run(folder: Path, *rows: str) -> list[str]:
    """The table's rows after a run in which the named environments are stubs."""
    for name in rows:
        python = folder / name / "bin" / "python"
        python.parent.mkdir(parents=True, exist_ok=True)
        python.write_text(PYTHON.format(triton=name[-3:], log=folder / f"{name}.log"))
        python.chmod(0o755)
    script = str(ROOT / "benchmarks" / "versions.sh")
    result = subprocess.run(["bash", script, str(folder), *rows], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return (folder / "versions.md").read_text().splitlines()[2:]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the script copies a checkout, and this is none")
def test_each_row_is_tested_in_its_environment_and_kept(tmp_path: Path) -> None:
    wanted = "| triton-3.9 | 2.99.0 | 3.9 | 3.11.9 | 2 failed, 3 passed |"
    assert run(tmp_path, "triton-3.9") == [wanted]
    log = (tmp_path / "triton-3.9.log").read_text()
    assert "build none" in log
    assert "interpret 1, path .: -m pytest" in log
    assert "sgr_kernels/__init__.py" in log  # the copy is a whole one
    rows = run(tmp_path, "torch-2.11")
    assert rows[0] == wanted
    assert rows[1].startswith("| torch-2.11 | 2.99.0")
    assert "build cpu" in (tmp_path / "torch-2.11.log").read_text()
    assert "interpret , path" in (tmp_path / "torch-2.11.log").read_text()
    assert sorted(run(tmp_path, "triton-3.9")) == sorted(rows)  # a row is replaced, not added


def test_without_a_folder_it_says_how_to_call_it() -> None:
    script = str(ROOT / "benchmarks" / "versions.sh")
    result = subprocess.run(["bash", script], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "versions.sh FOLDER [ROW...]" in result.stdout
