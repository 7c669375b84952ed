"""Means, errors and paired differences of curves."""

import math

import numpy as np
import pytest
import torch

from sgr_kernels.evaluation.curves import RobustnessCurve
from sgr_kernels.reproduce import stats
from sgr_kernels.reproduce.claims import NO, OPEN, YES, above, near, weakest


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


@pytest.mark.parametrize(("freedom", "quantile"), [(2, 4.303), (3, 3.182), (5, 2.571), (30, 2.042), (math.inf, 1.96)])
def test_quantiles_of_student(freedom, quantile):
    assert stats.student95(freedom) == pytest.approx(quantile, rel=0.035)


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
