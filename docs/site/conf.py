"""The site: ``make docs``. The repository's root is its source, so that a page's links lead to the same files there."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import sgr_kernels  # noqa: E402

project, author, copyright = "sgr_kernels", "the sgr_kernels authors", "MIT licence"
version = release = sgr_kernels.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "contents",
    "names",
    "reference",
    "commands",
]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "benchmarks/results/**.md", "csrc/cuda/*.md"]
exclude_patterns = [".*", "build", "versions", "runs", "*-report", "*-results"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_ivar = True

nitpicky = True
# What is not ours has no page here.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|Tensor|collections|typing|numpy|os|optional|callable|str|int|float)(\..*)?")
]

html_theme = "furo"
html_title = f"sgr_kernels {version}"
html_extra_path = ["extra"]
html_copy_source = html_show_sourcelink = False
