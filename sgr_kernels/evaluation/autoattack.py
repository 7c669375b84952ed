"""AutoAttack (Croce and Hein 2020), the ensemble that robustness is compared by, run on a model of this package.

The attacks are those of the package ``pyautoattack``, with the settings of its standard version; here are the model's
protection, the count of what each attack broke, and what the ensemble's own checks say.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sgr_kernels.attacks.guard import Model, model_device, preserve
from sgr_kernels.attacks.inputs import check_images, check_labels, seeded
from sgr_kernels.attacks.levels import check_eps
from sgr_kernels.attacks.objective import clean_logits, logits_of
from sgr_kernels.checks import check_count, check_number
from sgr_kernels.evaluation.curves import wilson_interval
from sgr_kernels.evaluation.loaders import Loader, first_images

Norm = Literal["Linf", "L2"]

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
"""The standard version, in its order: each attack gets the images that those before it have not broken."""

ATTACKS = (*STANDARD, "apgd-dlr", "fab")

# What the losses and the lists of targets take at least; the ratio of logits looks at the largest three or four.
_CLASSES = {"apgd-t": 4, "apgd-dlr": 3}


@dataclass(frozen=True)
class AutoAttackPart:
    """One attack of the ensemble.

    Attributes:
        name: as in ``ATTACKS``.
        attacked: images that it was given: those that no attack before it had broken.
        broken: how many of them it broke.
        seconds: what it took, the ensemble's checks included.
        warnings: what these said.
    """

    name: str
    attacked: int
    broken: int
    seconds: float
    warnings: list[str]


@dataclass(frozen=True)
class AutoAttackResult:
    """Which images are classified correctly whatever the ensemble does.

    Attributes:
        eps: radius of the ball, in pixel units.
        norm: "Linf" or "L2".
        clean: (n,) bool, on the CPU, images in the loader's order: correct without an attack.
        robust: (n,) bool, on the CPU: correct under all attacks.
        broken_by: (n,) int64, on the CPU: the number in ``parts`` of the attack that broke an image; -1 for none.
        parts: the attacks, in the order in which they ran.
        warnings: of the whole ensemble, such as that a search without gradients found more than those with them.
        largest_change: of any image, in the norm and in pixel units.
        batch_size: images at once.
        seed: of the random numbers.
        bounds: range of the pixels.
        version: of ``pyautoattack``.
        adversarial: (n, C, H, W), on the CPU, if it was to be kept: images that were not broken are as they were.
    """

    eps: float
    norm: Norm
    clean: Tensor
    robust: Tensor
    broken_by: Tensor
    parts: list[AutoAttackPart]
    warnings: list[str]
    largest_change: float
    batch_size: int
    seed: int
    bounds: tuple[float, float]
    version: str
    adversarial: Tensor | None = None

    @property
    def clean_accuracy(self) -> float:
        """Share of images classified correctly without an attack."""
        return float(self.clean.double().mean())

    @property
    def accuracy(self) -> float:
        """Share of images classified correctly under all attacks."""
        return float(self.robust.double().mean())

    @property
    def standard(self) -> bool:
        """Whether this is the standard version, and not some of its attacks or others."""
        return tuple(part.name for part in self.parts) == STANDARD

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson interval of the accuracy."""
        return wilson_interval(int(self.robust.sum()), len(self.robust), confidence)

    def to_dict(self) -> dict[str, Any]:
        """Everything but masks and images, ready for JSON; under "robustbench" as in that project's records."""
        return {
            "attack": "autoattack",
            "version": "standard" if self.standard else "custom",
            "pyautoattack": self.version,
            "norm": self.norm,
            "eps": self.eps,
            "n_ex": len(self.robust),
            "clean_accuracy": self.clean_accuracy,
            "accuracy": self.accuracy,
            "interval95": list(self.interval()),
            "attacks": [vars(part) for part in self.parts],
            "warnings": self.warnings,
            "largest_change": self.largest_change,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "bounds": list(self.bounds),
            "robustbench": {
                "eps": _as_fraction(self.eps),
                "clean_acc": f"{100 * self.clean_accuracy:.2f}",
                "autoattack_acc": f"{100 * self.accuracy:.2f}",
            },
        }

    def __str__(self) -> str:
        """One line for the ensemble, one for each attack, and the warnings."""
        low, high = self.interval()
        kind = "standard" if self.standard else "some attacks"
        lines = [
            f"AutoAttack ({kind}, {self.norm}, eps {_as_fraction(self.eps)}, {len(self.robust)} images): accuracy "
            f"{self.clean_accuracy:.1%}, under attack {self.accuracy:.1%} ({low:.1%} to {high:.1%})"
        ]
        for part in self.parts:
            lines.append(f"{part.name:>10}: broke {part.broken} of {part.attacked} images in {part.seconds:.1f} s")
            lines += [f"{'warning':>10}: {text}" for text in part.warnings]
        return "\n".join([*lines, *(f"{'warning':>10}: {text}" for text in self.warnings)])


def autoattack(
    model: Model,
    loader: Loader,
    eps: float,
    *,
    norm: Norm = "Linf",
    attacks: Sequence[str] | None = None,
    max_images: int | None = None,
    batch_size: int = 250,
    seed: int = 0,
    bounds: tuple[float, float] = (0.0, 1.0),
    keep_images: bool = False,
    on_part: Callable[[str], None] = lambda name: None,
) -> AutoAttackResult:
    """Accuracy of a model under AutoAttack: APGD on the cross-entropy, targeted APGD, targeted FAB and Square.

    Needs the package ``pyautoattack``: ``pip install 'sgr_kernels[autoattack]'``. Attacks start from the true labels,
    as the ensemble has it. With fewer than ten classes the targeted attacks go through all others.

    Args:
        model: maps images to logits (B, classes); runs in evaluation mode and is left as it was.
        loader: yields (images, labels) with images (B, C, H, W); read until ``max_images`` are found. A list of one
            pair will do.
        eps: radius of the ball in pixel units, such as 8/255.
        norm: "Linf" or "L2".
        attacks: some of ``ATTACKS``, run in this order; None: the standard version.
        max_images: images to use; None: all.
        batch_size: images at once. The random numbers of an attack depend on it.
        seed: of the random numbers.
        bounds: range of the pixels.
        keep_images: keep the adversarial images in the result.
        on_part: called with the name of each attack as it begins.

    Raises:
        ModuleNotFoundError: ``pyautoattack`` is not installed.
        TypeError: as the attacks of this package.
        ValueError: as the attacks of this package; also an unknown norm or attack, an attack that is named twice, too
            few classes for one, images of another rank, or an empty loader.
    """
    ensemble = package()
    if norm not in ("Linf", "L2"):
        raise ValueError(f"norm: expected 'Linf' or 'L2', got {norm!r}")
    names = check_attacks(attacks)
    eps = check_number("eps", eps, above=True)
    for name, value in (("max_images", max_images), ("batch_size", batch_size)):
        if value is not None:
            check_count(name, value)
    seeded(seed)
    images, labels = first_images(loader, max_images, model_device(model))
    images = check_images(images, bounds).contiguous()
    if images.ndim != 4:
        raise ValueError(f"images: expected shape (B, C, H, W), got {tuple(images.shape)}")
    check_eps(eps, bounds if norm == "Linf" else None)
    low, high = bounds
    # AutoAttack's pixels lie in [0, 1].
    unit = (images if (low, high) == (0, 1) else (images - low) / (high - low)).float()

    def from_unit(pixels: Tensor) -> Tensor:
        return (pixels if (low, high) == (0, 1) else low + (high - low) * pixels).to(images.dtype)

    def query(pixels: Tensor) -> Tensor:
        # A copy: the attacks write into logits, which a model may have kept.
        return logits_of(model, from_unit(pixels)).float().clone()

    with preserve(model):
        if isinstance(model, nn.Module):
            model.requires_grad_(False)  # FAB calls backward(), of which the parameters' share would be thrown away
        logits = torch.cat([clean_logits(model, part) for part in images.split(batch_size)])
        check_labels(labels, *logits.shape)
        labels = labels.long()
        check_classes(names, logits.shape[1])
        adversary = ensemble.AutoAttack(query, norm=norm, eps=eps / (high - low), seed=seed, device=unit.device)
        for attack in (adversary.apgd_targeted, adversary.fab):
            attack.n_target_classes = min(attack.n_target_classes, logits.shape[1] - 1)
        run = _Run(adversary, ensemble, unit, labels, logits.argmax(1) == labels, batch_size)
        for name in names:
            on_part(name)
            run.attack(name)
    warnings = run.last_check()
    adversarial = torch.where((run.broken_by >= 0)[:, None, None, None], from_unit(run.adversarial), images)
    change = (adversarial.double() - images.double()).flatten(1)
    length = torch.linalg.vector_norm(change, ord=float("inf") if norm == "Linf" else 2, dim=1)
    return AutoAttackResult(
        eps=eps,
        norm=norm,
        clean=run.clean.cpu(),
        robust=run.robust.cpu(),
        broken_by=run.broken_by.cpu(),
        parts=run.parts,
        warnings=warnings,
        largest_change=float(length.max()),
        batch_size=batch_size,
        seed=seed,
        bounds=(float(low), float(high)),
        version=str(ensemble.__version__),
        adversarial=adversarial.cpu() if keep_images else None,
    )


def check_attacks(attacks: Sequence[str] | None) -> tuple[str, ...]:
    """The attacks named, or the standard ones.

    Raises:
        ValueError: one is unknown or named twice, or there is none.
    """
    if attacks is None:
        return STANDARD
    names = (attacks,) if isinstance(attacks, str) else tuple(attacks)
    unknown = [name for name in names if name not in ATTACKS]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(f"attacks: expected some of {', '.join(ATTACKS)}, each once, got {', '.join(map(str, names))}")
    return names


def check_classes(names: Sequence[str], classes: int) -> None:
    """Raises ValueError where an attack takes more classes than there are."""
    for name in names:
        if classes < _CLASSES.get(name, 2):
            fit = ", ".join(other for other in ATTACKS if classes >= _CLASSES.get(other, 2))
            raise ValueError(
                f"attacks: {name} expects at least {_CLASSES[name]} classes, got a model with {classes}; name attacks "
                f"that fit: {fit}"
            )


class _Run:
    """The ensemble, one attack after the other on the images that are left: their order is the standard one's."""

    def __init__(
        self, adversary: Any, ensemble: ModuleType, images: Tensor, labels: Tensor, clean: Tensor, batch_size: int
    ) -> None:
        self.adversary, self.checks, self.batch_size = adversary, ensemble.checks, batch_size
        self.images, self.labels, self.clean = images, labels, clean
        self.robust, self.adversarial = clean.clone(), images.clone()
        self.broken_by = torch.full_like(labels, -1)
        self.parts: list[AutoAttackPart] = []
        self.accuracies = {"clean": float(clean.double().mean())}

    def attack(self, name: str) -> None:
        """Runs one attack and counts what it broke."""
        given = int(self.robust.sum())
        # The first run sees all images, so that the ensemble's checks do; it leaves out those misclassified itself.
        left = (self.robust if self.parts else torch.ones_like(self.robust)).nonzero()[:, 0]
        said: list[str] = []
        start = time.perf_counter()
        if given or not self.parts:
            self.adversary.attacks_to_run = [name]
            with _warnings(self.checks) as said:
                found, answers = self.adversary.run_standard_evaluation(
                    self.images[left], self.labels[left], batch_size=self.batch_size
                )
            broken = left[(answers != self.labels[left]) & self.robust[left]]
            self.adversarial[left] = found
            self.robust[broken] = False
            self.broken_by[broken] = len(self.parts)
        seconds = time.perf_counter() - start
        kept = int(self.robust.sum())
        self.parts.append(AutoAttackPart(name, given, given - kept, seconds, _grouped(said)))
        self.accuracies[name] = kept / len(self.images)

    def last_check(self) -> list[str]:
        """What AutoAttack says of the accuracies when all attacks have run."""
        with _warnings(self.checks) as said:
            self.checks.check_square_sr(self.accuracies, logger=logging.getLogger(_LOGGER))
        return _grouped(said)


_LOGGER = "auto-attack"


@contextmanager
def _warnings(checks: ModuleType) -> Iterator[list[str]]:
    """Collects what AutoAttack's checks warn of, and undoes what they do to the process."""
    said: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage().partition(" See flags_doc.md")[0])

    logger, handler, trace = logging.getLogger(_LOGGER), Collector(logging.WARNING), sys.gettrace()
    logger.addHandler(handler)
    for name in checks.funcs:
        checks.funcs[name] = 0  # counts of one model would be held against the next
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        sys.settrace(trace)


def _grouped(said: list[str]) -> list[str]:
    """Each warning once, those that differ in numbers alone by their first, with how often it came."""
    first: dict[str, str] = {}
    count: dict[str, int] = {}
    for text in said:
        kind = re.sub(r"\d+", "#", text)
        first.setdefault(kind, text)
        count[kind] = count.get(kind, 0) + 1
    return [text + (f" ({count[kind]} times)" if count[kind] > 1 else "") for kind, text in first.items()]


def package() -> ModuleType:
    """The package that has the attacks.

    Raises:
        ModuleNotFoundError: it is not installed; says how to.
    """
    try:
        import pyautoattack
    except ModuleNotFoundError as error:
        if error.name != "pyautoattack":
            raise
        raise ModuleNotFoundError(
            "pyautoattack is not installed: pip install 'sgr_kernels[autoattack]'", name="pyautoattack"
        ) from None
    return pyautoattack


def _as_fraction(eps: float) -> str:
    """8/255 for what is a whole number of grey levels, else digits."""
    levels = eps * 255
    return f"{round(levels)}/255" if abs(levels - round(levels)) < 1e-6 and round(levels) else f"{eps:g}"
