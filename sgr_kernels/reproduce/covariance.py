"""Covariances of adversarial perturbations: matrices, functions, decay lengths; Eq. 12; the full matrix's worth."""

from __future__ import annotations

import base64
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgr_kernels.attacks import deepfool, fgsm, pgd
from sgr_kernels.covariance import CovarianceFunction
from sgr_kernels.evaluation.curves import robustness_curve
from sgr_kernels.evaluation.perturbations import perturbations
from sgr_kernels.evaluation.suite import PIXEL_LEVELS
from sgr_kernels.functional import displacement_covariance
from sgr_kernels.report import plots
from sgr_kernels.report.covariance import DisplacementFunction, covariance_figure, single_channel_panel
from sgr_kernels.report.maps import matrix_figure
from sgr_kernels.report.page import Page
from sgr_kernels.reproduce import stats
from sgr_kernels.reproduce.lab import Lab
from sgr_kernels.reproduce.measurements import Measurement, Network

TITLE = "Covariance of perturbations"
SOURCES = {"pgd": "PGD", "fgsm": "FGSM", "deepfool": "DeepFool"}
CLIPPED = "pgd_clipped"
DATA = "data"
VARIANTS = {"full": "full matrix (Eq. 15)", "eq12": "mean correction (Eq. 12)"}
# Middle of the image that the pictured matrices show, by channels: the paper trims them too.
_WINDOW = {1: 14, 3: 10}


def measure(lab: Lab) -> dict[str, Any]:
    """Covariances of a clean network's perturbations and of the data, and two variants of SGR."""
    clean, sgr = lab.method("clean"), lab.method("sgr_sign")
    climb = partial(pgd, eps=eps(lab), steps=lab.scale.pgd_steps)
    attacks: dict[str, Callable[..., Tensor]] = {
        "pgd": partial(climb, bounds=None),
        "fgsm": partial(fgsm, eps=eps(lab), bounds=None),
        "deepfool": partial(deepfool, bounds=None),
        CLIPPED: climb,
    }
    wanted = [
        Measurement("covariance", name, [clean], partial(of_perturbations, lab, clean, attack))
        for name, attack in attacks.items()
    ]
    wanted.append(Measurement("covariance", DATA, [], partial(of_data, lab)))
    corrected = {"clean": clean, "sgr_sign": sgr}
    wanted += [
        Measurement("covariance", f"eq12-{name}", [network], partial(mean_correction, lab, network))
        for name, network in corrected.items()
    ]
    found = dict(zip([*attacks, DATA, *corrected], lab.measured(wanted, "covariances"), strict=True))
    correction = {name: found.pop(name) for name in corrected}
    return {
        "images": lab.scale.covariance_images,
        "attack_images": lab.scale.attack_images,
        "eps": lab.scale.covariance_eps,
        "pgd_steps": lab.scale.pgd_steps,
        "covariances": found,
        "mean_correction": correction,
        "variants": variants(lab, sgr),
    }


def eps(lab: Lab) -> float:
    """Strength of the perturbations, in pixel units."""
    return lab.scale.covariance_eps / PIXEL_LEVELS


def of_perturbations(lab: Lab, network: Network, attack: Callable[..., Tensor]) -> dict[str, Any]:
    """Second moments of an attack's perturbations of the test images, not centred."""
    batches = lab.batches(lab.scale.covariance_images)
    return second_moments([attack(network.model, images) - images for images, _ in batches])


def of_data(lab: Lab) -> dict[str, Any]:
    """Second moments of the test images about their mean."""
    images, _ = lab.pixels(lab.scale.covariance_images)
    return second_moments(list((images - images.mean(0)).split(100)))


def second_moments(batches: list[Tensor]) -> dict[str, Any]:
    """Covariance function, decay length, middle of the full matrix, and how large the squared mean is.

    The squared norm of the mean of n samples exceeds, on average, that of the true mean by a share 1/n of the second
    moment; the unbiased estimate takes that away (it may come out below zero).
    """
    count = sum(len(part) for part in batches)
    height, width = batches[0].shape[2:]
    values = sum(displacement_covariance(part).double() * (len(part) / count) for part in batches)
    assert isinstance(values, Tensor)
    function = CovarianceFunction.from_values(values.float().cpu(), (height, width))
    every = torch.cat(batches).double()
    energy = float(every.square().sum((1, 2, 3)).mean())
    squared_mean = float(every.mean(0).square().sum())
    unbiased = (count * squared_mean - energy) / max(1, count - 1)
    side = min(_WINDOW.get(every.shape[1], 10), height, width)
    top, left = (height - side) // 2, (width - side) // 2
    middle = every[:, :, top : top + side, left : left + side].flatten(1)
    matrix = (middle.mT @ middle / count).cpu().numpy()
    scale = float(np.abs(matrix).max()) or 1.0
    return {
        "values": values.cpu().tolist(),
        "decay_length": _finite(float(function.decay_length().diagonal().mean())),
        "second_moment": energy,
        "mean_share": unbiased / energy if energy else 0.0,
        "matrix": {"scale": scale, "side": side, "size": len(matrix), "levels": _packed(matrix / scale)},
    }


def mean_correction(lab: Lab, network: Network) -> dict[str, Any]:
    """The penalty (Eq. 11) and the term that Eq. 12 takes from it, for two sources of perturbations.

    The mean perturbation comes from one half of the images, the gradients from the other.
    """
    images, labels = lab.pixels(lab.scale.covariance_images)
    half = len(images) // 2
    model, variance = network.model, lab.data.train.pixel_variance()
    generator = torch.Generator().manual_seed(0)
    gradient = -perturbations(model, images[half:], labels[half:], "gradient", eps=0.0, generator=generator)
    found = {}
    for source in ("sign", "pgd"):
        first = images[:half]
        if source == "pgd":
            xi = pgd(model, first, eps=eps(lab), steps=lab.scale.pgd_steps, bounds=None, generator=generator) - first
        else:
            xi = perturbations(model, first, labels[:half], source, eps=0.0, generator=generator)
        values = displacement_covariance(xi)
        function = CovarianceFunction.from_values(values, tuple(images.shape[2:]), target_variance=variance)
        mu = xi.mean(0) * (variance / values[:, :, 0].diagonal().mean()).sqrt()
        omega = 0.5 * float(function.quadratic_form(gradient).double().mean())
        corrections = (gradient * mu).sum((1, 2, 3)).double()
        found[source] = {
            "penalty": omega,
            "correction": float(corrections.mean()),
            "share": float(corrections.mean()) / omega if omega else 0.0,
            "error": float(corrections.std(correction=0)) / max(1, len(corrections) - 1) ** 0.5 / (omega or 1.0),
        }
    return found


def variants(lab: Lab, sgr: Network) -> dict[str, Any]:
    """SGR with the signs' full matrix, and with Eq. 12, beside plain SGR: accuracy and PGD."""
    strength = sgr.settings.strength
    networks = {"function": sgr}
    if lab.scale.full_covariance:
        changed = lab.settings("sgr_sign", covariance="full", strength=strength)
        networks["full"] = lab.network(changed, "sgr_sign, full covariance")
    if lab.scale.mean_correction_network:
        changed = lab.settings("sgr_sign", mean_correction=True, strength=strength)
        networks["eq12"] = lab.network(changed, "sgr_sign, mean correction")
    if len(networks) == 1:
        return {}
    wanted = [
        Measurement("covariance", f"pgd-{name}", [n], partial(_under_pgd, lab, n)) for name, n in networks.items()
    ]
    wanted += [lab.accuracy(network) for network in networks.values()]
    found = zip(networks.items(), lab.measured(wanted, "variants of SGR"))  # and then the accuracies
    return {name: {"test_accuracy": lab.test_accuracy(network), "pgd": curve} for (name, network), curve in found}


def _under_pgd(lab: Lab, network: Network) -> dict[str, Any]:
    levels = [level / PIXEL_LEVELS for level in lab.scale.eps]
    attack = partial(pgd, steps=lab.scale.pgd_steps, early_stop=True)
    generator = torch.Generator().manual_seed(0)
    curve = robustness_curve(network.model, lab.batches(lab.scale.attack_images), attack, levels, generator)
    return stats.record(curve, PIXEL_LEVELS)


def show(results: dict[str, Any], folder: Path) -> None:
    """The page and its figures."""
    found = results["covariances"]
    names = {**{k: f"{v} perturbations" for k, v in SOURCES.items()}, DATA: "the images"}
    names[CLIPPED] = "PGD perturbations, clipped"
    page = Page(f"{TITLE}: {results['title']}")
    page.text(
        f"Perturbations of the clean network on the first {results['images']:,} test images: PGD and FGSM at eps "
        f"{results['eps']:g}/255, PGD with {results['pgd_steps']} steps; not clipped to the pixels' range, as SGR "
        "estimates them (clipped, a black ground allows one sign alone, which gives them a mean). Second moments, not "
        "centred; the images' "
        "are about their mean. The decay length is the displacement at which the covariance function has fallen to "
        "1/e of its value at zero, mean over the channels. Squared mean: squared norm of the mean perturbation over "
        "the mean squared norm, free of the bias of a finite sample (which can make it negative)."
    )
    page.table(
        ["covariance of", "decay length [pixels]", "squared mean / second moment"],
        [
            [names[name], _length(entry), "–" if name == DATA else f"{entry['mean_share']:.1e}"]
            for name, entry in found.items()
        ],
    )
    plots.save(_matrices(found), folder / "covariance-matrices.png")
    page.figure(
        "covariance-matrices.png",
        "Second-moment matrices of the pixels in the middle of the image, row by row (channel by channel), each "
        "divided by its largest entry. Narrow bands about the diagonals: short range.",
    )
    functions = [
        DisplacementFunction(names[name], np.asarray(entry["values"]), _number(entry["decay_length"]))
        for name, entry in found.items()
    ]
    if functions[0].values.shape[0] == 1:
        panel = single_channel_panel("Covariance functions", functions, until=20, markers=True)
        plots.save(plots.line_figure([panel]), folder / "covariance-functions.png")
    else:
        plots.save(covariance_figure(functions, "Covariance functions"), folder / "covariance-functions.png")
    page.figure(
        "covariance-functions.png",
        "Covariance of two pixels against their distance, divided by the variance of one. Dotted verticals: decay "
        "lengths.",
    )
    page.heading("What the mean correction (Eq. 12) changes")
    rows = []
    for network, sources in results["mean_correction"].items():
        for source, entry in sources.items():
            rows.append(
                [
                    f"{network}, {source}",
                    f"{entry['penalty']:.3g}",
                    f"{entry['correction']:.2g}",
                    f"{entry['share']:+.1%} ± {stats.Z95 * entry['error']:.1%}",
                ]
            )
    page.table(["network, perturbations", "penalty (Eq. 11)", "term of Eq. 12", "share"], rows)
    page.text("Penalties at the data's own variance and strength 1; mean and gradients from different images.")
    if results["variants"]:
        page.heading("Variants of SGR, trained")
        page.table(
            ["SGR (signs)", "test", "PGD", "PGD, minus the first row's"],
            [_variant_row(results["variants"], name) for name in results["variants"]],
        )
        page.text(f"One seed each, on {results['attack_images']:,} images; ± is half a 95 % interval from the images.")
    page.write(folder / "covariance.md")


def _variant_row(found: dict[str, Any], name: str) -> list[str]:
    entry = found[name]
    against = stats.difference([entry["pgd"]], [found["function"]["pgd"]])
    title = VARIANTS.get(name, "covariance function (Eq. 16)")
    shown = "–" if name == "function" else against.points()
    return [title, f"{100 * entry['test_accuracy']:.1f}", stats.mean([entry["pgd"]]).percent(), shown]


def _matrices(found: dict[str, Any]) -> plots.Figure:
    names = {**SOURCES, CLIPPED: "PGD, clipped", DATA: "the images"}
    side = next(iter(found.values()))["matrix"]["side"]
    matrices = [(names[name], _unpacked(entry["matrix"])) for name, entry in found.items()]
    return matrix_figure(matrices, "Second moments", f"the middle {side} x {side} pixels")


def _packed(matrix: np.ndarray) -> str:
    """Entries in [-1, 1], in steps of 1/127, as base64."""
    return base64.b64encode(np.rint(127 * matrix).astype(np.int8).tobytes()).decode()


def _unpacked(record: dict[str, Any]) -> np.ndarray:
    levels = np.frombuffer(base64.b64decode(record["levels"]), np.int8)
    return levels.reshape(record["size"], record["size"]) / 127


def _length(entry: dict[str, Any]) -> str:
    return "never" if entry["decay_length"] is None else f"{entry['decay_length']:.2f}"


def _number(value: float | None) -> float:
    return float("inf") if value is None else value


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
