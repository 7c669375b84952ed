"""The demonstration's results and the folder that shows them: one page, five pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sgr_kernels.evaluation.certificates import CertificatePlan, Certificates
from sgr_kernels.evaluation.curves import RobustnessCurve
from sgr_kernels.evaluation.suite import PIXEL_LEVELS, Evaluation, Plan
from sgr_kernels.report import plots
from sgr_kernels.report.covariance import DisplacementFunction, single_channel_panel
from sgr_kernels.report.page import Page, percent, text_table
from sgr_kernels.report.plots import Line, Panel, Tile, line_figure

_CHANCE = [(0.1, "chance")]


@dataclass(frozen=True)
class Pictures:
    """Digits before and after perturbation, with every network's answer.

    Attributes:
        noise_eps: Strength of the noise, in units of each digit's standard deviation.
        labels: True class of each column.
        rows: By name of the perturbation: for each column the image (H, W) and the answers by network.
    """

    noise_eps: float
    labels: list[str]
    rows: dict[str, list[tuple[np.ndarray, dict[str, str]]]]


@dataclass(frozen=True)
class Demonstration:
    """Everything a demonstration found.

    Attributes:
        options_text: How the networks were trained, in a sentence or two.
        methods: Settings of each network's training.
        plan: The attacks.
        test_images: Test images that ``test_accuracy`` counts.
        test_accuracy: Accuracy without attack on all of them, by network.
        training_seconds: By network.
        evaluations: By network.
        certificate_plan: The noise of the certificates.
        certificates: Certified radii of the first of these images.
        noise_covariances: Covariance functions of the noise SGR was told of, and of the digits.
        gradient_covariances: Covariance functions of the loss gradients, one for each network.
        pictures: Example digits.
        seconds: For everything.
    """

    options_text: str
    methods: dict[str, dict[str, Any]]
    plan: Plan
    test_images: int
    test_accuracy: dict[str, float]
    training_seconds: dict[str, float]
    evaluations: dict[str, Evaluation]
    certificate_plan: CertificatePlan
    certificates: Certificates
    noise_covariances: list[DisplacementFunction]
    gradient_covariances: list[DisplacementFunction]
    pictures: Pictures
    seconds: float

    @property
    def attacked_images(self) -> int:
        """Test images attacked."""
        return next(iter(self.evaluations.values())).clean.correct.shape[1]

    @property
    def certified_images(self) -> int:
        """Test images certified."""
        return len(next(iter(self.certificates.found.values())).radii)

    def to_dict(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        return {
            "seconds": round(self.seconds, 1),
            "plan": asdict(self.plan),
            "test_images": self.test_images,
            "networks": {
                name: {
                    "settings": settings,
                    "training_seconds": round(self.training_seconds[name], 1),
                    "test_accuracy": self.test_accuracy[name],
                    **self.evaluations[name].to_dict(),
                }
                for name, settings in self.methods.items()
            },
            "certificates": self.certificates.to_dict(),
            "noise_covariance": {function.name: function.to_dict() for function in self.noise_covariances},
            "gradient_covariance": {function.name: function.to_dict() for function in self.gradient_covariances},
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the summary, one row for each network."""
        lengths = self.plan.decay_lengths
        header = ["network", "no attack", "FGSM", "PGD", *(f"noise {length:g}" for length in lengths), "training"]
        rows = []
        for name, result in self.evaluations.items():
            shares = [self.test_accuracy[name], result.attacks["fgsm"].area, result.attacks["pgd"].area]
            shares += [result.noise[length].accuracy[-1] for length in lengths]
            rows.append([name, *(f"{100 * share:.1f}" for share in shares), f"{self.training_seconds[name]:.0f} s"])
        return header, rows

    def terminal_summary(self) -> str:
        """The table and how to read it."""
        return f"{text_table(*self.table())}\n\n{self._reading()}"

    def _reading(self) -> str:
        eps = self.plan.eps
        return (
            f"Accuracy in %. No attack: all {self.test_images:,} test digits. The rest: the first "
            f"{self.attacked_images} of them. FGSM, PGD: mean over eps {min(eps):g} to {max(eps):g} of 255. "
            f"Noise: Gaussian, correlated over so many pixels, {self.plan.noise_eps[-1]:g} times as strong as the "
            f"digit, worst of {self.plan.draws} draws."
        )

    def _finding(self) -> str:
        """The comparison that SGR is about, in counts of digits."""
        length = max(self.plan.decay_lengths)
        curves = {name: evaluation.noise[length] for name, evaluation in self.evaluations.items()}
        *others, best = curves
        sentences = [
            f"Under noise correlated over {length:g} pixels "
            + ", ".join(f"{name} keeps {percent(c.accuracy[-1], c.interval()[-1])}" for name, c in curves.items())
            + " (95 % intervals)."
        ]
        for other in others:
            mine, theirs = curves[best].correct[-1], curves[other].correct[-1]
            won, lost = int((mine & ~theirs).sum()), int((theirs & ~mine).sum())
            sentences.append(
                f"{best} withstands all draws on {won} digits on which {other} does not; the reverse holds for {lost}."
            )
        return " ".join(sentences)

    def _certified(self) -> str:
        """Mean certified radii, and what they mean in grey levels."""
        plan, found = self.certificate_plan, self.certificates
        (sigma,) = plan.sigmas
        sentences = []
        for length in plan.decay_lengths:
            radii = {name: found.found[name, length, sigma].mean_radius for name in self.evaluations}
            levels = PIXEL_LEVELS * found.shift[length]
            sentences.append(
                f"Decay length {length:g}: "
                + ", ".join(f"{name} {radius:.2f}" for name, radius in radii.items())
                + f"; at a radius of 1 lies a shift of all pixels at once by {levels:.0f} of 255."
            )
        return "Mean certified radius, zero where the answer is wrong or missing. " + " ".join(sentences)


def write_report(demonstration: Demonstration, folder: Path) -> None:
    """Write report.md and its pictures into an existing folder."""
    plan, pictures = demonstration.plan, demonstration.pictures
    networks = ", ".join(demonstration.evaluations)
    plots.save(_noise_figure(demonstration), folder / "accuracy-against-decay-length.png")
    plots.save(_attack_figure(demonstration), folder / "accuracy-against-eps.png")
    plots.save(_covariance_figure(demonstration), folder / "covariance-functions.png")
    page = Page("What structured gradient regularization does")
    page.text(
        "Three copies of one network learned the same digits: one with plain cross-entropy (clean), one with the "
        "gradient-norm penalty (GN), one with structured gradient regularization (SGR), which penalises the input "
        "gradient in the metric of a covariance of perturbations, here of noise that neighbouring pixels share. "
        f"{demonstration.options_text} The whole run took {demonstration.seconds / 60:.1f} minutes."
    )
    page.table(*demonstration.table())
    page.text(demonstration._reading())
    page.heading("Noise that neighbouring pixels share")
    page.text(demonstration._finding())
    page.figure(
        "accuracy-against-decay-length.png",
        "Accuracy under correlated noise, against the distance over which it is correlated. Bars: 95 % binomial "
        "intervals. All three networks meet noise of the same strength; only its structure changes along the axis. "
        "Towards the left neighbouring pixels are nearly independent, and a structured penalty has no advantage "
        "over GN; towards the right it has.",
    )
    if pictures.labels:
        plots.save(_picture_figure(pictures), folder / "digits.png")
        page.figure(
            "digits.png",
            f"Digits, and what the networks ({networks}) take them for. Shown is, for each class, the first digit "
            "that all three recognise unperturbed and at least one fails to under the noise in the third row; a class "
            "without such a digit is left out. So they were chosen for disagreement: the unselected numbers are in "
            f"the table. Noise: one draw, {pictures.noise_eps:g} times the digit's own standard deviation, "
            "shown from its darkest to its brightest pixel.",
        )
    page.heading("Gradient attacks")
    page.figure(
        "accuracy-against-eps.png",
        f"Accuracy against the strength of white-box attacks. Bars: 95 % binomial intervals. PGD: {plan.pgd_steps} "
        "steps from a random start. These attacks disturb short-range structure, against which the long-range "
        "covariance of this demonstration is not aimed: `sgr train --perturbation sign` estimates it from the "
        "attacks themselves.",
    )
    plots.save(_certificate_figure(demonstration), folder / "certified-accuracy.png")
    page.heading("What no attack can break")
    page.text(
        "Ask a network about many noisy copies of an image and take the answer that it gives most often: it provably "
        "stays the same for every perturbation whose size, in the metric of the noise's covariance, is below a radius. "
        "With noise that neighbouring pixels share that holds for large perturbations of the same kind, such as a "
        "change of light. " + demonstration._certified()
    )
    page.figure(
        "certified-accuracy.png",
        f"Share of the first {demonstration.certified_images} digits that are answered rightly, and provably so up to "
        f"a radius; {demonstration.certificate_plan.draws} noisy copies of each. Dotted: the largest radius that so "
        "few copies can prove.",
    )
    page.heading("Why: covariance functions")
    page.figure(
        "covariance-functions.png",
        "Covariance of two pixels against their distance, divided by the variance of one. Left: the noise that SGR "
        "was told of, and the digits. Right: the loss gradient of each trained network, which says what it listens "
        "to. Where the gradient keeps its sign over a distance, noise that keeps its sign over that distance adds up; "
        "where the gradient changes sign within a few pixels (a covariance below zero), such noise cancels. Dotted "
        "verticals: decay lengths, at which the covariance has fallen to 1/e.",
    )
    page.heading("Read with care")
    page.text(
        f"One seed and {demonstration.attacked_images} digits: differences smaller than the bars mean nothing. "
        "Gradient regularization is a first line of defence and no substitute for adversarial training against "
        "gradient attacks. Every number is in `results.json`, with the settings of the run."
    )
    page.write(folder / "report.md")


def _noise_figure(demonstration: Demonstration) -> plots.Figure:
    plan = demonstration.plan
    panels = []
    for k, eps in enumerate(plan.noise_eps):

        def at(curve: RobustnessCurve, k: int = k) -> tuple[float, tuple[float, float]]:
            return curve.accuracy[k], curve.interval()[k]

        lines = [
            _line(name, list(plan.decay_lengths), [at(result.noise[length]) for length in plan.decay_lengths])
            for name, result in demonstration.evaluations.items()
        ]
        panels.append(_accuracy_panel(f"eps {eps:g}", "decay length [pixels]", lines, plan.decay_lengths))
    return line_figure(
        panels, f"Accuracy under correlated noise of eps standard deviations of the digit, worst of {plan.draws} draws"
    )


def _covariance_figure(demonstration: Demonstration) -> plots.Figure:
    shown = 15
    return line_figure(
        [
            single_channel_panel("Noise and digits", demonstration.noise_covariances, until=2 * shown),
            single_channel_panel("Loss gradients", demonstration.gradient_covariances, until=shown, markers=True),
        ]
    )


def _attack_figure(demonstration: Demonstration) -> plots.Figure:
    names = {"fgsm": "FGSM", "pgd": f"PGD, {demonstration.plan.pgd_steps} steps"}
    panels = []
    for attack, title in names.items():
        lines = [
            _line(
                name,
                [PIXEL_LEVELS * eps for eps in result.attacks[attack].eps],
                list(zip(result.attacks[attack].accuracy, result.attacks[attack].interval())),
            )
            for name, result in demonstration.evaluations.items()
        ]
        panels.append(_accuracy_panel(title, "eps [1/255]", lines, None))
    return line_figure(panels, "Accuracy under white-box gradient attacks")


def _certificate_figure(demonstration: Demonstration) -> plots.Figure:
    (sigma,) = demonstration.certificate_plan.sigmas
    panels = []
    for length in demonstration.certificate_plan.decay_lengths:
        cells = {name: demonstration.certificates.found[name, length, sigma] for name in demonstration.evaluations}
        end = max(cell.largest_radius for cell in cells.values())
        radii = list(np.linspace(0, 1.05 * end, 200))
        lines = [Line(name, radii, list(cell.certified_accuracy(radii))) for name, cell in cells.items()]
        panel = _accuracy_panel(f"decay length {length:g}", "certified radius", lines, None)
        panels.append(replace(panel, levels=(), mark=end, markers=False))
    return line_figure(panels, f"Certified accuracy under correlated noise, sigma {sigma:g} in pixel units")


def _line(name: str, x: list[float], points: list[tuple[float, tuple[float, float]]]) -> Line:
    return Line(name, x, [y for y, _ in points], [low for _, (low, _) in points], [high for _, (_, high) in points])


def _accuracy_panel(title: str, x_label: str, lines: list[Line], ticks: Any) -> Panel:
    return Panel(title, x_label, "accuracy", lines, levels=_CHANCE, y_range=(0, 1.02), x_ticks=ticks)


def _picture_figure(pictures: Pictures) -> plots.Figure:
    rows: list[tuple[str, list[Tile]]] = []
    for row, (name, tiles) in enumerate(pictures.rows.items()):
        titled: Callable[[str], str] = (lambda label: f"digit: {label}") if row == 0 else (lambda label: "")
        rows.append(
            (
                name,
                [
                    Tile(
                        image,
                        [(f"{network}: {answer}", answer == label) for network, answer in answers.items()],
                        titled(label),
                    )
                    for label, (image, answers) in zip(pictures.labels, tiles)
                ],
            )
        )
    return plots.image_grid(rows)
