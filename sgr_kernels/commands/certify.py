"""``sgr certify``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sgr_kernels._version import __version__
from sgr_kernels.commands import common, networks
from sgr_kernels.evaluation.certificates import CertificatePlan, Certificates, Key, certificates
from sgr_kernels.evaluation.smoothing import Row
from sgr_kernels.evaluation.suite import PIXEL_LEVELS
from sgr_kernels.report.page import text_table
from sgr_kernels.report.plots import Line, Panel, line_figure, save
from sgr_kernels.training.checkpoint import checkpoint_file, write_atomically
from sgr_kernels.training.images import pixels
from sgr_kernels.training.records import difference, digest

FILE = "certificates.json"
PICTURE = "certificates.png"
_DEFAULT = CertificatePlan()
_RADII = (0.0, 0.25, 0.5, 1.0, 1.5)
_POINTS = 200


class _Interrupted(Exception):
    """An interrupt was asked for; everything counted is in the file."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="CHECKPOINT", help="trainings' folders or their checkpoint files")
    networks.add_network(parser)
    networks.add_weights(parser)
    common.add_data(parser, None)
    add("--images", type=common.whole, default=100, metavar="N", help="the first N test images")
    add(
        "--decay-lengths",
        type=common.positive,
        nargs="+",
        default=_DEFAULT.decay_lengths,
        help="of the noise, in pixels; its variance is one",
    )
    add("--sigmas", type=common.positive, nargs="+", default=_DEFAULT.sigmas, help="the noise's scales, in pixel units")
    add("--draws", type=common.whole, default=_DEFAULT.draws, help="certifying draws of noise for each image")
    add("--selection", type=common.whole, default=_DEFAULT.selection, help="draws that select each image's class")
    add("--alpha", type=common.positive, default=_DEFAULT.alpha, help="probability that a certificate is wrong")
    add("--seed", type=common.seed, default=_DEFAULT.seed, help="of the noise")
    add("--batch-size", type=common.whole, help="noisy images at once; none: 200 on a CPU, 1000 elsewhere")
    add(
        "--out",
        metavar="DIR",
        help=f"folder for {FILE} and {PICTURE}; none: beside the checkpoint or the weights of one network, "
        "./certificates of several",
    )
    add("--resume", action="store_true", help="go on with what --out holds, image by image")
    common.add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    """Certify, print tables, write JSON and a picture; 1 if interrupted."""
    device = common.device(arguments.device)
    subjects = _subjects(arguments, device)
    images = next(iter(subjects.values())).data.test.first(arguments.images)
    described = {}
    for name, subject in subjects.items():
        tensors = subject.model.state_dict().items()  # as bytes: NumPy has not all of torch's types
        weights = {
            key: sha256(t.cpu().contiguous().flatten().view(torch.uint8).numpy()).hexdigest() for key, t in tensors
        }
        described[name] = {**subject.record, "weights": digest(weights)}
    models = {name: subject.model for name, subject in subjects.items()}
    plan = CertificatePlan(
        tuple(arguments.decay_lengths),
        tuple(arguments.sigmas),
        arguments.draws,
        arguments.selection,
        arguments.alpha,
        arguments.seed,
    )
    question = {"images": len(images), "data": images.digest(), "plan": asdict(plan), "networks": described}
    path, picture = (common.writable(_place(arguments.out, subjects, name)) for name in (FILE, PICTURE))
    rows = _read(path, question, arguments.resume)
    head = {"sgr_kernels": __version__, "data_name": images.name, "question": question}
    keys = plan.keys(list(models))
    passes = len(keys) * len(images) * (plan.draws + plan.selection)
    sizes = f"images {len(images)}, networks {len(models)}, decay lengths {len(plan.decay_lengths)}"
    print(f"noisy images to classify: {passes:,} ({sizes}, sigmas {len(plan.sigmas)})", flush=True)
    with (
        common.interrupt_between_steps() as interrupted,
        tqdm(
            total=len(keys) * len(images),
            initial=sum(len(rows.get(key, [])) for key in keys),
            disable=None,
            unit="image",
            leave=False,
        ) as bar,
    ):

        def show(key: Key) -> None:
            bar.set_description(f"{key[0]}, decay length {key[1]:g}, sigma {key[2]:g}")
            bar.update()
            _write(path, {**head, "rows": _listed(rows)})
            if interrupted():
                raise _Interrupted

        values, labels = images.read(torch.arange(len(images)))
        try:
            result = certificates(
                models,
                pixels(values).to(device),
                labels.to(device),
                plan,
                chunk_size=arguments.batch_size or (200 if device.type == "cpu" else 1000),
                rows=rows,
                on_image=show,
            )
        except _Interrupted:
            tqdm.write(f"interrupted; to continue: the same command with --resume (counts in {path})")
            return 1
    _write(path, {**head, **result.to_dict(), "rows": _listed(rows)})
    save(figure(result, plan, f"{len(images)} test images of {images.name}"), picture)
    print(summary(result, plan, f"{len(images)} test images of {images.name}"))
    print(f"\nwritten: {path} and {picture}")
    return 0


def summary(result: Certificates, plan: CertificatePlan, images: str) -> str:
    """The results as tables for the terminal, one a decay length."""
    parts = [
        f"certified accuracy in % on {images}, by radius sqrt(delta^T Sigma^-1 delta); {plan.draws} draws an image, "
        f"alpha {plan.alpha:g}; means over all images, zero where the answer is wrong or missing"
    ]
    for length in plan.decay_lengths:
        shift, volume = result.shift[length], result.volume[length]
        header = ["network", "sigma", *(f"r {radius:g}" for radius in _RADII)]
        header += ["abstains", "mean radius", "shift [1/255]", "L2 by volume"]
        lines = []
        for (name, its, sigma), found in result.found.items():
            if its != length:
                continue
            shares = [f"{100 * share:.0f}" for share in found.certified_accuracy(_RADII)]
            mean = found.mean_radius
            units = [f"{mean:.3f}", f"{PIXEL_LEVELS * mean * shift:.1f}", f"{mean * volume:.3f}"]
            lines.append([name, f"{sigma:g}", *shares, f"{100 * found.abstained:.0f}", *units])
        parts.append(
            f"noise of decay length {length:g}; at radius 1: a shift of all pixels by {PIXEL_LEVELS * shift:.0f}/255, "
            f"the volume of an L2 ball of {volume:.2f}\n{text_table(header, lines)}"
        )
    return "\n\n".join(parts)


def figure(result: Certificates, plan: CertificatePlan, images: str) -> Any:
    """Certified accuracy against radius: a row of panels a decay length, a column a sigma, a line a network."""
    names = list(dict.fromkeys(name for name, _, _ in result.found))
    panels = []
    for length in plan.decay_lengths:
        for sigma in plan.sigmas:
            cells = {name: result.found[name, length, sigma] for name in names}
            end = next(iter(cells.values())).largest_radius
            radii = [1.05 * end * k / _POINTS for k in range(_POINTS + 1)]
            lines = [
                Line(name, radii, [100 * share for share in cell.certified_accuracy(radii)])
                for name, cell in cells.items()
            ]
            panels.append(
                Panel(
                    f"decay length {length:g}, sigma {sigma:g}",
                    f"radius (1: all pixels by {PIXEL_LEVELS * result.shift[length]:.0f}/255)",
                    "certified accuracy [%]",
                    lines,
                    mark=end,
                    y_range=(0, 102),
                    markers=False,
                )
            )
    title = f"Certified accuracy on {images}; dotted: the most that {plan.draws} draws can certify"
    return line_figure(panels, title, columns=len(plan.sigmas))


def _place(out: str | None, subjects: Mapping[str, networks.Trained], name: str) -> Path:
    if out is not None:
        return Path(out) / name
    (first, *others) = subjects.values()
    return Path("certificates") / name if others else first.beside(name)


def _subjects(arguments: argparse.Namespace, device: torch.device) -> dict[str, networks.Trained]:
    """The networks by name, all for the same images."""
    places: dict[str, str | None] = dict(_named(arguments.checkpoints)) or {"network": None}
    found = {}
    for name, place in places.items():
        found[name] = networks.trained(argparse.Namespace(**{**vars(arguments), "checkpoint": place}), device)
    first = next(iter(found.values())).data.test
    for name, subject in found.items():
        if subject.data.test.shape != first.shape or subject.data.test.name != first.name:
            raise ValueError(
                f"{places[name]}: expected a network for {first.name}, got one for another kind of images, "
                f"{subject.data.test.name}"
            )
        if subject.data.test.classes != first.classes:  # what the labels count
            raise ValueError(f"{places[name]}: expected a network of the first one's classes, got one of others")
    return found


def _named(paths: Sequence[str]) -> dict[str, str]:
    """Checkpoints by their folders' names, or by their paths where names are alike."""
    files = [checkpoint_file(path).resolve() for path in paths]
    if len(set(files)) < len(files):
        raise ValueError("CHECKPOINT: expected different checkpoints, got one twice")
    names = [file.parent.name for file in files]
    if len(set(names)) < len(names):
        names = list(paths)
    return dict(zip(names, paths))


def _read(path: Path, question: Mapping[str, Any], resume: bool) -> dict[Key, list[Row]]:
    """What an earlier run counted.

    Raises:
        ValueError: the file is not to be continued, answers another question, or is none of ours.
    """
    if not path.is_file():
        return {}
    if not resume:
        raise ValueError(f"{path} already holds certificates: add --resume to go on with them, or name another --out")
    try:
        record = json.loads(path.read_text())
        differs = difference(question, record["question"])
        rows = {
            (entry["network"], entry["decay_length"], entry["sigma"]): [(row[0], row[1]) for row in entry["rows"]]
            for entry in record["rows"]
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no certificates; name another --out") from error
    if differs is not None:
        raise ValueError(f"{path} holds certificates of another run ({differs}); name another --out")
    return rows


def _listed(rows: Mapping[Key, list[Row]]) -> list[dict[str, Any]]:
    return [
        {"network": name, "decay_length": length, "sigma": sigma, "rows": counted}
        for (name, length, sigma), counted in rows.items()
    ]


def _write(path: Path, record: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(record) + "\n").encode())
