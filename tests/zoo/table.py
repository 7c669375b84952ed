"""The table of real models in docs/support.md, from the results alone: ``python -m tests.zoo.table``."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable

from sgr_kernels.penalty.choice import METHODS
from tests.support_matrix import PAGE
from tests.zoo.measure import PART, Row, read
from tests.zoo.models import ENTRIES

MARKS = re.compile(r"(<!-- zoo -->\n).*(<!-- /zoo -->)", re.DOTALL)
SHORT = {"double-backward": "db", "forward-mode": "fm", "finite-difference": "fd", PART: "¼"}
_REFUSED = "kinks of ReLU"  # words of a refusal that allow_kinks turns into a warning


class _Notes:
    """Reasons, numbered as they come."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, reason: str) -> str:
        return f"[{self._numbers.setdefault(reason, len(self._numbers) + 1)}]"

    def __str__(self) -> str:
        return "\n".join(f"- [{number}] {reason}" for reason, number in self._numbers.items())


def _reason(message: str) -> str:
    """The first words of a refusal, and its remedy, without what varies."""
    first, _, remedy = message.removeprefix("method: ").partition("; ")
    return re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "#", first.split(" (")[0]) + (f" … {remedy[-70:]}" if remedy else "")


def _error(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-").replace("e+00", "")


def _exact(row: Row, notes: _Notes) -> str:
    parts = [
        _error(row[f"error{bits}"]) if f"error{bits}" in row else f"no {notes.mark(_reason(row[f'reason{bits}']))}"
        for bits in (64, 32)
    ]
    return parts[0] if parts[0] == parts[1] else ", ".join(parts)


def _difference(row: Row, notes: _Notes) -> str:
    wide = _error(row["error64"]) if "error64" in row else f"no {notes.mark(_reason(row['reason64']))}"
    if "cosine32" not in row:
        return f"{wide}, no {notes.mark(_reason(row['reason32']))}"
    refused = ", refused" if any(_REFUSED in line for line in row["said"]) else ""
    return f"{wide}, {row['cosine32']:.2f}, {row['norm32']:.3g}{refused}"


def _ratios(rows: dict[str, Row], key: str) -> str:
    found = [rows.get(way, {}).get(key) for way in SHORT]
    return " / ".join("–" if ratio is None else f"{ratio:.1f}" for ratio in found) if any(found) else ""


def _spread(rows: Iterable[Row], method: str, key: str) -> str:
    values = sorted(row[key] for row in rows if row["method"] == method and key in row)
    if len(values) < 2:
        return "–"
    return f"{statistics.median(values):.1f} ({values[0]:.1f} to {values[-1]:.1f})"


def render(rows: list[Row]) -> str:
    """What stands between the marks."""
    by = {(row["model"], row["pass"], row["method"]): row for row in rows}
    notes, lines = _Notes(), []
    for name, entry in ENTRIES.items():
        failed = by.get((name, "gradients", "all"))
        if failed is None and (name, "gradients", "auto") not in by:
            continue
        batch = "×".join(map(str, entry.shape))
        if failed is not None:
            lines.append(f"| {name}, {batch} | failed {notes.mark(failed['failed'])} | | | | | |")
            continue
        db, fm, fd = (by[name, "gradients", method] for method in METHODS)
        auto = by[name, "gradients", "auto"]
        chose = SHORT[auto["chose"]] if "chose" in auto else f"no {notes.mark(_reason(auto['reason32']))}"
        times, memory = (
            {method: by[name, which, method] for method in ("plain", *SHORT) if (name, which, method) in by}
            for which in ("times", "memory")
        )
        cells = [f"{name}, {batch}", _exact(db, notes), _exact(fm, notes), _difference(fd, notes), chose]
        cells += [_ratios(times, "time_ratio"), _ratios(memory, "memory_ratio")]
        lines.append("| " + " | ".join(cells) + " |")
    header = ["model, batch × input", *METHODS, "auto", "time", "peak memory"]
    about = rows[-1]
    libraries = ", ".join(f"{library} {about[library]}" for library in ("torch", "timm", "torchvision", "transformers"))
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    parts = [
        f"{len(lines)} models; {about['device']}, one thread, {libraries}, commit {commits}.",
        "| | time of a step: median (range) | peak memory | first step |\n|---|---|---|---|\n"
        + "\n".join(
            f"| {method} | " + " | ".join(_spread(rows, method, key) for key in _SPREADS) + " |" for method in SHORT
        ),
        "| " + " | ".join(header) + " |\n|" + "---|" * len(header) + "\n" + "\n".join(lines),
        str(notes),
    ]
    return "\n\n".join(parts) + "\n"


_SPREADS = ("time_ratio", "memory_ratio", "first_ratio")


def main() -> None:
    """Write the table into the page.

    Raises:
        ValueError: If the page has no marks.
    """
    page = PAGE.read_text()
    if not MARKS.search(page):
        raise ValueError(f"{PAGE}: expected a line '<!-- zoo -->' and a line '<!-- /zoo -->'")
    PAGE.write_text(MARKS.sub(lambda found: f"{found[1]}{render(read())}{found[2]}", page))


if __name__ == "__main__":
    main()
