"""In the place of the package ``pyautoattack``, where it is not installed: the same calls, and attacks by a script."""

from __future__ import annotations

import logging
from types import ModuleType, SimpleNamespace
from typing import ClassVar

from torch import Tensor

from sgr_kernels.attacks import pgd


class Scripted:
    """Each attack brightens a pixel of the images that a script names, or climbs where there is no script."""

    script: ClassVar[dict[str, list[int]] | None] = None  # attack: numbers of images, known by their first pixel

    def __init__(self, model, *, norm, eps, seed, device):
        self.model, self.eps, self.attacks_to_run = model, eps, []
        self.apgd_targeted, self.fab = SimpleNamespace(n_target_classes=9), SimpleNamespace(n_target_classes=9)

    def run_standard_evaluation(self, images, labels, /, *, batch_size) -> tuple[Tensor, Tensor]:
        (name,) = self.attacks_to_run
        if self.script is None:
            result = pgd(self.model, images, labels, eps=self.eps, steps=2)
            return result, self.model(result).argmax(1)
        numbers = (100 * images[:, 0, 0, 0]).round().long().tolist()
        result = images.clone()
        for place, number in enumerate(numbers):
            if number in self.script[name]:
                result[place, 0, 1, 1] += self.eps
        logging.getLogger("auto-attack").warning("%s saw %d. See flags_doc.md for details.", name, len(images))
        return result, self.model(result).argmax(1)


def stand_in() -> ModuleType:
    """The package; one model's count of gradients is still in it."""
    package = ModuleType("pyautoattack")
    checks = SimpleNamespace(funcs={"grad": 4}, check_square_sr=lambda accuracies, logger: None)
    vars(package).update(__version__="9.9", checks=checks, AutoAttack=Scripted)
    return package
