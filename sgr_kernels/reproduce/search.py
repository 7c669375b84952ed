"""The strengths of the penalties: the search behind every other experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sgr_kernels.report import plots
from sgr_kernels.report.page import Page
from sgr_kernels.report.plots import Line, Panel
from sgr_kernels.reproduce.lab import Lab
from sgr_kernels.training.search import TOLERANCE, Attack

TITLE = "Strengths"
SEARCHES: tuple[tuple[str, Attack], ...] = (("gn", "pgd"), ("sgr_sign", "pgd"), ("gn", "noise"), ("sgr_exp", "noise"))


def measure(lab: Lab) -> dict[str, Any]:
    """All searches."""
    plan = lab.scale.search
    return {
        "trial_images": plan.train_images or lab.scale.train_images,
        "trial_epochs": plan.epochs or lab.scale.epochs,
        "validation_images": plan.validation_images,
        "attack_images": plan.attack_images,
        "eps": list(plan.eps),
        "noise_eps": list(plan.noise_eps),
        "decay_length": lab.scale.decay_length,
        "draws": plan.draws,
        "searches": {
            f"{method}, {attack}": lab.search(method, attack).to_dict()
            for method, attack in SEARCHES
            if method in lab.scale.methods
        },
    }


def show(results: dict[str, Any], folder: Path) -> None:
    """The page and its figure."""
    epochs = results["trial_epochs"]
    page = Page(f"{TITLE}: {results['title']}")
    images = "all other" if results["trial_images"] is None else f"{results['trial_images']:,}"
    page.text(
        "The strength of a penalty is the one with the largest area under the attack curve (mean accuracy over the "
        f"attack's strengths) that costs at most {100 * TOLERANCE:g} point of accuracy against plain training; where "
        "each costs more, the most accurate. GN and SGR follow the same rule. Each trial trains on "
        f"{images} training images for {epochs} epoch{'' if epochs == 1 else 's'} and is judged on "
        f"{results['validation_images']:,} "
        f"training images that it has not seen ({results['attack_images']:,} of them attacked), never on test images. "
        f"PGD: eps {_list(results['eps'])} of 255; noise: decay length {results['decay_length']:g}, eps "
        f"{_list(results['noise_eps'])} standard deviations, worst of {results['draws']}. The other SGR variants "
        "with an estimated covariance take sgr_sign's strength."
    )
    rows = []
    for name, search in results["searches"].items():
        rows.append([name, "none", f"{100 * search['clean_accuracy']:.1f}", f"{100 * search['clean_area']:.1f}", ""])
        for trial in search["trials"]:
            mark = "chosen" if trial["strength"] == search["strength"] else "" if trial["allowed"] else "costs too much"
            share = [f"{100 * trial[key]:.1f}" for key in ("accuracy", "area")]
            rows.append(["", f"{trial['strength']:g}", *share, mark])
    page.table(["method, attack", "strength", "accuracy", "area", ""], rows)
    ends = [name for name, search in results["searches"].items() if at_its_end(search)]
    if ends:
        page.text(f"The largest strength that was tried is the one chosen for {'; '.join(ends)}: more may do better.")
    plots.save(_figure(results), folder / "search.png")
    page.figure("search.png", "Accuracy without an attack and mean accuracy under it, against the strength.")
    page.write(folder / "search.md")


def at_its_end(search: dict[str, Any]) -> bool:
    """Whether a search, as JSON, chose the largest strength it tried."""
    return bool(search["strength"] == max(trial["strength"] for trial in search["trials"]))


def _figure(results: dict[str, Any]) -> plots.Figure:
    panels = []
    for name, search in results["searches"].items():
        strengths = [trial["strength"] for trial in search["trials"]]
        lines = [
            Line(title, strengths, [trial[key] for trial in search["trials"]])
            for title, key in (("no attack", "accuracy"), ("mean under attack", "area"))
        ]
        levels = [(search["clean_accuracy"] - TOLERANCE, "accuracy allowed")]
        chosen = f"{name}: {search['strength']:g} chosen"
        panels.append(Panel(chosen, "strength", "accuracy", lines, levels=levels, x_ticks=strengths))
    return plots.line_figure(panels, "Strength of the penalty, by method and attack", columns=2)


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
