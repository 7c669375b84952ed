"""Label leaking: is a network better on perturbed images than on clean ones?"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from sgr_kernels.attacks import fgsm
from sgr_kernels.evaluation.curves import robustness_curve
from sgr_kernels.evaluation.suite import PIXEL_LEVELS
from sgr_kernels.report import plots
from sgr_kernels.report.page import Page
from sgr_kernels.report.plots import Line, Panel
from sgr_kernels.reproduce import stats
from sgr_kernels.reproduce.lab import Lab
from sgr_kernels.reproduce.measurements import Measurement, Network

TITLE = "Label leaking"
LEAKING = "fgsm, true labels"
SHOWN = (LEAKING, "fgsm", "pgd", "clean", "gn", "sgr_sign")


def measure(lab: Lab) -> dict[str, Any]:
    """FGSM from the true labels and from the networks' own predictions, on every method."""
    networks = lab.first(lab.scale.methods)
    if lab.scale.leaking_network:
        settings = lab.settings("fgsm", attack_labels="true")
        networks = {LEAKING: lab.network(settings, LEAKING), **networks}
    wanted = [
        Measurement("leaking", name.replace(", ", "-").replace(" ", "-"), [n], partial(under_fgsm, lab, n))
        for name, n in networks.items()
    ]
    found = dict(zip(networks, lab.measured(wanted, "label leaking"), strict=True))
    return {"images": lab.scale.leaking_images, "networks": found}


def under_fgsm(lab: Lab, network: Network) -> dict[str, Any]:
    """FGSM over the grid, from the true labels and from the own predictions."""
    eps = [level / PIXEL_LEVELS for level in (0.0, *(level for level in lab.scale.eps if level > 0))]
    batches = lab.batches(lab.scale.leaking_images)
    curves = {}
    for labels in ("true", "own"):
        generator = torch.Generator().manual_seed(0)
        curve = robustness_curve(network.model, batches, fgsm, eps, generator, labels=labels)
        curves[labels] = stats.record(curve, PIXEL_LEVELS)
    return curves


def gain(curve: dict[str, Any], level: int) -> stats.Estimate:
    """Accuracy under FGSM at one place of the grid, minus that on the clean images (its first place), paired."""
    clean = {**curve, "masks": [curve["masks"][0]] * len(curve["masks"])}
    return stats.difference([curve], [clean], level)


def largest_gain(curve: dict[str, Any]) -> stats.Estimate:
    """The gain at the strength where it is largest, its interval widened for having been chosen."""
    gains = [gain(curve, k) for k in range(1, len(curve["eps"]))]
    return stats.chosen(max(gains, key=lambda estimate: estimate.mean), len(gains))


def show(results: dict[str, Any], folder: Path) -> None:
    """The page and its figure."""
    found = results["networks"]
    page = Page(f"{TITLE}: {results['title']}")
    page.text(
        "A network trained on perturbations that started from the true labels may read the label off the "
        "perturbation, and be better on perturbed images than on clean ones. Accuracy in % on the first "
        f"{results['images']:,} test images without perturbation and under FGSM from the true labels; gain: accuracy "
        "under FGSM minus clean accuracy at the strength where it is largest, in points, ± half a 95 % interval of "
        "the paired difference that allows for the choice of the strength (Bonferroni). "
        "Adversarial training here starts from the network's own predictions, as in the paper"
        + (f"; `{LEAKING}` does not." if LEAKING in found else ".")
    )
    eps = next(iter(found.values()))["true"]["eps"]
    rows = []
    for name, curves in found.items():
        accuracies = [f"{100 * share:.1f}" for share in curves["true"]["accuracy"]]
        largest = [largest_gain(curves[labels]).points() for labels in ("true", "own")]
        rows.append([name, *accuracies, *largest])
    page.table(
        ["network", "clean", *(f"eps {level:g}" for level in eps[1:]), "gain, true labels", "gain, own predictions"],
        rows,
    )
    lines = []
    for name in (name for name in SHOWN if name in found):
        estimates = [gain(found[name]["true"], k) for k in range(len(eps))]
        lines.append(
            Line(
                name,
                eps,
                [100 * e.mean for e in estimates],
                [100 * e.low for e in estimates],
                [100 * e.high for e in estimates],
            )
        )
    panel = Panel(
        "FGSM from the true labels",
        "eps [1/255]",
        "accuracy minus clean accuracy [points]",
        lines,
        levels=[(0, "no change")],
    )
    plots.save(plots.line_figure([panel]), folder / "leaking.png")
    page.figure("leaking.png", "Change of accuracy under FGSM from the true labels. Above zero the label leaks.")
    page.write(folder / "leaking.md")
