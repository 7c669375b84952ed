"""Tables for the terminal and Markdown pages."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal: first column to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(header))]

    def aligned(cells: list[str]) -> str:
        return "  ".join(c.ljust(w) if k == 0 else c.rjust(w) for k, (c, w) in enumerate(zip(cells, widths))).rstrip()

    return "\n".join([aligned(lines[0]), "  ".join("-" * width for width in widths), *map(aligned, lines[1:])])


def percent(share: float, interval: tuple[float, float] | None = None) -> str:
    """A share as ``"91.6 %"``; with its interval as ``"91.6 % (89.0 to 93.7)"``."""
    text = f"{100 * share:.1f} %"
    return text if interval is None else f"{text} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


class Page:
    """A Markdown page, put together from top to bottom."""

    def __init__(self, title: str) -> None:
        self._blocks = [f"# {title}"]

    def heading(self, text: str) -> None:
        """A section's heading."""
        self._blocks.append(f"## {text}")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._blocks.append(text)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> None:
        """A table; the first ``left`` columns to the left, the others to the right."""
        rule = [*["---"] * left, *["---:"] * (len(header) - left)]
        lines = [header, rule, *rows]
        self._blocks.append(
            "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
        )

    def figure(self, file: str, description: str) -> None:
        """A picture from a file beside the page, and what it shows below it."""
        alternative = description.split(". ")[0].replace("[", "(").replace("]", ")")
        self._blocks.append(f"![{alternative}]({file})\n\n{description}")

    def code(self, text: str) -> None:
        """Verbatim text."""
        self._blocks.append(f"```\n{text}\n```")

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the page."""
        Path(path).write_text("\n\n".join(self._blocks) + "\n", encoding="utf-8")
