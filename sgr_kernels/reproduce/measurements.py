"""Measurements of a reproduction: each into a file of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sgr_kernels.reproduce.trainings import Training
from sgr_kernels.training.methods import Settings
from sgr_kernels.training.trained import load_model


@dataclass(frozen=True)
class Network:
    """A network, trained when it is first needed: what was measured of it before needs it no more.

    Attributes:
        name: For people and folders.
        settings: Of its training.
        folder: Of its checkpoint.
        device: Where it is wanted.
        training: That gives it; None in a process that measures, for which it has been done.
        train: Trains networks that are not trained yet.
    """

    name: str
    settings: Settings
    folder: Path
    device: torch.device
    training: Training | None
    train: Callable[[Sequence[Network]], None]

    @cached_property
    def model(self) -> nn.Module:
        """In evaluation mode, on the lab's device."""
        self.train([self])
        return load_model(self.folder)[0].to(self.device)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digits that tell its weights from those of another training by the same settings."""
        state = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            state.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return state.hexdigest()[:12]

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which loads the model from its folder."""
        return {
            **{name: value for name, value in self.__dict__.items() if name not in ("model", "fingerprint")},
            "training": None,
        }


class MeasurementError(RuntimeError):
    """A measurement failed, in a process of its own."""


@dataclass(frozen=True)
class Measurement:
    """What is measured once, and read from disk from then on.

    Attributes:
        experiment: Folder of the measurement.
        name: Its name there.
        networks: What it depends on.
        measure: Gives something ready for JSON. Where several are made at a time (`Lab.measured`) it is sent to another
            process: a function of a module, or a partial one.
        plan: What else it depends on, ready for JSON.
    """

    experiment: str
    name: str
    networks: Sequence[Network | Settings]
    measure: Callable[[], Any]
    plan: Any = None

    def trainings(self) -> list[Training]:
        """Those that its networks come from."""
        networks = [network for network in self.networks if isinstance(network, Network)]
        return [network.training for network in networks if network.training is not None]


@dataclass(frozen=True)
class Share:
    """Some of an experiment's measurements, one after the other.

    Attributes:
        description: What is measured, for people.
        make: Makes a measurement and writes its file.
        measurements: To make.
    """

    description: str
    make: Callable[[Measurement], Any]
    measurements: Sequence[Measurement]

    def announcement(self) -> str:
        """Said at the start."""
        return f"measuring {self.description}: {len(self.measurements)}"

    def outcome(self) -> str:
        """Said at the end."""
        return f"measured {self.description}: {len(self.measurements)}"

    def run(self, progress: bool | None) -> None:
        """Make them."""
        for measurement in self.measurements:
            self.make(measurement)

    def detached(self) -> Share:
        """Itself."""
        return self

    def failure(self, error: str) -> MeasurementError:
        """What is raised where its process says an error."""
        return MeasurementError(f"{self.description}: {error}")
