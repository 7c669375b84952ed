"""The CUDA kernels, executed without a GPU: the same source on an emulated device, against float64 mathematics.

AddressSanitizer watches every access, workspaces, outputs and shared memory start as NaN, and the emulated matrix
instructions round as pessimistically as any tensor core.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.signal import fftconvolve
from torch import Tensor

from sgr_kernels.backends import Request, native
from sgr_kernels.toeplitz.spectrum import frequency_counts, spectrum_from_table
from tests.cuda_emulator import HOPPER, STAGED_ONLY, Emulator, build, missing_compiler

_REASON = missing_compiler()
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))

V_TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12}
Q_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.fixture(scope="module")
def emulator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """The emulated device, built once for given sources."""
    binary = build(Path(request.config.cache.mkdir("cuda-emulation")))
    return Emulator(binary, tmp_path_factory.mktemp("emulation"))


def images(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise whose samples are white, 1/f and blue (rising as f squared) in turn."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(shape[2])[:, None], np.fft.fftfreq(shape[3])[None, :])
    gains = [np.ones_like(frequency), 1 / (frequency + 1 / max(shape[2:])), frequency**2 + 1e-6]
    fields = np.fft.fft2(rng.standard_normal(shape))
    for sample in range(shape[0]):
        fields[sample] *= gains[sample % 3]
    return torch.tensor(np.fft.ifft2(fields).real).to(dtype)


def table(
    channels: int, size: tuple[int, int], form: str = "even", asymmetric: bool = False, reach: int | None = None
) -> Tensor:
    """A covariance of exponential decay, float64; asymmetric: with random entries and asymmetric channels."""
    rng = np.random.default_rng(channels)
    height, width = (n if reach is None else min(n, reach + 1) for n in size)
    rows, columns = np.arange(height), np.arange(width)
    if form == "signed":
        rows, columns = np.arange(1 - height, height), np.arange(1 - width, width)
    mixing = 0.5 + 0.5 * np.eye(channels)
    if asymmetric:
        mixing = mixing + rng.random((channels, channels))
    values = mixing[..., None, None] * np.exp(-np.hypot(rows[:, None], columns[None, :]) / 5)
    if asymmetric:
        values = values * rng.uniform(0.5, 1.5, values.shape)
    return torch.tensor(values)


def dense_product(gradient: Tensor, covariance: Tensor, form: str = "even", symmetric: bool = True) -> Tensor:
    """``v[c, i] = sum f[c, c', j - i] g[c', j]`` (or of the symmetric part of that matrix) in float64."""
    f = covariance.numpy()
    if form == "even":
        f = np.concatenate([f[:, :, :0:-1], f], 2)
        f = np.concatenate([f[..., :0:-1], f], 3)
    backwards = f[:, :, ::-1, ::-1]
    kernel = (backwards + f.swapaxes(0, 1)) / 2 if symmetric else backwards
    g = gradient.double().numpy()
    top, left = f.shape[2] // 2, f.shape[3] // 2
    v = np.zeros_like(g)
    for c in range(g.shape[1]):
        for d in range(g.shape[1]):
            full = fftconvolve(g[:, d], kernel[None, c, d], axes=(1, 2))
            v[:, c] += full[:, top : top + g.shape[2], left : left + g.shape[3]]
    return torch.tensor(v)


def spectrum_of(covariance: Tensor, gradient: Tensor, form: str = "even") -> Tensor:
    """The spectrum that the operators give the kernels, of a table for gradients of this shape."""
    reach = tuple((n + 1) // 2 if form == "signed" else n for n in covariance.shape[-2:])
    wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    frequencies = frequency_counts((gradient.shape[2], gradient.shape[3]), reach)
    frequencies = native.transformed(request_of(gradient, form), frequencies) or frequencies
    return spectrum_from_table(covariance, frequencies, form, wide)


def request_of(gradient: Tensor, form: str = "even") -> Request:
    """A call on a GPU."""
    batch, channels, height, width = gradient.shape
    return Request("quadratic_form", torch.device("cuda"), gradient.dtype, batch, channels, (height, width), form)


def norms(batch: Tensor) -> Tensor:
    return batch.double().flatten(1).norm(dim=1)


def check_quadratic(
    emulator: Emulator,
    gradient: Tensor,
    covariance: Tensor,
    form: str = "even",
    limits: tuple[float, float] | None = None,
    **options: object,
) -> None:
    """Compare v and q of the symmetric part with float64, relative to ||v|| and ||g|| ||v||."""
    q, v = emulator.product(gradient, spectrum_of(covariance, gradient, form), **options)  # type: ignore[arg-type]
    check_product(gradient, q, v, dense_product(gradient, covariance, form), limits)


def check_product(
    gradient: Tensor,
    q: Tensor | None,
    v: Tensor | None,
    expected: Tensor,
    limits: tuple[float, float] | None = None,
) -> None:
    """Compare v, and q as the form of ``expected``, with float64."""
    v_limit, q_limit = limits or (V_TOLERANCE[gradient.dtype], Q_TOLERANCE[gradient.dtype])
    if v is not None:
        assert (norms(v.double() - expected) <= v_limit * norms(expected)).all()
    if q is not None:
        error = (q.double() - (gradient.double() * expected).sum((1, 2, 3))).abs()
        assert (error <= q_limit * norms(gradient) * norms(expected)).all()


RAGGED = [
    (2, 1, 1, 1),
    (1, 2, 1, 9),
    (3, 3, 6, 1),
    (5, 1, 28, 28),
    (3, 1, 5, 7),
    (3, 2, 31, 30),
    (7, 3, 32, 32),
    (2, 4, 17, 32),
    (3, 1, 33, 8),
    (1, 3, 64, 64),
    (2, 2, 50, 63),
    (1, 4, 64, 37),
    (1, 3, 2, 49),
]
LARGE = [(2, 5, 28, 27), (1, 2, 65, 20), (1, 1, 66, 71), (1, 17, 6, 5), (1, 2, 3, 150), (2, 3, 100, 8), (1, 1, 257, 3)]


@pytest.mark.parametrize("shape", RAGGED + LARGE, ids=str)
def test_quadratic_form_and_product_match_the_dense_matrix(emulator: Emulator, shape: tuple[int, ...]) -> None:
    covariance = table(shape[1], shape[2:], asymmetric=True)
    check_quadratic(emulator, images(shape), covariance)


@pytest.mark.parametrize("shape", [(3, 1, 28, 28), (3, 3, 32, 32), (3, 1, 64, 64)], ids=str)
def test_smooth_covariances_of_wide_dynamic_range(emulator: Emulator, shape: tuple[int, ...]) -> None:
    check_quadratic(emulator, images(shape), table(shape[1], shape[2:]))


@pytest.mark.parametrize("shape", [(3, 1, 28, 28), (5, 3, 32, 32), (2, 3, 40, 64), (3, 3, 9, 66)], ids=str)
def test_quadratic_form_alone(emulator: Emulator, shape: tuple[int, ...]) -> None:
    check_quadratic(emulator, images(shape), table(shape[1], shape[2:]), operator="quadratic_form_only")


@pytest.mark.parametrize(
    "shape", [(5, 1, 12, 28), (2, 3, 32, 31), (2, 4, 8, 9), (1, 3, 64, 33), (2, 3, 6, 67), (2, 6, 5, 7)], ids=str
)
def test_product_of_an_asymmetric_covariance(emulator: Emulator, shape: tuple[int, ...]) -> None:
    gradient, covariance = images(shape), table(shape[1], shape[2:], asymmetric=True)
    _, v = emulator.product(gradient, spectrum_of(covariance, gradient), "product")
    expected = dense_product(gradient, covariance, symmetric=False)
    assert v is not None
    assert (norms(v.double() - expected) <= 5e-6 * norms(expected)).all()


@pytest.mark.parametrize("shape", [(3, 1, 28, 28), (2, 3, 33, 16), (1, 2, 1, 5), (1, 1, 66, 131)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_general_path_also_serves_small_images(emulator: Emulator, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_quadratic(
        emulator, images(shape, dtype=dtype), table(shape[1], shape[2:], asymmetric=True), shared=STAGED_ONLY
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 9, 12), (2, 3, 8, 7)], ids=str)
def test_signed_covariances(emulator: Emulator, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    covariance = table(shape[1], shape[2:], "signed", asymmetric=True)
    check_quadratic(emulator, images(shape, dtype=dtype), covariance, "signed")
    gradient = images(shape, dtype=dtype)
    _, v = emulator.product(gradient, spectrum_of(covariance, gradient, "signed"), "product")
    expected = dense_product(gradient, covariance, "signed", symmetric=False)
    assert v is not None
    assert (norms(v.double() - expected) <= V_TOLERANCE[dtype] * norms(expected)).all()


@pytest.mark.parametrize(
    ("shape", "reach"), [((3, 1, 28, 28), 5), ((2, 3, 32, 32), 0), ((2, 2, 64, 50), 9), ((2, 2, 7, 80), 6)], ids=str
)
def test_short_covariances_need_fewer_frequencies(emulator: Emulator, shape: tuple[int, ...], reach: int) -> None:
    check_quadratic(emulator, images(shape), table(shape[1], shape[2:], reach=reach))


@pytest.mark.parametrize("shape", [(3, 1, 28, 28), (3, 3, 32, 32), (3, 1, 64, 50), (3, 4, 68, 9)], ids=str)
@pytest.mark.parametrize(("precision", "limits"), [("high", (1e-2, 5e-4)), ("medium", (6e-2, 5e-3))], ids=str)
def test_lower_precision_on_request(
    emulator: Emulator, shape: tuple[int, ...], precision: str, limits: tuple[float, float]
) -> None:
    check_quadratic(emulator, images(shape), table(shape[1], shape[2:]), limits=limits, precision=precision)
    with pytest.raises(AssertionError):
        check_quadratic(emulator, images(shape), table(shape[1], shape[2:]), precision=precision)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(3, 3, 32, 32), (2, 1, 33, 40), (2, 1, 67, 9), (2, 2, 32, 80), (2, 5, 9, 8)], ids=str
)
def test_low_precision_elements(emulator: Emulator, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    # The result differs from the exact one by its own rounding and little more; q is not rounded.
    check_quadratic(
        emulator, images(shape, dtype=dtype), table(shape[1], shape[2:]), limits=(torch.finfo(dtype).eps, 1e-6)
    )


# Images above 64 pixels whose numbers of frequencies have a fast transform: more of them than pixels, or fewer.
FOURIER = [
    ((2, 1, 70, 75), (80, 112)),
    ((1, 2, 97, 66), (192, 64)),
    ((1, 3, 81, 66), (144, 160)),
    ((1, 3, 66, 129), (48, 96)),
    ((1, 2, 3, 250), (128, 224)),
    ((1, 1, 200, 5), (112, 32)),
    ((1, 1, 9, 600), (32, 384)),
    ((1, 1, 300, 65), (320, 48)),
    ((1, 1, 2, 70), (32, 576)),
    ((1, 1, 3, 900), (32, 640)),
    ((1, 1, 3, 66), (32, 896)),
    ((1, 1, 66, 3), (960, 32)),
    ((1, 1, 2, 1024), (32, 1024)),
]


def fourier_case(shape: tuple[int, ...], frequencies: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A covariance of the longest reach that these frequencies allow, random and asymmetric, and its spectrum."""
    reach = [min(n, 2 * count - n) for n, count in zip(shape[2:], frequencies)]
    covariance = table(shape[1], (reach[0], reach[1]), asymmetric=True)
    return covariance, spectrum_from_table(covariance, frequencies, "even", torch.float32)


@pytest.mark.parametrize(("shape", "frequencies"), FOURIER, ids=str)
def test_fast_fourier_transforms(emulator: Emulator, shape: tuple[int, ...], frequencies: tuple[int, int]) -> None:
    gradient, (covariance, spectrum) = images(shape), fourier_case(shape, frequencies)
    q, v = emulator.product(gradient, spectrum)
    assert emulator.launches == 5  # arranged spectrum, rows, columns, rows, q
    check_product(gradient, q, v, dense_product(gradient, covariance))
    alone, _ = emulator.product(gradient, spectrum, "quadratic_form_only")
    assert torch.equal(alone, q)
    _, v = emulator.product(gradient, spectrum, "product")
    check_product(gradient, None, v, dense_product(gradient, covariance, symmetric=False))


def test_numbers_without_a_transform_are_served_by_the_general_path(emulator: Emulator) -> None:
    gradient, covariance = images((1, 2, 65, 20)), table(2, (65, 20), asymmetric=True)
    q, v = emulator.product(gradient, spectrum_from_table(covariance, (65, 20), "even", torch.float32))
    assert emulator.launches == 10
    check_product(gradient, q, v, dense_product(gradient, covariance))


def test_the_operators_know_what_has_transforms(emulator: Emulator) -> None:
    lengths = emulator.lengths()
    for most in range(65, 1100):
        wanted = native.transformed(request_of(torch.empty(1, 1, 1, most)), (1, most))
        assert wanted == (None if most > lengths[-1] else (lengths[0], min(n for n in lengths if n >= most)))


@pytest.mark.parametrize(("shape", "frequencies"), [((1, 3, 66, 3), (80, 32)), ((1, 1, 230, 3), (256, 32))], ids=str)
def test_the_operators_know_what_memory_transforms_need(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], frequencies: tuple[int, int]
) -> None:
    gradient, (_, spectrum) = images(shape), fourier_case(shape, frequencies)
    served = []
    for shared in range(4 << 10, 48 << 10, 128):
        monkeypatch.setattr(native, "_shared_memory", lambda device, shared=shared: shared)
        served.append(native.transformed(request_of(gradient), (shape[2], shape[3])) == frequencies)
    least = (4 << 10) + 128 * served.index(True)
    for shared, launches in ((least, 5), (least - 128, 10)):
        emulator.product(gradient, spectrum, shared=shared)
        assert emulator.launches == launches


def layouts(dense: Tensor) -> dict[str, Tensor]:
    """Views with the values of ``dense`` that are laid out otherwise."""
    batch, channels, height, width = dense.shape
    frame = torch.full((batch, channels, height + 3, width + 5), math.nan, dtype=dense.dtype)
    frame[:, :, 1 : height + 1, 2 : width + 2] = dense
    steps = torch.full((batch, 2 * channels, height, 2 * width), math.nan, dtype=dense.dtype)
    steps[:, ::2, :, 1::2] = dense
    return {
        "channels last": dense.contiguous(memory_format=torch.channels_last),
        "slice": frame[:, :, 1 : height + 1, 2 : width + 2],
        "steps": steps[:, ::2, :, 1::2],
        "transposed": dense.transpose(2, 3).contiguous().transpose(2, 3),
    }


@pytest.mark.parametrize("layout", ["channels last", "slice", "steps", "transposed"])
@pytest.mark.parametrize(
    "shape", [(3, 3, 12, 15), (2, 5, 7, 9), (2, 2, 34, 33), (2, 2, 9, 68), (1, 2, 32, 80)], ids=str
)
def test_layouts(emulator: Emulator, shape: tuple[int, ...], layout: str) -> None:
    gradient = layouts(images(shape))[layout]
    check_quadratic(emulator, gradient, table(shape[1], shape[2:]))


@pytest.mark.parametrize("shape", [(1, 2, 3, 4), (1, 5, 2, 3), (1, 2, 2, 66)], ids=str)
def test_places_that_32_bits_do_not_hold(emulator: Emulator, shape: tuple[int, ...]) -> None:
    dense = images(shape, dtype=torch.bfloat16)
    strides = (shape[2], shape[2], 1, 2**32 // (shape[3] - 1) + 7)
    extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides))
    gradient = torch.empty(extent, dtype=dense.dtype).as_strided(shape, strides).copy_(dense)
    check_quadratic(emulator, gradient, table(shape[1], shape[2:]), limits=(torch.finfo(dense.dtype).eps, 1e-6))


@pytest.mark.parametrize("shape", [(1, 1, 10, 11), (1, 3, 8, 32), (1, 3, 5, 68), (1, 1, 32, 80), (1, 5, 4, 6)], ids=str)
def test_expanded_images(emulator: Emulator, shape: tuple[int, ...]) -> None:
    gradient = images(shape).expand(9, *shape[1:])
    check_quadratic(emulator, gradient, table(shape[1], shape[2:]))


@pytest.mark.parametrize(
    "shape", [(3, 3, 10, 11), (3, 1, 28, 28), (2, 1, 40, 33), (2, 2, 70, 9), (2, 2, 32, 80)], ids=str
)
@pytest.mark.parametrize("factor", [1e-15, 1e15], ids=str)
@pytest.mark.parametrize("shared", [HOPPER, STAGED_ONLY], ids=["fused", "staged"])
def test_scaled_images(emulator: Emulator, shape: tuple[int, ...], factor: float, shared: int) -> None:
    check_quadratic(emulator, images(shape) * factor, table(shape[1], shape[2:]), shared=shared)
    check_quadratic(emulator, images(shape), table(shape[1], shape[2:]) * factor, shared=shared)


@pytest.mark.parametrize(
    "shape", [(5, 1, 9, 8), (4, 3, 10, 11), (4, 1, 40, 33), (5, 2, 7, 66), (4, 1, 32, 80)], ids=str
)
@pytest.mark.parametrize("shared", [HOPPER, STAGED_ONLY], ids=["fused", "staged"])
def test_special_values_stay_in_their_sample(emulator: Emulator, shape: tuple[int, ...], shared: int) -> None:
    covariance, gradient = table(shape[1], shape[2:]), images(shape)
    gradient[0] = 0
    gradient[1] *= 1e-40
    gradient[2, 0, 3, 2] = math.nan
    expected = dense_product(gradient[3:], covariance)
    q, v = emulator.product(gradient, spectrum_of(covariance, gradient), shared=shared)
    assert q is not None
    assert v is not None
    assert (v[0] == 0).all()
    assert q[0] == 0
    assert norms(v[1:2]) < 1e-35
    assert abs(q[1]) < 1e-35
    assert torch.isnan(v[2]).all()
    assert torch.isnan(q[2])
    assert (norms(v[3:].double() - expected) <= 5e-6 * norms(expected)).all()


@pytest.mark.parametrize("order", ["ascending", "descending"])
@pytest.mark.parametrize("shape", [(1, 1, 12, 10), (1, 1, 36, 5), (1, 1, 70, 9)], ids=str)
def test_a_bright_pixel_anywhere_sets_the_scale(emulator: Emulator, shape: tuple[int, ...], order: str) -> None:
    gradient = images(shape)
    gradient[..., -1, -1] = 1e7
    check_quadratic(emulator, gradient, table(shape[1], shape[2:]), order=order)


def transforms(batch: Tensor, frequencies: tuple[int, int]) -> Tensor:
    """Coefficients (B, C, 2, Fh, 2, Fw) in the orthonormal odd-frequency bases, float64."""
    bases = []
    for extent, count in zip(batch.shape[2:], frequencies):
        angles = (torch.arange(extent).double() - (extent - 1) / 2)[:, None] * (
            torch.pi * (2 * torch.arange(count).double() + 1) / (2 * count)
        )
        bases.append(torch.stack([angles.cos(), angles.sin()], 1) / math.sqrt(count))
    return torch.einsum("bcyx,ypk,xrl->bcpkrl", batch.double(), *bases)


def turn(z: Tensor, axis: int) -> Tensor:
    cosine, sine = z.unbind(axis)
    return torch.stack([sine, -cosine], axis)


def dense_cross_spectrum(a: Tensor, b: Tensor, frequencies: tuple[int, int], signed: bool) -> Tensor:
    za, zb = transforms(a, frequencies), transforms(b, frequencies)
    parts = [zb, turn(zb, 2), turn(zb, 4), turn(turn(zb, 2), 4)] if signed else [zb]
    sums = torch.stack([torch.einsum("bcpkrl,bdpkrl->cdkl", za, part) for part in parts])
    return sums if signed else sums[0]


def check_cross_spectrum(result: Tensor, expected: Tensor, limit: float) -> None:
    """Mean error relative to the mean power, of which variances are made, and largest error to the largest entry."""
    power = (expected[0] if expected.dim() == 5 else expected).diagonal().abs().mean()
    error = (result.double() - expected).abs()
    assert error.mean() <= limit * power
    assert error.max() <= 2 * limit * expected.abs().max()


@pytest.mark.parametrize("shape", [*RAGGED, (9, 1, 28, 28), (6, 4, 12, 11), *LARGE], ids=str)
def test_cross_spectrum_of_images_with_themselves(emulator: Emulator, shape: tuple[int, ...]) -> None:
    a, frequencies = images(shape), (shape[2], shape[3])
    result = emulator.cross_spectrum(a, None, frequencies)
    check_cross_spectrum(result, dense_cross_spectrum(a, a, frequencies, False), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("signed", [False, True], ids=["even", "signed"])
@pytest.mark.parametrize("shape", [(3, 1, 28, 5), (2, 3, 9, 10), (2, 5, 6, 7)], ids=str)
def test_cross_spectrum_of_two_batches(
    emulator: Emulator, shape: tuple[int, ...], signed: bool, dtype: torch.dtype
) -> None:
    a, b = images(shape, 1, dtype), images(shape, 2, dtype)
    frequencies = (shape[2] - shape[2] // 4, shape[3])
    result = emulator.cross_spectrum(a, b, frequencies, signed)
    check_cross_spectrum(
        result, dense_cross_spectrum(a, b, frequencies, signed), 1e-12 if dtype.itemsize == 8 else 1e-6
    )


@pytest.mark.parametrize("shape", [(5, 3, 32, 32), (2, 1, 64, 50)], ids=str)
def test_lower_precision_cross_spectrum_is_tf32(emulator: Emulator, shape: tuple[int, ...]) -> None:
    a, frequencies = images(shape), (shape[2], shape[3])
    high = emulator.cross_spectrum(a, None, frequencies, precision="high")
    check_cross_spectrum(high, dense_cross_spectrum(a, a, frequencies, False), 5e-4)
    assert torch.equal(high, emulator.cross_spectrum(a, None, frequencies, precision="medium"))


@pytest.mark.parametrize(
    "shape", [(5, 1, 28, 28), (3, 3, 32, 32), (1, 2, 40, 64), (3, 3, 6, 66), (1, 3, 32, 80), (3, 5, 9, 8)], ids=str
)
def test_results_do_not_depend_on_the_order_of_threads(emulator: Emulator, shape: tuple[int, ...]) -> None:
    gradient, covariance = images(shape), table(shape[1], shape[2:])
    spectrum = spectrum_of(covariance, gradient)
    up, down = (emulator.product(gradient, spectrum, order=order) for order in ("ascending", "descending"))
    assert torch.equal(up[0], down[0])  # type: ignore[arg-type]
    assert torch.equal(up[1], down[1])  # type: ignore[arg-type]
    frequencies = (shape[2], shape[3])
    sums = [emulator.cross_spectrum(gradient, None, frequencies, order=order) for order in ("ascending", "descending")]
    assert torch.equal(*sums)


def test_many_images_per_block(emulator: Emulator) -> None:
    shape = (20, 1, 6, 5)
    gradient, covariance = images(shape), table(1, shape[2:])
    check_quadratic(emulator, gradient, covariance)
    result = emulator.cross_spectrum(gradient, None, (6, 5))
    check_cross_spectrum(result, dense_cross_spectrum(gradient, gradient, (6, 5), False), 1e-6)
