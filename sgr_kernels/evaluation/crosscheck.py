"""This package's PGD beside AutoAttack: how far apart the two accuracies are, and what that says."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from sgr_kernels.attacks.gradient import pgd
from sgr_kernels.attacks.guard import Model, model_device
from sgr_kernels.attacks.inputs import seeded
from sgr_kernels.checks import check_count
from sgr_kernels.evaluation.autoattack import AutoAttackResult
from sgr_kernels.evaluation.curves import LabelSource, RobustnessCurve, robustness_curve
from sgr_kernels.evaluation.loaders import Loader, first_images

TELLING = 0.02  # a difference worth a sentence

CAUSES = {
    "apgd-ce": "its steps are more, begin at the ball's diameter, and adapt: PGD has not finished; raise --pgd-steps, "
    "or let them shrink, pgd(schedule='cosine')",
    "apgd-t": "it goes towards each class in turn, by the logits' ratio: PGD on the cross-entropy goes towards a class "
    "that is not the nearest, or the logits' scale hides where to go; see sanity_report and pgd(loss='scaled')",
    "fab-t": "it looks for the nearest boundary: adversarial images lie close to eps, where PGD's steps jump about",
    "square": "it uses no gradients: gradients are hidden, and accuracies under gradient attacks are not to be trusted",
}
CAUSES |= {"apgd-dlr": CAUSES["apgd-t"], "fab": CAUSES["fab-t"]}
"""Why an attack of the ensemble breaks what PGD does not."""


@dataclass(frozen=True)
class CrossCheck:
    """AutoAttack and PGD on the same images, at the same strength.

    Attributes:
        autoattack: from the true labels.
        pgd: one strength; ``pgd.labels`` says whose labels it starts from.
        pgd_steps: of PGD.
    """

    autoattack: AutoAttackResult
    pgd: RobustnessCurve
    pgd_steps: int

    @property
    def kept(self) -> Tensor:
        """(n,) bool: correct under PGD."""
        return self.pgd.correct[0]

    @property
    def difference(self) -> float:
        """Accuracy under PGD minus that under AutoAttack: what PGD overrates."""
        return self.pgd.accuracy[0] - self.autoattack.accuracy

    @property
    def both(self) -> float:
        """Share of the images that neither breaks."""
        return float((self.kept & self.autoattack.robust).double().mean())

    def won_by(self) -> dict[str, int]:
        """Of the images that stand under PGD, how many each attack of the ensemble broke."""
        numbers = self.autoattack.broken_by[self.kept]
        return {part.name: int((numbers == number).sum()) for number, part in enumerate(self.autoattack.parts)}

    def causes(self) -> list[str]:
        """Sentences on a difference of more than two points; none for a smaller one."""
        count = len(self.kept)
        if self.difference > TELLING:
            won = {name: number for name, number in self.won_by().items() if number}
            turned = int((self.kept & ~self.autoattack.clean).sum())
            found = [f"{name} broke {number} that PGD did not: {CAUSES[name]}." for name, number in won.items()]
            if turned:
                found.append(
                    f"Misclassified images that count as correct under PGD: {turned}; it starts from the model's own "
                    "answer and led away from it."
                )
            return found
        missed = int((self.autoattack.robust & ~self.kept).sum())
        if self.difference < -TELLING:
            few = "" if self.autoattack.standard else "; not all of its attacks were run"
            return [
                f"PGD broke {missed} of {count} images that AutoAttack did not{few}: neither figure is the last word."
            ]
        return []

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: AutoAttack's record, and PGD's beside it."""
        return {
            **self.autoattack.to_dict(),
            "pgd": {
                "steps": self.pgd_steps,
                "labels": self.pgd.labels,
                "accuracy": self.pgd.accuracy[0],
                "difference": self.difference,
                "neither_breaks": self.both,
                "won_by": self.won_by(),
                "causes": self.causes(),
            },
        }

    def __str__(self) -> str:
        """AutoAttack's lines, PGD's, and the causes."""
        line = (
            f"{'pgd':>10}: accuracy {self.pgd.accuracy[0]:.1%} ({self.pgd_steps} steps): {100 * self.difference:+.1f} "
            f"points; neither breaks {self.both:.1%}"
        )
        return "\n".join([str(self.autoattack), line, *(f"{'':>12}{cause}" for cause in self.causes())])


def against_pgd(
    model: Model,
    loader: Loader,
    result: AutoAttackResult,
    *,
    pgd_steps: int = 20,
    seed: int = 0,
    labels: LabelSource = "auto",
) -> CrossCheck:
    """PGD on the images that AutoAttack had, as many as it had, at its strength.

    Args:
        model: as for ``autoattack``.
        loader: as for ``autoattack``, with the same images.
        result: of ``autoattack``.
        pgd_steps: steps of PGD, each ``2.5 eps / steps`` long.
        seed: of PGD's starts.
        labels: what PGD starts from, as in ``robustness_curve``.

    Raises:
        ValueError: as ``robustness_curve``, or fewer images than AutoAttack had.
    """
    check_count("pgd_steps", pgd_steps)
    count = len(result.robust)
    images, answers = first_images(loader, count, model_device(model))
    if len(images) < count:
        raise ValueError(f"loader: expected the {count} images that AutoAttack had, got {len(images)}")
    attack = partial(pgd, steps=pgd_steps, norm=result.norm, early_stop=True, bounds=result.bounds)
    parts = list(zip(images.split(result.batch_size), answers.split(result.batch_size)))
    curve = robustness_curve(model, parts, attack, [result.eps], seeded(seed), labels=labels)
    return CrossCheck(result, curve, pgd_steps)
