"""Transferred attacks: PGD perturbations of every network, tried on every other."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sgr_kernels.attacks import pgd
from sgr_kernels.evaluation.curves import transfer_curves
from sgr_kernels.evaluation.suite import PIXEL_LEVELS
from sgr_kernels.report import plots
from sgr_kernels.report.maps import heat_map
from sgr_kernels.report.page import Page
from sgr_kernels.reproduce import paper, pictures, stats
from sgr_kernels.reproduce.lab import Lab
from sgr_kernels.reproduce.measurements import Measurement, Network

TITLE = "Transferred attacks"
SHOWN = ("clean", "pgd", "fgsm", "gn", "sgr_sign", "sgr_exp")


def measure(lab: Lab) -> dict[str, Any]:
    """Every network as a source; every first network, and none but them, as a target."""
    methods = lab.scale.methods
    targets, twins = lab.first(methods), lab.twins(methods)
    everyone = list(targets.values())
    sources = [
        Measurement(
            "transfer",
            f"{method}-seed{targets[method].settings.seed}",
            [targets[method], *everyone],
            partial(transferred, lab, targets[method], targets),
        )
        for method in methods
    ]
    from_source = dict(zip(methods, lab.measured(sources, "transferred attacks"), strict=True))
    twinned = [method for method in methods if method in twins]
    own = [
        Measurement(
            "transfer",
            f"{method}-twin",
            [twins[method], targets[method]],
            partial(transferred, lab, twins[method], {method: targets[method]}),
        )
        for method in twinned
    ]
    from_twins = zip(twinned, lab.measured(own, "attacks from twins"), strict=True)
    from_twin = {method: found[method] for method, found in from_twins}
    shown = {name: targets[name] for name in SHOWN if name in targets}
    return {
        "images": lab.scale.attack_images,
        "pgd_steps": lab.scale.pgd_steps,
        "grid": list(lab.scale.eps),
        "single_eps": list(lab.scale.single_eps),
        "sources": from_source,
        "twins": from_twin,
        "samples": lab.cached("transfer", "samples", list(shown.values()), partial(samples, lab, shown)),
    }


def transferred(lab: Lab, source: Network, targets: dict[str, Network]) -> dict[str, Any]:
    """Accuracies of the targets under PGD on the source, which starts from the source's own predictions."""
    scale = lab.scale
    levels = sorted({*scale.eps, *scale.single_eps})
    curves = transfer_curves(
        source.model,
        {name: network.model for name, network in targets.items()},
        lab.batches(scale.attack_images),
        # No early stop: a perturbation that just breaks its source would transfer too little.
        partial(pgd, steps=scale.pgd_steps),
        [level / PIXEL_LEVELS for level in levels],
        torch.Generator().manual_seed(0),
    )
    return {name: stats.record(curve, PIXEL_LEVELS) for name, curve in curves.items()}


def samples(lab: Lab, networks: dict[str, Network]) -> dict[str, Any]:
    """The first image of each class under PGD on several networks, with each network's answer to its own."""
    images, labels = lab.pixels(lab.scale.attack_images)
    chosen = pictures.one_of_each_class(labels)
    images, labels = images[chosen], labels[chosen]
    shown = {name: network.model for name, network in networks.items()}
    eps = min(lab.scale.single_eps)
    rows = [pictures.row("not perturbed,\nclean network", images, {"clean": shown["clean"]})]
    for name, model in shown.items():
        perturbed = pgd(model, images, eps=eps / PIXEL_LEVELS, steps=lab.scale.pgd_steps)
        rows.append(pictures.row(f"PGD on {name},\nits answer", perturbed, {name: model}))
    return {"eps": eps, "labels": labels.tolist(), "classes": list(lab.data.test.classes), "rows": rows}


def matrix(results: dict[str, Any], eps: float | None, *, white_box: bool = False) -> np.ndarray:
    """Accuracies (targets, sources): at one strength, or means over the grid (None).

    The diagonal is the attack by the twin, NaN where there is none; with ``white_box`` it is the attack on itself.
    """
    sources = results["sources"]
    names = list(sources)
    values = np.full((len(names), len(names)), np.nan)
    for column, source in enumerate(names):
        for row, target in enumerate(names):
            curve = sources[source][target]
            if source == target and not white_box:
                curve = results["twins"].get(target)
            if curve is not None:
                values[row, column] = value(results, curve, eps)
    return values


def value(results: dict[str, Any], curve: dict[str, Any], eps: float | None) -> float:
    """A curve's accuracy at one strength, or its mean over the grid."""
    levels = results["grid"] if eps is None else [eps]
    return float(np.mean([curve["accuracy"][stats.at(curve, level)] for level in levels]))


def show(results: dict[str, Any], folder: Path) -> None:
    """The page, the heat maps and the grid of samples."""
    names = list(results["sources"])
    page = Page(f"{TITLE}: {results['title']}")
    page.text(
        f"Accuracy in % of the network in the row under PGD ({results['pgd_steps']} steps, random start, from the "
        f"source's own predictions) on the network in the column; the first {results['images']:,} test images. A 95 % "
        f"interval is about ±{_half_width(results['images']):.1f} points wide at 90 %. On the diagonal of the heat "
        "maps the attack comes from a twin: the same method, another seed."
    )
    titles = {None: f"mean over eps {', '.join(f'{level:g}' for level in results['grid'])} of 255"}
    titles |= {eps: f"eps {eps:g}/255" for eps in results["single_eps"]}
    for eps, title in titles.items():
        file = "transfer-mean.png" if eps is None else f"transfer-eps{eps:g}.png"
        drawn = heat_map(
            matrix(results, eps),
            names,
            names,
            title=f"Transferred PGD, {title}",
            row_title="attacked network",
            column_title="perturbations made for",
            bar_title="accuracy",
        )
        plots.save(drawn, folder / file)
        page.figure(file, f"Transferred PGD, {title}. Diagonal: from a twin (–: not trained at this scale).")
    printed = paper.TRANSFER[results["dataset"]]
    for eps in results["single_eps"]:
        page.heading(f"Beside the paper, eps {eps:g}/255")
        page.text(
            "Ours / the paper's. Here the diagonal is white-box, as in the paper's tables (first version, section "
            "7.3), whose strengths are lost from its text: that they are these is our reading."
        )
        page.table(["attacked", *names], _beside(results, eps, printed.get(eps, {})))
    plots.save(pictures.grid(results["samples"], _samples_title(results)), folder / "transfer-samples.png")
    page.figure(
        "transfer-samples.png",
        "Perturbed images: the first of each class. Below each the answer of the network that the perturbation was "
        "made for; a tick where it is the image's true class, which stands above the column.",
    )
    page.write(folder / "transfer.md")


def _beside(results: dict[str, Any], eps: float, printed: dict[str, dict[str, float]]) -> list[list[str]]:
    ours = matrix(results, eps, white_box=True)
    names = list(results["sources"])
    rows = []
    for row, target in enumerate(names):
        cells = []
        for column, source in enumerate(names):
            theirs = printed.get(target, {}).get(source)
            cells.append(f"{100 * ours[row, column]:.1f} / {'–' if theirs is None else f'{theirs:.1f}'}")
        rows.append([target, *cells])
    return rows


def _samples_title(results: dict[str, Any]) -> str:
    return f"PGD at eps {results['samples']['eps']:g}/255"


def _half_width(images: int) -> float:
    return 100 * stats.Z95 * (0.9 * 0.1 / images) ** 0.5
