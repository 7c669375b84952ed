"""What the site adds to pages that also read as plain Markdown: its contents, and the programs that pages lead to.

The contents are those that the front page lists, and below the pages of results those that they lead to.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

HEADING = "## Documentation"


def groups(front_page: str) -> dict[str, list[str]]:
    """Pages by group, from the items ``- **Group**: ... [title](page.md) ...`` below the heading."""
    _, _, listed = front_page.partition(f"\n{HEADING}\n")
    items = re.findall(r"^- \*\*(.+?)\*\*: ((?:.+\n)(?:  .+\n)*)", listed, re.MULTILINE)
    return {name: links(text) for name, text in items}


def links(text: str) -> list[str]:
    """Pages that a text leads to, each once."""
    return list(dict.fromkeys(re.findall(r"\]\(([^):#]+)\.md\)", text)))


def toctree(pages: list[str], caption: str | None = None) -> str:
    """A hidden directive."""
    options = ":hidden:\n" + (f":caption: {caption}\n" if caption else "")
    listed = "\n".join(pages)
    return f"\n```{{toctree}}\n{options}\n{listed}\n```\n"


def _append(app: Any, page: str, source: list[str]) -> None:
    if page == app.config.root_doc:
        source[0] += "".join(toctree(pages, name) for name, pages in groups(source[0]).items())
    elif page.startswith(("benchmarks/results/paper/", "benchmarks/results/beyond/")) and page.endswith("/README"):
        source[0] += toctree([link for link in links(source[0]) if not link.startswith("..")])
    folder = posixpath.dirname(page)
    source[0] = re.sub(
        r"^\[(examples/\w+\.py)\]\(\1\)$",
        lambda found: f"```{{literalinclude}} /{posixpath.join(folder, found[1])}\n```",
        source[0],
        flags=re.MULTILINE,
    )


def setup(app: Any) -> dict[str, bool]:
    """Of Sphinx."""
    app.connect("source-read", _append)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
