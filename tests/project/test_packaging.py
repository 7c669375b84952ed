"""What importing the package costs and touches, and what it offers."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sgr_kernels

_IMPORT = """
import json, sys, time
import torch
before, start = set(sys.modules), time.process_time()
import sgr_kernels
seconds, modules = time.process_time() - start, set(sys.modules) - before
print(json.dumps({
    "seconds": seconds,
    "modules": sorted(modules),
    "cuda": torch.cuda.is_initialized(),
    "dtype": str(torch.get_default_dtype()),
}))
"""

MODULES = ("functional", "attacks", "evaluation", "models", "training", "backends", "perturbations")


def _import() -> dict:
    output = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True)
    assert output.stderr == ""
    return json.loads(output.stdout)


@pytest.fixture(scope="module")
def imported() -> dict:
    return _import()


def test_an_import_loads_nothing_heavy(imported):
    roots = {name.split(".")[0] for name in imported["modules"]}
    assert not roots & {"matplotlib", "triton", "safetensors", "scipy", "sympy", "PIL", "tqdm", "pandas", "hypothesis"}
    assert "torch._dynamo" not in imported["modules"]
    assert "torch._inductor" not in imported["modules"]


def test_an_import_touches_nothing(imported):
    assert not imported["cuda"]
    assert imported["dtype"] == "torch.float32"


def test_an_import_is_quick(imported):
    """Half a second of processor time beyond torch's own, at the most."""
    assert imported["seconds"] < 0.5


def test_what_is_public_is_said_in_three_places_alike():
    """The package's docstring, ``__all__``, and the page that also lists the modules' names."""
    docstring = re.findall(r"^(\w+)  +\S", sgr_kernels.__doc__, re.MULTILINE)
    assert sorted(docstring) == sorted(sgr_kernels.__all__)
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    listed = re.findall(r"^- `sgr\.([\w.]+)`: \S", page, re.MULTILINE)
    exported = [f"{module}.{name}" for module in MODULES for name in getattr(sgr_kernels, module).__all__]
    assert sorted(listed) == sorted([*sgr_kernels.__all__, *exported])


@pytest.mark.parametrize("module", ["", *MODULES])
def test_exported_names_exist_and_are_documented(module):
    owner = getattr(sgr_kernels, module) if module else sgr_kernels
    for name in owner.__all__:
        assert name.startswith("__") or getattr(owner, name).__doc__, name


def test_the_package_is_typed_and_versioned():
    folder = Path(sgr_kernels.__file__).parent
    assert (folder / "py.typed").exists()
    assert sgr_kernels.__version__[0].isdigit()


def test_a_backend_named_by_the_environment():
    program = "import sgr_kernels, torch; print(sgr_kernels.functional.displacement_covariance(torch.ones(1, 1, 2, 2)))"
    for name, message in (("reference", None), ("bogus", "SGR_BACKEND: expected one of 'auto'")):
        result = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | {"SGR_BACKEND": name}
        )
        assert (result.returncode == 0) == (message is None)
        assert message is None or message in result.stderr


@pytest.mark.parametrize("name", MODULES)
def test_a_public_module_can_be_imported_from(name: str) -> None:
    assert importlib.import_module(f"sgr_kernels.{name}") is getattr(sgr_kernels, name)
