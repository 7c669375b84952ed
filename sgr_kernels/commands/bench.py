"""``sgr bench``: the measurements in ``benchmarks/``, which a source checkout has."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import sgr_kernels

BENCHMARKS = {
    "operators": "the operators, beside dense, Fourier and convolution peers",
    "facts": "first facts from a GPU, the most valuable first, a line of JSON each",
    "crossovers": "tiny images: up to which size the dense matrix, formed, is fastest; writes auto's table",
    "solve": "Sigma^-1 x by conjugate gradients, beside dense factorizations and linear_operator",
    "step": "training steps: clean, SGR by every method, adversarial training",
    "lazy": "what networks keep of robustness when the penalty is applied now and then",
    "batch-norm": "the penalty's gradient on a part of the batch beside the whole batch's, under BatchNorm",
    "agreement": "finite differences' gradients beside the exact ones, on a ReLU network",
    "cuda-static": "what the CUDA kernels cost, counted without a GPU: instructions, bytes, launches, least times",
    "predictions": "times from a GPU beside the least ones that these counts allow",
    "plot": "figures of the operators' results",
    "tables": "Markdown of the operators' results; writes the README's table",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments; a benchmark declares its own."""
    lines = "; ".join(f"{name}: {what}" for name, what in BENCHMARKS.items())
    parser.add_argument("benchmark", choices=BENCHMARKS, help=lines)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="such as --out FILE; --help lists them")


def run(arguments: argparse.Namespace) -> int:
    """Run a benchmark."""
    checkout = Path(sgr_kernels.__file__).parent.parent
    module = arguments.benchmark.replace("-", "_")
    if not (checkout / "benchmarks" / f"{module}.py").is_file():
        raise ValueError("benchmarks/ is part of a source checkout, not of an installed package: run sgr from there")
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    importlib.import_module(f"benchmarks.{module}").main(arguments.options)
    return 0
