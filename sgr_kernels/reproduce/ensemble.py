"""Beyond the paper: the whole AutoAttack ensemble beside this package's PGD, on the paper's networks."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sgr_kernels.attacks import STRONG_PGD, pgd
from sgr_kernels.evaluation.autoattack import STANDARD, autoattack, package
from sgr_kernels.evaluation.crosscheck import CAUSES, TELLING, against_pgd
from sgr_kernels.evaluation.curves import RobustnessCurve, robustness_curve
from sgr_kernels.evaluation.suite import PIXEL_LEVELS
from sgr_kernels.report.page import Page
from sgr_kernels.reproduce import stats
from sgr_kernels.reproduce.lab import Lab
from sgr_kernels.reproduce.measurements import Measurement, Network

TITLE = "Beyond the paper: AutoAttack beside PGD"
METHODS = {
    "clean": "plain",
    "gn": "gradient norm, squared",
    "sgr_sign": "SGR, covariance of signs",
    "sgr_exp": "SGR, exponential covariance",
    "pgd": "PGD adversarial training",
}
_BATCH = 100


def measure(lab: Lab) -> dict[str, Any]:
    """A network of each method under the ensemble, PGD as the tables have it, and PGD at its strongest."""
    package()  # without it an error before hours of training
    plan = lab.scale.beyond
    networks = lab.planned([(lab.settings(method), method) for method in METHODS])
    attacked = [plan.ensemble_images, plan.autoattack_eps, STANDARD]
    ours = [plan.ensemble_images, plan.autoattack_eps, STRONG_PGD]
    found = lab.measured(
        [
            *(Measurement("ensemble", n.settings.method, [n], partial(_attacked, lab, n), attacked) for n in networks),
            *(Measurement("strong", n.settings.method, [n], partial(_by_strong_pgd, lab, n), ours) for n in networks),
        ],
        "AutoAttack",
    )
    rows = [
        {
            "method": network.settings.method,
            "strength": network.settings.strength,
            "test_accuracy": lab.test_accuracy(network),
            **ensemble,
            "strong": strong,
        }
        for network, ensemble, strong in zip(networks, found[: len(networks)], found[len(networks) :], strict=True)
    ]
    return {**asdict(plan), "pgd_steps": lab.scale.pgd_steps, "strong": STRONG_PGD, "networks": rows}


def _attacked(lab: Lab, network: Network) -> dict[str, Any]:
    plan = lab.scale.beyond
    images, labels = lab.pixels(plan.ensemble_images)
    result = autoattack(network.model, [(images, labels)], plan.autoattack_eps / PIXEL_LEVELS, batch_size=_BATCH)
    check = against_pgd(network.model, [(images, labels)], result, pgd_steps=lab.scale.pgd_steps)
    own = RobustnessCurve([plan.autoattack_eps], result.robust[None], result.clean, "autoattack", "true")
    return {
        "check": check.to_dict(),
        "autoattack": stats.record(own),
        "pgd": stats.record(check.pgd, PIXEL_LEVELS),
    }


def _by_strong_pgd(lab: Lab, network: Network) -> dict[str, Any]:
    plan = lab.scale.beyond
    parts = zip(*(part.split(_BATCH) for part in lab.pixels(plan.ensemble_images)), strict=True)
    attack = partial(pgd, early_stop=True, **STRONG_PGD)
    levels, stream = [plan.autoattack_eps / PIXEL_LEVELS], torch.Generator().manual_seed(0)
    curve = robustness_curve(network.model, list(parts), attack, levels, stream, labels="true")
    return stats.record(curve, PIXEL_LEVELS)


def show(results: dict[str, Any], folder: Path) -> None:
    """The page."""
    strong, eps = results["strong"], results["autoattack_eps"]
    page = Page(f"{TITLE}: {results['title']}")
    page.text(
        "The standard ensemble (Croce and Hein 2020): APGD on the cross-entropy, targeted APGD, targeted FAB, and "
        "Square, which uses no gradients. Each attacks what the ones before it left; the columns are what stands then. "
        f"The paper's networks, one seed, eps {eps:g} of 255, the first {results['ensemble_images']:,} test images; "
        "accuracy in %, ± half a 95 % interval from the images."
    )
    page.text(
        f"PGD: {results['pgd_steps']} steps on the cross-entropy from the network's own answers, as in the tables of "
        f"the paper. Strong PGD: from the true labels, {strong['restarts']} starts of {strong['steps']} steps that "
        "shrink along a cosine from twice eps on, on the cross-entropy of logits brought to one spread: "
        f"`sgr_kernels.attacks.pgd({', '.join(f'{name}={value!r}' for name, value in strong.items())})`."
    )
    names = [part["name"] for part in results["networks"][0]["check"]["attacks"]]
    header = ["training", "clean", "PGD", "strong PGD", *(f"after {name}" for name in names), "PGD − AutoAttack"]
    page.table([*header, "strong PGD − AutoAttack"], [_row(row) for row in results["networks"]])
    gaps = [abs(stats.difference([row["strong"]], [row["autoattack"]]).mean) for row in results["networks"]]
    page.text(f"On every network strong PGD is within {100 * max(gaps):.1f} points of the ensemble.")
    _differences(page, names, [row["check"]["pgd"] | row for row in results["networks"]])
    page.heading("Hidden gradients")
    hidden = [(METHODS[row["method"]], text) for row in results["networks"] for text in row["check"]["warnings"]]
    if hidden:
        page.text(f"The ensemble's own warnings; one image is {100 / results['ensemble_images']:.2g} %:")
    page.text(
        "\n".join(f"- {title}: {text}" for title, text in hidden)
        or "No sign of them: Square, which uses none, broke no more than the attacks that do."
    )
    page.write(folder / "ensemble.md")


def _differences(page: Page, names: list[str], rows: list[dict[str, Any]]) -> None:
    page.heading("Where PGD and the ensemble differ")
    rows = [row for row in rows if row["difference"] > TELLING]
    if not rows:
        page.text("Nowhere by more than two points.")
        return
    page.text(
        "Of the images that stand under PGD, those that each attack broke first. Misclassified images count as correct "
        "where PGD, which starts from the network's own answer, led away from it."
    )
    table = [[METHODS[row["method"]], *(str(row["won_by"][name]) for name in names), str(_turned(row))] for row in rows]
    page.table(["training", *names, "misclassified"], table)
    won = [name for name in names if any(row["won_by"][name] for row in rows)]
    page.text("\n".join(f"- {name}: {CAUSES[name]}." for name in won))


def _turned(row: dict[str, Any]) -> int:
    """Images that stand under PGD, though the ensemble neither broke them nor left them standing: misclassified."""
    stand, stand_too = (round(row[key] * row["check"]["n_ex"]) for key in ("accuracy", "neither_breaks"))
    return stand - stand_too - sum(row["won_by"].values())


def _row(row: dict[str, Any]) -> list[str]:
    check, ensemble = row["check"], [row["autoattack"]]
    stands = check["clean_accuracy"] * check["n_ex"]
    after = []
    for part in check["attacks"]:
        stands -= part["broken"]
        after.append(f"{100 * stands / check['n_ex']:.1f}")
    after[-1] = stats.mean(ensemble).percent()
    return [
        METHODS[row["method"]],
        f"{100 * check['clean_accuracy']:.1f}",
        *(f"{100 * row[name]['accuracy'][0]:.1f}" for name in ("pgd", "strong")),
        *after,
        *(stats.difference([row[name]], ensemble).points() for name in ("pgd", "strong")),
    ]
