"""``Sigma^-1 x`` by preconditioned conjugate gradients beside dense factorizations and linear_operator's own.

``sgr bench solve --out FILE`` solves for batches of images, white, 1/f and blue, under exponentials of several decay
lengths. Ours is timed from the covariance's values (``sgr``: spectrum and preconditioner are made in the call) and as
`CovarianceFunction.solve` has it (``prepared``); so are dense solvers. Residuals are taken in float64. The file is
written after every cell; the same command goes on where it was interrupted. ``pip install linear_operator`` adds that.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sgr_kernels as sgr
from benchmarks import timing
from benchmarks.operators import resume, write
from benchmarks.peers import Unsupported
from benchmarks.shapes import Problem, norms, periodic, power_of_two
from sgr_kernels.functional.solve import System
from sgr_kernels.reproduce import machine
from sgr_kernels.toeplitz import conjugate_gradients
from sgr_kernels.toeplitz.geometry import dense_matrix

SHAPES = [Problem(128, 1, 28, 28), Problem(128, 3, 32, 32), Problem(128, 3, 64, 64), Problem(16, 3, 224, 224)]
DECAY_LENGTHS = (1.0, 4.0, 16.0)
TOLERANCE = 1e-6
_DENSE_BYTES = 2 << 30
_SLOW = 20.0
"""Seconds of a call from which on one must do."""
Solver = Callable[[Tensor], Tensor]


def covariance_of(problem: Problem, decay_length: float, device: torch.device) -> sgr.CovarianceFunction:
    """The exponential as it is, not rounded; clipping would leave some of them singular."""
    return sgr.CovarianceFunction.exponential(problem.channels, problem.size, decay_length, psd="none").to(device)


def cold(covariance: sgr.CovarianceFunction, problem: Problem) -> Solver:
    """From the values alone, each time anew."""
    table = covariance.table.clone()

    return lambda images: sgr.functional.covariance_solve(images, table, tolerance=TOLERANCE)


def prepared(covariance: sgr.CovarianceFunction, problem: Problem) -> Solver:
    """With the preconditioner kept."""
    return lambda images: covariance.solve(images, tolerance=TOLERANCE)


def _matrix(covariance: sgr.CovarianceFunction, problem: Problem, dtype: torch.dtype) -> Tensor:
    needed = problem.dimension**2 * dtype.itemsize
    if needed > _DENSE_BYTES:
        raise Unsupported(f"the matrix takes {needed / 1e9:.1f} GB, more than {_DENSE_BYTES / 1e9:.1f} GB")
    return dense_matrix(covariance.table.to(dtype), problem.size)


def dense(dtype: torch.dtype) -> Callable[[sgr.CovarianceFunction, Problem], Solver]:
    """``torch.linalg.solve`` on the formed matrix; forming it is part of the call."""

    def prepare(covariance: sgr.CovarianceFunction, problem: Problem) -> Solver:
        _matrix(covariance, problem, dtype)

        def run(images: Tensor) -> Tensor:
            right = images.flatten(1).to(dtype).mT
            return torch.linalg.solve(_matrix(covariance, problem, dtype), right).mT.reshape(images.shape)

        return run

    return prepare


def factorized(dtype: torch.dtype, kept: bool) -> Callable[[sgr.CovarianceFunction, Problem], Solver]:
    """Cholesky's factor of the formed matrix, kept between calls or made in each."""

    def prepare(covariance: sgr.CovarianceFunction, problem: Problem) -> Solver:
        def factor() -> Tensor:
            return torch.linalg.cholesky(_matrix(covariance, problem, dtype))

        once = factor()

        def run(images: Tensor) -> Tensor:
            right = images.flatten(1).to(dtype).mT
            return torch.cholesky_solve(right, once if kept else factor()).mT.reshape(images.shape)

        return run

    return prepare


def linear_operator_cg(covariance: sgr.CovarianceFunction, problem: Problem) -> Solver:
    """Its conjugate gradients, in float64, on an operator that multiplies by FFT: it has none for images."""
    if importlib.util.find_spec("linear_operator") is None:
        raise Unsupported("linear_operator is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import linear_operator
    table = covariance.table.double()
    period = [power_of_two(extent + reach - 1) for extent, reach in zip(problem.size, table.shape[2:])]
    kernel = torch.fft.rfft2(periodic(table, period)).real.to(torch.complex128)

    class Toeplitz(linear_operator.LinearOperator):
        def _matmul(self, rhs: Tensor) -> Tensor:
            images = rhs.mT.reshape(-1, problem.channels, *problem.size)
            mixed = torch.einsum("cdkl,ndkl->nckl", kernel, torch.fft.rfft2(images, s=period))
            v = torch.fft.irfft2(mixed, s=period)[..., : problem.height, : problem.width]
            return v.reshape(-1, problem.dimension).mT.reshape(rhs.shape)

        def _size(self) -> torch.Size:
            return torch.Size((problem.dimension, problem.dimension))

        def _transpose_nonbatch(self) -> Toeplitz:
            return self

    settings = linear_operator.settings

    def run(images: Tensor) -> Tensor:
        right = images.flatten(1).double().mT.contiguous()
        with (
            torch.no_grad(),
            warnings.catch_warnings(),
            settings.cg_tolerance(TOLERANCE),
            settings.max_cg_iterations(1000),
            settings.max_cholesky_size(0),
        ):
            warnings.simplefilter("ignore")
            return Toeplitz(table).solve(right).mT.reshape(images.shape)

    return run


PROVIDERS: dict[str, Callable[[sgr.CovarianceFunction, Problem], Solver]] = {
    "sgr": cold,
    "sgr prepared": prepared,
    "dense solve float32": dense(torch.float32),
    "dense solve float64": dense(torch.float64),
    "dense Cholesky float32": factorized(torch.float32, kept=False),
    "dense Cholesky float64": factorized(torch.float64, kept=False),
    "dense Cholesky float64 prepared": factorized(torch.float64, kept=True),
    "linear_operator CG float64": linear_operator_cg,
}


def iterations(covariance: sgr.CovarianceFunction, problem: Problem, images: Tensor) -> dict[str, Any]:
    """Of our conjugate gradients over the batch, and of those without a preconditioner (up to 1000)."""
    system = System(covariance.table, problem.size, "even")
    wide = images.to(system.table.dtype)

    def count(precondition: Callable[[Tensor], Tensor], of: Tensor) -> list[int]:
        return sorted(conjugate_gradients.solve(system.product, precondition, of, TOLERANCE, 1000).iterations.tolist())

    ours, without = count(system.preconditioner.inverse, wide), count(lambda r: r, wide[:6])
    return {"median": ours[len(ours) // 2], "most": ours[-1], "without a preconditioner": without[-1]}


def measure(problem: Problem, decay_length: float, chosen: list[str], device: torch.device, budget: float) -> dict:
    """One cell: a row for each provider, residuals in float64, times in turn, ratios to ours."""
    covariance, images = covariance_of(problem, decay_length, device), problem.images(device)
    rows: dict[str, dict[str, Any]] = {}
    timers: dict[str, timing.Timer] = {}
    once: timing.Samples = {}
    for name in chosen:
        row = rows[name] = {"provider": name}
        try:
            run = PROVIDERS[name](covariance, problem)
            start = time.perf_counter()
            y = run(images).double()
            seconds = time.perf_counter() - start
            off = images.double() - sgr.functional.covariance_product(y, covariance.table.double())
            row["residual"] = float((norms(off) / norms(images.double())).max())
            if seconds > _SLOW:
                once[name] = [seconds]
            else:
                timers[name] = timing.timer(lambda images, run=run: (run(images),), images)
        except Unsupported as reason:
            row["reason"] = str(reason)
    samples = timing.interleave(timers, budget) | once
    for name, values in samples.items():
        rows[name] |= timing.summary(values)
        for mine in ("sgr", "sgr prepared"):
            if mine in samples and name != mine:
                rows[name][f"over {mine}"] = timing.paired_ratio(values, samples[mine])
    return {
        "problem": vars(problem),
        "decay_length": decay_length,
        "iterations": iterations(covariance, problem, images),
        "rows": list(rows.values()),
    }


def table(cells: list[dict[str, Any]]) -> str:
    """A row for each cell and provider, as Markdown."""
    lines = ["| shape | decay length | iterations | solver | ms | residual | times ours |", "|---" * 7 + "|"]
    for cell in cells:
        counts = cell["iterations"]
        shape, length = Problem(**cell["problem"]), cell["decay_length"]
        found = f"{counts['most']} ({counts['without a preconditioner']} without)"
        for row in cell["rows"]:
            values = row.get("reason", "–")
            if "milliseconds" in row:
                ratio = row.get("over sgr", {}).get("ratio", math.nan)
                values = (
                    f"{row['milliseconds']:.3g} | {row['residual']:.1g} | {'–' if ratio != ratio else f'{ratio:.3g}'}"
                )
            else:
                values = f"– | – | {values}"
            lines.append(f"| {shape} | {length:g} | {found} | {row['provider']} | {values} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure what is not in the file yet, writing after every cell, and print the table."""
    parser = argparse.ArgumentParser(prog="sgr bench solve", description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", type=Problem.parse, metavar="B,C,H,W", default=SHAPES)
    parser.add_argument("--decay-lengths", nargs="+", type=float, default=list(DECAY_LENGTHS))
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS), metavar="NAME")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--budget", type=float, default=10.0, help="seconds of sampling for each cell, five rounds at least"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write, or to go on with")
    parser.add_argument("--fresh", action="store_true", help="overwrite the file instead of going on with it")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    result = resume(options.out, machine.describe(device), options.fresh)
    print(json.dumps(result["machine"]), flush=True)
    done = [(cell["problem"], cell["decay_length"]) for cell in result["cells"]]
    for problem in options.shapes:
        for length in options.decay_lengths:
            if (vars(problem), length) in done:
                continue
            result["cells"].append(measure(problem, length, options.providers, device, options.budget))
            if options.out is not None:
                write(options.out, result)
            print(table(result["cells"][-1:]), flush=True)
    print(f"\n{table(result['cells'])}")


if __name__ == "__main__":
    main()
