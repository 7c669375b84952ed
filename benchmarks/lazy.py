"""What a lazy penalty keeps: networks trained with the penalty on every step, every 4th, every 16th, and never.

``sgr bench lazy --data DIR --out FILE`` trains each on MNIST with several seeds and attacks it with PGD and correlated
noise. The file is written after every network, and a run that is begun again goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from sgr_kernels.evaluation.suite import EPS_GRIDS, Plan, evaluate
from sgr_kernels.training.batches import Batches
from sgr_kernels.training.checkpoint import write_atomically
from sgr_kernels.training.datasets import DataSet, load
from sgr_kernels.training.loop import Trainer
from sgr_kernels.training.methods import Settings

WAYS: dict[str, dict[str, Any]] = {
    "clean": {"method": "clean"},
    "every step": {"method": "sgr", "penalty_every": 1},
    "every 4th": {"method": "sgr", "penalty_every": 4, "update_every": 4},
    "every 16th": {"method": "sgr", "penalty_every": 16, "update_every": 16},
}
PLAN = Plan(EPS_GRIDS["mnist"], pgd_steps=20, decay_lengths=(4.0, 16.0), noise_eps=(0.5,), draws=30)


def train_and_attack(way: str, seed: int, options: argparse.Namespace, data: DataSet) -> dict[str, Any]:
    """One row: a network trained one way from one seed."""
    settings = Settings(
        "mnist", strength=options.strength, perturbation=options.perturbation, augment=False, seed=seed, **WAYS[way]
    )
    trainer = Trainer(settings, DataSet(data.train.first(options.train_images), data.test))
    trainer.run(options.epochs, progress=False)
    model = trainer.model.eval()
    attacked = Batches(data.test.first(options.images), 250)
    evaluation = evaluate(model, attacked, PLAN)
    return {
        "way": way,
        "seed": seed,
        "test_accuracy": trainer.history[-1]["test_accuracy"],
        "seconds": sum(record["seconds"] for record in trainer.history),
        "pgd_area": evaluation.attacks["pgd"].area,
        "noise_accuracy": statistics.mean(curve.accuracy[0] for curve in evaluation.noise.values()),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean, standard error over seeds, and the share of the every-step gain over clean that each way keeps."""
    result: dict[str, dict[str, Any]] = {}
    for measure in ("test_accuracy", "pgd_area", "noise_accuracy"):
        means = {}
        for way in WAYS:
            values = [row[measure] for row in rows if row["way"] == way]
            if not values:
                continue
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
            means[way] = statistics.mean(values)
            result.setdefault(way, {})[measure] = {"mean": means[way], "standard_error": error}
        gain = means.get("every step", 0.0) - means.get("clean", 0.0)
        for way, mean in means.items():
            if gain and way != "clean":
                result[way][measure]["gain_kept"] = (mean - means["clean"]) / gain
    return result


def main(arguments: list[str] | None = None) -> None:
    """Train, attack, write."""
    parser = argparse.ArgumentParser(prog="sgr bench lazy", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file; networks in it are not trained again")
    parser.add_argument("--data", default=os.environ.get("SGR_DATA", "."), help="folder with the full MNIST")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train-images", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--images", type=int, default=1000, help="test images attacked")
    parser.add_argument("--strength", type=float, default=30.0)
    parser.add_argument("--perturbation", default="sign")
    options = parser.parse_args(arguments)
    folder = Path(options.data)
    data = load(folder / "mnist" if (folder / "mnist").is_dir() else folder)
    settings = {
        name: getattr(options, name) for name in ("train_images", "epochs", "images", "strength", "perturbation")
    }
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    for seed in options.seeds:
        for way in options.ways:
            if any(row["way"] == way and row["seed"] == seed for row in rows):
                continue
            rows.append(train_and_attack(way, seed, options, data))
            print(json.dumps(rows[-1]), flush=True)
            result = {
                "machine": machine.describe(torch.device("cpu")),
                "settings": settings,
                "summary": summary(rows),
                "rows": rows,
            }
            write_atomically(options.out, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
