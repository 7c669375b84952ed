"""Agreement of finite differences with exact penalty gradients, on the paper's ReLU network.

At ReLU and max-pooling kinks a finite difference sees curvature that the exact derivative drops, so that the two differ
by more than rounding. ``sgr bench agreement`` trains a Carlini-Wagner network by double backward on the packaged digits
and, before and after some epochs, compares the parameters' gradients on batches of them: of the whole loss, and of the
penalty alone, that is, less those of cross-entropy.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sgr_kernels as sgr
from sgr_kernels.reproduce import machine
from sgr_kernels.training.datasets import load
from sgr_kernels.training.loop import Trainer
from sgr_kernels.training.methods import Settings

PRECISIONS = {"float64": torch.float64, "float32": torch.float32}


def _gradient(loss: Tensor, model: nn.Module) -> Tensor:
    return torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, list(model.parameters()))])


def gradients(
    model: nn.Module,
    covariance: sgr.CovarianceFunction,
    images: Tensor,
    labels: Tensor,
    strength: float,
    method: str,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Gradients in the parameters: of the loss, and of its penalty."""
    dtype = PRECISIONS[precision]
    criterion = sgr.SGRLoss(covariance.to(dtype), strength, perturbation=None, method=method, allow_kinks=True).eval()
    model, images = model.to(dtype), images.to(dtype)
    loss, plain = criterion(model, images, labels), nn.functional.cross_entropy(model(images), labels)
    whole = _gradient(loss, model)
    return whole, whole - _gradient(plain, model)


def compare(trainer: Trainer, strength: float, precisions: list[str], batches: int) -> list[dict[str, Any]]:
    """A row for each precision: finite differences beside double backward in float64, over batches."""
    covariance = trainer.criterion.covariance
    names = ("penalty_share", "cosine", "penalty_cosine", "penalty_norm_ratio")
    found: dict[str, dict[str, list[float]]] = {precision: {name: [] for name in names} for precision in precisions}
    for images, labels in itertools.islice(trainer.batches.epoch(1000), batches):
        batch = trainer.model, covariance, images, labels, strength
        exact, penalty = gradients(*batch, "double-backward", "float64")
        for precision in precisions:
            mine, my_penalty = gradients(*batch, "finite-difference", precision)
            values = (
                penalty.norm() / (exact - penalty).norm(),
                torch.cosine_similarity(mine, exact, dim=0),
                torch.cosine_similarity(my_penalty, penalty, dim=0),
                my_penalty.norm() / penalty.norm(),
            )
            for name, value in zip(names, values, strict=True):
                found[precision][name].append(float(value))
    trainer.model.float()
    covariance.float()
    return [
        {
            "precision": precision,
            "strength": strength,
            "batches": batches,
            **{name: {"mean": statistics.mean(v), "min": min(v)} for name, v in values.items()},
        }
        for precision, values in found.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Means over batches, as Markdown."""
    head = "| strength | epochs | penalty / cross-entropy | precision | cosine | of the penalty | its norm / exact |"
    lines = [head, "|---" * 7 + "|"]
    for row in rows:
        share, *others = (
            row[name]["mean"] for name in ("penalty_share", "cosine", "penalty_cosine", "penalty_norm_ratio")
        )
        cells = " | ".join(f"{value:.3g}" for value in others)
        lines.append(f"| {row['strength']:g} | {row['epochs']} | {share:.2g} | {row['precision']} | {cells} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Train, compare, print the table, and write the rows as JSON."""
    parser = argparse.ArgumentParser(prog="sgr bench agreement", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--epochs", type=int, nargs="+", default=[0, 1], help="after which to compare, ascending")
    parser.add_argument("--strengths", type=float, nargs="+", default=[1.0, 30.0])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--train-images", type=int, help="none: all 5,000")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    data = load("mnist-sample")
    data = type(data)(data.train.first(options.train_images), data.test)
    rows: list[dict[str, Any]] = []
    for strength in options.strengths:
        trainer = Trainer(Settings("mnist", strength=strength, augment=False), data, device=options.device)
        for epochs in options.epochs:
            trainer.run(epochs, progress=False)
            if epochs == 0:  # the covariance's first estimate
                trainer.criterion(trainer.model, *next(trainer.batches.epoch(1001)))
                trainer.criterion.steps = 0
            found = compare(trainer, strength, options.precisions, options.batches)
            rows += [{"epochs": epochs, **row} for row in found]
    result = {"machine": machine.describe(torch.device(options.device)), "rows": rows}
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["machine"]))
    print(table(rows))


if __name__ == "__main__":
    main()
