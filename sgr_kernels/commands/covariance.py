"""``sgr covariance``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from torch import Tensor

from sgr_kernels.commands import common, networks
from sgr_kernels.covariance import CovarianceFunction
from sgr_kernels.evaluation.perturbations import SOURCES, image_covariance, perturbation_covariance
from sgr_kernels.evaluation.suite import PIXEL_LEVELS
from sgr_kernels.report import plots
from sgr_kernels.report.covariance import DisplacementFunction, covariance_figure
from sgr_kernels.report.page import text_table
from sgr_kernels.training.batches import Batches
from sgr_kernels.training.checkpoint import write_atomically
from sgr_kernels.training.datasets import SAMPLE, load

_DATA, _TRAINED = "data", "trained"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    networks.add_trained(parser)
    common.add_data(parser, None)
    add(
        "--source",
        nargs="+",
        choices=(_DATA, _TRAINED, *SOURCES),
        help="the centred images, what a network was trained with, or perturbations of it; none: data, and with a "
        "network trained, if it has a covariance function, and pgd",
    )
    add("--split", choices=("train", "test"), default="test", help="images to use")
    add("--images", type=common.whole, metavar="N", help="only the first N of them")
    add("--eps", type=common.positive, default=8.0, help="strength of fgsm and pgd, in grey levels (1/255)")
    add("--seed", type=common.seed, default=0, help="of PGD's random starts")
    common.add_batch_size(parser)
    add(
        "--out",
        metavar="FILE",
        help="picture; the numbers go beside it as .json; none: covariance.png beside the checkpoint or the weights, "
        "here without a network",
    )
    common.add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    """Estimate, print decay lengths, write picture and numbers."""
    has_network = networks.named(arguments)
    if not has_network and set(arguments.source or [_DATA]) != {_DATA}:
        raise ValueError(
            f"--source {' '.join(arguments.source)} needs a CHECKPOINT or a --model, whose network is perturbed"
        )
    if arguments.out is not None and Path(arguments.out).suffix != ".png":
        raise ValueError(f"--out must end in .png, got {arguments.out}")
    device = common.device(arguments.device)
    subject = networks.trained(arguments, device) if has_network else None
    beside = Path if subject is None else subject.beside
    path = common.writable(arguments.out or beside("covariance.png"))
    common.writable(path.with_suffix(".json"))
    own = None if subject is None else networks.trained_covariance(subject)
    if not isinstance(own, CovarianceFunction):
        own = None
    sources = arguments.source or [_DATA, *([_TRAINED] if own is not None else []), *(["pgd"] if has_network else [])]
    if _TRAINED in sources and own is None:
        raise ValueError("source: the network was trained without a covariance function; name another source")
    data = load(arguments.data or SAMPLE, image_size=arguments.image_size) if subject is None else subject.data
    images = (data.train if arguments.split == "train" else data.test).first(arguments.images)
    batches = Batches(images, common.batch_size(arguments.batch_size, device), device=device)
    size = images.shape[1:]

    def estimate(source: str) -> Tensor:
        if subject is None or source == _DATA:
            return image_covariance(batches)
        if source == _TRAINED:
            assert own is not None
            return own.profile()
        eps = arguments.eps / PIXEL_LEVELS
        return perturbation_covariance(subject.model, batches, source, eps=eps, seed=arguments.seed)

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
        _TRAINED: "what the network was trained with",
        "gradient": "loss gradients",
        "sign": "signs of loss gradients",
        "fgsm": f"FGSM perturbations, eps {eps:g}/255",
        "pgd": f"PGD perturbations, eps {eps:g}/255",
    }[source]
