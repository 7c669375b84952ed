"""Means, errors and paired differences of curves."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from scipy.stats import ttest_ind_from_stats

from sgr_kernels.evaluation.curves import RobustnessCurve
from sgr_kernels.reproduce import stats
from sgr_kernels.reproduce.claims import NO, OPEN, YES, _test_difference, above, judge, near, weakest


def curve(correct):
    correct = torch.as_tensor(correct, dtype=torch.bool)
    eps = [k / 255 for k in range(len(correct))]
    return stats.record(RobustnessCurve(eps, correct, correct[0], "pgd", "own"), 255)


@pytest.fixture
def noise():
    return np.random.default_rng(0)


def test_masks_survive_json(noise):
    correct = noise.random((3, 21)) < 0.6
    record = curve(correct)
    assert np.array_equal(stats.masks(record), correct)
    assert record["eps"] == pytest.approx([0, 1, 2])
    assert record["area"] == pytest.approx(correct.mean())


def test_the_mean_of_one_network_has_the_binomial_error(noise):
    correct = noise.random((1, 500)) < 0.8
    estimate = stats.mean([curve(correct)])
    p = correct.mean()
    assert estimate.mean == pytest.approx(p)
    assert estimate.error == pytest.approx(math.sqrt(p * (1 - p) / 499))
    assert estimate.spread is None


@pytest.mark.parametrize(("networks", "skills"), [(3, 0.08), (3, 0.02), (8, 0.05), (1, 0.0)])
def test_intervals_hold_the_truth_about_as_often_as_they_say(noise, networks, skills):
    """Networks with accuracies of their own, all on the same images of varying difficulty."""
    hits = 0
    for _ in range(400):
        difficulty = noise.normal(0, 0.15, 200)
        runs = [curve((noise.random(200) < s + difficulty)[None]) for s in noise.normal(0.6, skills, networks)]
        estimate = stats.mean(runs)
        hits += estimate.low <= 0.6 <= estimate.high
    assert 0.915 <= hits / 400 <= 0.995


@pytest.mark.parametrize("freedom", [1, 1.3, 2, 2.5, 3, 5.7, 30, 400, 5000, math.inf])
def test_quantiles_of_student(freedom):
    assert stats.student95(freedom) == pytest.approx(student.ppf(0.975, freedom), rel=1e-3)


def test_the_largest_of_several_holds_the_truth_as_often_as_it_says(noise):
    """Without any effect, hardly one largest of eight in twenty is called positive."""
    wrong = 0
    for _ in range(2000):
        estimates = [stats.Estimate(value, 1.0, None, 1) for value in noise.normal(size=8)]
        largest = stats.chosen(max(estimates, key=lambda e: e.mean), 8)
        wrong += above(largest) == YES
    assert wrong / 2000 < 0.035
    assert stats.chosen(estimates[0], 1).half == pytest.approx(estimates[0].half, rel=1e-4)


def test_differences_are_paired(noise):
    base = noise.random((1, 400)) < 0.5
    better = base.copy()
    better[0, np.flatnonzero(~base[0])[:20]] = True
    gap = stats.difference([curve(better)], [curve(base)])
    assert gap.mean == pytest.approx(0.05)
    # 20 of 400 images differ, all the same way; unpaired, the error would be three times as large.
    assert gap.error == pytest.approx(math.sqrt(0.05 * 0.95 / 399))
    assert stats.difference([curve(base)], [curve(base)]).error == 1 / 400


def test_a_contrast_of_four_is_a_difference_of_differences(noise):
    a, b, c, d = ([curve(noise.random((2, 60)) < p) for _ in range(3)] for p in (0.9, 0.5, 0.7, 0.6))
    both = stats.contrast([(1, a), (-1, b), (-1, c), (1, d)])
    apart = stats.difference(a, b).mean - stats.difference(c, d).mean
    assert both.mean == pytest.approx(apart)
    assert both.seeds == 3


def test_a_strength_is_found_in_its_grid():
    record = curve([[True], [True], [False]])
    assert stats.at(record, 2) == 2
    with pytest.raises(ValueError, match="eps 7 is not among"):
        stats.at(record, 7)


def test_verdicts_follow_the_interval():
    def estimate(mean, error):
        return stats.Estimate(mean, error, None, 1)

    assert above(estimate(0.1, 0.01)) == YES
    assert above(estimate(-0.1, 0.01)) == NO
    assert above(estimate(0.01, 0.01)) == OPEN
    assert above(estimate(0.1, 0.01), boundary=0.2) == NO
    assert near(estimate(0.0, 0.01)) == YES
    assert near(estimate(0.02, 0.01)) == OPEN
    assert near(estimate(0.1, 0.01)) == near(estimate(-0.1, 0.01)) == NO
    assert weakest([YES, OPEN, YES]) == OPEN
    assert weakest([YES, OPEN, NO]) == NO
    assert weakest([YES, YES]) == YES


def of_accuracy(share, images=200):
    """A network with this accuracy at the one strength there is."""
    return curve((np.arange(images) < share * images)[None])


def verdict_on(start, results):
    (found,) = [v for v in judge(results) if v.claim.startswith(start)]
    return found


def test_adversarial_training_leads_only_if_it_leads_every_rival():
    """The nearest rival may be surely beaten, while one further off, of two unlike seeds, is not."""

    def methods(**shares):
        return {m: [{"test_accuracy": 0.9, "curves": {"pgd": of_accuracy(s)}} for s in v] for m, v in shares.items()}

    for other, expected in (((0.7, 0.7), YES), ((0.9, 0.4), OPEN)):
        found = {"test_images": 200, "methods": methods(pgd=(0.9, 0.9), fgsm=(0.8, 0.8), clean=other)}
        verdict = verdict_on("Adversarial training with PGD", {"table1": found})
        assert verdict.verdict == expected
        assert "fgsm" in verdict.finding or "clean" in verdict.finding


def test_gaps_of_opposite_signs_do_not_make_sgr_gn():
    def networks(short, long):
        gn = {"1": of_accuracy(0.5, 2000), "16": of_accuracy(0.5, 2000)}
        sgr = {"1": of_accuracy(short, 2000), "16": of_accuracy(long, 2000)}
        return {"limit": {"networks": {"gn": gn, "0.25": sgr}}}

    def verdict(*shares):
        results = {"methods": {}, "dataset": "mnist", **networks(*shares)}
        return verdict_on("SGR approaches GN", {"lrc": results}).verdict

    assert verdict(0.501, 0.499) == YES
    assert verdict(0.7, 0.3) == NO


def test_test_accuracies_of_few_seeds_are_compared_as_welch_does():
    ours, theirs = [0.96, 0.98, 0.97], [0.99, 0.97, 0.995]
    runs = {m: [{"test_accuracy": s} for s in v] for m, v in (("a", ours), ("b", theirs))}
    images = 10**9  # leaves the seeds alone
    estimate = _test_difference({"test_images": images, "methods": runs}, "a", "b")
    welch = ttest_ind_from_stats(
        np.mean(ours), np.std(ours, ddof=1), 3, np.mean(theirs), np.std(theirs, ddof=1), 3, equal_var=False
    )
    assert estimate.mean / estimate.error == pytest.approx(welch.statistic)
    assert 2 * student.sf(abs(welch.statistic), estimate.freedom) == pytest.approx(welch.pvalue)
