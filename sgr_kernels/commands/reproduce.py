"""``sgr reproduce``."""

from __future__ import annotations

import argparse
from pathlib import Path

from sgr_kernels.commands import common
from sgr_kernels.models import architecture_for
from sgr_kernels.reproduce.lab import Lab
from sgr_kernels.reproduce.measurements import MeasurementError
from sgr_kernels.reproduce.run import BEYOND, EXPERIMENTS, reproduce, show
from sgr_kernels.reproduce.scales import SCALES
from sgr_kernels.training.datasets import SAMPLE, load
from sgr_kernels.training.loop import TrainingError
from sgr_kernels.training.records import require_folder

_NAMES = {"mnist": "MNIST", "cifar10": "CIFAR-10"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add(
        "experiments",
        nargs="+",
        choices=(*EXPERIMENTS, *BEYOND, "all"),
        metavar="EXPERIMENT",
        help=f"of {', '.join(EXPERIMENTS)}, or all of them, the paper's; beyond it: {', '.join(BEYOND)}",
    )
    add("--dataset", choices=tuple(SCALES), default="mnist", help="whose networks and columns of the paper")
    add(
        "--scale",
        choices=("smoke", "cpu", "full"),
        default="smoke",
        help="smoke: about a minute, says nothing; cpu: two cores, an hour or two; full: as the paper, on a GPU",
    )
    add("--seeds", type=common.whole, metavar="N", help="networks of each method that has several; none: the scale's")
    common.add_data(parser)
    add("--data-name", metavar="NAME", help="of the data on the pages; none: the data set's")
    add("--out", metavar="DIR", default="reproduction", help="networks, measurements and, in results/, the pages")
    add("--pages-only", action="store_true", help="make the pages anew from the results in --out; nothing is measured")
    add("--jobs", type=common.whole, default=1, help="how much is done at a time, each with its part of the threads")
    common.add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    """Reproduce, resuming what an earlier run left in ``--out``."""
    out = Path(arguments.out)
    require_folder(out)
    if arguments.pages_only:
        show(out / "results")
    else:
        data = load(arguments.data, image_size=arguments.image_size)
        found = architecture_for(data.train.shape)
        if found != arguments.dataset:
            raise ValueError(f"--dataset {arguments.dataset}, but --data {arguments.data} holds images for {found}")
        scale = SCALES[arguments.dataset][arguments.scale]
        lab = Lab(
            arguments.dataset,
            scale if arguments.seeds is None else scale.with_seeds(arguments.seeds),
            data,
            out,
            device=common.device(arguments.device),
            say=lambda line: print(line, flush=True),
            jobs=arguments.jobs,
        )
        name = arguments.data_name or ("MNIST sample" if arguments.data == SAMPLE else _NAMES[arguments.dataset])
        paper = list(EXPERIMENTS)
        chosen = dict.fromkeys(n for name in arguments.experiments for n in (paper if name == "all" else [name]))
        try:
            reproduce(lab, list(chosen), f"{name}, {arguments.scale} scale")
        except (TrainingError, MeasurementError) as error:
            raise ValueError(str(error)) from error
    print(f"written: {out / 'results' / 'README.md'}")
    return 0
