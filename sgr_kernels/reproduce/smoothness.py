"""Softmax along the line from a clean to a perturbed image: how steeply does a network change its mind?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sgr_kernels.attacks import pgd
from sgr_kernels.evaluation.suite import PIXEL_LEVELS
from sgr_kernels.report import plots
from sgr_kernels.report.page import Page
from sgr_kernels.report.plots import Line, Panel
from sgr_kernels.reproduce.lab import Lab
from sgr_kernels.reproduce.measurements import Measurement, Network
from sgr_kernels.reproduce.stats import Z95

TITLE = "Smoothness"
SHOWN = ("clean", "gn", "sgr_sign", "pgd")
REACH = 2.0
EXAMPLES = 3


def measure(lab: Lab) -> dict[str, Any]:
    """Lines for the networks that the figure shows, all over the same images."""
    networks = lab.first([name for name in SHOWN if name in lab.scale.methods])
    eps = min(lab.scale.single_eps)
    wanted = [Measurement("smoothness", name, [n], partial(along_lines, lab, n, eps)) for name, n in networks.items()]
    found = dict(zip(networks, lab.measured(wanted, "softmax along lines"), strict=True))
    _, labels = lab.pixels(lab.scale.line_images)
    chosen = examples(found["clean"], labels.tolist())
    shown = {
        name: lab.cached(
            "smoothness", f"{name}-examples", [network], partial(lines_of, lab, network, eps, chosen), chosen
        )
        for name, network in networks.items()
    }
    return {
        "images": lab.scale.line_images,
        "eps": eps,
        "pgd_steps": lab.scale.pgd_steps,
        "classes": list(lab.data.test.classes),
        "examples": {"labels": labels[chosen].tolist(), "networks": shown},
        "positions": positions(lab).tolist(),
        "networks": found,
    }


def positions(lab: Lab) -> Tensor:
    """Places on the line: 0 the clean image, 1 the perturbed one."""
    return torch.linspace(0, REACH, lab.scale.line_points, dtype=torch.float64)


def along_lines(lab: Lab, network: Network, eps: float) -> dict[str, Any]:
    """Of each image the probability of its first answer along the line."""
    probabilities = _lines(lab, network, eps)
    answer = probabilities[0].argmax(1)
    own = probabilities[:, torch.arange(len(answer)), answer]
    return {
        "answers": answer.tolist(),
        "own": own.round(decimals=4).T.tolist(),
        "answers_at_end": (probabilities[_place_of_one(positions(lab))].argmax(1) != answer).tolist(),
    }


def lines_of(lab: Lab, network: Network, eps: float, chosen: Sequence[int]) -> list[Any]:
    """All probabilities along the lines of the chosen images, (images, places, classes)."""
    return _lines(lab, network, eps)[:, list(chosen)].round(decimals=4).transpose(0, 1).tolist()


def examples(clean: dict[str, Any], labels: Sequence[int]) -> list[int]:
    """The first images that the clean network knows, and no longer when perturbed."""
    known = [answer == label for answer, label in zip(clean["answers"], labels)]
    return [k for k, changed in enumerate(clean["answers_at_end"]) if changed and known[k]][:EXAMPLES]


def _lines(lab: Lab, network: Network, eps: float) -> Tensor:
    images, _ = lab.pixels(lab.scale.line_images)
    perturbed = pgd(network.model, images, eps=eps / PIXEL_LEVELS, steps=lab.scale.pgd_steps)
    return softmax_along(network.model, images, perturbed, positions(lab))


@torch.no_grad()
def softmax_along(model: nn.Module, images: Tensor, perturbed: Tensor, places: Tensor) -> Tensor:
    """(places, images, classes): probabilities at ``x + t (x' - x)``, not clipped to the pixels' range."""
    step = perturbed - images
    rows = []
    for place in places.tolist():
        parts = (images + place * step).split(100)
        rows.append(torch.cat([model(part) for part in parts]).double().softmax(1).cpu())
    return torch.stack(rows)


def steepness(entry: dict[str, Any], places: list[float]) -> np.ndarray:
    """Largest change of an image's probability per length of the perturbation, (images,)."""
    own = np.asarray(entry["own"])
    return (np.abs(np.diff(own, axis=1)) / np.diff(np.asarray(places))).max(1)


def show(results: dict[str, Any], folder: Path) -> None:
    """The page and its figures."""
    places = results["positions"]
    page = Page(f"{TITLE}: {results['title']}")
    page.text(
        f"Softmax along the line from an image through its PGD perturbation ({results['pgd_steps']} steps, eps "
        f"{results['eps']:g}/255, made for the network itself) and as far again; the first {results['images']:,} test "
        "images. Steepness: the largest change of the probability of the network's first answer, per length of the "
        "perturbation. ± is half a 95 % interval from the images."
    )
    rows = []
    for name, entry in results["networks"].items():
        steep = steepness(entry, places)
        error = Z95 * float(steep.std()) / max(1, len(steep) - 1) ** 0.5
        kept = np.asarray(entry["own"])[:, _place_of_one(torch.tensor(places))]
        changed = np.mean(entry["answers_at_end"])
        rows.append([name, f"{steep.mean():.2f} ± {error:.2f}", f"{kept.mean():.2f}", f"{100 * changed:.1f} %"])
    page.table(["network", "steepness", "probability kept", "answers changed"], rows)
    plots.save(_mean_figure(results), folder / "smoothness-mean.png")
    page.figure(
        "smoothness-mean.png", "Probability of the network's first answer along the line, mean over the images."
    )
    if results["examples"]["labels"]:
        plots.save(_example_figure(results), folder / "smoothness-lines.png")
        page.figure(
            "smoothness-lines.png",
            "Probabilities of the most likely classes along the line. The images are the first whose perturbation "
            "changes the clean network's answer; each network has perturbations of its own.",
        )
    page.write(folder / "smoothness.md")


def _mean_figure(results: dict[str, Any]) -> plots.Figure:
    lines = [
        Line(name, results["positions"], np.asarray(entry["own"]).mean(0).tolist())
        for name, entry in results["networks"].items()
    ]
    panel = Panel(
        "From the image (0) through its perturbation (1)",
        "length along the line [perturbations]",
        "probability of the first answer",
        lines,
        mark=1.0,
        y_range=(0, 1.02),
        markers=False,
    )
    return plots.line_figure([panel])


def _example_figure(results: dict[str, Any]) -> plots.Figure:
    labels, panels = results["examples"]["labels"], []
    likely: list[set[int]] = [
        set() for _ in labels
    ]  # by image, over all networks: a class keeps its colour down a column
    for lines in results["examples"]["networks"].values():
        for classes, line in zip(likely, lines):
            classes |= {int(c) for c in np.argsort(-np.asarray(line).max(0), kind="stable")[:2]}
    for name, lines in results["examples"]["networks"].items():
        for label, line, classes in zip(labels, lines, likely):
            probabilities = np.asarray(line)
            shown = [
                Line(results["classes"][c], results["positions"], probabilities[:, c].tolist(), color=k)
                for k, c in enumerate(sorted(classes))
            ]
            title = f"{name}; image of: {results['classes'][label]}"
            panels.append(
                Panel(title, "length [perturbations]", "probability", shown, mark=1.0, y_range=(0, 1.02), markers=False)
            )
    return plots.line_figure(panels, columns=len(labels))


def _place_of_one(places: Tensor) -> int:
    return int((places - 1).abs().argmin())
