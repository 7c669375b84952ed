"""First facts from a GPU, the most valuable first, one JSON line each: ceilings, errors, then times.

``sgr bench facts --out FILE`` writes each fact the moment it has it, with the machine it is of. One that fails is
written with its error. Given again, the command goes on with what the file lacks; where a CUDA error left the device
unusable the process ends, and the next one leaves out the fact that did it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import providers
from benchmarks.operators import given
from benchmarks.shapes import Problem
from benchmarks.timing import interleave, summary, timer
from sgr_kernels.reproduce import machine

Fact = tuple[str, Callable[[], Any]]

RAGGED = [
    *(Problem(9, 1, 28, 28), Problem(7, 3, 32, 32), Problem(3, 4, 19, 32), Problem(5, 3, 40, 33)),
    *(Problem(4, 1, 64, 64), Problem(3, 4, 64, 64), Problem(3, 5, 20, 12), Problem(2, 1, 70, 31)),
    *(Problem(2, 3, 224, 224), Problem(1, 3, 512, 512), Problem(2, 3, 100, 150)),
]
"""Odd batches and sizes, one or more for each kernel."""

HEADLINE = [
    *(Problem(1024, 3, 32, 32), Problem(128, 3, 32, 32), Problem(256, 3, 64, 64), Problem(64, 3, 224, 224)),
    *(Problem(8, 3, 512, 512), Problem(1024, 1, 28, 28), Problem(128, 1, 28, 28)),
]

FIRST = ["copy", "sgr native", "sgr native tf32", "sgr torch", "rfft2"]
SECOND = ["copy", "sgr native", "sgr triton", "sgr triton tf32", "dense", "dense tf32"]
_SECONDS = 0.4
"""Of sampling for each cell."""


class DeviceLost(RuntimeError):
    """After a CUDA error that stays, nothing more can be asked of the device by this process."""


def facts(device: torch.device, small: bool = False) -> Iterator[Fact]:
    """All of them, by name, in order of value; ``small`` for a rehearsal."""
    ragged, headline = (RAGGED[:2], HEADLINE[-1:]) if small else (RAGGED, HEADLINE)
    on_gpu = device.type == "cuda"
    if on_gpu:
        yield "copy bandwidth", partial(_copy_bandwidth, device, 2**12 if small else 2**28)
        yield "product rate", partial(_product_rate, device, (64, 32) if small else (8192, 4096))
        yield "launches", partial(_launches, device)
    for problem in ragged:
        yield f"errors native {problem}", partial(errors, problem, "sgr native", device)
    for problem in headline:
        yield f"times v+q {problem}", partial(times, problem, "v+q", FIRST, device)
    for problem in headline[:4]:
        names = ["copy", "sgr native", "rfft2"]
        yield f"times accumulation {problem}", partial(times, problem, "accumulation", names, device)
    for problem in ragged if on_gpu else ():
        yield f"errors triton {problem}", partial(errors, problem, "sgr triton", device)
    for problem in headline if on_gpu else ():
        yield f"times v+q {problem}, second", partial(times, problem, "v+q", SECOND, device)


def errors(problem: Problem, name: str, device: torch.device) -> dict[str, Any]:
    """Errors of a provider against float64, by operation, and whether all are within the tolerance."""
    images, exact = given(problem, device)
    (provider,) = providers.named([name], device)
    found = {o: exact.error(o, provider.build(problem, o, device)(images)) for o in ("v+q", "q", "accumulation")}
    return {"errors": found, "correct": all(provider.correct(error) for error in found.values())}


def times(problem: Problem, operation: str, names: list[str], device: torch.device) -> dict[str, Any]:
    """Median milliseconds of some providers, in turn; of one that fails, its error."""
    images, _ = given(problem, device)
    known = {provider.name for provider in providers.all_providers(device)}
    timers, rows = {}, {}
    for provider in providers.named([name for name in names if name in known], device):
        try:
            timers[provider.name] = timer(provider.build(problem, operation, device), images)
        except Exception as error:
            _raise_if_lost(device, error)
            rows[provider.name] = {"error": _told(error)}
    samples = interleave(timers, _SECONDS)
    return rows | {name: {**summary(values), "method": timers[name].method} for name, values in samples.items()}


def _copy_bandwidth(device: torch.device, numbers: int) -> dict[str, float]:
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    seconds = _device_seconds(lambda: target.copy_(source))
    return {"gigabytes_per_second": 2e-9 * source.numel() * source.element_size() / seconds}


def _product_rate(device: torch.device, sizes: tuple[int, int]) -> dict[str, float]:
    found = {}
    for name, dtype, size in zip(("bfloat16", "float32"), (torch.bfloat16, torch.float32), sizes):
        a = torch.randn(size, size, device=device, dtype=dtype)
        found[f"{name}_teraflops"] = 2e-12 * size**3 / _device_seconds(partial(torch.matmul, a, a))
    return found


def _launches(device: torch.device) -> dict[str, float]:
    """Microseconds of an elementwise kernel on one number: launched alone, and as a node of a graph."""
    x, count = torch.zeros(1, device=device), 200

    def run() -> None:
        for _ in range(count):
            x.add_(1)

    alone = _device_seconds(run) / count
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return {"launch_microseconds": 1e6 * alone, "node_microseconds": 1e6 * _device_seconds(graph.replay) / count}


def _device_seconds(call: Callable[[], Any], repeats: int = 10) -> float:
    for _ in range(3):
        call()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _raise_if_lost(device: torch.device, error: Exception) -> None:
    """Raise if the device no longer answers.

    Raises:
        DeviceLost: Then.
    """
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            raise DeviceLost(_told(error)) from error


def _value(fact: Callable[[], Any], device: torch.device) -> tuple[Any, bool]:
    """What a fact is, or its error; and whether the device was lost over it."""
    try:
        return fact(), False
    except DeviceLost as error:
        return {"error": str(error), "device_lost": True}, True
    except Exception as error:
        try:
            _raise_if_lost(device, error)
        except DeviceLost:
            return {"error": _told(error), "device_lost": True}, True
        return {"error": _told(error)}, False


def main(arguments: list[str] | None = None) -> None:
    """Write the facts that the file lacks."""
    parser = argparse.ArgumentParser(prog="sgr bench facts", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines, to begin or to go on with")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=140.0, help="begin no fact after so long")
    parser.add_argument("--small", action="store_true", help="a rehearsal: few and small shapes")
    options = parser.parse_args(arguments)
    device, start = torch.device(options.device), time.monotonic()
    about = machine.describe(device)
    known = set()
    if options.out.exists():
        lines = map(json.loads, options.out.read_text().splitlines())
        known = {line["fact"] for line in lines if line["machine"] == about}
    with options.out.open("a") as out:
        for name, fact in facts(device, options.small):
            if name in known:
                continue
            if time.monotonic() - start > options.seconds:
                print("out of time; the same command goes on", file=sys.stderr)
                return
            begin = time.monotonic()
            value, lost = _value(fact, device)
            line = {"fact": name, "seconds": round(time.monotonic() - begin, 2), "value": value, "machine": about}
            out.write(json.dumps(line) + "\n")
            out.flush()
            print(f"{name}: {json.dumps(value)[:300]}", flush=True)
            if lost:
                print("the device no longer answers; the same command goes on in a new process", file=sys.stderr)
                sys.exit(3)


if __name__ == "__main__":
    main()
