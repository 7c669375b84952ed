"""Measurements of a reproduction: each into a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sgr_kernels.training.methods import Settings


@dataclass(frozen=True)
class Network:
    """A trained network.

    Attributes:
        name: For people and folders.
        settings: Of its training.
        model: In evaluation mode, on the lab's device.
    """

    name: str
    settings: Settings
    model: nn.Module


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
