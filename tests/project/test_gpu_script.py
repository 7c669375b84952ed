"""benchmarks/gpu.sh, on a machine of stubs: what it runs, and with what in the environment."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks import facts, ragged
from sgr_kernels import backends
from sgr_kernels.backends import native
from sgr_kernels.cli import main
from sgr_kernels.reproduce.run import EXPERIMENTS
from sgr_kernels.toeplitz.geometry import Size
from tests.backends import test_cuda_device as device_tests

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
PYTHON = """#!/bin/sh
case "$*" in
*get_device_capability*) echo "9.0 $HAS" ;;
-c*) exit "${CARRIED:-1}" ;;
*"cli reproduce "*)
    echo "$*"
    folder=${*##*--out }
    mkdir -p "$folder/measurements" "$folder/networks"
    touch "$folder/networks/weights"
    [ -n "$LONG" ] && echo begun >"$folder/measurements/begun.json" && exec sleep 600
    echo done >"$folder/measurements/done.json"
    exit "${REPRODUCED:-0}" ;;
*facts*) echo "facts in $PWD: $*"; exit "${FACTS:-0}" ;;
*) echo "arch $TORCH_CUDA_ARCH_LIST, build $SGR_BUILD: $*" ;;
esac
"""
NCU = """#!/bin/sh
echo "ncu $*"
"""
SANITIZER = """#!/bin/sh
echo "caching off: $PYTORCH_NO_CUDA_MEMORY_CACHING"
exit 9
"""


def run(folder: Path, *parts: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script with a stub for python, and a toolkit that has a sanitizer which is not on PATH."""
    stubs = {"python": PYTHON, "nvidia-smi": "#!/bin/sh\n"}
    stubs |= {"cuda/bin/compute-sanitizer": SANITIZER, "cuda/bin/ncu": NCU}
    for name, text in stubs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    variables = (
        os.environ
        | {"PATH": "/usr/bin:/bin", "PYTHON": str(folder / "python"), "CUDA_HOME": str(folder / "cuda")}
        | {"HAS": "pytest hypothesis xdist"}
        | environment
    )
    command = ["bash", str(SCRIPT), str(folder / "out"), *parts]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def test_a_part_that_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    result = run(tmp_path, TORCH_CUDA_ARCH_LIST="7.5 8.0 9.0+PTX")
    assert result.returncode == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["log.txt"]  # few files: few come back
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "arch 9.0, build cuda: setup.py build_ext --inplace" in log
    assert log.count("caching off: 1\n") == 2
    assert log.count("ncu --clock-control none") == 3
    assert "-k regex:fourier_columns" in log
    order = ["device ", "build ", "facts ", "counters", "device-tests", "contract", "triton", "racecheck", "operators"]
    places = [log.index(f"== {name}") for name in order]
    assert places == sorted(places)
    assert "== step" not in log
    assert result.stdout.count("failed, status 9") == 2
    assert "-m pytest -q -W default" in log
    assert "-n 8" in log


def test_a_carried_binary_is_not_built_anew(tmp_path: Path) -> None:
    result = run(tmp_path, "build", CARRIED="0")
    assert "left out: the kernels are there" in result.stdout
    assert "setup.py" not in (tmp_path / "out" / "log.txt").read_text()


def test_facts_go_on_in_another_process_after_a_lost_device(tmp_path: Path) -> None:
    run(tmp_path, "facts", FACTS="3")
    assert (tmp_path / "out" / "log.txt").read_text().count("bench facts --device cuda") == 3
    other = tmp_path / "other"
    run(other, "facts", FACTS="1")
    assert (other / "out" / "log.txt").read_text().count("bench facts --device cuda") == 1


def test_the_step_is_a_part_of_its_own(tmp_path: Path) -> None:
    run(tmp_path, "step")
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "bench step --device cuda" in log
    assert "bench operators" not in log


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    result = run(tmp_path, "contract", "device-tests", HAS="pytest")
    assert result.stdout.count("left out: pytest or hypothesis") == 2


def test_all_parts_together_have_a_limit(tmp_path: Path) -> None:
    result = run(tmp_path, SGR_SECONDS="100")
    (limit,) = re.findall(r"^== facts \(at most (\d+) s\)", (tmp_path / "out" / "log.txt").read_text(), re.MULTILINE)
    assert 50 < int(limit) <= 100
    late = run(tmp_path, SGR_SECONDS="5")
    assert late.stdout.count("left out: no time") == 12
    assert result.stdout.count("left out: no time") == 0


def measured(archive: Path) -> set[str]:
    with tarfile.open(archive) as packed:
        return {Path(name).stem for name in packed.getnames() if name.endswith(("json", "weights"))}


def test_a_reproduction_brings_back_what_was_measured_and_goes_on_from_it(tmp_path: Path) -> None:
    (tmp_path / "some data" / "mnist").mkdir(parents=True)
    archive = tmp_path / "out" / "mnist.tar.gz"
    places = {"SGR_DATA": str(tmp_path / "some data"), "SGR_SCRATCH": str(tmp_path / "scratch"), "SGR_SECONDS": "60"}
    first = run(tmp_path, "mnist", "cifar10", **places, SGR_SEEDS="3", REPRODUCED="2")
    assert first.returncode == 1
    assert "failed, status 2" in first.stdout
    assert f"left out: no folder {tmp_path / 'some data' / 'cifar10'}" in first.stdout
    assert "note: there are no compiled kernels for GPUs" in first.stdout
    log = (tmp_path / "out" / "log.txt").read_text()
    (asked,) = re.findall(r"reproduce (\w.*) --dataset mnist --scale full .* --seeds 3 .* --device cuda ", log)
    assert set(asked.split()) == set(EXPERIMENTS)
    assert asked.endswith(" lrc")
    (limit,) = re.findall(r"^== mnist \(at most (\d+) s\)", log, re.MULTILINE)
    assert int(limit) <= 45  # what is measured by then still has to be packed
    assert measured(archive) == {"done"}
    # On another machine: nothing is there but what came back.
    places |= {"SGR_SCRATCH": str(tmp_path / "other"), "SGR_SECONDS": "26"}
    again = run(tmp_path, "mnist", **places, LONG="1")
    assert "stopped after 1" in again.stdout
    assert (tmp_path / "other" / "mnist" / "measurements" / "done.json").is_file()
    assert measured(archive) == {"done", "begun"}


def test_a_part_has_no_more_time_than_there_is(tmp_path: Path) -> None:
    for name in ("mnist", "cifar10"):
        (tmp_path / "data" / name).mkdir(parents=True)
    places = {"SGR_DATA": str(tmp_path / "data"), "SGR_SCRATCH": str(tmp_path / "scratch")}
    result = run(tmp_path, "mnist", "cifar10", **places, LONG="1", SGR_SECONDS="26")
    assert "stopped after 1" in result.stdout
    assert re.search(r"cifar10 .*left out: no time", result.stdout)


def test_a_damaged_archive_is_told_and_kept(tmp_path: Path) -> None:
    (tmp_path / "data" / "mnist").mkdir(parents=True)
    places = {"SGR_DATA": str(tmp_path / "data"), "SGR_SCRATCH": str(tmp_path / "scratch"), "SGR_SECONDS": "60"}
    assert run(tmp_path, "mnist", **places).returncode == 0
    archive = tmp_path / "out" / "mnist.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-20])
    damaged = archive.read_bytes()
    result = run(tmp_path, "mnist", **places | {"SGR_SCRATCH": str(tmp_path / "other")})
    assert result.returncode == 1
    assert f"left out: cannot read {archive}" in result.stdout
    assert archive.read_bytes() == damaged


def test_unknown_parts_are_refused(tmp_path: Path) -> None:
    result = run(tmp_path, "operator")
    assert result.returncode == 2
    assert "expected of device build facts counters device-tests contract" in result.stderr
    assert "got operator" in result.stderr


def test_facts_are_written_one_by_one_and_only_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rehearsal on a CPU: everything but the device's own ceilings."""
    out = tmp_path / "facts.jsonl"
    command = ["bench", "facts", "--device", "cpu", "--small", "--out", str(out)]
    assert main([*command, "--seconds", "0"]) == 0
    assert "out of time" in capsys.readouterr().err
    assert main(command) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["fact"].split(" (")[0] for line in lines] == [
        "errors native", "errors native", "times v+q", "times accumulation",
    ]  # fmt: skip
    if "native" in lines[0]["machine"]["backends"]:
        assert lines[0]["value"]["correct"]
    assert lines[2]["value"]["sgr torch"]["milliseconds"] > 0
    assert main(command) == 0
    assert len(out.read_text().splitlines()) == len(lines)


def test_a_fact_that_fails_is_written_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(facts, "errors", broken)
    out = tmp_path / "facts.jsonl"
    assert main(["bench", "facts", "--device", "cpu", "--small", "--out", str(out)]) == 0
    values = [json.loads(line)["value"] for line in out.read_text().splitlines()]
    assert values[0] == {"error": "RuntimeError: no such kernel"}
    assert "sgr torch" in values[2]


@pytest.mark.parametrize("shape", [s for s in ragged.SHAPES if math.prod(s[1:]) < 8192], ids=str)
def test_ragged_shapes_agree_on_a_cpu(shape: tuple[int, ...]) -> None:
    ragged.check("reference", shape, torch.float32, "cpu")


@pytest.mark.parametrize("shapes", [device_tests.SHAPES, ragged.SHAPES], ids=["device tests", "ragged"])
def test_shapes_for_a_gpu_reach_all_transforms(shapes: list[tuple[int, ...]]) -> None:
    """Those of both kinds, along rows and along columns, and images above 64 pixels that have none."""

    def counts(shape: tuple[int, ...]) -> Size | None:
        size = (shape[2], shape[3])
        request = backends.Request("product", torch.device("cuda"), torch.float32, *shape[:2], size, "even")
        return native.transformed(request, size)

    found = [counts(shape) for shape in shapes if max(shape[2:]) > 64]
    assert None in found
    for axis in (0, 1):
        assert {native._SQUARES[count[axis]] for count in found if count} == {16, 64}


@pytest.mark.skipif("native" not in backends.available("cpu"), reason="this build has no CPU kernels")
@pytest.mark.parametrize("shape", [s for s in device_tests.SHAPES if math.prod(s) < 8192], ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("agrees_with_the_dense_matrix", (torch.float32,)),
        ("nan_stays_in_its_sample", ()),
        ("layouts", ()),
    ],
    ids=str,
)
def test_what_a_gpu_is_to_show_holds_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, name: str, options: tuple[object, ...], shape: tuple[int, ...]
) -> None:
    """The tests that wait for a device can be passed: the same operators there by the CPU kernels."""
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    getattr(device_tests, f"test_{name}")(shape, *options)


@pytest.mark.parametrize("parts", [[], ["build"]])
def test_without_a_gpu_nothing_runs(tmp_path: Path, parts: list[str]) -> None:
    result = run(tmp_path, *parts, PYTHON="false")
    assert result.returncode == 2
    assert "there is no CUDA device" in result.stderr
