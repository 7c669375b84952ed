"""``sgr diagnose``."""

from __future__ import annotations

import argparse
import json

from torch import Tensor
from tqdm import tqdm

from sgr_kernels._version import __version__
from sgr_kernels.attacks.inputs import seeded
from sgr_kernels.commands import common, networks
from sgr_kernels.covariance import CovarianceFunction
from sgr_kernels.evaluation.diagnose import STRENGTHS, SampledCovariance, diagnose
from sgr_kernels.evaluation.perturbations import SOURCES, perturbation_covariance
from sgr_kernels.evaluation.suite import PIXEL_LEVELS
from sgr_kernels.training.batches import Batches
from sgr_kernels.training.checkpoint import write_atomically
from sgr_kernels.training.methods import EXPONENTIAL

_TRAINED = "trained"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    networks.add_trained(parser)
    common.add_data(parser, None)
    add = parser.add_argument
    add(
        "--source",
        choices=(_TRAINED, EXPONENTIAL, *SOURCES),
        help="of the covariance: the one that the checkpoint was trained with, an exponential one, or that of "
        "perturbations of the network; none: trained if there is one, else exponential",
    )
    add("--covariance-of", metavar="CHECKPOINT", help="another training, whose covariance is taken (source: trained)")
    add("--decay-length", type=common.positive, default=8.0, help="of the exponential covariance, in pixels")
    add("--eps", type=common.positive, default=8.0, help="strength of fgsm and pgd, in grey levels (1/255)")
    add("--strengths", type=common.positive, nargs="+", default=STRENGTHS, help="of the penalty, to try")
    add("--draws", type=common.whole, default=32, help="draws of noise for each image")
    add("--images", type=common.whole, metavar="N", help="only the first N test images")
    add("--seed", type=common.seed, default=0, help="of noise and of PGD's random starts")
    common.add_batch_size(parser)
    add("--out", metavar="FILE", help="JSON file; none: diagnosis.json beside the checkpoint or the weights")
    common.add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    """Diagnose, print the table, write JSON."""
    device = common.device(arguments.device)
    subject = networks.trained(arguments, device)
    path = common.writable(arguments.out or subject.beside("diagnosis.json"))
    if arguments.covariance_of is not None and arguments.source not in (None, _TRAINED):
        raise ValueError(f"covariance_of: names the covariance, and so does --source {arguments.source}")
    own, whose = networks.trained_covariance(subject), "it"
    if arguments.covariance_of is not None:
        own, whose = networks.covariance_of(arguments.covariance_of, subject.data), arguments.covariance_of
    source = arguments.source or (EXPONENTIAL if own is None else _TRAINED)
    if source == _TRAINED and own is None:
        raise ValueError("source: the network was trained without a covariance; name another source")
    images = subject.data.test.first(arguments.images)
    batches = Batches(images, common.batch_size(arguments.batch_size, device), device=device)
    covariance: SampledCovariance
    if source == _TRAINED:
        assert own is not None
        covariance, what = own.to(device), f"the covariance {whose} was trained with"
    else:
        values, what = _named(subject, source, batches, arguments)
        size, variance = images.shape[1:], subject.data.train.pixel_variance()
        covariance = CovarianceFunction.from_values(values, size, target_variance=variance).to(device)
    tried = len(images) * len(arguments.strengths) * arguments.draws
    sizes = f"images {len(images)}, strengths {len(arguments.strengths)}, draws {arguments.draws}"
    print(f"noisy images to classify: {tried:,} ({sizes})", flush=True)
    found = diagnose(
        subject.model,
        tqdm(batches, disable=None, unit="batch", leave=False),
        covariance,
        strengths=arguments.strengths,
        draws=arguments.draws,
        generator=seeded(arguments.seed),
    )
    print(f"{len(images)} test images of {images.name}, {what}, at the data's own variance\n\n{found}")
    record = {"sgr_kernels": __version__, "data": images.name, **subject.record, "source": source}
    record.update(covariance_of=arguments.covariance_of, **found.to_dict())
    write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())
    print(f"\nwritten: {path}")
    return 0


def _named(
    subject: networks.Trained, source: str, batches: Batches, arguments: argparse.Namespace
) -> tuple[Tensor, str]:
    """Values of the covariance function that a source names, and what it is."""
    if source == EXPONENTIAL:
        channels, *size = subject.data.test.shape
        length = arguments.decay_length
        exponential = CovarianceFunction.exponential(channels, (size[0], size[1]), length)
        return exponential.values, f"an exponential covariance, decay length {length:g}"
    eps = arguments.eps / PIXEL_LEVELS
    values = perturbation_covariance(subject.model, batches, source, eps=eps, seed=arguments.seed)
    return values, f"the covariance of perturbations by {source}"
