"""Trained networks: read from their checkpoints, and how many images they get right."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sgr_kernels.attacks.inputs import check_labels
from sgr_kernels.attacks.objective import logits_of
from sgr_kernels.checks import check_floating_point
from sgr_kernels.training import checkpoint
from sgr_kernels.training.checkpoint import checkpoint_file
from sgr_kernels.training.network import Source, remember, require_asked_for
from sgr_kernels.training.processes import Processes
from sgr_kernels.training.state import settings_of

_ALONE = Processes()


def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], processes: Processes = _ALONE) -> float:
    """Share of images whose largest logit is at the label; the model is in evaluation mode meanwhile.

    Several processes each bring their part of the images.

    Raises:
        TypeError: labels that are not integers.
        ValueError: outputs that are not logits (B, classes), or labels out of range.
    """
    training = model.training
    model.eval()
    correct, seen = 0, 0
    try:
        with torch.no_grad():
            for images, labels in batches:
                check_floating_point("images", images)
                logits = logits_of(model, images)
                check_labels(labels, *logits.shape)
                correct += int((logits.argmax(1) == labels).sum())
                seen += len(labels)
    finally:
        model.train(training)
    parameter = next(model.parameters(), None)
    device = None if parameter is None else parameter.device
    correct, seen = processes.total(torch.tensor([correct, seen], device=device)).tolist()
    return correct / seen


def load_model(
    path: str | os.PathLike[str], network: Source | nn.Module | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The trained network of a checkpoint (its file or folder), in evaluation mode, and the whole state.

    Args:
        path: Of the checkpoint.
        network: What makes the network, or the network itself, which takes the weights; None: what the checkpoint
            names, if it is this package's, or if this user has trained with it or named it before.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        CheckpointError: if it is damaged, edited out of shape, or newer than this package.
        NetworkError: if the network cannot be made, or is made by code that has not been asked for.
    """
    state = checkpoint.load(checkpoint_file(path))
    return model_of(state, network), state


def model_of(state: dict[str, Any], network: Source | nn.Module | None = None) -> nn.Module:
    """The trained network of a checkpoint's state, in evaluation mode; as `load_model`, and with its errors."""
    recorded = settings_of(state).network
    if network is None:
        require_asked_for(recorded)
        model = recorded.maker()()
    elif isinstance(network, Source):
        model = network.maker()()
        remember(network)
    else:
        model = network
    checkpoint.load_module(model, checkpoint.network_weights(state), "model")
    return model.eval()
