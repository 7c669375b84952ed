"""The floors of the house: a room uses only the rooms that this table grants it, all of them below its own."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import sgr_kernels

PACKAGE = Path(sgr_kernels.__file__).parent

MATHEMATICS = {"toeplitz"}
OPERATORS = MATHEMATICS | {"checks", "backends", "ops", "functional"}
LIBRARY = OPERATORS | {"covariance", "attacks"}
LOSS = LIBRARY | {"perturbations", "penalty", "loss"}
ABOVE = LOSS | {"models", "_version"}

# From the ground up.
MAY_USE = {
    "_version": set(),
    "report": set(),
    "toeplitz": set(),
    "checks": MATHEMATICS,
    "backends": MATHEMATICS | {"checks"},
    "ops": MATHEMATICS | {"checks", "backends"},
    "functional": OPERATORS,
    "covariance": OPERATORS,
    "attacks": OPERATORS | {"covariance"},
    "models": {"checks"},
    "perturbations": LIBRARY,
    "penalty": LIBRARY | {"perturbations"},
    "loss": LIBRARY | {"perturbations", "penalty"},
    "evaluation": LOSS,
    "training": ABOVE | {"evaluation"},
    "reproduce": ABOVE | {"evaluation", "training", "report"},
    "__init__": ABOVE | {"evaluation", "training"},
    "demo": ABOVE | {"evaluation", "training", "report"},
    "commands": ABOVE | {"evaluation", "training", "report", "reproduce", "demo", "__init__"},
    "cli": {"commands", "_version"},
    "__main__": {"cli"},
}


def _module(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(source: str) -> Iterator[str]:
    """Modules of the package that a source imports, at its top or within its functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "sgr_kernels")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they lead"
            if (node.module or "").partition(".")[0] == "sgr_kernels":
                names = (f"{node.module}.{alias.name}" for alias in node.names)
                yield from (name if name in MODULES else node.module for name in names)


USES = {name: set(imports(path.read_text())) - {name} for name, path in MODULES.items()}


def room(module: str) -> str:
    """The part of a module's name below the package; the package itself is the roof."""
    return [*module.split("."), "__init__"][1]


def test_the_table_has_no_arrow_up():
    floors = list(MAY_USE)
    for number, (name, granted) in enumerate(MAY_USE.items()):
        assert granted - {name} <= set(floors[:number]), name
    assert {room(module) for module in MODULES} <= set(floors)


@pytest.mark.parametrize("name", MAY_USE)
def test_a_room_uses_what_it_may(name):
    for module, used in USES.items():
        if room(module) == name:
            assert {room(other) for other in used} <= MAY_USE[name] | {name}, f"{module} uses {sorted(used)}"


def test_no_circle_of_modules():
    graphlib.TopologicalSorter(USES).prepare()


def test_imports_within_functions_are_seen():
    assert list(imports("def f():\n    from sgr_kernels import loss, SGRLoss\n    import sgr_kernels.ops\n")) == [
        "sgr_kernels.loss",
        "sgr_kernels",
        "sgr_kernels.ops",
    ]
