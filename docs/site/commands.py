"""``{sgr-command} NAME``: a command's options, from the parser that reads them."""

from __future__ import annotations

import argparse
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive

from sgr_kernels import cli


def parser(name: str) -> argparse.ArgumentParser:
    """The parser of a command."""
    commands = cli._parser([name])._subparsers
    assert commands is not None
    return commands._group_actions[0].choices[name]  # type: ignore[index]


class Command(Directive):
    """What the command does, how it is called, and a list of its options with their defaults.

    Its content is what shows where the page is read as plain Markdown.
    """

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        """Docutils' interface."""
        its = parser(self.arguments[0])
        options = nodes.definition_list(classes=["options"])
        for action in its._actions:
            if action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction):
                options += _item(its, action)
        return [nodes.paragraph("", its.description or ""), options]


def _item(its: argparse.ArgumentParser, action: argparse.Action) -> nodes.definition_list_item:
    formatter = its._get_formatter()
    call = " ".join(formatter._format_action_invocation(action).split())
    text = formatter._expand_help(action).removesuffix(" (default: None)") if action.help else ""
    term = nodes.term("", "", nodes.literal(call, call))
    return nodes.definition_list_item("", term, nodes.definition("", nodes.paragraph(text, text)))


def setup(app: Any) -> dict[str, bool]:
    """Of Sphinx."""
    app.add_directive("sgr-command", Command)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
