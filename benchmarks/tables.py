"""Markdown of the operators' results, from their JSON alone.

``sgr bench tables FILE...`` prints every row and the overview; ``--readme README.md`` writes the overview of the files
between the README's ``<!-- operators -->`` marks instead.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from benchmarks import step
from benchmarks.shapes import Problem

Cell = dict[str, Any]
_COLUMNS = "ms [20 %, 80 %]", "x dense [95 %]", "x best peer [95 %]", "GB/s", "of copy", "peak MB", "error"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _significant(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _speedup(ratio: dict[str, Any] | None, name: bool = False) -> str:
    if ratio is None:
        return "–"
    text = f"{_significant(ratio['ratio'])} [{_significant(ratio['low'])}, {_significant(ratio['high'])}]"
    return f"{text} {ratio['provider']}" if name else text


def _line(row: dict[str, Any]) -> list[str]:
    if "reason" in row:
        return [row["provider"], f"– ({row['reason']})", *["–"] * (len(_COLUMNS) - 1)]
    error = ", ".join(f"{name} {value:.1e}" for name, value in row.get("error", {}).items()) or "–"
    return [
        row["provider"],
        f"{row['milliseconds']:.4g} [{row['p20']:.4g}, {row['p80']:.4g}]",
        _speedup(row.get("over_dense")),
        _speedup(row.get("over_best_peer"), name=True),
        f"{row['gigabytes_per_second']:.3g}",
        f"{100 * row['copy_fraction']:.0f} %" if "copy_fraction" in row else "–",
        f"{row['peak_bytes'] / 1e6:.4g}" if "peak_bytes" in row else "–",
        error if row.get("correct", True) else f"{error}: wrong",
    ]


def cell_table(cell: Cell) -> str:
    """All rows of a cell under its title."""
    title = f"**{Problem(**cell['problem'])} {cell['operation']}**"
    if "auto_to_fastest" in cell:
        ratio = cell["auto_to_fastest"]
        title += f", auto / fastest other ({ratio['provider']}): {_speedup(ratio)}"
    return f"{title}\n\n{_table(['provider', *_COLUMNS], [_line(row) for row in cell['rows']])}"


def overview(cells: list[Cell]) -> str:
    """A line a cell: time of ``auto``, of the copy, and how much faster than each peer of float32 accuracy."""
    lines = []
    for cell in cells:
        rows = {row["provider"]: row for row in cell["rows"]}
        auto = rows.get("sgr auto", {})
        if "milliseconds" not in auto:
            continue

        best = auto.get("over_best_peer")
        # Where there are paired ratios, those: a slow peer sits out rounds that count in the others' medians.
        paired = {ratio["provider"]: ratio["ratio"] for ratio in (auto.get("over_dense"), best) if ratio}

        def times(name: str, rows: dict[str, Any] = rows, paired: dict[str, float] = paired) -> str:
            auto, peer = rows["sgr auto"], rows.get(name, {})
            if not (auto["correct"] and peer.get("correct")):
                return "–"
            return _significant(paired.get(name, peer["milliseconds"] / auto["milliseconds"]))

        fraction = f"{100 * auto['copy_fraction']:.0f} %" if "copy_fraction" in auto else "–"
        lines.append(
            [
                str(Problem(**cell["problem"])),
                cell["operation"],
                f"{auto['milliseconds']:.3g}",
                fraction,
                times("dense"),
                times("rfft2"),
                times("conv2d"),
                f"{_significant(best['ratio'])} ({best['provider']})" if best else "–",
            ]
        )
    header = ["images", "operation", "ms", "of copy", "x dense", "x rfft2", "x conv2d", "x best peer"]
    return _table(header, lines)


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    threads = f", {machine['threads']} threads" if machine["threads"] else f", CUDA {machine['cuda']}"
    return f"{machine['device']}{threads}, torch {machine['torch']}, commit {machine['commit']}"


def for_readme(results: list[dict[str, Any]]) -> str:
    """Overviews of v+q and accumulation at full range, one after the other, each under its machine."""
    kept = ("v+q", "accumulation")
    parts = []
    for result in results:
        cells = [c for c in result["cells"] if c["series"] == "shapes" and c["operation"] in kept]
        parts.append(f"{_machine(result)}:\n\n{overview(cells)}")
    return "\n\n".join(parts)


def step_overview(result: dict[str, Any]) -> str:
    """Ratios of time, and in brackets of peak memory, to the clean step: one line a way, one column a network."""
    rows = {(row["way"], row["network"]): row for row in result["rows"]}
    networks = list(dict.fromkeys(network for _, network in rows))

    def cell(way: str, network: str) -> str:
        row = rows.get((way, network), {})
        memory = f" ({row['memory_ratio']:.2f})" if "memory_ratio" in row else ""
        return f"{row['time_ratio']:.2f}{memory}" if "milliseconds" in row else "–"

    lines = [[way, *(cell(way, network) for network in networks)] for way in dict.fromkeys(way for way, _ in rows)]
    clean = [rows["clean", network] for network in networks]
    lines[0] = ["clean", *(f"{row['milliseconds']:.0f} ms, {row['peak_bytes'] / 1e6:.0f} MB" for row in clean)]
    header = ["step", *(f"{row['network']}, batch {row['batch']}" for row in clean)]
    return _table(header, lines)


def steps_for_readme(results: list[dict[str, Any]]) -> str:
    """Overviews of training steps, each under its machine."""
    return "\n\n".join(f"{_machine(result)}:\n\n{step_overview(result)}" for result in results)


def read(file: Path) -> dict[str, Any]:
    """A file of results.

    Raises:
        ValueError: If it holds neither the operators' results nor training steps.
    """
    result: dict[str, Any] = json.loads(file.read_text())
    if "cells" not in result and not all("network" in row for row in result.get("rows", [{}])):
        raise ValueError(f"{file}: expected results of sgr bench operators or step")
    return result


def main(arguments: list[str] | None = None) -> None:
    """Print the tables of result files, or write their overviews into a README.

    Raises:
        ValueError: If a file holds other results, or the README has no marks.
    """
    parser = argparse.ArgumentParser(prog="sgr bench tables", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="JSON of sgr bench operators or step")
    parser.add_argument("--readme", type=Path, help="file to write the overviews into")
    options = parser.parse_args(arguments)
    results = [read(file) for file in options.files]
    operators, steps = ([r for r in results if part in r] for part in ("cells", "rows"))
    if options.readme is None:
        for result in operators:
            print(_machine(result), *map(cell_table, result["cells"]), overview(result["cells"]), sep="\n\n")
        for result in steps:
            print(_machine(result), step.table(result["rows"]), sep="\n\n")
        return
    text = options.readme.read_text()
    for name, content in (("operators", operators and for_readme(operators)), ("steps", steps_for_readme(steps))):
        marks = re.compile(rf"(<!-- {name} -->\n).*(<!-- /{name} -->)", re.DOTALL)
        if content and not marks.search(text):
            raise ValueError(f"{options.readme}: expected a line '<!-- {name} -->' and a line '<!-- /{name} -->'")
        if content:
            text = marks.sub(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text)
    options.readme.write_text(text)


if __name__ == "__main__":
    main()
