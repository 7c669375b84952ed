"""What the paper claims, and whether the results bear it out: every verdict follows from numbers by a stated rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sgr_kernels.evaluation.curves import wilson_interval
from sgr_kernels.reproduce import covariance, lrc, paper, smoothness, stats
from sgr_kernels.reproduce.leaking import LEAKING, largest_gain
from sgr_kernels.reproduce.stats import Estimate

YES, NO, OPEN = "reproduced", "not reproduced", "undecided"
RULE = (
    "Reproduced: the 95 % interval lies wholly on the claimed side of the boundary named; not reproduced: wholly on "
    "the other side; undecided: it holds the boundary. A claim with several parts is as good as its weakest part. "
    "Nothing is corrected for the number of claims and parts: of twenty intervals one may miss."
)
NEAR = 0.03

Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """One claim, judged.

    Attributes:
        claim: What the paper says.
        finding: The numbers.
        verdict: ``YES``, ``NO`` or ``OPEN``.
        experiment: Whose page has the details.
    """

    claim: str
    finding: str
    verdict: str
    experiment: str


def judge(results: Results) -> list[Verdict]:
    """All claims whose experiments have been run."""
    found = []
    for experiment, check in CHECKS:
        if experiment in results and (answer := check(results[experiment])) is not None:
            claim, finding, verdict = answer
            found.append(Verdict(claim, finding, verdict, experiment))
    return found


def above(estimate: Estimate, boundary: float = 0.0) -> str:
    """Is it larger than the boundary?"""
    return YES if estimate.low > boundary else NO if estimate.high < boundary else OPEN


def near(estimate: Estimate, margin: float = NEAR) -> str:
    """Is it within the margin of zero?"""
    if -margin < estimate.low and estimate.high < margin:
        return YES
    return NO if estimate.low > margin or estimate.high < -margin else OPEN


def weakest(verdicts: list[str]) -> str:
    """The verdict on all of them together."""
    return next((verdict for verdict in (NO, OPEN) if verdict in verdicts), YES)


Answer = tuple[str, str, str] | None


def _curves(results: dict[str, Any], method: str, attack: str = "pgd") -> list[dict[str, Any]]:
    return [run["curves"][attack] for run in results["methods"][method]]


def _has(results: dict[str, Any], *methods: str) -> bool:
    return all(method in results["methods"] for method in methods)


def _regularized_beat_clean(results: dict[str, Any]) -> Answer:
    if not _has(results, "clean", "gn", "sgr_sign"):
        return None
    gains = {m: stats.difference(_curves(results, m), _curves(results, "clean")) for m in ("gn", "sgr_sign")}
    finding = "PGD, mean over the grid, minus clean: " + _points(gains)
    return "GN and SGR are more accurate than plain training under PGD", finding, weakest([*map(above, gains.values())])


def _sgr_near_gn(results: dict[str, Any]) -> Answer:
    if not _has(results, "gn", "sgr_sign"):
        return None
    gap = stats.difference(_curves(results, "sgr_sign"), _curves(results, "gn"))
    claim = f"SGR and GN are close under PGD (within {100 * NEAR:g} points)"
    return claim, f"sgr_sign minus gn: {gap.points()}", near(gap)


def _variants_alike(results: dict[str, Any]) -> Answer:
    others = [m for m in ("sgr_grad", "fgsm_sgr", "pgd_sgr") if _has(results, m, "sgr_sign")]
    if not others:
        return None
    gaps = {m: stats.difference(_curves(results, m), _curves(results, "sgr_sign")) for m in others}
    claim = f"Whatever its perturbations come from, SGR does almost the same under PGD (within {100 * NEAR:g} points)"
    return claim, "minus sgr_sign: " + _points(gaps), weakest([near(gap) for gap in gaps.values()])


def _accuracy_kept(results: dict[str, Any]) -> Answer:
    if not _has(results, "clean", "gn", "sgr_sign"):
        return None
    gaps = {m: _test_difference(results, m, "clean") for m in ("gn", "sgr_sign")}
    claim = "GN and SGR cost at most 1 point of test accuracy"
    return claim, "test accuracy minus clean's: " + _points(gaps), weakest([above(g, -0.01) for g in gaps.values()])


def _test_difference(results: dict[str, Any], ours: str, theirs: str) -> Estimate:
    """Errors from seeds and, as if the two had different test images, from the images: too wide rather than narrow."""
    means, variance, uncertain = [], 0.0, 0.0
    for method in (ours, theirs):
        shares = np.asarray([run["test_accuracy"] for run in results["methods"][method]])
        low, high = wilson_interval(round(shares.mean() * results["test_images"]), results["test_images"])
        of_seeds = float(shares.var(ddof=1)) / len(shares) if len(shares) > 1 else 0.0
        variance += ((high - low) / (2 * stats.Z95)) ** 2 + of_seeds
        uncertain += of_seeds**2 / max(1, len(shares) - 1)
        means.append(float(shares.mean()))
    freedom = variance**2 / uncertain if uncertain else np.inf  # Welch and Satterthwaite
    return Estimate(means[0] - means[1], variance**0.5, None, 1, freedom)


def _adversarial_training_leads(results: dict[str, Any]) -> Answer:
    rivals = [m for m in results["methods"] if m not in ("pgd", "lrc")]
    if not _has(results, "pgd") or not rivals:
        return None
    leads = {m: stats.difference(_curves(results, "pgd"), _curves(results, m)) for m in rivals}
    # The next best, and whoever may be ahead of it: a few seeds leave wide intervals.
    nearest = {min(leads, key=lambda m: leads[m].mean), min(leads, key=lambda m: leads[m].low)}
    shown = _points({m: lead for m, lead in leads.items() if m in nearest})
    claim = "Adversarial training with PGD is the most accurate under PGD"
    return claim, f"smallest lead over another method: {shown}", weakest([*map(above, leads.values())])


def _regularized_perturbations_transfer(results: dict[str, Any]) -> Answer:
    sources = results["sources"]
    if not all(m in sources for m in ("clean", "pgd", "fgsm", "gn", "sgr_sign")):
        return None
    level, eps = _strongest(results)
    curves = {m: [sources[m]["clean"]] for m in ("pgd", "fgsm", "gn", "sgr_sign")}
    gap = stats.contrast(
        [(0.5, curves["pgd"]), (0.5, curves["fgsm"]), (-0.5, curves["gn"]), (-0.5, curves["sgr_sign"])], level
    )
    claim = "Perturbations of GN and SGR networks hurt the clean network more than those of adversarially trained ones"
    shown = ", ".join(f"{m} {stats.mean(c, level).percent()}" for m, c in curves.items())
    return claim, f"clean network at eps {eps:g}/255, by source: {shown}; gap {gap.points()}", above(gap)


def _clean_perturbations_do_not(results: dict[str, Any]) -> Answer:
    sources = results["sources"]
    if not all(m in sources for m in ("clean", "gn", "sgr_sign")):
        return None
    level, eps = _strongest(results)
    gaps = {m: stats.difference([sources["clean"][m]], [sources[m]["clean"]], level) for m in ("gn", "sgr_sign")}
    claim = "Perturbations of the clean network hurt GN and SGR networks less than theirs hurt it"
    return claim, f"at eps {eps:g}/255: {_points(gaps)}", weakest([*map(above, gaps.values())])


def _strongest(results: dict[str, Any]) -> tuple[int, float]:
    eps = max(results["single_eps"])
    return stats.at(results["sources"]["clean"]["clean"], eps), eps


def _noise(results: dict[str, Any], method: str, noise: str) -> list[dict[str, Any]]:
    return [run["curves"][noise] for run in results["methods"][method] if noise in run["curves"]]


def _ends(results: dict[str, Any]) -> tuple[str, str]:
    lengths = results["decay_lengths"]
    return f"{min(lengths):g}", f"{max(lengths):g}"


def _over_eps(results: dict[str, Any]) -> str:
    return "mean over eps " + ", ".join(f"{eps:g}" for eps in sorted(results["eps"]))


def _sgr_beats_gn(results: dict[str, Any]) -> Answer:
    if not _has(results, "gn", "sgr_exp"):
        return None
    _, longest = _ends(results)
    gap = stats.difference(_noise(results, "sgr_exp", longest), _noise(results, "gn", longest))
    claim = "Under long-range correlated noise SGR (exponential covariance) beats GN"
    return claim, f"decay length {longest}, {_over_eps(results)}: {gap.points()}", above(gap)


def _margin(results: dict[str, Any]) -> Answer:
    eps = paper.MAIN_NOISE_EPS
    if results["dataset"] != "cifar10" or eps not in results["eps"] or not _has(results, "gn", "sgr_exp"):
        return None
    _, longest = _ends(results)
    gap = stats.difference(
        _noise(results, "sgr_exp", longest), _noise(results, "gn", longest), results["eps"].index(eps)
    )
    claim = f"... by more than {paper.MARGIN_AT_LONG_RANGE:g} points at decay length {longest}, eps {eps:g}"
    return claim, gap.points(), above(gap, paper.MARGIN_AT_LONG_RANGE / 100)


def _margin_grows(results: dict[str, Any]) -> Answer:
    if not _has(results, "gn", "sgr_exp"):
        return None
    shortest, longest = _ends(results)
    ours = {z: _noise(results, "sgr_exp", z) for z in (f"{length:g}" for length in results["decay_lengths"])}
    margins = {z: stats.difference(curves, _noise(results, "gn", z)) for z, curves in ours.items()}
    growth = stats.contrast(
        [
            (1.0, ours[longest]),
            (-1.0, _noise(results, "gn", longest)),
            (-1.0, ours[shortest]),
            (1.0, _noise(results, "gn", shortest)),
        ]
    )
    claim = "SGR's margin over GN grows with the noise's decay length"
    finding = f"margin by decay length: {_points(margins)}; longest minus shortest: {growth.points()}"
    return claim, finding, above(growth)


def _sgr_beats_others(results: dict[str, Any]) -> Answer:
    if not _has(results, "clean", "lrc", "sgr_exp"):
        return None
    _, longest = _ends(results)
    ours = _noise(results, "sgr_exp", longest)
    gaps = {m: stats.difference(ours, _noise(results, m, longest)) for m in ("clean", "lrc")}
    claim = "... and plain and noise-augmented training"
    return claim, f"sgr_exp minus, at decay length {longest}: {_points(gaps)}", weakest([*map(above, gaps.values())])


def _data_covariance(results: dict[str, Any]) -> Answer:
    if not _has(results, "clean", "gn", "lrc", "sgr_exp"):
        return None
    ours = _noise(results, "sgr_exp", lrc.DATA)
    gaps = {m: stats.difference(ours, _noise(results, m, lrc.DATA)) for m in ("gn", "lrc", "clean")}
    claim = "Under noise with the data set's covariance SGR beats GN, noise-augmented and plain training"
    finding = f"sgr_exp minus, {_over_eps(results)}, one seed: {_points(gaps)}"
    return claim, finding, weakest([*map(above, gaps.values())])


def _limit_is_gn(results: dict[str, Any]) -> Answer:
    networks = results["limit"]["networks"]
    lengths = sorted((name for name in networks if name != "gn"), key=float)
    noises = list(networks["gn"])

    def gap(name: str) -> Estimate:
        share = 1 / len(noises)
        terms = [(share, [networks[name][z]]) for z in noises] + [(-share, [networks["gn"][z]]) for z in noises]
        return stats.contrast(terms)

    gaps = {name: gap(name) for name in lengths}
    closest = near(gaps[lengths[0]])
    # Gaps of opposite signs must not cancel: none may lie outside the margin.
    apart = {z: stats.difference([networks[lengths[0]][z]], [networks["gn"][z]]) for z in noises}
    verdict = NO if any(near(estimate) == NO for estimate in apart.values()) else closest
    claim = (
        f"SGR approaches GN as its covariance's decay length goes to 0 (at {lengths[0]}: within {100 * NEAR:g} points)"
    )
    finding = (
        f"SGR minus GN by SGR's decay length, mean over the noises: {_points(gaps)}; "
        f"at {lengths[0]}, by noise: {_points(apart)}"
    )
    return claim, finding, verdict


def _short_range(results: dict[str, Any]) -> Answer:
    found = results["covariances"]
    lengths = {
        name: np.inf if entry["decay_length"] is None else entry["decay_length"] for name, entry in found.items()
    }
    data, _ = lengths.pop("data"), lengths.pop(covariance.CLIPPED)
    longest = max(lengths.values())
    verdict = YES if longest < data / 2 else NO if longest >= data else OPEN
    claim = "Adversarial perturbations have a shorter range than the data (boundary: half the data's decay length)"
    shown = ", ".join(f"{name} {length:.2f}" for name, length in lengths.items())
    return claim, f"decay lengths in pixels: {shown}; data {data:.2f}. No interval", verdict


def _small_mean(results: dict[str, Any]) -> Answer:
    shares = {name: results["covariances"][name]["mean_share"] for name in ("pgd", "fgsm", "deepfool")}
    largest = max(shares.values())
    verdict = YES if largest <= 3 * paper.MEAN_SHARE else NO if largest >= 10 * paper.MEAN_SHARE else OPEN
    claim = "The squared mean perturbation is about 1/1000 of the second moment (boundary: 3/1000; 1/100 is not)"
    shown = ", ".join(f"{name} {share:.1e}" for name, share in shares.items())
    return claim, f"{shown}. No interval", verdict


def _small_correction(results: dict[str, Any]) -> Answer:
    shares = {
        f"{network}, {source}": Estimate(entry["share"], entry["error"], None, 1)
        for network, sources in results["mean_correction"].items()
        for source, entry in sources.items()
    }
    claim = "The mean correction (Eq. 12) is small (within a fifth of the penalty)"
    shown = ", ".join(f"{k} {100 * e.mean:+.0f} ± {100 * stats.Z95 * e.error:.0f} %" for k, e in shares.items())
    return claim, shown, weakest([near(e, 0.2) for e in shares.values()])


def _function_suffices(results: dict[str, Any]) -> Answer:
    found = results["variants"]
    if "full" not in found:
        return None
    gap = stats.difference([found["function"]["pgd"]], [found["full"]["pgd"]])
    claim = "The covariance function loses nothing against the full matrix (at most 1 point under PGD)"
    tests = f"test accuracy {found['function']['test_accuracy']:.1%} and {found['full']['test_accuracy']:.1%}"
    return claim, f"function minus full: {gap.points()}, {tests}", above(gap, -0.01)


def _smoother(results: dict[str, Any]) -> Answer:
    networks = results["networks"]
    places = results["positions"]
    if not all(m in networks for m in ("clean", "gn", "sgr_sign")):
        return None
    steep = {name: smoothness.steepness(entry, places) for name, entry in networks.items()}
    gaps = {m: _of_images(steep["clean"] - steep[m]) for m in ("gn", "sgr_sign")}
    claim = "GN and SGR networks change more smoothly towards an adversarial image than the clean one"
    shown = ", ".join(f"{name} {values.mean():.2f}" for name, values in steep.items())
    return claim, f"steepest change of probability per perturbation: {shown}", weakest([*map(above, gaps.values())])


def _of_images(values: np.ndarray) -> Estimate:
    return Estimate(float(values.mean()), float(values.std()) / max(1, len(values) - 1) ** 0.5, None, 1)


def _no_leaking(results: dict[str, Any]) -> Answer:
    networks = [m for m in results["networks"] if m == "gn" or "sgr" in m]
    gains = {m: largest_gain(results["networks"][m]["true"]) for m in networks}
    if not gains:
        return None
    worst = max(gains, key=lambda m: gains[m].low)
    verdict = OPEN
    if any(above(gain) == YES for gain in gains.values()):
        verdict = NO
    elif all(gain.high < 0.01 for gain in gains.values()):
        verdict = YES
    claim = "Regularized networks do not profit from perturbations: no label leaking (below 1 point; above 0 is some)"
    return claim, f"largest gain under FGSM from true labels: {worst} {gains[worst].points()}", verdict


def _leaking_exists(results: dict[str, Any]) -> Answer:
    if LEAKING not in results["networks"]:
        return None
    gain = largest_gain(results["networks"][LEAKING]["true"])
    return "Adversarial training can leak labels", f"{LEAKING}: gain {gain.points()}", above(gain)


def _points(estimates: dict[str, Estimate]) -> str:
    return ", ".join(f"{name} {estimate.points()}" for name, estimate in estimates.items())


CHECKS: tuple[tuple[str, Callable[[dict[str, Any]], Answer]], ...] = (
    ("covariance", _short_range),
    ("covariance", _small_mean),
    ("covariance", _small_correction),
    ("covariance", _function_suffices),
    ("lrc", _sgr_beats_gn),
    ("lrc", _margin),
    ("lrc", _sgr_beats_others),
    ("lrc", _margin_grows),
    ("lrc", _data_covariance),
    ("lrc", _limit_is_gn),
    ("table1", _regularized_beat_clean),
    ("table1", _sgr_near_gn),
    ("table1", _variants_alike),
    ("table1", _accuracy_kept),
    ("table1", _adversarial_training_leads),
    ("transfer", _regularized_perturbations_transfer),
    ("transfer", _clean_perturbations_do_not),
    ("smoothness", _smoother),
    ("leaking", _no_leaking),
    ("leaking", _leaking_exists),
)
