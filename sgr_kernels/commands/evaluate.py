"""``sgr evaluate``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sgr_kernels._version import __version__
from sgr_kernels.attacks import STRONG_PGD
from sgr_kernels.commands import autoattack, common, corruptions, networks
from sgr_kernels.evaluation.suite import DECAY_LENGTHS, Evaluation, Plan, eps_grid, evaluate, parts
from sgr_kernels.report.page import percent, text_table
from sgr_kernels.training.batches import Batches
from sgr_kernels.training.checkpoint import write_atomically

_WHOSE = {"true": "the true labels", "own": "the network's own answers", "auto": "the network's own answers"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    networks.add_trained(parser)
    common.add_data(parser, None)
    add("--images", type=common.whole, metavar="N", help="only the first N test images")
    add(
        "--eps",
        type=common.nonnegative,
        nargs="+",
        help="FGSM's and PGD's, in grey levels (1/255); none: 0 to 32 for images like MNIST's, else 0 to 8",
    )
    add(
        "--attack-labels",
        choices=("true", "own"),
        default="true",
        help="what FGSM and PGD start from; own: the network's answers, as in the paper, so that an image it gets "
        "wrong may count as right under attack",
    )
    add("--pgd-steps", type=common.whole, default=Plan.pgd_steps, help="steps of PGD")
    add(
        "--strong-pgd",
        action="store_true",
        help="PGD at its strongest besides, which leaves about what AutoAttack leaves, at a dozen times PGD's cost",
    )
    add(
        "--decay-lengths", type=common.positive, nargs="+", default=DECAY_LENGTHS, help="of correlated noise, in pixels"
    )
    add("--noise-eps", type=common.nonnegative, nargs="+", default=Plan.noise_eps, help="in the image's own deviation")
    add("--draws", type=common.whole, default=Plan.draws, help="draws of noise for each image; the worst counts")
    corruptions.add_options(parser)
    add("--seed", type=common.seed, default=Plan.seed, help="of random starts, noise and corruptions")
    autoattack.add_options(parser)
    common.add_batch_size(parser)
    add("--out", metavar="FILE", help="JSON file; none: evaluation.json beside the checkpoint or the weights")
    common.add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print a table, write JSON."""
    kinds = corruptions.kinds(arguments)
    autoattack.check_options(arguments)
    device = common.device(arguments.device)
    subject = networks.trained(arguments, device)
    path = common.writable(arguments.out or subject.beside("evaluation.json"))
    images = subject.data.test.first(arguments.images)
    autoattack.check_network(arguments, subject.model, images, device)
    corruptions.check_kinds_of(kinds, images)
    plan = Plan(
        eps=arguments.eps or eps_grid(images.shape),
        pgd_steps=arguments.pgd_steps,
        strong_pgd=arguments.strong_pgd,
        decay_lengths=arguments.decay_lengths,
        noise_eps=arguments.noise_eps,
        draws=arguments.draws,
        seed=arguments.seed,
        labels=arguments.attack_labels,
    )
    draws = len(images) * len(plan.decay_lengths) * len(plan.noise_eps) * plan.draws
    strong = STRONG_PGD["steps"] * STRONG_PGD["restarts"] if plan.strong_pgd else 0
    steps = len(images) * sum(eps > 0 for eps in plan.eps) * (1 + plan.pgd_steps + strong)
    print(f"at most {steps:,} gradients for FGSM and PGD, and {draws:,} noisy images to classify", flush=True)
    with tqdm(total=parts(plan) + (kinds != []), disable=None, unit="part", leave=False) as bar:

        def show(part: str) -> None:
            bar.set_description(part)
            bar.update()

        batches = Batches(images, common.batch_size(arguments.batch_size, device), device=device)
        result = evaluate(subject.model, batches, plan, on_part=show)
        corrupted = None
        if kinds != []:
            show("corruptions")
            corrupted = corruptions.measure(arguments, subject.model, batches, kinds)
    print(summary(result, plan, f"{len(images)} test images of {images.name}"))
    if corrupted is not None:
        print(f"\n{corruptions.summary(corrupted)}")
    record = {
        "sgr_kernels": __version__,
        "data": images.name,
        "images": len(images),
        **subject.record,
        **result.to_dict(),
    }
    if corrupted is not None:
        record["corruptions"] = corrupted.to_dict()
    _write(path, record)  # AutoAttack takes longer than all before it: what is known is kept
    for check in autoattack.run(arguments, subject.model, images, device, plan):
        record.setdefault("autoattack", []).append(check.to_dict())
        _write(path, record)
    print(f"\nwritten: {path}")
    return 0


def _write(path: Path, record: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())


def summary(result: Evaluation, plan: Plan, images: str) -> str:
    """The results as tables for the terminal."""
    (interval,) = result.clean.interval()
    curves = [*result.attacks.values(), *result.noise.values()]
    widest = max((high - low) / 2 for curve in curves for low, high in curve.interval())
    gradient = text_table(
        ["eps [1/255]", *(f"{eps:g}" for eps in plan.eps), "mean"],
        [
            [name, *(f"{100 * share:.1f}" for share in curve.accuracy), f"{100 * curve.area:.1f}"]
            for name, curve in result.attacks.items()
        ],
    )
    noise = text_table(
        ["decay length", *(f"eps {eps:g}" for eps in plan.noise_eps)],
        [
            [f"{length:g}", *(f"{100 * share:.1f}" for share in curve.accuracy)]
            for length, curve in result.noise.items()
        ],
    )
    strong = (
        "; strong: {restarts} starts of {steps} steps that shrink".format_map(STRONG_PGD) if plan.strong_pgd else ""
    )
    return (
        f"accuracy in % on {images} (clean: {percent(result.clean.accuracy[0], interval)}, 95 % interval; "
        f"below at most ± {100 * widest:.1f})\n\n"
        f"gradient attacks from {_WHOSE[plan.labels]} (PGD: {plan.pgd_steps} steps{strong})\n{gradient}\n\n"
        f"correlated noise, worst of {plan.draws} draws, eps in units of the image's standard deviation\n{noise}"
    )
