"""What several commands share of networks: the options that name one, and the trained network that they look at."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sgr_kernels.covariance import Covariance
from sgr_kernels.models import ARCHITECTURES
from sgr_kernels.training import checkpoint
from sgr_kernels.training.datasets import FOLDER, SAMPLE, load
from sgr_kernels.training.images import DataSet
from sgr_kernels.training.matching import matched
from sgr_kernels.training.methods import build_criterion
from sgr_kernels.training.network import Source, classes_of, located, remember
from sgr_kernels.training.state import settings_of
from sgr_kernels.training.trained import model_of
from sgr_kernels.training.weights import load_weights


def add_network(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a network of one's own."""
    add = parser.add_argument
    add(
        "--model",
        metavar="MODULE:CALLABLE|FILE.py:CALLABLE",
        help="runs this code, which returns a network of your own, an nn.Module from images in [0, 1] to logits; "
        "none: the paper's, or the checkpoint's",
    )
    add("--model-args", type=json_object, metavar="JSON", help="the callable's keyword arguments, as a JSON object")
    add(
        "--normalize",
        type=numbers,
        nargs=2,
        metavar=("MEAN", "STD"),
        help="make (x - MEAN) / STD the network's first layer; each a number, or one for each channel: 0.48,0.46,0.41",
    )


def add_trained(parser: argparse.ArgumentParser) -> None:
    """Add CHECKPOINT, and the options that take its place."""
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", nargs="?", help="a training's folder or its checkpoint file")
    add_network(parser)
    add_weights(parser)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Add the weights of a network that no checkpoint holds."""
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="of a --model without CHECKPOINT: safetensors, or a state dict that is read without running code; "
        "none: as the callable makes it",
    )


def json_object(text: str) -> str:
    """Argument type: a JSON object, in one spelling."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text} ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object of names and values, got {text}")
    return json.dumps(value, sort_keys=True)


def numbers(text: str) -> tuple[float, ...]:
    """Argument type: finite numbers with commas between them."""
    try:
        values = tuple(float(entry) for entry in text.split(","))
    except ValueError:
        values = (math.nan,)
    if not all(math.isfinite(value) for value in values):
        raise argparse.ArgumentTypeError(f"expected numbers with commas between them, got {text}")
    return values


def source(arguments: argparse.Namespace, like: Source | None = None) -> Source | None:
    """The network that the options name; None where there is no ``--model``.

    Args:
        arguments: Of the command.
        like: Of which the options that are not given are taken.

    Raises:
        ValueError: If an option is given without ``--model``.
    """
    if arguments.model is None:
        for name in ("model_args", "normalize"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"{name}: goes with --model, which names the network")
        return None
    same = Source("") if like is None else like
    normalize = same.normalize if arguments.normalize is None else (arguments.normalize[0], arguments.normalize[1])
    return Source(located(arguments.model), arguments.model_args or same.arguments, normalize)


def named(arguments: argparse.Namespace) -> bool:
    """Whether any option says something of a network."""
    names = ("checkpoint", "model", "model_args", "normalize", "weights")
    return any(getattr(arguments, name) is not None for name in names)


@dataclass(frozen=True)
class Trained:
    """A trained network, and what there is to say of it.

    Attributes:
        model: In evaluation mode, on the device.
        data: To look at it with.
        state: The checkpoint's; None without one.
        record: For results: the settings it was trained with and for how many epochs, or the source and its weights.
        beside: Names a file beside what the network was read from.
    """

    model: nn.Module
    data: DataSet
    state: dict[str, Any] | None
    record: dict[str, Any]
    beside: Callable[[str], Path]


def trained(arguments: argparse.Namespace, device: torch.device) -> Trained:
    """The network of CHECKPOINT, or of ``--model`` and ``--weights``, and images for it.

    Without ``--data`` they are those that the checkpoint was trained on, or else the shipped digits. Labels count the
    classes of the training, which are found by name.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If the options contradict each other, something cannot be read, or the images are not the network's.
    """
    if arguments.checkpoint is None:
        return _untrained(arguments, device)
    if arguments.weights is not None:
        raise ValueError("weights: CHECKPOINT has its own; give one of the two")
    state = checkpoint.load(checkpoint.checkpoint_file(arguments.checkpoint))
    model = model_of(state, source(arguments, settings_of(state).network))
    settings, known = state["settings"], state["data"]
    name = arguments.data or known.get("origin") or SAMPLE
    (builtin, *_) = ARCHITECTURES.get(settings["architecture"], (None,))
    shape = known.get("shape") or builtin  # older checkpoints are of the paper's networks, and do not name it
    size = (shape[1], shape[2]) if shape and name.startswith(f"{FOLDER}:") else None
    data = load(name, image_size=arguments.image_size or size)
    if shape and data.test.shape != tuple(shape):
        found, wanted = ("x".join(map(str, each)) for each in (data.test.shape, shape))
        raise ValueError(
            f"the checkpoint was trained on {known['name']} ({wanted}), but --data {name} holds {data.test.name} "
            f"({found}): name the folder of its data set"
        )
    data = DataSet(*(matched(part, known.get("classes"), "the checkpoint's training") for part in data))
    model = model.to(device)
    classes_of(model, data.test, device)
    record = {"settings": settings, "epochs": state["position"]["epoch"]}
    return Trained(model, data, state, record, checkpoint.checkpoint_file(arguments.checkpoint).with_name)


def _untrained(arguments: argparse.Namespace, device: torch.device) -> Trained:
    own = source(arguments)
    if own is None:
        raise ValueError("CHECKPOINT: name a training's folder, or a --model and its --weights")
    model = own.maker()().eval()
    if arguments.weights is not None:
        load_weights(model, arguments.weights)
    remember(own)
    data = load(arguments.data or SAMPLE, image_size=arguments.image_size)
    model = model.to(device)
    classes_of(model, data.test, device)
    beside = Path() if arguments.weights is None else Path(arguments.weights).parent
    record = {
        "network": {"model": own.name, "model_args": own.arguments, "normalize": own.normalize},
        "weights": arguments.weights,
    }
    return Trained(model, data, None, record, lambda name: beside / name)


def trained_covariance(subject: Trained) -> Covariance | None:
    """The covariance of a checkpoint's penalty, as its training left it; None where it had none."""
    return None if subject.state is None else _covariance(subject.state, subject.data)


def covariance_of(place: str, data: DataSet) -> Covariance:
    """The covariance of another training's penalty, for images of the same shape; its network is not needed.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If it cannot be read, had no covariance, or is of other images.
    """
    state = checkpoint.load(checkpoint.checkpoint_file(place))
    shape = state["data"].get("shape")
    if shape and tuple(shape) != data.test.shape:
        found, wanted = ("x".join(map(str, each)) for each in (shape, data.test.shape))
        raise ValueError(f"covariance_of: {place} was trained on images of {found}, and these are {wanted}")
    covariance = _covariance(state, data)
    if covariance is None:
        raise ValueError(f"covariance_of: {place} was trained without a covariance")
    return covariance


def _covariance(state: dict[str, Any], data: DataSet) -> Covariance | None:
    criterion = build_criterion(settings_of(state), data.train)
    if not isinstance(getattr(criterion, "covariance", None), Covariance):
        return None
    checkpoint.load_module(criterion, state["criterion"], "criterion")
    covariance = criterion.covariance
    assert isinstance(covariance, Covariance)
    return covariance
