"""Long-range correlated noise: accuracy against decay length and strength, the data set's covariance, GN as a limit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from sgr_kernels.attacks import correlated_noise
from sgr_kernels.attacks.noise import mean_variance
from sgr_kernels.covariance import CovarianceFunction
from sgr_kernels.evaluation.curves import robustness_curve
from sgr_kernels.report import plots
from sgr_kernels.report.page import Page
from sgr_kernels.report.plots import Line, Panel
from sgr_kernels.reproduce import paper, pictures, stats
from sgr_kernels.reproduce.lab import Lab
from sgr_kernels.reproduce.measurements import Measurement, Network
from sgr_kernels.reproduce.scales import NOISE_METHODS
from sgr_kernels.training.search import Attack

TITLE = "Long-range correlated noise"
DATA = "data set"
SHOWN = ("clean", "gn", "sgr_exp")
# GN and SGR are compared at strengths found under this very attack, by the same rule.
SEARCHED_UNDER: dict[str, Attack] = {"gn": "noise", "sgr_exp": "noise"}


def measure(lab: Lab) -> dict[str, Any]:
    """All decay lengths, strengths and seeds; then GN as the limit of SGR."""
    networks = lab.networks([m for m in NOISE_METHODS if m in lab.scale.methods], SEARCHED_UNDER)
    noises = {f"{length:g}": length for length in lab.scale.decay_lengths}
    pairs = [(n, name) for n in networks for name in (*noises, DATA) if name != DATA or n.settings.seed == 0]
    wanted = [
        Measurement(
            "lrc",
            f"{n.settings.method}-seed{n.settings.seed}-{name.replace(' ', '-')}",
            [n],
            partial(under_noise, lab, n, noises.get(name), lab.scale.noise_eps),
        )
        for n, name in pairs
    ]
    rows: dict[str, list[dict[str, Any]]] = {}
    wanted += [lab.accuracy(network) for network in networks]
    found = zip(pairs, lab.measured(wanted, "correlated noise"))  # and then the accuracies
    for network, named in groupby(found, key=lambda item: item[0][0]):
        row = {"test_accuracy": lab.test_accuracy(network), "strength": network.settings.strength}
        rows.setdefault(network.settings.method, []).append(
            {**row, "curves": {name: curve for (_, name), curve in named}}
        )
    shown = [n for n in networks if n.settings.seed == 0 and n.settings.method in SHOWN]
    return {
        "images": lab.scale.noise_images,
        "draws": lab.scale.draws,
        "decay_lengths": list(lab.scale.decay_lengths),
        "eps": list(lab.scale.noise_eps),
        "sgr_decay_length": lab.scale.decay_length,
        "methods": rows,
        "limit": limit(lab),
        "samples": lab.cached("lrc", "samples", shown, partial(samples, lab, shown)),
    }


def covariance(lab: Lab, length: float | None) -> CovarianceFunction:
    """The exponential with a decay length, or for None that of the training images."""
    channels, height, width = lab.image_shape()
    if length is None:
        return CovarianceFunction.from_images(lab.data.train.images).to(lab.device)
    return CovarianceFunction.exponential(channels, (height, width), length).to(lab.device)


def under_noise(lab: Lab, network: Network, length: float | None, eps: Sequence[float]) -> dict[str, Any]:
    """Accuracy under the worst of the draws. Not clipped to [0, 1]: that would change the noise's covariance."""
    batches = lab.batches(lab.scale.noise_images)
    attack = partial(
        correlated_noise,
        covariance=covariance(lab, length),
        draws=lab.scale.draws,
        clip=False,
        chunk_size=2 * batches.batch_size,
    )
    generator = torch.Generator().manual_seed(0)
    return stats.record(robustness_curve(network.model, batches, attack, list(eps), generator))


def limit(lab: Lab) -> dict[str, Any]:
    """SGR with shorter and shorter covariances, at GN's strength, beside GN."""
    gn = lab.method("gn", attack="noise")
    eps = [max(lab.scale.noise_eps)]
    strength, wanted = gn.settings.strength, {}
    for length in lab.scale.limit_lengths:
        wanted[f"{length:g}"] = lab.settings("sgr_exp", decay_length=length, strength=strength)
    shorter = lab.planned([(settings, f"sgr_exp, decay length {length}") for length, settings in wanted.items()])
    networks = {"gn": gn, **dict(zip(wanted, shorter, strict=True))}
    cells = [(name, length) for name in networks for length in lab.scale.decay_lengths]
    measurements = [
        Measurement(
            "lrc",
            f"limit-{name}-{length:g}",
            [networks[name]],
            partial(under_noise, lab, networks[name], length, eps),
        )
        for name, length in cells
    ]
    found: dict[str, Any] = {}
    for (name, length), curve in zip(cells, lab.measured(measurements, "the limit of SGR"), strict=True):
        found.setdefault(name, {})[f"{length:g}"] = curve
    return {"eps": eps[0], "strength": gn.settings.strength, "networks": found}


def samples(lab: Lab, networks: Sequence[Network]) -> dict[str, Any]:
    """The first image of each class with one draw of noise, and the networks' answers."""
    images, labels = lab.pixels(lab.scale.noise_images)
    chosen = pictures.one_of_each_class(labels)
    images, labels = images[chosen], labels[chosen]
    shown = {network.settings.method: network.model for network in networks}
    eps = max(lab.scale.noise_eps)
    deviation = images.std((1, 2, 3), correction=0, keepdim=True)
    rows = [pictures.row("no noise", images, shown)]
    kinds: dict[str, float | None] = {f"decay length\n{length:g}": length for length in lab.scale.decay_lengths}
    for name, length in [*kinds.items(), ("covariance of\nthe data set", None)]:
        noise = covariance(lab, length)
        drawn = noise.sample(len(images), torch.Generator(device=lab.device).manual_seed(1))
        scale = mean_variance(noise, images.shape[1:], lab.device) ** 0.5
        rows.append(pictures.row(name, images + eps * deviation * drawn / scale, shown))
    return {"eps": eps, "labels": labels.tolist(), "classes": list(lab.data.test.classes), "rows": rows}


def show(results: dict[str, Any], folder: Path) -> None:
    """The page and its figures."""
    found, lengths, eps = results["methods"], results["decay_lengths"], results["eps"]
    page = Page(f"{TITLE}: {results['title']}")
    strengths = ", ".join(f"{name} {runs[0]['strength']:g}" for name, runs in found.items() if runs[0]["strength"])
    page.text(
        f"Accuracy in % on the first {results['images']:,} test images, each under the worst of {results['draws']} "
        "draws from N(0, Sigma), Sigma = exp(-r / decay length) within a channel and half of that between channels, "
        "r not rounded; eps in units of the image's own standard deviation, noisy images not clipped. ± is half a "
        "95 % interval, from the images and, with several seeds, from the seeds. SGR's own covariance (`sgr_exp`) and "
        f"the noise that `lrc` trains with have decay length {results['sgr_decay_length']:g}. Strengths: {strengths}; "
        "those of gn and sgr_exp were searched for under this attack, by the same rule; that of sgr_sign under PGD."
    )
    if any(len(runs) > 1 for runs in found.values()):
        page.text("Noise with the data set's covariance: the first seed alone.")
    for place, level in enumerate(eps):
        page.heading(f"eps {level:g}")
        header = ["method", "seeds", "test", *(f"decay length {length:g}" for length in lengths), DATA]
        page.table(header, [_row(name, runs, lengths, place) for name, runs in found.items()])
    page.heading("Against the decay length")
    plots.save(_lengths_figure(results), folder / "lrc-decay-length.png")
    page.figure(
        "lrc-decay-length.png",
        "Accuracy against the decay length of the noise. Bars: 95 % intervals, from the images and, with several "
        "seeds, from the seeds.",
    )
    if len(eps) > 1:
        plots.save(_eps_figure(results), folder / "lrc-eps.png")
        page.figure("lrc-eps.png", "Accuracy against the strength of the noise, for several covariances.")
    printed = paper.DATA_COVARIANCE[results["dataset"]]
    if printed and paper.MAIN_NOISE_EPS in eps:
        page.heading(f"The data set's covariance at eps {paper.MAIN_NOISE_EPS:g}, beside the paper")
        place = eps.index(paper.MAIN_NOISE_EPS)
        page.table(
            ["method", "ours", "paper"],
            [
                [name, stats.mean([found[name][0]["curves"][DATA]], place).percent(), f"{value:.1f}"]
                for name, value in printed.items()
                if name in found
            ],
        )
    page.heading("SGR with a shorter and shorter covariance")
    plots.save(_limit_figure(results), folder / "lrc-limit.png")
    page.figure(
        "lrc-limit.png",
        "SGR approaches GN as its covariance approaches the identity. Each line is a network trained with SGR and an "
        f"exponential covariance of that decay length, or with GN; all at strength {results['limit']['strength']:g}, "
        f"one seed, under noise of eps {results['limit']['eps']:g}.",
    )
    title = f"One draw of noise at eps {results['samples']['eps']:g}"
    plots.save(pictures.grid(results["samples"], title), folder / "lrc-samples.png")
    page.figure(
        "lrc-samples.png",
        "Noisy images, the first of each class, one draw each, from their darkest to their brightest pixel; below "
        "them the networks' answers. A single draw is far weaker than the worst of many.",
    )
    page.write(folder / "lrc.md")


def _row(name: str, runs: list[dict[str, Any]], lengths: list[float], place: int) -> list[str]:
    test = 100 * sum(run["test_accuracy"] for run in runs) / len(runs)
    cells = [stats.mean([run["curves"][f"{length:g}"] for run in runs], place).percent() for length in lengths]
    return [name, str(len(runs)), f"{test:.1f}", *cells, stats.mean([runs[0]["curves"][DATA]], place).percent()]


def _line(name: str, x: Sequence[float], estimates: Sequence[stats.Estimate], dashed: bool = False) -> Line:
    return Line(
        name, x, [e.mean for e in estimates], [e.low for e in estimates], [e.high for e in estimates], dashed=dashed
    )


def _lengths_figure(results: dict[str, Any]) -> plots.Figure:
    found, lengths = results["methods"], results["decay_lengths"]
    panels = []
    # The main strength and the two largest: small ones break nothing.
    shown = sorted({results["eps"][0], *sorted(results["eps"])[-2:]})
    for level in shown:
        place = results["eps"].index(level)
        lines = [
            _line(name, lengths, [stats.mean([r["curves"][f"{z:g}"] for r in runs], place) for z in lengths])
            for name, runs in found.items()
        ]
        panels.append(_panel(f"eps {level:g}", "decay length of the noise [pixels]", lines, lengths))
    return plots.line_figure(panels, f"Accuracy under correlated noise, worst of {results['draws']} draws")


def _eps_figure(results: dict[str, Any]) -> plots.Figure:
    found, lengths = results["methods"], results["decay_lengths"]
    order = sorted(range(len(results["eps"])), key=lambda k: results["eps"][k])
    eps = [results["eps"][k] for k in order]
    chosen = [f"{length:g}" for length in (lengths[0], lengths[-1])]
    panels = []
    for name in (*chosen, DATA):
        lines = []
        for method, runs in found.items():
            curves = [run["curves"][name] for run in runs if name in run["curves"]]
            lines.append(_line(method, eps, [stats.mean(curves, k) for k in order]))
        title = "covariance of the data set" if name == DATA else f"decay length {name}"
        panels.append(_panel(title, "eps [standard deviations of the image]", lines, None))
    return plots.line_figure(panels, f"Accuracy under correlated noise, worst of {results['draws']} draws")


def _limit_figure(results: dict[str, Any]) -> plots.Figure:
    lengths = results["decay_lengths"]
    lines = []
    for name, curves in results["limit"]["networks"].items():
        title = "GN" if name == "gn" else f"SGR, decay length {name}"
        estimates = [stats.mean([curves[f"{length:g}"]], 0) for length in lengths]
        lines.append(_line(title, lengths, estimates, dashed=name == "gn"))
    panel = _panel(f"eps {results['limit']['eps']:g}", "decay length of the noise [pixels]", lines, lengths)
    return plots.line_figure([panel])


def _panel(title: str, x_label: str, lines: list[Line], ticks: Sequence[float] | None) -> Panel:
    low = min(min(line.low or line.y) for line in lines)
    # The whole range would hide differences of a few points.
    bottom = 0.0 if low < 0.5 else 0.1 * int(10 * low)
    return Panel(title, x_label, "accuracy", lines, y_range=(bottom, 1.01), x_ticks=ticks)
