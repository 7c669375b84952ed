"""Covariance functions that are given, semidefinite, sampled from, resized and described."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from sgr_kernels import CovarianceFunction, FullCovariance
from tests.helpers import dense, dense_covariance, gradients, norms, table_shape

BINNINGS = ("rounded", "linear", "even", "offset")
FORMS = {"rounded": "radial", "even": "even", "offset": "signed"}


def _distances(size) -> torch.Tensor:
    y, x = torch.arange(size[0]).double(), torch.arange(size[1]).double()
    return torch.hypot(y[:, None], x[None, :])


def _eigenvalues(covariance) -> torch.Tensor:
    return torch.linalg.eigvalsh(covariance.dense().double())


@pytest.mark.parametrize("size", [(8, 8), (5, 9), (1, 7)])
@pytest.mark.parametrize("zeta", [1.0, 4.0])
def test_exponential_by_its_definition(size, zeta):
    """``exp(-r / zeta)`` within a channel, half of it between channels, r not rounded (section 4.3)."""
    covariance = CovarianceFunction.exponential(2, size, zeta, psd="none").double()
    mixing = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    table = torch.einsum("cd,yx->cdyx", mixing, torch.exp(-_distances(size) / zeta))
    torch.testing.assert_close(covariance.dense(), torch.tensor(dense(table, size, "even")), rtol=1e-6, atol=1e-7)
    assert covariance.frozen
    clipped = CovarianceFunction.exponential(2, size, zeta).double()
    assert float((clipped.dense() - covariance.dense()).abs().max()) < 2e-3


@pytest.mark.parametrize("binning", ["rounded", "linear", "even", "offset"])
@pytest.mark.parametrize("zeta", [0.7, 3.0])
def test_exponential_in_every_binning(binning, zeta):
    size = (6, 9)
    covariance = CovarianceFunction.exponential(1, size, zeta, binning=binning, psd="none").double()
    r = _distances(size)
    if binning == "rounded":
        expected = torch.exp(-r.round() / zeta)
    elif binning == "linear":
        lower, share = r.floor(), r - r.floor()
        expected = (1 - share) * torch.exp(-lower / zeta) + share * torch.exp(-(lower + 1) / zeta)
    else:
        expected = torch.exp(-r / zeta)
    matrix = torch.tensor(dense(expected[None, None], size, "even"))
    torch.testing.assert_close(covariance.dense(), matrix, rtol=1e-6, atol=1e-7)
    if binning == "rounded":
        same = CovarianceFunction.exponential(1, size, zeta, rounded=True, psd="none").double()
        assert torch.equal(same.dense(), covariance.dense())


@pytest.mark.parametrize("zeta", [2.0, 4.0, 8.0])
def test_rounding_makes_exponentials_indefinite_and_linear_binning_does_not(zeta):
    rounded = CovarianceFunction.exponential(1, (16, 16), zeta, rounded=True, psd="none")
    linear = CovarianceFunction.exponential(1, (16, 16), zeta, binning="linear", psd="none")
    unrounded = CovarianceFunction.exponential(1, (16, 16), zeta, psd="none")
    assert _eigenvalues(rounded)[0] < -1e-3
    assert _eigenvalues(linear)[0] > 1e-3
    assert _eigenvalues(unrounded)[0] > 1e-3
    # clipping changes a good covariance little, and mends the other at the price of a larger diagonal
    for good in (linear, unrounded):
        again = CovarianceFunction.from_values(good.table, 16)
        assert float((again.dense() - good.dense()).abs().max()) <= 2e-3
    clipped = CovarianceFunction.exponential(1, (16, 16), zeta, rounded=True)
    assert _eigenvalues(clipped)[0] > -1e-5
    assert 1 < float(clipped.dense().diagonal().mean()) < 1.2


@pytest.mark.parametrize(
    ("zeta", "eigenvalue"), [(1.0, -0.014), (2.0, -0.274), (4.0, -0.571), (8.0, -0.733), (16.0, -0.592)]
)
def test_the_smallest_eigenvalues_known_for_32_pixels(zeta, eigenvalue):
    covariance = CovarianceFunction.exponential(1, 32, zeta, rounded=True, psd="none")
    assert covariance.min_eigenvalue() == pytest.approx(eigenvalue, abs=6e-4)


def test_clipping_adds_eight_percent_to_the_diagonal_of_a_rounded_exponential():
    clipped = CovarianceFunction.exponential(1, 32, 8.0, rounded=True)
    assert float(clipped.table[0, 0, 0, 0]) == pytest.approx(1.08, abs=0.005)


def _nasty_perturbations(channels: int, size) -> dict[str, torch.Tensor]:
    y, x = torch.arange(size[0])[:, None], torch.arange(size[1])[None, :]
    shape = (1, channels, *size)
    generator = torch.Generator().manual_seed(0)
    drawn = gradients((3, channels, *size), dtype=torch.float32)
    impulse, corners = torch.zeros(shape), torch.zeros(shape)
    impulse[0, 0, size[0] // 2, size[1] // 2] = 1
    corners[0, 0, 0, 0], corners[0, 0, -1, -1] = 1, -1
    return {
        "one sign": torch.randn(shape, generator=generator).sign(),
        "white": drawn[:1],
        "pink": drawn[1:2],
        "blue": drawn[2:],
        "all": drawn,
        "constant": torch.ones(shape),
        "impulse": impulse,
        "corners": corners,
        "checkerboard": ((-1.0) ** (y + x)).expand(shape),
        "stripes": ((-1.0) ** x).expand(shape),
        "ramp": (x / size[1] + torch.sin(y / 3.0)).expand(shape),
    }


@pytest.mark.parametrize("reach", [None, 3])
@pytest.mark.parametrize("binning", BINNINGS)
@pytest.mark.parametrize(("channels", "size"), [(1, (12, 12)), (3, (7, 10)), (2, (1, 15))])
def test_a_clipped_penalty_is_not_negative_whatever_was_fed(channels, size, binning, reach):
    """``q >= -1e-6 |g| |v|``; along null vectors of Sigma, where v is rounding itself, to rounding of ``|Sigma|``."""
    for name, xi in _nasty_perturbations(channels, size).items():
        covariance = CovarianceFunction(channels, size, binning=binning, max_displacement=reach)
        covariance.update(xi)
        values, vectors = torch.linalg.eigh(covariance.dense().double())
        assert values[0] >= -1e-7 * values[-1], name
        g = gradients((12, channels, *size), seed=1, dtype=torch.float32)
        g = torch.cat([g, vectors[:, :4].T.reshape(4, channels, *size).float()])
        q, v = covariance.quadratic_form(g).double(), covariance.product(g)
        rounding = 1e-7 * norms(g) ** 2 * values[-1] if values[0] < 1e-6 * values[-1] else 0.0
        assert (q >= -1e-6 * norms(g) * norms(v) - rounding).all(), name


@pytest.mark.parametrize("binning", BINNINGS)
def test_without_clipping_the_matrix_is_exactly_as_estimated(binning):
    xi = gradients((3, 2, 5, 6))
    covariance = CovarianceFunction(2, (5, 6), binning=binning, psd="none").double()
    covariance.update(xi)
    if binning != "linear":
        exact = dense(dense_covariance(xi, FORMS[binning]), (5, 6), FORMS[binning])
        torch.testing.assert_close(covariance.dense(), torch.tensor(exact))
    assert _eigenvalues(covariance)[0] < 0  # so few samples make an indefinite estimate


def test_a_short_covariance_is_zero_beyond_its_reach_unless_clipped():
    for binning in BINNINGS:
        covariance = CovarianceFunction(1, (8, 9), binning=binning, max_displacement=2, psd="none")
        covariance.update(gradients((3, 1, 8, 9), dtype=torch.float32))
        far = torch.tensor(dense((_distances((8, 9)) >= 4)[None, None].double(), (8, 9), "even")) > 0
        assert not covariance.dense()[far].any()
        assert covariance.dense().any()
        g = gradients((2, 1, 8, 9))
        expected = g.double().flatten(1) @ covariance.dense().double().T
        torch.testing.assert_close(covariance.product(g).flatten(1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("binning", BINNINGS)
def test_samples_have_the_dense_covariance(binning):
    """The empirical covariance converges to ``dense()`` at the rate of the Wishart distribution."""
    channels, size, n = 2, (4, 5), 40_000
    covariance = CovarianceFunction(channels, size, binning=binning).double()
    covariance.update(gradients((6, channels, *size)))
    draws = covariance.sample(n, torch.Generator().manual_seed(1))
    assert draws.shape == (n, channels, *size)
    sigma, flat = covariance.dense(), draws.flatten(1)
    deviation = (sigma.diagonal()[:, None] * sigma.diagonal()[None, :] + sigma**2).div(n).sqrt()
    assert float(((flat.T @ flat / n - sigma) / deviation).abs().max()) < 5.5
    assert float((flat.mean(0) / sigma.diagonal().div(n).sqrt()).abs().max()) < 5
    assert torch.equal(draws[:5], covariance.sample(n, torch.Generator().manual_seed(1))[:5])
    assert not torch.equal(covariance.sample(2), covariance.sample(2))


@pytest.mark.parametrize("kind", ["function", "full"])
def test_samples_follow_the_estimate(kind):
    """What samples are drawn with is kept between draws, and never beyond an update, a load or a move."""
    covariance, other = ({"function": CovarianceFunction, "full": FullCovariance}[kind](1, (4, 5)) for _ in range(2))
    covariance.update(torch.ones(3, 1, 4, 5))

    def draw(c):
        return c.sample(2, torch.Generator().manual_seed(0))

    first = draw(covariance)
    assert torch.equal(first, draw(covariance))
    assert torch.equal(first, draw(copy.deepcopy(covariance)))
    covariance.update(4 * torch.ones(3, 1, 4, 5))
    second = draw(covariance)
    torch.testing.assert_close(second, first * (0.9 + 0.1 * 16) ** 0.5, rtol=1e-4, atol=1e-4)
    other.update(torch.randn(3, 1, 4, 5))
    draw(other)
    other.load_state_dict(covariance.state_dict())
    assert torch.equal(draw(other), second)
    assert covariance.double().sample(1).dtype == torch.float64


def test_samples_of_a_definite_covariance_whose_embedding_is_not():
    """Where no circulant root exists the draws come from the dense matrix's."""
    table = torch.tensor([1.0, 0.9, 0.76]).view(1, 1, 1, 3)
    covariance = CovarianceFunction.from_values(table, (3,), psd="none")
    assert _eigenvalues(covariance)[0] > 0
    flat = covariance.sample(40_000, torch.Generator().manual_seed(0)).flatten(1)
    torch.testing.assert_close(flat.T @ flat / 40_000, covariance.dense(), rtol=0, atol=0.03)


def test_an_indefinite_covariance_has_no_samples():
    covariance = CovarianceFunction.exponential(1, 12, 8.0, rounded=True, psd="none")
    with pytest.raises(ValueError, match="indefinite"):
        covariance.sample(1)


@pytest.mark.parametrize("psd", ["clip", "none"])
@pytest.mark.parametrize("binning", BINNINGS)
@pytest.mark.parametrize(("channels", "size"), [(1, (9, 9)), (3, (4, 6)), (2, (1, 8)), (1, (1, 1))])
def test_min_eigenvalue(channels, size, binning, psd):
    covariance = CovarianceFunction(channels, size, binning=binning, psd=psd)
    covariance.update(gradients((2, channels, *size), dtype=torch.float32))
    values = _eigenvalues(covariance)
    assert covariance.min_eigenvalue() == pytest.approx(float(values[0]), abs=2e-7 * float(values.abs().max()))


def test_from_images_is_the_centred_covariance_of_a_data_set():
    images = torch.rand(37, 2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    centred = CovarianceFunction.from_images(images, chunk=10, psd="none")
    expected = dense_covariance(images - images.mean(0), "radial")
    torch.testing.assert_close(centred.values, expected)
    raw = CovarianceFunction.from_images(images, center=False, psd="none")
    torch.testing.assert_close(raw.values, dense_covariance(images, "radial"))
    torch.testing.assert_close(raw.mean, images.mean(0))
    assert not centred.mean.any()
    assert centred.frozen
    assert raw.frozen
    pixels = (255 * images).round().to(torch.uint8)
    quantized = CovarianceFunction.from_images(pixels, psd="none")
    torch.testing.assert_close(quantized.values.double(), expected, rtol=0, atol=1e-3)
    table = CovarianceFunction.from_images(images, binning="even", target_variance=1.0)
    assert float(table.dense().diagonal().mean()) == pytest.approx(1.0)
    assert CovarianceFunction.from_images(images[:, :, 0]).mean.shape == (2, 4)


@pytest.mark.parametrize("binning", BINNINGS)
@pytest.mark.parametrize("reach", [None, 1])
def test_from_values_means_what_the_operators_mean(binning, reach):
    size, form = (4, 5), FORMS.get(binning, "radial")
    values = torch.randn(2, 2, *table_shape(form, size, reach), generator=torch.Generator().manual_seed(0))
    transposed = values.transpose(0, 1).flip(-2, -1) if form == "signed" else values.transpose(0, 1)
    values = values + transposed
    covariance = CovarianceFunction.from_values(values.requires_grad_(), size, binning=binning, psd="none")
    assert covariance.frozen
    if binning != "linear":
        torch.testing.assert_close(covariance.dense(), torch.tensor(dense(values, size, form)).float())
    assert not covariance.dense().requires_grad
    assert covariance.values.dtype == torch.float32
    assert CovarianceFunction.from_values(values.detach().double(), size, binning=binning).values.dtype == torch.float64


def test_from_values_takes_the_binning_from_the_rank():
    f, table = torch.tensor([[[1.0, 0.5]]]), torch.tensor([[[[1.0, 0.5], [0.25, 0.0]]]])
    assert CovarianceFunction.from_values(f, (3, 3)).binning == "rounded"
    assert CovarianceFunction.from_values(table, (3, 3)).binning == "even"


@pytest.mark.parametrize("zeta", [1.0, 2.5, 6.0])
@pytest.mark.parametrize("binning", BINNINGS)
def test_decay_length(zeta, binning):
    covariance = CovarianceFunction.exponential(3, (24, 20), zeta, binning=binning)
    length = covariance.decay_length()
    assert length.shape == (3, 3)
    # linear interpolation of an exponential errs to the far side, by less than an eighth of a pixel over zeta
    assert ((length >= zeta - 1e-4) & (length <= zeta + 0.13 / zeta)).all()


def test_decay_lengths_by_hand():
    """First displacement, interpolated, at which f(k) <= f(0)/e; infinite where it never falls so far."""

    def length(*values: float) -> float:
        f = torch.tensor(values, dtype=torch.float32).view(1, 1, -1)
        return float(CovarianceFunction.from_values(f, (1, 9), psd="none").decay_length())

    assert length(1, 0) == pytest.approx(1 - 1 / math.e)
    assert length(2, 1.5, 1.0, 0.0, 2.0) == pytest.approx(2 + 1 - 2 / math.e)
    assert length(1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.5, 0.5) == math.inf
    assert length(1, 0.9) == pytest.approx(2 - 1 / (0.9 * math.e))  # zero beyond its reach
    assert math.isnan(length(0, 0, 0))


@pytest.mark.parametrize("binning", BINNINGS)
def test_a_smaller_image_has_the_same_covariances(binning):
    """F depends on displacement alone: the matrix of a part of the image."""
    covariance = CovarianceFunction(2, (7, 8), binning=binning, psd="none").double()
    covariance.update(gradients((3, 2, 7, 8)))
    small = covariance.resize((4, 5))
    whole = covariance.dense().view(2, 7, 8, 2, 7, 8)
    torch.testing.assert_close(small.dense().view(2, 4, 5, 2, 4, 5), whole[:, 1:5, 2:7, :, 1:5, 2:7])
    assert small.values.dtype == torch.float64
    assert (int(small.updates), small.frozen, small.decay) == (1, False, 0.1)
    small.update(gradients((3, 2, 4, 5)))
    assert int(covariance.updates) == 1


@pytest.mark.parametrize("binning", BINNINGS)
def test_a_larger_image_knows_no_covariance_beyond(binning):
    covariance = CovarianceFunction(1, (4, 5), binning=binning, psd="none").double()
    covariance.update(gradients((3, 1, 4, 5)))
    large = covariance.resize((6, 6))
    part = large.dense().view(6, 6, 6, 6)[:3, :3, :3, :3]
    torch.testing.assert_close(part, covariance.dense().view(4, 5, 4, 5)[:3, :3, :3, :3])
    assert large.dense().view(6, 6, 6, 6)[0, 0, 5, 5] == 0
    np.testing.assert_array_equal(large.resize((4, 5)).values, covariance.values)
    frozen = CovarianceFunction.exponential(1, 6, 2.0).resize(9)
    assert frozen.frozen
    assert frozen.product(torch.ones(1, 1, 9, 9)).shape == (1, 1, 9, 9)
