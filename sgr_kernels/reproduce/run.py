"""From a lab to a folder of results: JSON first, then pages and pictures made from nothing but the JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from sgr_kernels.report.page import Page
from sgr_kernels.reproduce import (
    certified,
    claims,
    corruptions,
    covariance,
    ensemble,
    leaking,
    lrc,
    search,
    smooth,
    smoothness,
    table1,
    transfer,
)
from sgr_kernels.reproduce.lab import Lab
from sgr_kernels.reproduce.measurements import MeasurementError
from sgr_kernels.training.checkpoint import TrainingError, write_atomically
from sgr_kernels.training.records import difference

EXPERIMENTS: dict[str, ModuleType] = {
    "table1": table1,
    "transfer": transfer,
    "lrc": lrc,
    "covariance": covariance,
    "smoothness": smoothness,
    "leaking": leaking,
}
"""The paper's."""

BEYOND: dict[str, ModuleType] = {
    "smooth": smooth,
    "certified": certified,
    "corruptions": corruptions,
    "ensemble": ensemble,
}
"""What it has not: run by name, not by ``all``."""

_SEARCH_THEIR_OWN = ("corruptions",)
"""Experiments whose strengths are not those of the page on strengths."""

_ALL = {"search": search, **EXPERIMENTS, **BEYOND}


def reproduce(lab: Lab, experiments: Sequence[str], title: str) -> None:
    """Measure, write results and pages; everything already in the lab's folder is used again.

    An experiment that fails does not stop the next ones.

    Args:
        lab: Where to work.
        experiments: Names in ``EXPERIMENTS`` and ``BEYOND``.
        title: Of the pages: data set and scale.

    Raises:
        ValueError: if the folder holds results of other data or another scale, beyond those measured anew.
        TrainingError, MeasurementError: the first experiment's that failed, at the end.
    """
    about = {
        "question": lab.question(),
        "dataset": lab.dataset,
        "title": title,
        "train_images": len(lab.data.train),
        "test_images": len(lab.data.test),
        "scale": asdict(lab.scale),
    }
    folder = lab.out / "results"
    folder.mkdir(parents=True, exist_ok=True)
    renewed = [*experiments]
    if set(experiments) - set(_SEARCH_THEIR_OWN):
        renewed.insert(0, "search")
    kept = {name: found for name, found in load(folder).items() if name not in renewed}
    _require_one_question(folder, lab.question(), kept)
    failures: list[TrainingError | MeasurementError] = []
    for name in renewed:
        lab.say(f"{name}: {_ALL[name].TITLE.lower()}")
        lab.machines.clear()
        lab.weights.clear()
        try:
            found = _ALL[name].measure(lab)
        except (TrainingError, MeasurementError) as error:
            if len(renewed) == 1:
                raise
            lab.say(f"{name}: {error}")
            failures.append(error)
            continue
        weights = {network: sorted(kinds) for network, kinds in sorted(lab.weights.items())}
        results = {**about, **found, "machines": lab.machines, "weights": weights}
        write_atomically(folder / f"{name}.json", (json.dumps(results) + "\n").encode())
        _ALL[name].show(results, folder)
        summarize(folder, lab.question())
    if failures:
        raise failures[0]


def show(folder: Path) -> None:
    """Make all pages and pictures anew from the results in a folder.

    Raises:
        FileNotFoundError: if there are no results.
        ValueError: if they are of different data or scales.
    """
    results = load(folder)
    if not results:
        raise FileNotFoundError(f"no results in {folder}")
    question = next(iter(results.values())).get("question", {})
    _require_one_question(folder, question, results)
    for name, found in results.items():
        _ALL[name].show(found, folder)
    summarize(folder, question)


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The results in a folder, by experiment."""
    return {name: json.loads(path.read_text()) for name in _ALL if (path := folder / f"{name}.json").is_file()}


def summarize(folder: Path, question: dict[str, Any]) -> None:
    """Write README.md: each of the paper's claims and what became of it, by the results that answer the question."""
    results = {name: found for name, found in load(folder).items() if not _difference(question, found)}
    verdicts = claims.judge(results)
    papers = any(name in EXPERIMENTS for name in results)
    seeds = {name: _seeds(found, papers) for name, found in results.items() if name != "search"}
    # Where results differ, the fewest are said of all.
    about = results[min(seeds, key=lambda name: seeds[name]) if seeds else "search"]
    page = Page(("The paper's claims: " if papers else "Beyond the paper: ") + about["title"])
    made = [entry for found in results.values() for entry in found.get("machines", [found])]
    page.text(_setting(about, papers, made))
    notes = [f"More seeds: {', '.join(more)}."] if (more := _more(seeds)) else []
    if again := _trained_again(results):
        notes.append(
            "Trained more than once, and not to the same bits, so that what was measured is of several "
            f"networks of the same settings: {', '.join(again)}."
        )
    for note in notes:
        page.text(note)
    if verdicts:
        page.text(
            f"Of {len(verdicts)} claims measured: "
            + ", ".join(f"{count} {verdict}" for verdict, count in _counted(verdicts))
            + f". {claims.RULE} Differences are paired image by image, in points of accuracy; ± is half a 95 % "
            "interval."
        )
        page.table(
            ["claim", "found", "verdict", "details"],
            [[v.claim, v.finding, f"**{v.verdict}**", f"[{v.experiment}]({v.experiment}.md)"] for v in verdicts],
            left=4,
        )
    page.heading("Pages")
    page.text("\n".join(f"- [{_ALL[name].TITLE}]({name}.md), numbers in `{name}.json`" for name in results))
    if papers:
        page.heading("What this scale leaves out")
        page.text("\n".join(f"- {line}" for line in missing(about, results)))
    page.write(folder / "README.md")


def _difference(question: dict[str, Any], found: dict[str, Any]) -> str | None:
    return difference(question, found.get("question", {}))


def _require_one_question(folder: Path, question: dict[str, Any], results: dict[str, dict[str, Any]]) -> None:
    for name, found in results.items():
        differs = _difference(question, found)
        if differs is not None:
            raise ValueError(f"{folder / name}.json answers another question ({differs}); name another folder")


def missing(about: dict[str, Any], results: dict[str, Any]) -> list[str]:
    """What the paper has and these results have not."""
    scale = about["scale"]
    lines = [f"{module.TITLE}: not run." for name, module in _ALL.items() if name not in (*results, *BEYOND)]
    if scale["epochs"] < 50:
        lines.append(f"Trainings of {_epochs(scale)} on {about['train_images']:,} images; the paper: 50 on all.")
    if scale.get("schedule", "constant") != "constant":
        lines.append("A learning rate that falls to 0, for so short a training; the paper's is constant.")
    if scale["attack_images"] < about["test_images"]:
        lines.append(
            f"Gradient attacks on {scale['attack_images']:,} test images, DeepFool on {scale['deepfool_images']:,}, "
            f"noise on {scale['noise_images']:,}; the paper: all."
        )
    if scale["draws"] < 100:
        lines.append(f"The worst of {scale['draws']} draws of noise; the paper: of 100.")
    absent = [m for m in ("wdecay", "pgd", "fgsm", "sgr_grad", "fgsm_sgr", "pgd_sgr") if m not in scale["methods"]]
    if absent:
        lines.append(f"Methods not trained: {', '.join(absent)}.")
    single = [m for m in scale["methods"] if m not in scale["repeated"] or scale["seeds"] == 1]
    if single:
        lines.append(
            f"One seed only, so that their intervals miss the variation between trainings: {', '.join(single)}."
        )
    twinless = [m for m in single if m not in scale["twins"]]
    if twinless:
        lines.append(f"No twin for self-transfer: {', '.join(twinless)}.")
    if scale["update_every"] > 1:
        lines.append(f"Covariances of FGSM and PGD perturbations are updated every {scale['update_every']} steps.")
    for key, what in (
        ("full_covariance", "SGR with the full covariance matrix"),
        ("mean_correction_network", "a network trained with Eq. 12"),
        ("leaking_network", "a network trained on leaking labels"),
    ):
        if not scale[key]:
            lines.append(f"Not trained: {what}.")
    return lines or ["Nothing that we know of."]


def _counted(verdicts: Sequence[claims.Verdict]) -> list[tuple[str, int]]:
    counts = Counter(verdict.verdict for verdict in verdicts)
    return [(name, counts[name]) for name in (claims.YES, claims.NO, claims.OPEN) if counts[name]]


def _epochs(scale: dict[str, Any]) -> str:
    return f"{scale['epochs']} epoch{'' if scale['epochs'] == 1 else 's'}"


def _setting(about: dict[str, Any], papers: bool, made: Sequence[dict[str, Any]]) -> str:
    scale = about["scale"]
    several = scale["seeds"] > 1 and scale["repeated"]
    repeated = f"{scale['seeds']} seeds of {', '.join(scale['repeated'])}, one of the others" if several else "one seed"
    if not papers:
        repeated = f"{scale['beyond']['seeds']} seed{'' if scale['beyond']['seeds'] == 1 else 's'}"
    rate = "falling along a cosine to 0" if scale.get("schedule") == "cosine" else "constant"
    return (
        f"{about['title']}: Carlini-Wagner networks, {_epochs(scale)} on {about['train_images']:,} images, "
        f"Adam 1e-3 ({rate}), batches of {scale['batch_size']}; {repeated}. "
        f"{_machines(made)}."
    )


def _seeds(about: dict[str, Any], papers: bool) -> int:
    """How many networks there are of a method that has several."""
    scale = about["scale"]
    if not papers:
        return int(scale["beyond"]["seeds"])
    return int(scale["seeds"]) if scale["repeated"] else 1


def _more(seeds: dict[str, int]) -> list[str]:
    """Pages with more seeds than the others."""
    return [f"{_ALL[name].TITLE} ({count})" for name, count in seeds.items() if count > min(seeds.values())]


def _trained_again(results: dict[str, dict[str, Any]]) -> list[str]:
    """Names of the networks of which there are several by the same settings."""
    weights: dict[str, set[str]] = {}
    for found in results.values():
        for name, kinds in found.get("weights", {}).items():
            weights.setdefault(name, set()).update(kinds)
    return list(dict.fromkeys(name.rpartition("-")[0] for name in sorted(weights) if len(weights[name]) > 1))


def _machines(made: Sequence[dict[str, Any]]) -> str:
    """What measured, each kind once."""
    kinds = [
        f"sgr_kernels {entry['sgr_kernels']}"
        + (f" at commit {entry['commit']}" if "commit" in entry else "")
        + f", torch {entry['torch']}, {entry['device']}"
        for entry in made
    ]
    return "; ".join(dict.fromkeys(kinds))
