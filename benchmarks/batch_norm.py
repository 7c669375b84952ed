"""How far the penalty's gradient on a part of the batch is from the whole batch's under BatchNorm, on a ResNet.

With ``fraction`` below 1 the penalty's gradient is that of a few samples, normalized by the whole batch's statistics,
of which the few estimate the derivatives. Beside it: a few drawn at random and normalized by their own statistics.
``sgr bench batch-norm --data DIR`` compares the means over draws with the exact gradient, before and after some epochs.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sgr_kernels as sgr
from benchmarks.networks import resnet18
from sgr_kernels.penalty.passes import select
from sgr_kernels.reproduce import machine
from sgr_kernels.training.batches import Batches
from sgr_kernels.training.datasets import load


def gradient(loss: Tensor, model: nn.Module) -> Tensor:
    """Of a loss in all parameters, flat."""
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(found, model.parameters())]
    )


def penalties(model: nn.Module, images: Tensor, labels: Tensor, draws: int, fraction: float) -> dict[str, Tensor]:
    """The penalty's gradient each way, the sampled ones as means over draws."""
    covariance = sgr.CovarianceFunction.exponential(3, tuple(images.shape[2:]), 3.0, target_variance=0.06)

    def of(criterion: sgr.SGRLoss, images: Tensor, labels: Tensor, step: int = 0) -> Tensor:
        model_, criterion.steps = copy.deepcopy(model), step
        total = gradient(criterion(model_, images, labels), model_)
        plain = copy.deepcopy(model)
        return total - gradient(nn.functional.cross_entropy(plain(images), labels), plain)

    exact = of(sgr.SGRLoss(covariance, 1.0), images, labels)
    sampled = sgr.SGRLoss(covariance, 1.0, fraction=fraction)
    whole = sum(of(sampled, images, labels, step) for step in range(draws)) / draws
    count, own = round(fraction * len(images)), torch.zeros_like(exact)
    for step in range(draws):
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(step))[:count]
        own += of(sgr.SGRLoss(covariance, 1.0), images[chosen], select(labels, chosen, len(images))) / draws
    return {"exact": exact, "the whole batch's statistics": whole, "statistics of the few": own}


def main(arguments: list[str] | None = None) -> None:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(prog="sgr bench batch-norm", description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder with CIFAR-10 (binary version)")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--width", type=int, default=16, help="of ResNet-18's first stage")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--fraction", type=float, default=1 / 8)
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--epochs", type=int, nargs="+", default=[0, 1, 3])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model, data = resnet18(options.width).train(), load(options.data).train.first(options.images)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    rows: list[dict[str, Any]] = []
    for epoch in range(max(options.epochs) + 1):
        if epoch in options.epochs:
            images, labels = next(iter(Batches(data, options.batch).epoch(1000)))
            found = penalties(model, images, labels, options.draws, options.fraction)
            exact = found.pop("exact")
            for way, mine in found.items():
                cosine = float(torch.cosine_similarity(mine, exact, dim=0))
                rows.append({"epoch": epoch, "way": way, "cosine": cosine, "norm": float(mine.norm() / exact.norm())})
                print(json.dumps(rows[-1]), flush=True)
        for images, labels in Batches(data, options.batch).epoch(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    settings = {name: getattr(options, name) for name in ("images", "width", "batch", "fraction", "draws")}
    result = {"machine": machine.describe(torch.device("cpu")), "settings": settings, "rows": rows}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
