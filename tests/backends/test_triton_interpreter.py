"""The Triton kernels, executed: in a process where Triton interprets its kernels (TRITON_INTERPRET=1)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
# Too many cases, or of several that take long one; and NumPy's results repeat.
ELSEWHERE = (
    "agree",
    "large_images",
    "longer",
    "repeat",
    "6-inf",
    "(layout and (dtype1 or dtype2))",
    "(short and (cpu-1 or cpu-4))",
)
CONTRACT = f"test_operators.py and not ({' or '.join(ELSEWHERE)})"
REGISTRATION = "test_registration.py and (fake or (opcheck and sliced))"
# The folder's own tests, and of the contracts of all backends what does not go through hundreds of cases.
PARTS = {
    "kernels": ["backends/triton_interpreter"],
    "operators": ["operators", "-k", f"triton and (({CONTRACT}) or ({REGISTRATION}))"],
}


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process collects the folder itself")
@pytest.mark.parametrize("part", PARTS)
def test_kernels_agree_with_the_oracle_under_the_interpreter(part):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    file, *selection = PARTS[part]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / file), *selection]
    run = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
