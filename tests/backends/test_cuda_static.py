"""The cost of the CUDA kernels, counted anew, beside the committed counts: none may worsen by five per cent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cuda_static import BY_INSTRUCTIONS, CASES, RESULT, Tools, count, count_bytes, label

ARCHITECTURE = "sm_90"
LIMIT = 1.05

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Tools:
    found = Tools(tmp_path_factory.mktemp("cuda-static"))
    if problem := found.missing():
        pytest.skip(problem)
    found.build_tally()
    return found


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return json.loads(Path(RESULT).read_text())[ARCHITECTURE]


@pytest.mark.parametrize(("operation", "shape"), CASES, ids=[label(*case) for case in CASES])
def test_launches_and_bytes(tools: Tools, committed: dict[str, Any], operation: str, shape: tuple[int, ...]) -> None:
    before = committed[label(operation, shape)]
    launches = tools.launches(operation, shape, ARCHITECTURE)
    resident = {
        found.symbol: before["kernels"][found.name]["resident blocks"]
        for found in launches
        if found.name in before["kernels"]
    }
    assert len(launches) <= before["launches"]
    if shape[2] > 224:
        return  # the same kernels once more
    for name, amount in count_bytes(tools, operation, shape, ARCHITECTURE, resident).items():
        assert amount <= LIMIT * before["bytes"][name], name


# Fused kernels, and Fourier transforms of both kinds, at 224 and at 300; more channels take the general path.
COUNTED = [case for case in CASES + BY_INSTRUCTIONS if case[1][1] * case[1][2] <= 3 * 300]
COUNTED = [case for case in COUNTED if case[1][2] not in (65, 100)]


@pytest.mark.parametrize(("operation", "shape"), COUNTED, ids=[label(*case) for case in COUNTED])
def test_instructions(tools: Tools, committed: dict[str, Any], operation: str, shape: tuple[int, ...]) -> None:
    before, after = committed[label(operation, shape)], count(tools, operation, shape, ARCHITECTURE, with_bytes=False)
    for name in ("instructions", "tensor-core instructions"):
        assert after[name] <= LIMIT * before[name], name
    for name, kernel in after["kernels"].items():
        old = before["kernels"][name]
        assert kernel["resident blocks"] >= old["resident blocks"], name
        for what in ("spilled bytes", "shared bytes", "instructions a warp and image", "instructions around them"):
            assert kernel.get(what, 0) <= LIMIT * old.get(what, 0), (name, what)
