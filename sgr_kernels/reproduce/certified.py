"""Beyond the paper: how far around each image an answer certainly stays, under noise of short and long range."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sgr_kernels.covariance import CovarianceFunction
from sgr_kernels.evaluation.certify import Certification, certify, unit_shift, unit_volume
from sgr_kernels.evaluation.suite import PIXEL_LEVELS
from sgr_kernels.report import plots
from sgr_kernels.report.page import Page
from sgr_kernels.report.plots import Line, Panel
from sgr_kernels.reproduce import stats
from sgr_kernels.reproduce.lab import Lab
from sgr_kernels.reproduce.lrc import SEARCHED_UNDER
from sgr_kernels.reproduce.measurements import Measurement, Network

TITLE = "Beyond the paper: certificates under structured noise"
METHODS = {
    "clean": "plain",
    "gn": "gradient norm, squared",
    "sgr_sign": "SGR, covariance of signs",
    "sgr_exp": "SGR, exponential covariance",
    "lrc": "training on correlated noise",
}
ALPHA, SELECTION = 1e-3, 100
_SHOWN = (0.25, 0.5, 1.0)


def measure(lab: Lab) -> dict[str, Any]:
    """Radii of every method's networks, by decay length of the noise and its scale."""
    plan, shape = lab.scale.beyond, lab.image_shape()
    networks = lab.planned(
        [
            (lab.settings(method, seed, SEARCHED_UNDER.get(method)), method)
            for seed in range(plan.seeds)
            for method in METHODS
        ]
    )
    cells = [
        (network, length, sigma)
        for network in networks
        for length in lab.scale.decay_lengths
        for sigma in plan.certified_sigmas[: None if network.settings.seed == 0 else 1]
    ]
    found = lab.measured([certification(lab, *cell) for cell in cells], "certificates")
    certificates = [
        {
            "method": network.settings.method,
            "seed": network.settings.seed,
            "strength": network.settings.strength,
            "test_accuracy": lab.test_accuracy(network),
            "decay_length": length,
            "sigma": sigma,
            **certificate,
        }
        for (network, length, sigma), certificate in zip(cells, found, strict=True)
    ]
    units = []
    for length in lab.scale.decay_lengths:
        noise = CovarianceFunction.exponential(shape[0], shape[1:], length)
        units.append({"decay_length": length, "shift": unit_shift(noise, shape), "volume": unit_volume(noise, shape)})
    return {
        **asdict(plan),
        "alpha": ALPHA,
        "selection": SELECTION,
        "sgr_decay_length": lab.scale.decay_length,
        "units": units,
        "certificates": certificates,
    }


def certification(lab: Lab, network: Network, length: float, sigma: float) -> Measurement:
    """One network under noise of one decay length and scale."""
    plan = lab.scale.beyond
    return Measurement(
        "certified",
        f"{network.settings.method}-seed{network.settings.seed}-{length:g}-{sigma:g}",
        [network],
        partial(_certified, lab, network, length, sigma),
        [plan.certified_images, plan.certified_draws, ALPHA, SELECTION, length, sigma],
    )


def _certified(lab: Lab, network: Network, length: float, sigma: float) -> dict[str, Any]:
    images, labels = lab.pixels(lab.scale.beyond.certified_images)
    channels, *size = images.shape[1:]
    found: Certification = certify(
        network.model,
        images,
        labels,
        covariance=CovarianceFunction.exponential(channels, tuple(size), length).to(lab.device),
        sigma=sigma,
        draws=lab.scale.beyond.certified_draws,
        selection=SELECTION,
        alpha=ALPHA,
        chunk_size=200 if lab.device.type == "cpu" else 1000,
    )
    right = found.predictions == labels.cpu()
    return {
        "abstained": found.abstained,
        "largest_radius": found.largest_radius,
        "radii": [round(radius, 6) for radius in torch.where(right, found.radii, 0.0).tolist()],
    }


def mean_radius(runs: list[dict[str, Any]]) -> stats.Estimate:
    """Over seeds and images; zero where the answer is wrong or missing."""
    return stats.estimate(np.array([run["radii"] for run in runs]))


def show(results: dict[str, Any], folder: Path) -> None:
    """The page and its figure."""
    main, *others = results["certified_sigmas"]
    lengths = [unit["decay_length"] for unit in results["units"]]
    page = Page(f"{TITLE}: {results['title']}")
    page.text(
        "The smoothed classifier answers the class that a network gives most often to `x + sigma e`, "
        "`e ~ N(0, Sigma)`. Where that class has a probability of at least p > 1/2, the answer is certainly the same "
        "for every perturbation `delta` with `sqrt(delta^T Sigma^-1 delta)` below `sigma Phi^-1(p)`, its certified "
        "radius (Cohen, Rosenfeld and Kolter 2019, after a change of variables). No attack enters: what is certified "
        "holds against all. With noise of long range the certified ellipsoid is long along structured perturbations: "
        "a shift of all pixels, a shadow, a gradient of light."
    )
    page.text(
        f"The first {results['certified_images']:,} test images, {results['certified_draws']:,} draws each (at most "
        f"a radius of {_largest(results):.2f} for sigma {main:g}), alpha {results['alpha']:g}, the probability with "
        "which an image's certificate may be wrong. Sigma is `exp(-r / decay length)`, of variance 1 in pixel units. "
        "The mean radius counts zero where the answer is wrong "
        "or missing; ± is half a 95 % interval, from the images and, with several seeds, from the seeds. SGR's "
        f"exponential covariance and the noise that training on correlated noise uses have decay length "
        f"{results['sgr_decay_length']:g}; the strengths of the gradient norm and of that covariance were searched for "
        "under such noise, that of signs under PGD ([how](search.md))."
    )
    page.text(
        "Certified accuracy in %: the share of images answered rightly, certainly up to that radius. Over gradient "
        "norm: difference of the mean radii, image by image. A network that gives one answer to all such noise "
        "certifies the images of that class up to the largest radius, and no others."
    )
    for unit in results["units"]:
        length = unit["decay_length"]
        page.heading(f"Noise of decay length {length:g}, sigma {main:g}")
        page.text(
            f"A radius of 1 is a shift of all pixels at once by {PIXEL_LEVELS * unit['shift']:.0f} of 255; the "
            f"ellipsoid of radius 1 has the volume of an L2 ball of radius {unit['volume']:.3f}."
        )
        header = ["training", "test", *(f"certified at {radius:g}" for radius in _SHOWN)]
        header += ["mean radius", "as a shift [1/255]", "over gradient norm"]
        page.table(header, [_row(results, method, length, main, unit["shift"]) for method in METHODS])
    if others:
        page.heading("Other scales of the noise")
        page.text("Mean radius of the first seed, by decay length and sigma:")
        cells = [(length, sigma) for length in lengths for sigma in sorted([main, *others])]
        page.table(
            ["training", *(f"{length:g}, {sigma:g}" for length, sigma in cells)],
            [
                [title, *(f"{mean_radius(_runs(results, name, *cell)[:1]).mean:.3f}" for cell in cells)]
                for name, title in METHODS.items()
            ],
        )
    plots.save(_figure(results, lengths, main), folder / "certified.png")
    page.figure("certified.png", "Certified accuracy against radius, by decay length of the noise. Means over seeds.")
    page.write(folder / "certified.md")


def _runs(results: dict[str, Any], method: str, length: float, sigma: float) -> list[dict[str, Any]]:
    wanted = (method, length, sigma)
    return [run for run in results["certificates"] if (run["method"], run["decay_length"], run["sigma"]) == wanted]


def _largest(results: dict[str, Any]) -> float:
    main = results["certified_sigmas"][0]
    return max(run["largest_radius"] for run in results["certificates"] if run["sigma"] == main)


def _row(results: dict[str, Any], method: str, length: float, sigma: float, shift: float) -> list[str]:
    runs, gn = _runs(results, method, length, sigma), _runs(results, "gn", length, sigma)
    radii = np.array([run["radii"] for run in runs])
    test = 100 * sum(run["test_accuracy"] for run in runs) / len(runs)
    found = mean_radius(runs)
    over = stats.estimate(radii - np.array([run["radii"] for run in gn]))
    return [
        METHODS[method],
        f"{test:.1f}",
        *(f"{100 * float((radii > radius).mean()):.0f}" for radius in _SHOWN),
        f"{found.mean:.3f} ± {found.half:.3f}",
        f"{PIXEL_LEVELS * shift * found.mean:.1f}",
        "" if method == "gn" else f"{over.mean:+.3f} ± {over.half:.3f}",
    ]


def _figure(results: dict[str, Any], lengths: list[float], sigma: float) -> plots.Figure:
    grid = np.linspace(0, 1.05 * _largest(results), 200)
    panels = []
    for length in lengths:
        lines = []
        for method, title in METHODS.items():
            radii = np.array([run["radii"] for run in _runs(results, method, length, sigma)])
            lines.append(Line(title, list(grid), [float((radii > radius).mean()) for radius in grid]))
        panels.append(
            Panel(
                f"noise of decay length {length:g}",
                "certified radius",
                "certified accuracy",
                lines,
                mark=_largest(results),
                y_range=(0, 1.02),
                markers=False,
            )
        )
    return plots.line_figure(
        panels, f"Certified accuracy, sigma {sigma:g}; dotted: the most that so few draws can show"
    )
