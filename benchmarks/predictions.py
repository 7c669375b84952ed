"""Times from a GPU beside the least ones that counts allow: ``sgr bench predictions facts.jsonl``.

The counts are those of `benchmarks.cuda_static`, made without a GPU; of the card they take the bandwidth of a copy and
the time of a graph's node as the facts have them, and assume the rest. A time that is more than `FAR` times the largest
of the least ones wants an explanation: a sentence, with the counter that shows it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.cuda_static import DEVICES, RESULT

FAR = 1.5
GOALS = {
    "v+q (128,1,28,28)": 3.0,
    "v+q (1024,1,28,28)": 4.0,
    "v+q (128,3,32,32)": 4.5,
    "v+q (1024,3,32,32)": 10.0,
    "v+q (256,3,64,64)": 16.0,
    "v+q (64,3,224,224)": 160.0,
    "v+q (8,3,512,512)": 100.0,
    "accumulation (1024,3,32,32)": 9.0,
}
"""Microseconds to reach on an H200 at float32 accuracy."""
_BOUNDS = ("issue", "tensor cores", "float64", "launches")
"""Of the counts' least times, beside the memory's; not the L2's, for the first-level cache serves some requests."""


def rows(facts: Iterable[dict[str, Any]], counts: dict[str, Any]) -> list[dict[str, Any]]:
    """One a measured case that has counts.

    Args:
        facts: Lines of `benchmarks.facts`, of one card; of several of a name the last counts.
        counts: Of `benchmarks.cuda_static`.

    Returns:
        Rows with the case, microseconds measured and least, what bounds them, and the goal, or None.

    Raises:
        ValueError: If the facts are of several machines or commits, or of a card whose architecture was not counted.
    """
    lines = list(facts)
    found = {line["fact"]: line["value"] for line in lines}
    machines = {json.dumps(line["machine"], sort_keys=True): line["machine"]["device"] for line in lines}
    if len(machines) != 1:
        raise ValueError(f"facts: expected those of one machine and commit, got {len(machines)}")
    (name,) = machines.values()
    architecture, card = next(
        ((a, c) for a, device in DEVICES.items() for c in device.memory_bytes if c.split()[0] in name), (None, None)
    )
    if architecture is None or card is None:
        raise ValueError(f"facts: expected an A100, H100 or H200, whose kernels were counted, got {name}")
    copy = found.get("copy bandwidth", {}).get("gigabytes_per_second")
    node = found.get("launches", {}).get("node_microseconds")
    result = []
    for case, count in counts[architecture].items():
        value = found.get(f"times {case}", {}).get("sgr native", {})
        if "milliseconds" not in value:
            continue
        memory = count["floors in us"][f"memory, {card}"]
        least = {bound: count["floors in us"][bound] for bound in _BOUNDS}
        least["memory"] = memory if copy is None else memory * DEVICES[architecture].memory_bytes[card] / (1e9 * copy)
        if node is not None:
            least["launches"] = count["launches"] * node
        bound = max(least, key=lambda what: least[what])
        measured = 1e3 * value["milliseconds"]
        goal = GOALS.get(case)
        result.append({"case": case, "measured": measured, "least": least[bound], "bound": bound, "goal": goal})
    return result


def table(found: list[dict[str, Any]]) -> str:
    """Markdown, a line a case."""
    lines = ["| case | least time, us | by | measured, us | of the least | goal, us | |", "|---" * 7 + "|"]
    for row in found:
        ratio = row["measured"] / row["least"]
        far = f"over {FAR:g}: explain" if ratio > FAR else ""
        goal = "" if row["goal"] is None else f"{row['goal']:g}"
        times = f"{row['least']:.3g} | {row['bound']} | {row['measured']:.3g} | {ratio:.2f}"
        lines.append(f"| {row['case']} | {times} | {goal} | {far} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="sgr bench predictions", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="of sgr bench facts")
    options = parser.parse_args(arguments)
    facts = [json.loads(line) for line in options.file.read_text().splitlines()]
    print(table(rows(facts, json.loads(RESULT.read_text()))))


if __name__ == "__main__":
    main()
