"""What ``sgr evaluate --autoattack`` adds: AutoAttack beside PGD on the same images."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import nn
from tqdm import tqdm

from sgr_kernels.commands import common
from sgr_kernels.evaluation.autoattack import ATTACKS, autoattack, check_attacks, check_classes, package
from sgr_kernels.evaluation.crosscheck import CrossCheck, against_pgd
from sgr_kernels.evaluation.suite import PIXEL_LEVELS, Plan, eps_grid
from sgr_kernels.training.batches import Batches
from sgr_kernels.training.images import ImageSet
from sgr_kernels.training.network import classes_of


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--autoattack`` and what goes with it."""
    add = parser.add_argument
    add(
        "--autoattack",
        action="store_true",
        help="AutoAttack too, beside PGD on the same images; on a CPU minutes for a hundred of MNIST's",
    )
    add(
        "--autoattack-eps",
        type=common.positive,
        nargs="+",
        help="its strengths, in grey levels (1/255); none: 32 for images like MNIST's, else 8",
    )
    add("--autoattack-images", type=common.whole, metavar="N", help="only the first N of the images; none: all")
    add("--autoattack-attacks", nargs="+", choices=ATTACKS, help="some of its attacks; none: the standard version's")


def check_options(arguments: argparse.Namespace) -> None:
    """What can be said of the options before a network is read.

    Raises:
        ModuleNotFoundError: AutoAttack is not installed.
        ValueError: options without ``--autoattack``, or an attack that is named twice.
    """
    for name in ("autoattack_eps", "autoattack_images", "autoattack_attacks"):
        if getattr(arguments, name) is not None and not arguments.autoattack:
            raise ValueError(f"{name}: goes with --autoattack")
    if arguments.autoattack:
        package()
        _named(arguments)


def check_network(arguments: argparse.Namespace, model: nn.Module, images: ImageSet, device: torch.device) -> None:
    """Raises ValueError if the network has too few classes for an attack: before the other attacks have run."""
    if arguments.autoattack:
        _named(arguments, classes_of(model, images, device))


def run(
    arguments: argparse.Namespace, model: nn.Module, images: ImageSet, device: torch.device, plan: Plan
) -> Iterator[CrossCheck]:
    """AutoAttack and PGD at each strength, printed as they come; nothing without ``--autoattack``."""
    levels = arguments.autoattack_eps or [max(eps_grid(images.shape))]
    size = common.batch_size(arguments.batch_size, device)
    loader = Batches(images.first(arguments.autoattack_images), size, device=device)
    for level in levels if arguments.autoattack else []:
        with tqdm(disable=None, unit="attack", leave=False) as bar:

            def show(name: str, bar: tqdm = bar) -> None:
                bar.set_description(name)
                bar.update()

            result = autoattack(
                model,
                loader,
                level / PIXEL_LEVELS,
                attacks=arguments.autoattack_attacks,
                batch_size=size,
                seed=plan.seed,
                on_part=show,
            )
        check = against_pgd(model, loader, result, pgd_steps=plan.pgd_steps, seed=plan.seed, labels=plan.labels)
        print(f"\n{check}")
        yield check


def _named(arguments: argparse.Namespace, classes: int | None = None) -> None:
    try:
        names = check_attacks(arguments.autoattack_attacks)
        if classes is not None:
            check_classes(names, classes)
    except ValueError as error:
        raise ValueError(f"autoattack_{error}") from error
