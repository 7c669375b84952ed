"""Warnings name the line that called the package, whatever lies between."""

import functools
import importlib.util
import inspect
import warnings

import pytest
import torch

from sgr_kernels.checks.caller import warn_caller


def inside(tmp_path, source):
    """A module of the package's, from its source."""
    (tmp_path / "made.py").write_text(source)
    spec = importlib.util.spec_from_file_location("sgr_kernels.made", tmp_path / "made.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def here(caught):
    assert len(caught) == 1
    assert caught[0].filename == __file__
    return caught[0].lineno


def test_called_from_the_package(tmp_path):
    deep = (
        "from sgr_kernels.checks.caller import warn_caller\n"
        "def f(): g()\ndef g(): warn_caller('deep', RuntimeWarning)\n"
    )
    made = inside(tmp_path, deep)
    with pytest.warns(RuntimeWarning, match="deep") as caught:
        functools.partial(torch.no_grad()(made.f))()
    assert here(caught) == inspect.currentframe().f_lineno - 1


def test_called_by_an_import(tmp_path):
    """`warnings.warn` does not count the frames of imports, so that a number of frames would lead past the line."""
    with pytest.warns(UserWarning, match="on import") as caught:
        inside(tmp_path, "from sgr_kernels.checks.caller import warn_caller\nwarn_caller('on import')\n")
    here(caught)


def test_said_once_a_line():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            warn_caller("again and again")
    here(caught)
