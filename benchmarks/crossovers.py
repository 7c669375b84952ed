"""Up to which dimension the dense matrix, formed in every call, beats each backend: the data of ``backend="auto"``.

``sgr bench crossovers`` measures tiny images through the public interface and rewrites this kind of device's entry in
``sgr_kernels/backends/crossovers.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks import providers, tables
from benchmarks.operators import Cell, measure, write
from benchmarks.shapes import SERIES, SERIES_OPERATIONS, Problem
from sgr_kernels.backends import crossovers
from sgr_kernels.reproduce import machine

BACKENDS = ("native", "triton", "torch")
OPERATORS = {
    "product": ("q", "forward+backward"),
    "quadratic_form": ("q", "forward+backward"),
    "cross_spectrum": ("accumulation",),
}
"""The operations that stand for an operator: the dense matrix must win all of them."""


def medians(cells: list[Cell]) -> list[dict[str, Any]]:
    """Milliseconds by backend whose answer is right, a record for each cell."""
    return [
        {
            "operation": cell["operation"],
            "shape": [cell["problem"][key] for key in ("batch", "channels", "height", "width")],
            "milliseconds": {
                row["provider"].removeprefix("sgr "): round(row["milliseconds"], 5)
                for row in cell["rows"]
                if "milliseconds" in row and row.get("correct")
            },
        }
        for cell in cells
    ]


def dense_up_to(records: list[dict[str, Any]], backend: str, operations: tuple[str, ...]) -> int:
    """The largest measured dimension up to which, without exception, the dense matrix was faster."""
    wins: dict[int, bool] = {}
    for record in records:
        times = record["milliseconds"]
        if record["operation"] in operations and backend in times:
            _, channels, height, width = record["shape"]
            dimension = channels * height * width
            won = times.get("reference", float("inf")) < times[backend]
            wins[dimension] = wins.get(dimension, True) and won
    largest = 0
    for dimension in sorted(wins):
        if not wins[dimension]:
            break
        largest = dimension
    return largest


def entry(records: list[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """What the table says of a kind of device: source, answer, and what it was read from."""
    measured = [b for b in BACKENDS if any(b in r["milliseconds"] for r in records)]
    return {
        "source": {"command": "sgr bench crossovers", **machine.describe(device)},
        "dense_up_to": {
            b: {operator: dense_up_to(records, b, operations) for operator, operations in OPERATORS.items()}
            for b in measured
        },
        "measured": records,
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(prog="sgr bench crossovers", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of sampling for each cell")
    parser.add_argument("--shapes", nargs="+", type=Problem.parse, metavar="B,C,H,W", default=SERIES["tiny"])
    parser.add_argument("--out", type=Path, default=crossovers.FILE, help="the table to rewrite")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    chosen = providers.named([f"sgr {b}" for b in (*BACKENDS, "reference")], device)
    cells = []
    for problem in options.shapes:
        for operation in SERIES_OPERATIONS["tiny"]:
            cells.append(measure(problem, operation, chosen, device, options.budget, "tiny"))
            print(f"\n{tables.cell_table(cells[-1])}", flush=True)
    table = json.loads(options.out.read_text()) if options.out.exists() else {}
    table[device.type] = entry(medians(cells), device)
    write(options.out, table)
    print(json.dumps(table[device.type]["dense_up_to"], indent=1))


if __name__ == "__main__":
    main()
