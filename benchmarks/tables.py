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

from benchmarks.shapes import Problem

Cell = dict[str, Any]
_MARKS = re.compile(r"(<!-- operators -->\n).*?(<!-- /operators -->)", re.DOTALL)
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

        def times(name: str, rows: dict[str, Any] = rows, auto: dict[str, Any] = auto) -> str:
            peer = rows.get(name, {})
            if not (auto["correct"] and peer.get("correct")):
                return "–"
            return _significant(peer["milliseconds"] / auto["milliseconds"])

        best = auto.get("over_best_peer")
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
    """Overviews of the shapes' v+q and accumulation, one after the other, each under its machine."""
    kept = ("v+q", "accumulation")
    parts = []
    for result in results:
        cells = [c for c in result["cells"] if c["series"] in ("shapes", "truncated") and c["operation"] in kept]
        parts.append(f"{_machine(result)}:\n\n{overview(cells)}")
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    """Print the tables of result files, or write their overview into a README.

    Raises:
        ValueError: If the README has no marks.
    """
    parser = argparse.ArgumentParser(prog="sgr bench tables", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="JSON of sgr bench operators")
    parser.add_argument("--readme", type=Path, help="file to write the overview into")
    options = parser.parse_args(arguments)
    results = [json.loads(file.read_text()) for file in options.files]
    if options.readme is None:
        for result in results:
            print(_machine(result), *map(cell_table, result["cells"]), overview(result["cells"]), sep="\n\n")
        return
    text = options.readme.read_text()
    if not _MARKS.search(text):
        raise ValueError(f"{options.readme}: expected a line '<!-- operators -->' and a line '<!-- /operators -->'")
    options.readme.write_text(_MARKS.sub(lambda marks: f"{marks[1]}{for_readme(results)}\n{marks[2]}", text))


if __name__ == "__main__":
    main()
