"""The workshop of a reproduction: trains networks when they are needed, measures once, and remembers both on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sgr_kernels._version import __version__
from sgr_kernels.evaluation.suite import PIXEL_LEVELS
from sgr_kernels.reproduce import machine
from sgr_kernels.reproduce.jobs import Task, Workers
from sgr_kernels.reproduce.measurements import Measurement, Network, Share
from sgr_kernels.reproduce.scales import Scale
from sgr_kernels.reproduce.trainings import Training
from sgr_kernels.training.batches import Batches
from sgr_kernels.training.checkpoint import write_atomically
from sgr_kernels.training.datasets import DataSet
from sgr_kernels.training.methods import METHODS, Settings
from sgr_kernels.training.records import digest
from sgr_kernels.training.search import Attack, Search, Trial, attack_area, held_out, strength_search
from sgr_kernels.training.trained import accuracy

T = TypeVar("T")

_FORMAT = 2  # of a measurement's file
_LOGGED = 1000
# Fields of a scale that say which networks there are, not how one is measured: more seeds leave what is known as it is.
# What is beyond the paper is part of the question of those measurements alone that depend on it (`Lab.cached`).
_APART = ("methods", "seeds", "repeated", "twins", "beyond")
# Methods that share the strength found for another: variants of one penalty (section 4.1).
_L1_SHARES = (0.1, 0.3, 1.0, 3.0)
_SEARCHED = {"sgr_grad": "sgr_sign", "fgsm_sgr": "sgr_sign", "pgd_sgr": "sgr_sign"}


def _accuracy(lab: Lab, network: Network) -> float:
    return accuracy(network.model, lab.batches(len(lab.data.test)))


def _silent(line: str) -> None:
    """What another process says is said here."""


class Lab:
    """Everything an experiment needs.

    Args:
        dataset: ``"mnist"`` or ``"cifar10"``: the architecture and the paper's columns.
        scale: How much of everything.
        data: Training and test images.
        out: Folder of networks and measurements; made if need be. What is there already is not done again.
        device: Where to compute.
        say: Told what is being done.
        progress: Whether progress bars are shown; None: where standard error is a terminal.
        jobs: Trainings and measurements at a time, each in a process of its own with its part of the threads.

    Attributes:
        machines: What those results were measured with that were asked for, each kind once (`machine.describe`).
        weights: Of the networks that those results are of, by the names of their folders, fingerprints: several where
            networks of several machines, say, were trained by the same settings.
    """

    def __init__(
        self,
        dataset: str,
        scale: Scale,
        data: DataSet,
        out: Path,
        *,
        device: torch.device | str = "cpu",
        say: Callable[[str], None] = print,
        progress: bool | None = None,
        jobs: int = 1,
    ) -> None:
        self.jobs = jobs
        self.dataset, self.scale, self.out = dataset, scale, out
        self.device, self.say, self.progress = torch.device(device), say, progress
        self.whole = data
        self.data = DataSet(data.train.first(scale.train_images), data.test)
        self.machines: list[dict[str, Any]] = []
        self.weights: dict[str, set[str]] = {}
        self._workers = Workers()
        self._digests = [part.digest() for part in data]

    def __getstate__(self) -> dict[str, Any]:
        """For a process that measures, one thing after the other, in silence; searches, over all data, are not its."""
        return {**self.__dict__, "say": _silent, "progress": False, "jobs": 1, "whole": None}

    def settings(self, method: str, seed: int = 0, attack: Attack | None = None, **changes: Any) -> Settings:
        """Settings of a method at this scale; a penalty's strength is searched for if none is given.

        Args:
            method: A method's name.
            seed: Of the training.
            attack: Whose curve decides the strength; None: noise for the exponential covariance, else PGD.
            **changes: Other settings.
        """
        base = Settings(
            self.dataset,
            method=method,
            decay_length=self.scale.decay_length,
            update_every=self.scale.update_every if method in ("fgsm_sgr", "pgd_sgr") else 1,
            batch_size=self.scale.batch_size,
            schedule=self.scale.schedule,
            flip=self.dataset == "cifar10",
            strength=0.0,
            seed=seed,
        )
        if METHODS[method].penalized and "strength" not in changes:
            network = {name: changes[name] for name in ("activation", "pooling") if name in changes}
            changes["strength"] = self.strength(_SEARCHED.get(method, method), attack, **network)
        return replace(base, **changes)

    def network(self, settings: Settings, name: str = "") -> Network:
        """The network that these settings give, by the method's name if none is given (`planned`)."""
        return self.planned([(settings, name or settings.method)])[0]

    def planned(
        self, wanted: Sequence[tuple[Settings, str]], *, data: DataSet | None = None, epochs: int | None = None
    ) -> list[Network]:
        """The networks of several settings, trained when something is measured of them that is not known yet.

        Args:
            wanted: Settings and names.
            data: To train and test on; None: the lab's.
            epochs: Of the trainings; None: the scale's.
        """
        trainings = [self._training(settings, name, data or self.data, epochs) for settings, name in wanted]
        return [Network(t.name, t.settings, t.folder, self.device, t, self.train) for t in trainings]

    def train(self, networks: Iterable[Network]) -> None:
        """Train those of the networks that were not trained before, several at a time.

        Raises:
            TrainingError: If a training fails.
        """
        wanted = {network.folder: network.training for network in networks if network.training is not None}
        missing = [training for training in wanted.values() if not training.done()]
        self._workers.run(missing, min(self.jobs, len(missing)), self.say, self.progress)

    def _training(self, settings: Settings, name: str, data: DataSet, epochs: int | None) -> Training:
        epochs = epochs or self.scale.epochs
        # Not of the test images: trials on the same training images as the lab's give the lab's networks.
        key = digest([settings.record(), epochs, data.train.digest()])
        folder = self.out / "networks" / f"{settings.method}-seed{settings.seed}-{key}"
        # Its own accuracy after each epoch is for the log: a sample will do.
        logged = DataSet(data.train, data.test.first(_LOGGED))
        return Training(name, settings, logged, epochs, folder, self.device)

    def accuracy(self, network: Network) -> Measurement:
        """Of a network on all test images."""
        name = f"{network.settings.method}-seed{network.settings.seed}"
        return Measurement("accuracy", name, [network], partial(_accuracy, self, network))

    def test_accuracy(self, network: Network) -> float:
        """A network's `accuracy`, measured now or before."""
        found: float = self._made(self.accuracy(network))
        return found

    def method(self, method: str, seed: int = 0, attack: Attack | None = None, **changes: Any) -> Network:
        """The network of a method at this scale (`settings`)."""
        return self.network(self.settings(method, seed, attack, **changes), method)

    def networks(self, methods: Sequence[str], attacks: Mapping[str, Attack] | None = None) -> list[Network]:
        """All seeds of several methods; ``attacks`` names those that decide a strength, where not the usual one."""
        chosen = attacks or {}
        return self.planned(
            [(self.settings(m, seed, chosen.get(m)), m) for m in methods for seed in self.scale.seeds_of(m)]
        )

    def first(self, methods: Sequence[str]) -> dict[str, Network]:
        """The first network of each method."""
        return self._one_each(methods, seed=0)

    def twins(self, methods: Sequence[str]) -> dict[str, Network]:
        """A separately trained network of each method of which this scale has one."""
        return self._one_each([method for method in methods if self.scale.has_twin(method)], seed=1)

    def _one_each(self, methods: Sequence[str], seed: int) -> dict[str, Network]:
        networks = self.planned([(self.settings(method, seed), method) for method in methods])
        return dict(zip(methods, networks, strict=True))

    def strength(self, method: str, attack: Attack | None = None, **network: Any) -> float:
        """The strength found for a penalty."""
        return self.search(method, attack, **network).strength

    def search(self, method: str, attack: Attack | None = None, **network: Any) -> Search:
        """The search for a penalty's strength under an attack, made now or before.

        Args:
            method: The penalty's method.
            attack: Whose curve decides.
            **network: Activation and pooling, where not the paper's.
        """
        plan, scale = self.scale.search, self.scale
        chosen: Attack = attack or ("noise" if method == "sgr_exp" else "pgd")
        validation = self.validation().test
        eps = [level / PIXEL_LEVELS for level in plan.eps] if chosen == "pgd" else list(plan.noise_eps)

        def area(model: torch.nn.Module) -> float:
            return attack_area(
                model,
                validation.first(plan.attack_images),
                chosen,
                eps,
                steps=scale.pgd_steps,
                decay_length=scale.decay_length,
                draws=plan.draws,
                device=self.device,
            )

        settings = self.settings(method, strength=0.0, **network)
        # The strength of an L1 norm is a bound on perturbations; PGD's own largest one is its measure.
        strengths = [share * max(plan.eps) / PIXEL_LEVELS for share in _L1_SHARES] if method == "l1" else plan.strengths
        return self.searched(settings, strengths, chosen, area)

    def validation(self) -> DataSet:
        """What trials train on, and training images held out of it that judge them."""
        plan = self.scale.search
        return held_out(self.whole, plan.train_images or self.scale.train_images, plan.validation_images)

    def searched(
        self, settings: Settings, strengths: Sequence[float], attack: str, area: Callable[[nn.Module], float]
    ) -> Search:
        """The search for the strength of these settings, made now or before.

        Args:
            settings: Without a strength.
            strengths: To try.
            attack: Name of what decides.
            area: A network's mean accuracy under it, on images held out (`validation`).
        """
        data, method = self.validation(), settings.method

        def train(tried: Sequence[Settings]) -> list[nn.Module]:
            wanted = [(settings, f"trial of {settings.method}") for settings in tried]
            networks = self.planned(wanted, data=data, epochs=self.scale.search.epochs)
            self.train(networks)
            return [network.model for network in networks]

        def run() -> dict[str, Any]:
            self.say(f"searching {method}'s strength under {attack}")
            found = strength_search(settings, strengths, data.test, train, area, attack=attack, device=self.device)
            return found.to_dict()

        kept = self.cached("search", f"{method}-{attack}", [settings], run)
        return Search(**{**kept, "trials": [Trial(**trial) for trial in kept["trials"]]})

    def cached(
        self,
        experiment: str,
        name: str,
        networks: Sequence[Network | Settings],
        measure: Callable[[], Any],
        plan: Any = None,
    ) -> Any:
        """A `Measurement`'s result, from disk if it was made before with the same version, scale, data and networks."""
        return self._made(Measurement(experiment, name, networks, measure, plan))

    def measured(self, wanted: Sequence[Measurement], description: str) -> list[Any]:
        """The results of measurements, made now, several at a time, or before.

        Args:
            wanted: What to measure.
            description: Of it, for people.

        Raises:
            MeasurementError: If one of several at a time fails.
        """
        missing = [measurement for measurement in wanted if self._known(measurement) is None]
        jobs = min(self.jobs, len(missing))
        if jobs > 1:
            self._measure_at_a_time(missing, jobs, description)
        return [self._made(measurement) for measurement in self.bar(wanted, description)]

    def _measure_at_a_time(self, missing: Sequence[Measurement], jobs: int, description: str) -> None:
        """Each as soon as its networks are trained, so that an interruption takes little."""
        trainings = {t.folder: t for measurement in missing for t in measurement.trainings()}
        untrained = {folder: training for folder, training in trainings.items() if not training.done()}
        waiting: dict[frozenset[Path], list[Measurement]] = {}
        for measurement in missing:
            needed = frozenset(t.folder for t in measurement.trainings() if t.folder in untrained)
            waiting.setdefault(needed, []).append(measurement)

        def then(task: Task | None) -> list[Task]:
            if isinstance(task, Training):
                del untrained[task.folder]
            ready = [needed for needed in waiting if not any(folder in untrained for folder in needed)]
            parts = [group[k::jobs] for group in map(waiting.pop, ready) for k in range(jobs)]
            return [Share(description, self._made, part) for part in parts if part]

        with self._tqdm(total=len(missing), desc=description) as bar:

            def watch() -> None:
                bar.update(sum(self._path(measurement).is_file() for measurement in missing) - bar.n)

            first: list[Task] = [*then(None), *untrained.values()]
            self._workers.run(first, jobs, self.say, watch=watch, then=then, shared=self)

    def _path(self, measurement: Measurement) -> Path:
        """Where it is remembered."""
        settings = [(n if isinstance(n, Settings) else n.settings).record() for n in measurement.networks]
        question = [_FORMAT, __version__, self._measured_at(), self._digests, settings]
        key = digest(question if measurement.plan is None else [*question, measurement.plan])
        return self.out / "measurements" / measurement.experiment / f"{measurement.name}-{key}.json"

    def _known(self, measurement: Measurement) -> dict[str, Any] | None:
        """What a file says of it, if there is one; a damaged one is none."""
        try:
            kept: dict[str, Any] = json.loads(self._path(measurement).read_text())
        except (FileNotFoundError, ValueError):
            return None
        return kept if set(kept) == {"found", "machine", "weights"} else None

    def _made(self, measurement: Measurement) -> Any:
        kept = self._known(measurement)
        if kept is None:
            networks = [n for n in measurement.networks if isinstance(n, Network)]
            self.train(networks)
            made = {
                "found": measurement.measure(),
                "machine": machine.describe(self.device),
                "weights": {network.folder.name: network.fingerprint for network in networks},
            }
            path = self._path(measurement)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(made).encode())
            kept = json.loads(path.read_text())
        if kept["machine"] not in self.machines:
            self.machines.append(kept["machine"])
        for name, fingerprint in kept["weights"].items():
            self.weights.setdefault(name, set()).add(fingerprint)
        return kept["found"]

    def question(self) -> dict[str, Any]:
        """What every result of this lab depends on, ready for JSON."""
        return {"dataset": self.dataset, "data": self._digests, "scale": self._measured_at()}

    def _measured_at(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self.scale).items() if name not in _APART}

    def bar(self, items: Sequence[T], description: str) -> Iterable[T]:
        """The items behind a progress bar."""
        return self._tqdm(items, desc=description)

    def _tqdm(self, *arguments: Any, **options: Any) -> Any:
        hidden = None if self.progress is None else not self.progress
        return tqdm(*arguments, disable=hidden, leave=False, **options)

    def batches(self, count: int) -> Batches:
        """The first test images, in batches that suit the device."""
        return Batches(self.data.test.first(count), 100 if self.device.type == "cpu" else 1000, device=self.device)

    def pixels(self, count: int) -> tuple[Tensor, Tensor]:
        """The first test images in [0, 1], and their labels."""
        test = self.data.test.first(count)
        return test.images.to(self.device).float() / PIXEL_LEVELS, test.labels.to(self.device)

    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.data.test.images.shape[1:]
        return channels, height, width
