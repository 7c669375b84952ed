"""Beyond the paper: the same penalties on networks with a continuous input gradient, beside adversarial training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sgr_kernels.attacks import pgd
from sgr_kernels.evaluation.autoattack import autoattack, package
from sgr_kernels.evaluation.corrupt import KINDS, CorruptionUnavailable, corrupt, require_package
from sgr_kernels.evaluation.curves import RobustnessCurve, robustness_curve
from sgr_kernels.evaluation.suite import PIXEL_LEVELS
from sgr_kernels.penalty.per_sample import cross_entropy_per_sample
from sgr_kernels.penalty.proof import agreement
from sgr_kernels.penalty.trial import Trial
from sgr_kernels.report import plots
from sgr_kernels.report.page import Page
from sgr_kernels.report.plots import Line, Panel
from sgr_kernels.reproduce import stats
from sgr_kernels.reproduce.certified import certification, mean_radius
from sgr_kernels.reproduce.corruptions import answers, corrupted
from sgr_kernels.reproduce.lab import Lab
from sgr_kernels.reproduce.lrc import under_noise
from sgr_kernels.reproduce.measurements import Measurement, Network
from sgr_kernels.reproduce.search import at_its_end
from sgr_kernels.training.datasets import DataSet
from sgr_kernels.training.loop import Trainer
from sgr_kernels.training.methods import Settings

TITLE = "Beyond the paper: smooth networks"
NETWORKS: dict[str, dict[str, Any]] = {
    "ReLU, max-pooling": {"activation": "relu", "pooling": "max"},
    "GELU, average pooling": {"activation": "gelu", "pooling": "average"},
}
METHODS = {
    "clean": "plain",
    "gn": "gradient norm, squared",
    "l1": "gradient norm, L1",
    "sgr_sign": "SGR, covariance of signs",
    "sgr_exp": "SGR, exponential covariance",
    "pgd": "PGD adversarial training",
    "lrc": "training on correlated noise",
}
PENALTIES = ("gn", "l1", "sgr_sign", "sgr_exp")
"""Methods whose strengths are searched for."""
_KINKED_IMAGES = 128
_TIMED_STEPS, _TIMED_ROUNDS = 8, 5
AUTOATTACK = ("apgd-ce", "apgd-t")
"""The two of the ensemble that break nearly all that it breaks; the others take as long again, and longer."""
SEVERITIES = (1, 3, 5)


def measure(lab: Lab) -> dict[str, Any]:
    """Both kinds of network, trained by every method, under attacks, noise, corruptions and certificates."""
    package()  # without it, or the next one, an error before hours of training
    require_package()
    kinds, unavailable = _kinds(lab)
    wanted = [
        (lab.settings(method, seed, **options), f"{method}, {kind}")
        for seed in range(lab.scale.beyond.seeds)
        for kind, options in NETWORKS.items()
        for method in METHODS
    ]
    networks = lab.planned(wanted)
    names = [(kind, method) for _ in range(lab.scale.beyond.seeds) for kind in NETWORKS for method in METHODS]
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    asked = [measurements(lab, network, kinds) for network in networks]
    results = iter(lab.measured([each for part in asked for each in part.values()], "smooth networks"))
    for (kind, method), part in zip(names, asked, strict=True):
        row = dict(zip(part, results))  # no more results than there are names
        found.setdefault(kind, {}).setdefault(method, []).append({**row.pop(""), **row})
    first = [(name, network.settings) for name, network in zip(names, networks, strict=True)]
    first = [(name, settings) for name, settings in first if settings.seed == 0]
    cost = lab.cached("smooth", "cost", [settings for _, settings in first], partial(costs, lab, first))
    return {
        "images": lab.scale.attack_images,
        "noise_images": lab.scale.noise_images,
        "draws": lab.scale.draws,
        "pgd_steps": lab.scale.pgd_steps,
        "noise_eps": max(lab.scale.noise_eps),
        "sgr_decay_length": lab.scale.decay_length,
        "certified_images": lab.scale.beyond.certified_images,
        "certified_decay_length": max(lab.scale.decay_lengths),
        "certified_sigma": lab.scale.beyond.certified_sigmas[0],
        "autoattack_images": lab.scale.beyond.autoattack_images,
        "autoattack_eps": lab.scale.beyond.autoattack_eps,
        "autoattack": AUTOATTACK,
        "corrupted_images": lab.scale.beyond.corrupted_images,
        "corruptions": kinds,
        "corruptions_unavailable": unavailable,
        "severities": SEVERITIES,
        "cost": cost,
        "searches": {
            kind: {method: lab.search(method, **options).to_dict() for method in PENALTIES if METHODS.get(method)}
            for kind, options in NETWORKS.items()
        },
        "networks": found,
    }


def measurements(lab: Lab, network: Network, kinds: list[str]) -> dict[str, Measurement]:
    """Of one network: what `attacked` finds, and by the name of their part in the results, the others."""
    plan, name = (
        lab.scale.beyond,
        f"{network.settings.method}-{network.settings.activation}-seed{network.settings.seed}",
    )

    def asked(part: str, measure: Callable[..., Any], question: list[Any], *arguments: Any) -> Measurement:
        return Measurement("smooth", f"{part}-{name}", [network], partial(measure, lab, network, *arguments), question)

    robust, corrupted = [plan.autoattack_images, plan.autoattack_eps, AUTOATTACK], [plan.corrupted_images, kinds]
    return {
        "": Measurement("smooth", name, [network], partial(attacked, lab, network)),
        "certified": certification(lab, network, max(lab.scale.decay_lengths), plan.certified_sigmas[0]),
        "autoattack": asked("autoattack", _under_autoattack, robust),
        "corruptions": asked("corruptions", _under_corruptions, [*corrupted, SEVERITIES], kinds),
    }


def attacked(lab: Lab, network: Network) -> dict[str, Any]:
    """One network: accuracy, PGD, noise of short and long range, and how far its gradient is from continuous."""
    scale = lab.scale
    batches = lab.batches(scale.attack_images)
    attack = partial(pgd, steps=scale.pgd_steps, early_stop=True)
    eps = [level / PIXEL_LEVELS for level in scale.eps]
    curve = robustness_curve(network.model, batches, attack, eps, torch.Generator().manual_seed(0))
    images, labels = lab.pixels(_KINKED_IMAGES)
    lengths = (min(scale.decay_lengths), max(scale.decay_lengths))
    return {
        "test_accuracy": lab.test_accuracy(network),
        "strength": network.settings.strength,
        "pgd": stats.record(curve, PIXEL_LEVELS),
        "noise": {f"{z:g}": under_noise(lab, network, z, [max(scale.noise_eps)]) for z in lengths},
        "gradient_cosine": agreement(Trial(network.model, cross_entropy_per_sample, images, labels)),
    }


def _under_autoattack(lab: Lab, network: Network) -> dict[str, Any]:
    plan = lab.scale.beyond
    images, labels = lab.pixels(plan.autoattack_images)
    found = autoattack(
        network.model, [(images, labels)], plan.autoattack_eps / PIXEL_LEVELS, attacks=AUTOATTACK, batch_size=100
    )
    curve = RobustnessCurve([plan.autoattack_eps], found.robust[None], found.clean, "autoattack", "true")
    return {**stats.record(curve), "broken": {part.name: part.broken for part in found.parts}}


def _kinds(lab: Lab) -> tuple[list[str], dict[str, str]]:
    """The corruptions that the packages installed here can make, and why not the others."""
    images, _ = lab.pixels(1)
    found, unavailable = [], {}
    for kind in KINDS:
        try:
            corrupt(images, kind, 1)
            found.append(kind)
        except CorruptionUnavailable as error:
            unavailable[kind] = str(error)
    return found, unavailable


def _under_corruptions(lab: Lab, network: Network, kinds: list[str]) -> dict[str, Any]:
    images = lab.data.test.first(lab.scale.beyond.corrupted_images)
    rows = [
        answers(lab, network.model, corrupted(lab, images, kind, severity)) for kind in kinds for severity in SEVERITIES
    ]
    levels = [float(k) for k in range(len(rows))]
    clean = answers(lab, network.model, images)
    return stats.record(RobustnessCurve(levels, torch.stack(rows), clean, "corruptions", "true"))


def costs(lab: Lab, wanted: list[tuple[tuple[str, str], Settings]]) -> dict[str, dict[str, float]]:
    """Time of a training step relative to a plain one of the same kind of network: medians of rounds taken in turn.

    Args:
        lab: Where to work.
        wanted: Kind and method, and the settings of their training.
    """
    train = lab.data.train.first(_TIMED_STEPS * lab.scale.batch_size)
    part = DataSet(train, lab.data.test.first(lab.scale.batch_size))
    trainers = {
        name: Trainer(replace(settings, schedule="constant"), part, device=lab.device) for name, settings in wanted
    }
    # The first round has what is done once, such as the trial of a penalty's gradient.
    for done in lab.bar(range(1, _TIMED_ROUNDS + 2), "costs"):
        for trainer in trainers.values():
            trainer.run(done, progress=False)
    found: dict[str, dict[str, float]] = {}
    for (kind, method), trainer in trainers.items():
        found.setdefault(kind, {})[method] = median(record["seconds"] for record in trainer.history[1:])
    return {
        kind: {method: seconds / max(methods["clean"], 1e-9) for method, seconds in methods.items()}
        for kind, methods in found.items()
    }


def show(results: dict[str, Any], folder: Path) -> None:
    """The page and its figure."""
    found = results["networks"]
    first = next(iter(next(iter(found.values())).values()))[0]
    lengths = list(first["noise"])
    page = Page(f"{TITLE}: {results['title']}")
    page.text(
        "A penalty on the input gradient flattens the loss where that gradient tells how the loss goes on. ReLU and "
        "max-pooling bend the loss at kinks that the gradient does not show; GELU and average pooling do not. The same "
        "Carlini-Wagner network, trained from scratch both ways by every method; [strengths](#strengths) searched for "
        "separately ([how](search.md): the most robust at no more than a point of accuracy), those of SGR with an "
        f"exponential covariance (decay length {results['sgr_decay_length']:g}) under noise, the others under PGD."
    )
    eps = ", ".join(f"{level:g}" for level in first["pgd"]["eps"])
    page.text(
        f"Accuracy in %: on all test images; under PGD ({results['pgd_steps']} steps, from the network's own answers, "
        "which may turn a mistake into the right one) on the first "
        f"{results['images']:,}, the mean over eps {eps} of 255 and at the "
        f"last of these; under the worst of {results['draws']} draws of noise of {results['noise_eps']:g} standard "
        f"deviations on the first {results['noise_images']:,}, with decay lengths {' and '.join(lengths)}; under "
        f"AutoAttack's {' and '.join(results['autoattack'])}, from the true labels, with eps "
        f"{results['autoattack_eps']:g} of 255 on the first {results['autoattack_images']:,}; under "
        f"{len(results['corruptions'])} common corruptions, the mean over severities "
        f"{', '.join(map(str, results['severities']))} of the first {results['corrupted_images']:,}"
        f"{_left_out(results)}. The mean "
        f"certified radius of the first {results['certified_images']:,} is how far a perturbation may go, in the "
        f"metric of noise of decay length {results['certified_decay_length']:g}, without changing the answer of the "
        f"network smoothed by that noise (sigma {results['certified_sigma']:g}). ± is half a "
        "95 % interval, from the images and, with several seeds, from the seeds. The cost is the time of a training "
        "step relative to a plain one of the same network, taken in turn. The cosine is between a finite "
        "difference and the exact gradient of the penalty in the parameters: 1 but for rounding where the input "
        "gradient is continuous."
    )
    for kind, methods in found.items():
        page.heading(kind)
        header = ["training", "strength", "test", "PGD, mean", "PGD, largest eps", "AutoAttack"]
        header += [*(f"noise {z}" for z in lengths), "corruptions"]
        rows = [
            [*_row(METHODS[name], runs, lengths), f"{results['cost'][kind][name]:.1f}"]
            for name, runs in methods.items()
        ]
        page.table([*header, "certified radius", "cosine", "cost"], rows)
    page.heading("What became of the penalties' gain")
    page.text(
        "Accuracy minus that of plain training of the same network, in points, image by image: under PGD (mean over "
        "eps), under AutoAttack, under common corruptions."
    )
    under = {"PGD": "pgd", "AutoAttack": "autoattack", "corruptions": "corruptions"}
    gains = [
        [METHODS[name], *(_gain(found[kind], name, key) for kind in found for key in under.values())]
        for name in METHODS
        if name != "clean" and all(name in methods for methods in found.values())
    ]
    page.table(["training", *(f"{kind}: {attack}" for kind in found for attack in under)], gains)
    _strengths(page, results["searches"])
    plots.save(_figure(found), folder / "smooth.png")
    seeds = "Means over seeds" if len(next(iter(next(iter(found.values())).values()))) > 1 else "One seed"
    page.figure("smooth.png", f"Accuracy under PGD against its strength. {seeds}.")
    page.write(folder / "smooth.md")


def _row(title: str, runs: list[dict[str, Any]], lengths: list[str]) -> list[str]:
    curves = [run["pgd"] for run in runs]
    strength = runs[0]["strength"]
    test = 100 * sum(run["test_accuracy"] for run in runs) / len(runs)
    noise = [stats.mean([run["noise"][z] for run in runs]).percent() for z in lengths]
    cosine = sum(run["gradient_cosine"] for run in runs) / len(runs)
    under = [stats.mean(curves).percent(), stats.mean(curves, len(curves[0]["eps"]) - 1).percent()]
    radius = mean_radius([run["certified"] for run in runs])
    certified_radius = f"{radius.mean:.2f} ± {radius.half:.2f}"
    given = f"{strength:.3g}" if strength else "–"
    stronger, corrupt_ = (stats.mean([run[key] for run in runs]).percent() for key in ("autoattack", "corruptions"))
    return [title, given, f"{test:.1f}", *under, stronger, *noise, corrupt_, certified_radius, f"{cosine:.2f}"]


def _left_out(results: dict[str, Any]) -> str:
    names = ", ".join(results["corruptions_unavailable"])
    return f" ({names} cannot be made by the packages installed)" if names else ""


def _gain(methods: dict[str, list[dict[str, Any]]], name: str, under: str) -> str:
    ours, plain = ([run[under] for run in methods[key]] for key in (name, "clean"))
    return stats.difference(ours, plain).points()


def _strengths(page: Page, searches: dict[str, dict[str, dict[str, Any]]]) -> None:
    page.heading("Strengths")
    page.text(
        "Accuracy and mean accuracy under the attack that decides, in %, on training images held out; the strength "
        "chosen is bold. `none` is plain training."
    )
    first = next(iter(searches.values()))
    rows = []
    for method, search in first.items():
        cells = [searches[kind][method] for kind in searches]
        plain = [f"{100 * cell['clean_accuracy']:.1f}, {100 * cell['clean_area']:.1f}" for cell in cells]
        rows.append([METHODS[method], "none", *plain])
        for k, trial in enumerate(search["trials"]):
            tried = []
            for cell in cells:
                own = cell["trials"][k]
                text = f"{100 * own['accuracy']:.1f}, {100 * own['area']:.1f}"
                tried.append(f"**{text}**" if own["strength"] == cell["strength"] else text)
            rows.append(["", f"{trial['strength']:.3g}", *tried])
    page.table(["training", "strength", *searches], rows)
    ends = [
        f"{METHODS[method]} ({'; '.join(kinds)})"
        for method in first
        if (kinds := [kind for kind, found in searches.items() if at_its_end(found[method])])
    ]
    if ends:
        page.text(f"The largest strength that was tried is the one chosen for {', '.join(ends)}: more may do better.")


def _figure(found: dict[str, dict[str, list[dict[str, Any]]]]) -> plots.Figure:
    panels = []
    for kind, methods in found.items():
        lines = []
        for name, runs in methods.items():
            eps = runs[0]["pgd"]["eps"]
            means = [stats.mean([run["pgd"] for run in runs], level).mean for level in range(len(eps))]
            lines.append(Line(METHODS[name], eps, means))
        panels.append(Panel(kind, "eps [1/255]", "accuracy", lines, levels=[(0.1, "chance")], y_range=(0, 1.02)))
    return plots.line_figure(panels, "Accuracy under PGD")
