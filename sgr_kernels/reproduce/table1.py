"""Table 1, white-box: accuracies of all methods under attacks on themselves, and DeepFool's relative norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgr_kernels.attacks import deepfool, fgsm, pgd, relative_norm, uniform_noise
from sgr_kernels.evaluation.curves import robustness_curve, wilson_interval
from sgr_kernels.evaluation.sanity import sanity_report
from sgr_kernels.evaluation.suite import PIXEL_LEVELS
from sgr_kernels.report import plots
from sgr_kernels.report.page import Page
from sgr_kernels.report.plots import Line, Panel
from sgr_kernels.reproduce import paper, stats
from sgr_kernels.reproduce.lab import Lab
from sgr_kernels.reproduce.measurements import Measurement, Network

TITLE = "White-box attacks"
ATTACKS = {"rand": "uniform noise", "fgsm": "FGSM", "pgd": "PGD", "targeted": "PGD, targeted"}
# One colour and marker each: no more lines than the palette has.
SHOWN = ("clean", "wdecay", "pgd", "fgsm", "gn", "sgr_sign", "sgr_exp")


def measure(lab: Lab) -> dict[str, Any]:
    """Every network under every attack."""
    networks = lab.networks(lab.scale.methods)
    wanted = [
        Measurement("table1", f"{n.settings.method}-seed{n.settings.seed}", [n], partial(attacked, lab, n))
        for n in networks
    ]
    shown = [method for method in SHOWN if method in lab.scale.methods]
    found = lab.measured([*wanted, *(sanity(lab, method) for method in shown)], "white-box attacks")
    rows: dict[str, list[dict[str, Any]]] = {}
    for network, row in zip(networks, found):  # and then the sanity reports
        rows.setdefault(network.settings.method, []).append(row)
    return {
        "images": lab.scale.attack_images,
        "deepfool_images": lab.scale.deepfool_images,
        "test_images": len(lab.data.test),
        "pgd_steps": lab.scale.pgd_steps,
        "methods": rows,
        "sanity_images": lab.scale.sanity_images,
        "sanity": dict(zip(shown, found[len(networks) :], strict=True)),
    }


def sanity(lab: Lab, method: str) -> Measurement:
    """Can the PGD accuracies of a method's first network be believed?"""
    network, surrogate = lab.method(method), lab.method("gn" if method == "clean" else "clean")
    return Measurement("sanity", method, [network, surrogate], partial(_sanity, lab, network, surrogate))


def _sanity(lab: Lab, network: Network, surrogate: Network) -> dict[str, Any]:
    report = sanity_report(
        network.model,
        lab.batches(lab.scale.sanity_images),
        eps=max(lab.scale.eps) / PIXEL_LEVELS,
        surrogate=surrogate.model,
        steps=lab.scale.pgd_steps,
        max_images=lab.scale.sanity_images,
    )
    return report.to_dict()


def attacked(lab: Lab, network: Network) -> dict[str, Any]:
    """One network under every attack."""
    scale = lab.scale
    eps = [level / PIXEL_LEVELS for level in scale.eps]
    climb = partial(pgd, steps=scale.pgd_steps, early_stop=True)
    functions: dict[str, Callable[..., Tensor]] = {
        "rand": uniform_noise,
        "fgsm": fgsm,
        "pgd": climb,
        "targeted": partial(climb, targeted=True),
    }
    curves = {}
    for name, function in functions.items():
        generator = torch.Generator().manual_seed(0)
        curve = robustness_curve(network.model, lab.batches(scale.attack_images), function, eps, generator)
        curves[name] = stats.record(curve, PIXEL_LEVELS)
    norms = [
        relative_norm(images, deepfool(network.model, images)).cpu() for images, _ in lab.batches(scale.deepfool_images)
    ]
    relative = torch.cat(norms)
    return {
        "test_accuracy": lab.test_accuracy(network),
        "strength": network.settings.strength,
        "curves": curves,
        "deepfool": {
            "mean": float(relative.mean()),
            "error": float(relative.std(correction=0)) / max(1, len(relative) - 1) ** 0.5,
        },
    }


def show(results: dict[str, Any], folder: Path) -> None:
    """The page and its figure."""
    found, dataset = results["methods"], results["dataset"]
    printed = paper.WHITE_BOX[dataset]
    page = Page(f"{TITLE}: {results['title']}")
    page.text(
        f"Accuracy in %, beside the paper's. Test: all {results['test_images']:,} test images. Attacks: the first "
        f"{results['images']:,}, each cell the mean over eps {_grid(found)} of 255 (the paper's range, its steps are "
        f"not known); ± is half a 95 % interval, from the images and, with several seeds, from the seeds. PGD takes "
        f"{results['pgd_steps']} steps from a random start, from the network's own prediction; targeted: towards "
        f"another class, drawn uniformly. DeepFool: mean of norm(r)/norm(x) on {results['deepfool_images']:,} images."
    )
    header = ["method", "seeds", "strength", "test", "paper"]
    for title in ("rand", "FGSM", "PGD", "PGD targeted", "DeepFool"):
        header += [title] if title == "FGSM" else [title, "paper"]
    page.table(header, [_row(name, runs, printed.get(name), results) for name, runs in found.items()])
    page.text(
        "`sgr_sign` stands beside the paper's `sgr`, whose tables show that variant. Spread over seeds (standard "
        f"deviation, points): {_spreads(found) or 'one seed each'}."
    )
    names = [name for name in SHOWN if name in found]
    plots.save(figure(found, names), folder / "table1-curves.png")
    page.figure(
        "table1-curves.png",
        "Accuracy against the strength of white-box attacks. Bars: 95 % Wilson intervals of the first network's "
        "accuracy. Methods left out here are in the table.",
    )
    page.heading("Can these accuracies be believed?")
    page.text(
        f"`sanity_report` on {results['sanity_images']:,} images at the largest eps, the clean network (for it, gn) as "
        "the surrogate. A passed check is no proof of robustness; a failed one says that PGD overstates it."
    )
    reports = results["sanity"]
    checks = [check["name"] for check in next(iter(reports.values()))["checks"]]
    marks = {True: "ok", False: "**failed**", None: "–"}
    page.table(
        ["check", *reports],
        [[name, *(marks[r["checks"][k]["passed"]] for r in reports.values())] for k, name in enumerate(checks)],
    )
    failures = [
        f"- {method}, {check['name']}: {check['detail']}"
        for method, report in reports.items()
        for check in report["checks"]
        if check["passed"] is False
    ]
    if failures:
        page.text("\n".join(failures))
    page.write(folder / "table1.md")


def figure(found: dict[str, Any], names: Sequence[str]) -> plots.Figure:
    """Accuracy against strength, one panel for each attack."""
    panels = []
    for attack in ("fgsm", "pgd", "targeted"):
        lines = []
        for name in names:
            curve = found[name][0]["curves"][attack]
            low, high = zip(*curve["interval95"])
            lines.append(Line(name, curve["eps"], curve["accuracy"], low, high))
        panels.append(
            Panel(ATTACKS[attack], "eps [1/255]", "accuracy", lines, levels=[(0.1, "chance")], y_range=(0, 1.02))
        )
    return plots.line_figure(panels, "Accuracy under white-box attacks")


def _row(
    name: str, runs: list[dict[str, Any]], printed: tuple[float, ...] | None, results: dict[str, Any]
) -> list[str]:
    cells = ["–"] * 5 if printed is None else [*(f"{value:.1f}" for value in printed[:4]), f"{printed[4]:.3f}"]
    strength = runs[0]["strength"]
    by_attack = {a: stats.mean([run["curves"][a] for run in runs]).percent() for a in ATTACKS}
    norm = sum(run["deepfool"]["mean"] for run in runs) / len(runs)
    return [
        name,
        str(len(runs)),
        f"{strength:g}" if strength else "–",
        _test(runs, results["test_images"]),
        cells[0],
        by_attack["rand"],
        cells[1],
        by_attack["fgsm"],
        by_attack["pgd"],
        cells[2],
        by_attack["targeted"],
        cells[3],
        f"{norm:.3f}",
        cells[4],
    ]


def _test(runs: list[dict[str, Any]], images: int) -> str:
    mean = sum(run["test_accuracy"] for run in runs) / len(runs)
    low, high = wilson_interval(round(mean * images), images)
    return f"{100 * mean:.1f} ± {50 * (high - low):.1f}"


def _spreads(found: dict[str, Any]) -> str:
    parts = []
    for name, runs in found.items():
        if len(runs) > 1:
            test = torch.tensor([run["test_accuracy"] for run in runs], dtype=torch.float64).std()
            climbed = stats.mean([run["curves"]["pgd"] for run in runs]).spread or 0.0
            parts.append(f"{name} {100 * float(test):.2f} test, {100 * climbed:.2f} PGD")
    return "; ".join(parts)


def _grid(found: dict[str, Any]) -> str:
    eps = next(iter(found.values()))[0]["curves"]["pgd"]["eps"]
    return ", ".join(f"{level:g}" for level in eps)
