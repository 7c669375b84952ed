"""Displacements, bins and pair counts against counting by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from sgr_kernels.toeplitz import geometry
from tests.helpers import covariances, dense

CPU = torch.device("cpu")
SIZES = [(1, 1), (1, 2), (2, 2), (1, 9), (4, 1), (3, 5), (6, 6), (7, 4)]


def _pairs(size):
    pixels = list(itertools.product(range(size[0]), range(size[1])))
    return [(v - y, u - x) for (y, x), (v, u) in itertools.product(pixels, pixels)]


@pytest.mark.parametrize("size", SIZES)
def test_the_bins_reach_exactly_across_the_image(size):
    distances = [math.hypot(*pair) for pair in _pairs(size)]
    assert geometry.bin_count(size) == round(max(distances)) + 1
    assert geometry.bin_count(size, "linear") == math.ceil(max(distances)) + 1
    occupied = {round(d) for d in distances}
    assert occupied == set(range(geometry.bin_count(size)))


def test_a_distance_never_ties_between_two_bins():
    """``sqrt(n) = k + 1/2`` would need ``4n = (2k + 1)^2``, which is odd; the nearest bin is that of integers."""
    shape = (224, 224)
    k = geometry.nearest_bin(shape, CPU)
    y, x = torch.arange(224)[:, None], torch.arange(224)[None, :]
    four_n = 4 * (y**2 + x**2)
    assert ((2 * k - 1) ** 2 * (k > 0) <= four_n).all()
    assert (four_n < (2 * k + 1) ** 2).all()


@pytest.mark.parametrize("size", SIZES)
def test_pair_counts(size):
    counts = geometry.pair_counts(size, size, CPU)
    pairs = _pairs(size)
    for dy, dx in itertools.product(range(size[0]), range(size[1])):
        assert counts[dy, dx] == sum((abs(a), abs(b)) == (dy, dx) for a, b in pairs)
    assert counts.sum() == (size[0] * size[1]) ** 2


def test_pair_counts_of_large_images_pass_32_bits():
    size = (224, 224)
    counts = geometry.pair_counts(size, size, CPU)
    assert counts.sum() == 224**4 == 2_517_630_976
    binned = torch.zeros(geometry.bin_count(size), dtype=torch.int64)
    binned.index_add_(0, geometry.nearest_bin(size, CPU).flatten(), counts.flatten())
    assert binned.max() == 16_749_324  # just below 2^24, beyond which float32 would lose integers
    # The mean over a bin of constant images is their square, however many pairs it holds.
    ones = geometry.radial_from_even(counts.double(), size, geometry.bin_count(size))
    assert torch.equal(ones, torch.ones_like(ones))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bins", [1, 2, 4, 100])
def test_radial_bins_read_the_rounded_distance(size, bins):
    bins = min(bins, geometry.bin_count(size))
    f = torch.randn(2, 2, bins, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = geometry.even_from_radial(f, size)
    for dy, dx in itertools.product(range(size[0]), range(size[1])):
        k = round(math.hypot(dy, dx))
        expected = f[:, :, k] if k < bins else torch.zeros(2, 2, dtype=torch.float64)
        inside = dy < table.shape[2] and dx < table.shape[3]
        assert torch.equal(table[:, :, dy, dx], expected) if inside else not expected.any()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bins", [1, 3, 100])
def test_linear_bins_interpolate(size, bins):
    bins = min(bins, geometry.bin_count(size, "linear"))
    f = torch.randn(1, 1, bins, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = geometry.even_from_radial(f, size, "linear")
    longer = torch.cat([f, torch.zeros(1, 1, 100, dtype=torch.float64)], -1)
    for dy, dx in itertools.product(range(size[0]), range(size[1])):
        r = math.hypot(dy, dx)
        k, t = int(r), r - int(r)
        expected = (1 - t) * longer[0, 0, k] + t * longer[0, 0, k + 1]
        if dy < table.shape[2] and dx < table.shape[3]:
            torch.testing.assert_close(table[0, 0, dy, dx], expected)
        else:
            assert expected == 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("binning", ["rounded", "linear"])
@pytest.mark.parametrize("reach", [None, 2])
def test_binning_is_the_weighted_mean_over_pairs(size, binning, reach):
    """Each pair counts in its bin, or in its two bins by their distance to it."""
    bins = geometry.bin_count(size, binning) if reach is None else min(geometry.bin_count(size, binning), reach + 1)
    shape = geometry.reach_of_bins(bins, size)
    values = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sums = (values * geometry.pair_counts(size, size, CPU))[: shape[0], : shape[1]]
    weight, total = torch.zeros(bins), torch.zeros(bins, dtype=torch.float64)
    for dy, dx in _pairs(size):
        r = math.hypot(dy, dx)
        shares = {round(r): 1.0} if binning == "rounded" else {int(r): 1 - (r - int(r)), int(r) + 1: r - int(r)}
        for k, share in shares.items():
            if k < bins:
                weight[k] += share
                total[k] += share * values[abs(dy), abs(dx)]
    got = geometry.radial_from_even(sums[None, None], size, bins, binning)[0, 0]
    torch.testing.assert_close(got, total / weight.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("binning", ["rounded", "linear"])
def test_a_constant_function_survives_expansion_and_binning(binning):
    size = (9, 14)
    bins = geometry.bin_count(size, binning)
    table = geometry.even_from_radial(torch.ones(1, 1, bins, dtype=torch.float64), size, binning)
    torch.testing.assert_close(table, torch.ones_like(table))
    sums = table * geometry.pair_counts(size, size, CPU)
    torch.testing.assert_close(
        geometry.radial_from_even(sums, size, bins, binning), torch.ones(1, 1, bins, dtype=torch.float64)
    )


@pytest.mark.parametrize("form", ["even", "signed"])
@pytest.mark.parametrize("size", [(1, 1), (3, 4), (1, 5), (4, 2)])
@pytest.mark.parametrize("reach", [None, 1])
def test_dense_matrix(form, size, reach):
    table = covariances(form, 2, size, reach=reach)
    expected = torch.tensor(dense(table, size, form))
    assert torch.equal(geometry.dense_matrix(table, size, form), expected)


def test_constants_are_built_once_and_not_shared_between_sizes():
    first = geometry.nearest_bin((3, 4), CPU)
    assert geometry.nearest_bin((3, 4), CPU) is first
    assert geometry.nearest_bin((4, 3), CPU).shape == (4, 3)
    assert torch.equal(geometry.nearest_bin((4, 3), CPU), first.T)
