"""``sgr demo``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from sgr_kernels.commands import common
from sgr_kernels.demo.run import Options
from sgr_kernels.demo.run import run as demonstrate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add, defaults = parser.add_argument, Options()
    add("--out", metavar="DIR", default="demo-report", help="folder for report.md, results.json and the pictures")
    add("--epochs", type=common.whole, default=defaults.epochs, help="of each training")
    add("--images", type=common.whole, default=defaults.images, help="test digits attacked")
    add("--train-images", type=common.whole, help="only the first so many of the 5,000 training digits")
    add("--draws", type=common.whole, default=defaults.draws, help="draws of noise for each digit; the worst counts")
    add("--strength", type=common.nonnegative, default=defaults.strength, help="of the penalties of GN and SGR")
    add("--decay-length", type=common.positive, default=defaults.decay_length, help="of SGR's covariance, in pixels")
    add("--seed", type=common.seed, default=defaults.seed, help="of everything random")
    common.add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the demonstration and print its table."""
    names = ("epochs", "images", "train_images", "draws", "strength", "decay_length", "seed")
    options = replace(Options(), **{name: getattr(arguments, name) for name in names})
    result = demonstrate(
        arguments.out, options, device=common.device(arguments.device), say=lambda line: print(line, flush=True)
    )
    print(f"\n{result.terminal_summary()}\n")
    print(f"{result.seconds / 60:.1f} minutes; the report: {Path(arguments.out) / 'report.md'}")
    return 0
