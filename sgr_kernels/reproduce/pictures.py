"""Images inside JSON, and grids of perturbed images with what networks make of them."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sgr_kernels.report.plots import Figure, Tile, image_grid

COLUMNS = 8


def encode(images: Tensor) -> dict[str, Any]:
    """Images (n, C, H, W) as grey levels for JSON; those with pixels outside [0, 1] are shown from min to max."""
    low = images.amin((1, 2, 3), keepdim=True).clamp(max=0)
    high = images.amax((1, 2, 3), keepdim=True).clamp(min=1)
    levels = ((images - low) / (high - low) * 255).round().to(torch.uint8).cpu().numpy()
    return {"shape": list(levels.shape), "base64": base64.b64encode(levels.tobytes()).decode()}


def decode(record: dict[str, Any]) -> np.ndarray:
    """What ``encode`` took, as (n, H, W) or (n, H, W, 3) in [0, 1]."""
    levels = np.frombuffer(base64.b64decode(record["base64"]), np.uint8).reshape(record["shape"]) / 255
    return levels[:, 0] if levels.shape[1] == 1 else levels.transpose(0, 2, 3, 1)


def one_of_each_class(labels: Tensor, columns: int = COLUMNS) -> list[int]:
    """Places of the first image of each of the first classes: no choice by outcome."""
    found = [int((labels == c).nonzero()[0]) for c in labels.unique()]
    return found[:columns]


def row(name: str, images: Tensor, models: dict[str, nn.Module]) -> dict[str, Any]:
    """A grid's row: images and each network's answers to them."""
    with torch.no_grad():
        answers = {network: model(images).argmax(1).tolist() for network, model in models.items()}
    return {"name": name, "images": encode(images), "answers": answers}


def grid(record: dict[str, Any], title: str) -> Figure:
    """A figure of ``{"labels": [...], "classes": [...], "rows": [row, ...]}``."""
    classes, labels = record["classes"], record["labels"]
    rows = []
    for place, entry in enumerate(record["rows"]):
        tiles = []
        for k, image in enumerate(decode(entry["images"])):
            several = len(entry["answers"]) > 1
            answers = [
                (f"{network}: {classes[found[k]]}" if several else classes[found[k]], found[k] == labels[k])
                for network, found in entry["answers"].items()
            ]
            tiles.append(Tile(image, answers, f"{classes[labels[k]]}" if place == 0 else ""))
        rows.append((entry["name"], tiles))
    return image_grid(rows, title)
