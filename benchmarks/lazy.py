"""What a cheaper penalty keeps of robustness: on some steps, for a part of each batch, by finite differences.

``sgr bench lazy --data DIR --out FILE`` trains networks on MNIST or CIFAR-10, without a penalty, with one on every
step, and in the cheaper ways, each from several seeds, and attacks them with PGD and correlated noise. The file is
written after every network; begun again, the command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from sgr_kernels.evaluation.suite import EPS_GRIDS, Plan, evaluate
from sgr_kernels.reproduce import machine
from sgr_kernels.training.batches import Batches
from sgr_kernels.training.checkpoint import write_atomically
from sgr_kernels.training.datasets import DataSet, load
from sgr_kernels.training.loop import Trainer
from sgr_kernels.training.methods import SCHEDULES, Settings

WAYS: dict[str, dict[str, Any]] = {
    "clean": {"method": "clean"},
    "every step": {"method": "sgr", "penalty_every": 1},
    "every 4th": {"method": "sgr", "penalty_every": 4, "update_every": 4},
    "every 16th": {"method": "sgr", "penalty_every": 16, "update_every": 16},
    "an eighth by importance": {"method": "sgr", "fraction": 1 / 8},
    "a sixteenth by importance": {"method": "sgr", "fraction": 1 / 16},
    "a quarter at random": {"method": "sgr", "fraction": 1 / 4, "sampling": "uniform"},
    "an eighth at random": {"method": "sgr", "fraction": 1 / 8, "sampling": "uniform"},
    "finite difference": {"method": "sgr", "penalty_method": "finite-difference", "allow_kinks": True},
}
ROBUSTNESS = ("pgd_area", "noise_accuracy")
MEASURES = ("test_accuracy", *ROBUSTNESS)
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""97.5 % quantiles of Student's t by degrees of freedom."""
PLANS = {
    name: Plan(grid, pgd_steps=20, decay_lengths=(4.0, 16.0), noise_eps=(0.5,), draws=30)
    for name, grid in EPS_GRIDS.items()
}


def train_and_attack(way: str, seed: int, options: argparse.Namespace, data: DataSet) -> dict[str, Any]:
    """One row: a network trained one way from one seed."""
    settings = Settings(
        data.train.name,
        strength=options.strength,
        perturbation=options.perturbation,
        augment=False,
        seed=seed,
        schedule=options.schedule,
        **WAYS[way],
    )
    trainer = Trainer(settings, DataSet(data.train.first(options.train_images), data.test))
    trainer.run(options.epochs)
    model = trainer.model.eval()
    attacked = Batches(data.test.first(options.images), 100)
    evaluation = evaluate(model, attacked, PLANS[data.train.name])
    return {
        "way": way,
        "seed": seed,
        "test_accuracy": trainer.history[-1]["test_accuracy"],
        "seconds": sum(record["seconds"] for record in trainer.history),
        "pgd_area": evaluation.attacks["pgd"].area,
        "noise_accuracy": statistics.mean(curve.accuracy[0] for curve in evaluation.noise.values()),
    }


def interval(values: list[float]) -> dict[str, Any]:
    """Mean over seeds and its 95 % confidence interval; None where one value tells nothing of their spread."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return {"mean": mean, "interval95": None}
    half = STUDENT.get(len(values) - 1, 2.0) * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": mean, "interval95": [mean - half, mean + half]}


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By way and measure: the mean over seeds, and of robustness what is kept of every-step SGR's gain over clean.

    ``behind`` is every-step SGR minus this way, seed by seed; ``kept`` the share of the gain. ``keeps`` holds where the
    share is 95 % or more, or the interval of ``behind`` contains zero.
    """
    found = {(row["way"], row["seed"]): row for row in rows}
    result: dict[str, dict[str, Any]] = {}
    for way in dict.fromkeys(row["way"] for row in rows):
        for measure in MEASURES:
            entry = interval([row[measure] for row in rows if row["way"] == way])
            result.setdefault(way, {})[measure] = entry
            seeds = [s for (w, s) in found if w == way and {("clean", s), ("every step", s)} <= found.keys()]
            if measure not in ROBUSTNESS or way in ("clean", "every step") or not seeds:
                continue
            every, clean, mine = (
                [found[name, seed][measure] for seed in seeds] for name in ("every step", "clean", way)
            )
            gain = statistics.mean(every) - statistics.mean(clean)
            entry["behind"] = interval([e - m for e, m in zip(every, mine, strict=True)])
            entry["kept"] = (statistics.mean(mine) - statistics.mean(clean)) / gain if gain else None
            low, high = entry["behind"]["interval95"] or (1.0, -1.0)
            entry["keeps"] = bool(gain > 0 and entry["kept"] >= 0.95) or low <= 0 <= high
    return result


def table(result: dict[str, dict[str, Any]]) -> str:
    """The summary as Markdown, in percent: means with 95 % intervals over seeds, and what is kept of the gain."""

    def cell(entry: dict[str, Any]) -> str:
        text = _points(entry)
        if entry.get("kept") is not None:
            text += f"; keeps {entry['kept']:.0%}, behind by {_points(entry['behind'])}"
        return text

    lines = ["| penalty | test accuracy | PGD area | correlated noise |", "|---" * 4 + "|"]
    lines += [f"| {way} | " + " | ".join(cell(entry[m]) for m in MEASURES) + " |" for way, entry in result.items()]
    return "\n".join(lines)


def _points(entry: dict[str, Any]) -> str:
    bounds = entry["interval95"]
    return f"{100 * entry['mean']:.1f}" + (f" ({100 * bounds[0]:.1f} to {100 * bounds[1]:.1f})" if bounds else "")


def _resumed(out: Path, expected: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier run of the same measurement.

    Raises:
        ValueError: If the file holds another one.
    """
    if not out.exists():
        return []
    result: dict[str, Any] = json.loads(out.read_text())
    for part, own in expected.items():
        for name, value in own.items():
            if result[part].get(name) != value:
                raise ValueError(
                    f"--out {out}: holds results of another run ({name}: {result[part].get(name)!r}, now {value!r}); "
                    "name another file"
                )
    rows: list[dict[str, Any]] = result["rows"]
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Train, attack, write."""
    parser = argparse.ArgumentParser(prog="sgr bench lazy", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file; networks in it are not trained again")
    parser.add_argument("--data", default=os.environ.get("SGR_DATA", "."), help="folder with MNIST or CIFAR-10")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train-images", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--images", type=int, default=1000, help="test images attacked")
    parser.add_argument("--strength", type=float, default=10.0)
    parser.add_argument("--perturbation", default="sign")
    parser.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="of the learning rate")
    options = parser.parse_args(arguments)
    folder = Path(options.data)
    data = load(folder / "mnist" if (folder / "mnist").is_dir() else folder)
    names = ("train_images", "epochs", "images", "strength", "perturbation", "schedule")
    settings = {"images_of": data.train.name, **{name: getattr(options, name) for name in names}}
    head = {"machine": machine.describe(torch.device("cpu")), "settings": settings}
    rows = _resumed(options.out, head)
    pending = [
        (way, seed)
        for seed in options.seeds
        for way in options.ways
        if not any(row["way"] == way and row["seed"] == seed for row in rows)
    ]
    start = time.monotonic()
    for done, (way, seed) in enumerate(pending, 1):
        rows.append(train_and_attack(way, seed, options, data))
        result = {**head, "summary": summary(rows), "rows": rows}
        write_atomically(options.out, (json.dumps(result, indent=1) + "\n").encode())
        print(json.dumps(rows[-1]), flush=True)
        elapsed = time.monotonic() - start
        left = elapsed / done * (len(pending) - done)
        print(f"{done} of {len(pending)} networks, {elapsed / 60:.0f} min; about {left / 60:.0f} min left", flush=True)
    print(table(summary(rows)))


if __name__ == "__main__":
    main()
