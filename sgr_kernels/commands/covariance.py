"""``sgr covariance``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from torch import Tensor

from sgr_kernels.commands import common
from sgr_kernels.covariance import CovarianceFunction
from sgr_kernels.evaluation.perturbations import SOURCES, perturbation_covariance
from sgr_kernels.evaluation.suite import PIXEL_LEVELS
from sgr_kernels.report import plots
from sgr_kernels.report.covariance import DisplacementFunction, covariance_figure
from sgr_kernels.report.page import text_table
from sgr_kernels.training.batches import Batches
from sgr_kernels.training.checkpoint import write_atomically
from sgr_kernels.training.loop import load_model

_DATA = "data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", nargs="?", help="a trained network, for the covariance of perturbations")
    common.add_data(parser)
    add(
        "--source",
        nargs="+",
        choices=(_DATA, *SOURCES),
        help="the centred images, or perturbations of the network; none: data, and pgd with a checkpoint",
    )
    add("--split", choices=("train", "test"), default="test", help="images to use")
    add("--images", type=common.whole, metavar="N", help="only the first N of them")
    add("--eps", type=common.positive, default=8.0, help="strength of fgsm and pgd, in grey levels (1/255)")
    add("--seed", type=common.seed, default=0, help="of PGD's random starts")
    common.add_batch_size(parser)
    add("--out", metavar="FILE", default="covariance.png", help="picture; the numbers go beside it as .json")
    common.add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    """Estimate, print decay lengths, write picture and numbers."""
    sources = arguments.source or ([_DATA] if arguments.checkpoint is None else [_DATA, "pgd"])
    if arguments.checkpoint is None and sources != [_DATA]:
        raise ValueError(f"--source {' '.join(sources)} needs a CHECKPOINT, whose network is perturbed")
    if Path(arguments.out).suffix != ".png":
        raise ValueError(f"--out must end in .png, got {arguments.out}")
    path = common.writable(arguments.out)
    common.writable(path.with_suffix(".json"))
    device = common.device(arguments.device)
    model, trained_on, architecture = None, None, None
    if arguments.checkpoint is not None:
        model, state = load_model(arguments.checkpoint)
        model, trained_on, architecture = model.to(device), state["data"]["name"], state["settings"]["architecture"]
    data = common.load_for(arguments.data, trained_on, architecture)
    images = (data.train if arguments.split == "train" else data.test).first(arguments.images)
    batches = Batches(images, common.batch_size(arguments.batch_size, device), device=device)
    size = tuple(images.images.shape[2:])

    def estimate(source: str) -> Tensor:
        if model is None or source == _DATA:
            pixels = images.images.to(device).float() / PIXEL_LEVELS
            return CovarianceFunction.from_images(pixels, center=True).values
        return perturbation_covariance(model, batches, source, eps=arguments.eps / PIXEL_LEVELS, seed=arguments.seed)

    functions = []
    for source in sources:
        values = estimate(source)
        length = float(CovarianceFunction.from_values(values, size).decay_length().diagonal().mean())
        functions.append(DisplacementFunction(_title(source, arguments.eps), values.cpu().numpy(), length))
    rows = [[f.name, f"{f.variance:.3g}", f"{f.decay_length:.2f}"] for f in functions]
    print(text_table(["covariance function of", "f(0)", "decay length"], rows))
    numbers = {
        "data": images.name,
        "images": len(images),
        "functions": {source: function.to_dict() for source, function in zip(sources, functions)},
    }
    write_atomically(path.with_suffix(".json"), (json.dumps(numbers, indent=2) + "\n").encode())
    plots.save(covariance_figure(functions, f"{len(images)} images of {images.name}"), path)
    print(f"\nwritten: {path}, {path.with_suffix('.json')}")
    return 0


def _title(source: str, eps: float) -> str:
    return {
        _DATA: "the images",
        "gradient": "loss gradients",
        "sign": "signs of loss gradients",
        "fgsm": f"FGSM perturbations, eps {eps:g}/255",
        "pgd": f"PGD perturbations, eps {eps:g}/255",
    }[source]
