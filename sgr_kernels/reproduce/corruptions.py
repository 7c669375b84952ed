"""Beyond the paper: SGR with the covariance of a corruption, beside training on the corruption itself."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sgr_kernels.covariance import CovarianceFunction
from sgr_kernels.evaluation.corrupt import SEVERITIES, corrupt
from sgr_kernels.evaluation.curves import RobustnessCurve, correct_answers
from sgr_kernels.report import plots
from sgr_kernels.report.maps import heat_map
from sgr_kernels.report.page import Page
from sgr_kernels.reproduce import stats
from sgr_kernels.reproduce.lab import Lab
from sgr_kernels.reproduce.measurements import Measurement, Network
from sgr_kernels.training.batches import Batches
from sgr_kernels.training.checkpoint import write_atomically
from sgr_kernels.training.datasets import DataSet
from sgr_kernels.training.images import ImageSet, pixels
from sgr_kernels.training.methods import Settings
from sgr_kernels.training.search import TOLERANCE
from sgr_kernels.training.trained import accuracy

TITLE = "Beyond the paper: corruptions"
KINDS = {
    "gaussian_noise": "noise",
    "gaussian_blur": "blur",
    "jpeg_compression": "JPEG",
    "fog": "fog",
    "brightness": "brightness",
    "contrast": "contrast",
}
"""Corruptions, by short names: of short range in front, of long range behind."""

SEARCHED = {"gaussian_noise": "gaussian_noise", "gaussian_blur": "gaussian_noise", "jpeg_compression": "gaussian_noise"}
"""Under which kind the strength for another is searched for; that for the others under fog."""

SEVERITY = 2  # trained for
_JUDGED = (1, 2, 3)  # severities that decide a strength
_SHARE = 1 / 8  # of each batch that is penalized, drawn by importance
_STRENGTHS = 3  # so many of the scale's, the smallest
_IMAGES = 1000  # that corruptions are tested on, and that covariances are shown of
_VALIDATION_IMAGES = 500
_LARGE_MEAN = 0.5  # share of the squared mean in the second moment from which on Eq. 12 is tried as well
_CHUNK = 1000
_TRAINING, _VALIDATION, _TEST = range(3)  # seeds: no image is corrupted by the random numbers of another set's


def measure(lab: Lab) -> dict[str, Any]:
    """Networks trained for each corruption, tested on all."""
    wanted_moments = [Measurement("corruptions", f"moment-{k}", [], partial(moment, lab, k)) for k in KINDS]
    moments = dict(zip(KINDS, lab.measured(wanted_moments, "moments of corruptions"), strict=True))
    searches = {"gn": _search(lab, lab.settings("gn", strength=0.0, fraction=_SHARE), list(KINDS))}
    for kind in dict.fromkeys(SEARCHED.get(kind, "fog") for kind in KINDS):
        searches[kind] = _search(lab, _sgr(lab, kind, 0.0), [kind])

    strength = {kind: searches[SEARCHED.get(kind, "fog")]["strength"] for kind in KINDS}
    wanted: dict[str, Settings] = {
        "clean": lab.settings("clean"),
        "gn": lab.settings("gn", strength=searches["gn"]["strength"], fraction=_SHARE),
        **{f"sgr {kind}": _sgr(lab, kind, strength[kind]) for kind in KINDS},
        **{
            f"eq12 {kind}": replace(_sgr(lab, kind, strength[kind]), mean_correction=True)
            for kind in KINDS
            if moments[kind]["mean_share"] > _LARGE_MEAN
        },
    }
    found = _all_tested(lab, lab.planned([(settings, name) for name, settings in wanted.items()]))
    for kind in KINDS:
        # Twice as many images half as often: as many steps as the others take. One kind at a time: each has its images.
        epochs = max(1, lab.scale.epochs // 2)
        both = with_corrupted(lab, kind)
        found |= _all_tested(lab, lab.planned([(lab.settings("clean"), f"data {kind}")], data=both, epochs=epochs))
    return {
        "kinds": list(KINDS),
        "severity": SEVERITY,
        "judged": list(_JUDGED),
        "severities": list(SEVERITIES),
        "share": _SHARE,
        "images": len(_tested_on(lab)),
        "validation_images": len(_validated_on(lab)),
        "trial_epochs": lab.scale.search.epochs or lab.scale.epochs,
        "moments": moments,
        "searches": searches,
        "networks": found,
    }


def _sgr(lab: Lab, kind: str, strength: float) -> Settings:
    return lab.settings("sgr", strength=strength, corruption=kind, severity=SEVERITY, fraction=_SHARE)


def _search(lab: Lab, settings: Settings, kinds: Sequence[str]) -> dict[str, Any]:
    def area(model: nn.Module) -> float:
        shares = [
            float(answers(lab, model, corrupted(lab, _validated_on(lab), kind, severity, _VALIDATION)).double().mean())
            for kind in kinds
            for severity in _JUDGED
        ]
        return sum(shares) / len(shares)

    strengths = sorted(lab.scale.search.strengths)[:_STRENGTHS]
    attack = kinds[0] if len(kinds) == 1 else "corruptions"
    return lab.searched(settings, strengths, attack, area).to_dict()


def with_corrupted(lab: Lab, kind: str) -> DataSet:
    """The training images, and all of them once more corrupted; test images as they are."""
    train = lab.data.train
    other = corrupted(lab, train, kind, SEVERITY, _TRAINING)
    images, labels = (torch.cat(pair) for pair in ((train.images, other.images), (train.labels, other.labels)))
    return DataSet(replace(train, images=images, labels=labels), lab.data.test)


def corrupted(lab: Lab, images: ImageSet, kind: str, severity: int, seed: int = _TRAINING) -> ImageSet:
    """Images under a corruption, made once and kept in the lab's folder."""
    path = lab.out / "corrupted" / f"{kind}-{severity}-{seed}-{images.digest()}.npy"
    if not path.is_file():
        lab.say(f"corrupting {len(images):,} images: {kind}, severity {severity}")
        parts = [
            corrupt(pixels(part), kind, severity, seed=seed, first=k * _CHUNK).mul(255).round().to(torch.uint8)
            for k, part in enumerate(images.images.split(_CHUNK))
        ]
        content = io.BytesIO()
        np.save(content, torch.cat(parts).numpy())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content.getvalue())
    return replace(images, images=torch.from_numpy(np.load(path)))


def moment(lab: Lab, kind: str) -> dict[str, Any]:
    """What the covariance of a corruption of the training images is like: its range, and the share of its mean."""
    images = pixels(lab.data.train.first(_IMAGES).images)
    found = CovarianceFunction.from_pairs(images, corrupt(images, kind, SEVERITY, seed=_TRAINING), psd="none")
    variance = float(found.values[:, :, 0].diagonal().mean())
    length = float(found.decay_length().diagonal().mean())
    return {
        "standard_deviation": variance**0.5,
        "decay_length": length if np.isfinite(length) else None,
        "mean_share": float(found.mean.double().square().mean()) / variance if variance else 0.0,
    }


def _all_tested(lab: Lab, networks: Sequence[Network]) -> dict[str, dict[str, Any]]:
    """Several networks (`tested`), by name."""
    wanted = [
        Measurement("corruptions", n.name.replace(" ", "-"), [n], partial(tested, lab, n), {"seed": _TEST})
        for n in networks
    ]
    return {n.name: found for n, found in zip(networks, lab.measured(wanted, "corruptions"), strict=True)}


def tested(lab: Lab, network: Network) -> dict[str, Any]:
    """One network: accuracy on the images as they are, and under each corruption at each severity."""
    images = _tested_on(lab)
    clean = answers(lab, network.model, images)
    curves = {}
    for kind in KINDS:
        rows = [answers(lab, network.model, corrupted(lab, images, kind, severity, _TEST)) for severity in SEVERITIES]
        curve = RobustnessCurve([float(s) for s in SEVERITIES], torch.stack(rows), clean, kind, "true")
        curves[kind] = stats.record(curve)
    unharmed = stats.record(RobustnessCurve([0.0], clean[None], clean, "none", "true"))
    return {
        "strength": network.settings.strength,
        "test_accuracy": accuracy(network.model, lab.batches(len(lab.data.test))),
        "clean": unharmed,
        "kinds": curves,
    }


def answers(lab: Lab, model: nn.Module, images: ImageSet) -> Tensor:
    """Which images a model classifies correctly, (n,), bool."""
    return torch.cat([correct_answers(model, *batch) for batch in Batches(images, 100, device=lab.device)])


def _tested_on(lab: Lab) -> ImageSet:
    return lab.data.test.first(_IMAGES)


def _validated_on(lab: Lab) -> ImageSet:
    return lab.validation().test.first(_VALIDATION_IMAGES)


def show(results: dict[str, Any], folder: Path) -> None:
    """The page and its heat map."""
    found, kinds, severity = results["networks"], results["kinds"], results["severity"]
    page = Page(f"{TITLE}: {results['title']}")
    page.text(
        "SGR is made for perturbations of the pixels with a covariance; common corruptions (Hendrycks and Dietterich, "
        "2019) are such perturbations, some of long range (fog, brightness, contrast), noise white, blur and JPEG "
        "different for each image. What does SGR with a corruption's own covariance gain on that corruption, and on "
        "the others, beside training on the corrupted images themselves?"
    )
    page.text(
        f"Corruptions by imagecorruptions, whose severities are meant for photographs of 224 pixels: on these images "
        f"they are harsher than CIFAR-10-C's. Trained for severity {severity}; tested on severities "
        f"{results['severities'][0]} to {results['severities'][-1]} of the first {results['images']:,} test images, "
        "each with random numbers of its own, others than in training. "
        "*SGR* has the fixed covariance function of 1,000 training images' "
        "perturbations (second moments, not centred, at the images' own variance), *Eq. 12* takes their mean into "
        f"account as well, where it is more than {_LARGE_MEAN:.0%} of the second moment. *On the corruption* is plain "
        "training on every training image twice, as it is and corrupted (half of all images), for half as many epochs: "
        "as many steps. Penalties' gradients are of an eighth of each batch, drawn by importance. One seed."
    )
    plots.save(_heat_map(found, kinds), folder / "corruptions.png")
    page.figure(
        "corruptions.png",
        "Accuracy by what was trained for (rows) and tested on (columns). Means over all severities.",
    )
    page.heading("What it says")
    page.text(
        "Each kind is judged by its own 95 % interval, which knows the images and not the seeds: of so many a few will "
        "be wrong, and other seeds would differ by more."
    )
    page.text("\n".join(f"- {line}" for line in conclusions(results)))
    page.heading("Gains")
    page.text(
        "Accuracy minus plain training's, in points, on the same images; ± is half a 95 % interval, from the images "
        "alone. Own: the corruption trained for, at the severity trained for and over all severities; others: mean "
        "over the other kinds and all severities; for GN, over all kinds."
    )
    page.table(
        ["training", "strength", "test accuracy [%]", f"own, severity {severity}", "own", "others"],
        [_row(results, name) for name in found],
    )
    page.heading("The corruptions' covariances")
    page.table(
        ["corruption", "standard deviation [1/255]", "decay length [pixels]", "squared mean / second moment"],
        [
            [
                KINDS[kind],
                f"{255 * entry['standard_deviation']:.0f}",
                "never" if entry["decay_length"] is None else f"{entry['decay_length']:.1f}",
                f"{entry['mean_share']:.2f}",
            ]
            for kind, entry in results["moments"].items()
        ],
    )
    page.heading("Strengths")
    judged = ", ".join(map(str, results["judged"]))
    epochs = results["trial_epochs"]
    page.text(
        f"Of the strengths tried the one with the highest accuracy under the corruption (severities {judged}) that "
        f"costs at most {100 * TOLERANCE:g} point of accuracy against plain training; where each costs more, the most "
        f"accurate. Trials of {epochs} epoch{'' if epochs == 1 else 's'}, judged on training images held out: accuracy "
        f"on all, corruptions on {results['validation_images']:,}. To save time one search serves several kinds: "
        "noise's also blur and JPEG, fog's also brightness and contrast; GN's is under all kinds."
    )
    page.table(
        ["searched for", "strength", "accuracy [%]", "corrupted [%]", ""],
        [line for name, search in results["searches"].items() for line in _trials(name, search)],
    )
    page.write(folder / "corruptions.md")


def conclusions(results: dict[str, Any]) -> list[str]:
    """What the matrix says, in sentences made of its numbers."""
    kinds, found = results["kinds"], results["networks"]
    lines = []
    for title, family, other, over in (
        ("SGR with a corruption's covariance", "sgr", "clean", "plain training"),
        ("SGR with a corruption's covariance", "sgr", "gn", "GN"),
        ("Training on the corruption", "data", "clean", "plain training"),
        ("Training on the corruption", "data", "sgr", "SGR with its covariance"),
    ):
        for where, own in (("that corruption", True), ("the others", False)):
            gains = {
                kind: gain(
                    results, f"{family} {kind}", f"sgr {kind}" if other == "sgr" else other, _under(kinds, kind, own)
                )
                for kind in kinds
            }
            lines.append(f"{title} against {over}, on {where}: {_verdict(gains)}")
    for name in found:
        family, _, kind = name.partition(" ")
        if family == "eq12":
            difference = gain(results, name, f"sgr {kind}", [kind]).points()
            lines.append(f"Eq. 12, {KINDS[kind]}: {difference} points against SGR without it, on that corruption.")
    return lines


def _verdict(gains: dict[str, stats.Estimate]) -> str:
    better = [kind for kind, estimate in gains.items() if estimate.low > 0]
    worse = [kind for kind, estimate in gains.items() if estimate.high < 0]
    single = ", ".join(f"{KINDS[kind]} {estimate.points()}" for kind, estimate in gains.items())
    undecided = len(gains) - len(better) - len(worse)
    return (
        f"better for {len(better)} of {len(gains)} kinds, worse for {len(worse)}, undecided for {undecided} ({single})."
    )


def _under(kinds: Sequence[str], kind: str, own: bool) -> list[str]:
    return [kind] if own else [other for other in kinds if other != kind]


def gain(
    results: dict[str, Any], name: str, other: str, kinds: Sequence[str], level: int | None = None
) -> stats.Estimate:
    """Accuracy of one network minus another's, mean over kinds, at one severity (its place) or over all."""
    found = results["networks"]
    terms = [
        (sign / len(kinds), [found[network]["kinds"][kind]])
        for kind in kinds
        for sign, network in ((1.0, name), (-1.0, other))
    ]
    return stats.contrast(terms, level)


def _row(results: dict[str, Any], name: str) -> list[str]:
    entry, kinds = results["networks"][name], results["kinds"]
    kind = name.partition(" ")[2]
    strength = f"{entry['strength']:.3g}" if entry["strength"] else "–"
    row = [_title(name), strength, f"{100 * entry['test_accuracy']:.1f}"]
    if name == "clean":
        return [*row, "–", "–", "–"]
    if not kind:
        return [*row, "–", "–", gain(results, name, "clean", kinds).points()]
    place = results["severities"].index(results["severity"])
    return [
        *row,
        gain(results, name, "clean", [kind], place).points(),
        gain(results, name, "clean", [kind]).points(),
        gain(results, name, "clean", _under(kinds, kind, False)).points(),
    ]


def _trials(name: str, search: dict[str, Any]) -> list[list[str]]:
    title = "GN" if name == "gn" else f"SGR, {KINDS[name]}"
    lines = [[title, "plain", f"{100 * search['clean_accuracy']:.1f}", f"{100 * search['clean_area']:.1f}", ""]]
    for trial in search["trials"]:
        mark = "chosen" if trial["strength"] == search["strength"] else ""
        shares = [f"{100 * trial[key]:.1f}" for key in ("accuracy", "area")]
        lines.append([title, f"{trial['strength']:g}", *shares, mark])
    return lines


def _title(name: str) -> str:
    family, _, kind = name.partition(" ")
    titles = {"clean": "plain", "gn": "GN", "sgr": "SGR, ", "eq12": "SGR with Eq. 12, ", "data": "on the corruption, "}
    return titles[family] + KINDS.get(kind, "")


def _heat_map(found: dict[str, Any], kinds: Sequence[str]) -> plots.Figure:
    values = [[entry["clean"]["area"], *(entry["kinds"][kind]["area"] for kind in kinds)] for entry in found.values()]
    return heat_map(
        np.asarray(values),
        [_title(name) for name in found],
        ["none", *(KINDS[kind] for kind in kinds)],
        title="Accuracy under corruptions, mean over severities",
        row_title="trained for",
        column_title="tested on",
        bar_title="accuracy",
    )
