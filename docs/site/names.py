"""Names of the public surface become links: ``sgr.SGRLoss`` in a page, `SGRLoss` in a docstring."""

from __future__ import annotations

import types
from functools import cache
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.transforms import SphinxTransform

import sgr_kernels

MODULES = ("functional", "attacks", "evaluation", "models", "training", "backends")


@cache
def targets() -> dict[str, str]:
    """Where a name is documented, by every way to write it: an object with two names has one home, the first."""
    found: dict[str, str] = {}
    homes: dict[int, str] = {}
    names = [name for name in sgr_kernels.__all__ if not name.startswith("__")]
    names += [f"{module}.{name}" for module in MODULES for name in getattr(sgr_kernels, module).__all__]
    for name in names:
        thing = resolve(name)
        home = thing.__name__ if isinstance(thing, types.ModuleType) else f"sgr_kernels.{name}"
        home = homes.setdefault(id(thing), home)
        for spelling in (name, f"sgr.{name}", f"sgr_kernels.{name}", name.rpartition(".")[2]):
            found.setdefault(spelling, home)
    return found


def resolve(name: str) -> Any:
    """The object of that name below the package."""
    thing: Any = sgr_kernels
    for part in name.split("."):
        thing = getattr(thing, part)
    return thing


def modules() -> set[str]:
    """The public modules, by their own names."""
    return {getattr(sgr_kernels, name).__name__ for name in MODULES}


class Names(SphinxTransform):
    """Turns code that is a public name, alone or called with whatever arguments, into a reference to it."""

    default_priority = 200

    def apply(self, **_: Any) -> None:
        """Docutils' interface."""
        for node in list(self.document.findall(lambda n: isinstance(n, (nodes.literal, nodes.title_reference)))):
            text = node.astext()
            name = text.partition("(")[0]
            literal = nodes.literal(text, text)
            known = name.startswith("sgr.") or isinstance(node, nodes.title_reference)
            if not known or name not in targets() or isinstance(node.parent, nodes.reference):
                node.replace_self(literal)
                continue
            home = targets()[name]
            kind = "mod" if home in modules() else "obj"
            reference = pending_xref("", literal, refdomain="py", reftype=kind, reftarget=home, refexplicit=True)
            reference["refdoc"] = self.env.docname
            node.replace_self(reference)


def setup(app: Any) -> dict[str, bool]:
    """Of Sphinx."""
    app.add_transform(Names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
