"""The compiled CPU kernels against the dense matrix in float64, for every instruction set this machine has."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sgr_kernels.backends import extension, native
from sgr_kernels.backends.registry import Request

Array = NDArray[np.float64]

if extension.binary is None:
    pytest.skip(str(extension.build_info()["error"]), allow_module_level=True)

INSTRUCTION_SETS = extension.build_info()["instruction_sets"]
TOLERANCE = {torch.float32: (5e-6, 1e-6), torch.float64: (1e-12, 1e-12)}  # of v, of q
OPS = torch.ops.sgr_kernels


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run with each instruction set; afterwards with the best again."""
    extension.binary.select_instruction_set(request.param)
    yield request.param
    extension.binary.select_instruction_set(INSTRUCTION_SETS[0])


def dense(spectrum: Tensor, height: int, width: int) -> Array:
    """The matrix (C H W, C H W) that a spectrum stands for: a sum of its frequencies, one displacement at a time."""
    parts = spectrum.double().numpy()
    parts = parts if parts.ndim == 5 else parts[None]
    rows, columns = parts.shape[-2:]

    def waves(extent: int, count: int, odd: bool) -> Array:
        theta = np.pi * (2 * np.arange(count) + 1) / (2 * count)
        angles = np.outer(np.arange(1 - extent, extent), theta)  # displacements j - i
        return (np.sin(angles) if odd else np.cos(angles)) / count

    table = sum(
        np.einsum("yk,cdkl,xl->cdyx", waves(height, rows, p % 2 == 1), part, waves(width, columns, p // 2 == 1))
        for p, part in enumerate(parts)
    )
    y, x = np.arange(height), np.arange(width)
    dy, dx = y[None, :] - y[:, None] + height - 1, x[None, :] - x[:, None] + width - 1
    matrix = table[:, :, dy[:, None, :, None], dx[None, :, None, :]]  # (C, C', y, x, y', x')
    size = parts.shape[1] * height * width
    return matrix.transpose(0, 2, 3, 1, 4, 5).reshape(size, size)


def correlation(a: Array, b: Array, rows: int, columns: int, signed: bool) -> Array:
    """Sums of ``Z^a_c Z^b_c'`` from the definition of Z, with b turned for the odd parts."""

    def bases(extent: int, count: int) -> Array:
        angles = np.outer(np.arange(extent), np.pi * (2 * np.arange(count) + 1) / (2 * count))
        return np.stack([np.cos(angles), np.sin(angles)]) / math.sqrt(count)

    def transform(images: Array) -> Array:
        return np.einsum("bcyx,pyk,rxl->bcprkl", images, bases(a.shape[2], rows), bases(a.shape[3], columns))

    def turned(z: Array, axis: int) -> Array:
        cosine, sine = np.moveaxis(z, axis, 0)
        return np.stack([sine, -cosine], axis)

    za, zb = transform(a), transform(b)
    others = [zb, turned(zb, 2), turned(zb, 3), turned(turned(zb, 2), 3)] if signed else [zb]
    sums = np.stack([np.einsum("bcprkl,bdprkl->cdkl", za, other) for other in others])
    return sums if signed else sums[0]


def errors(result: Tensor, expected: Array) -> Array:
    """Relative error of each sample's vector."""
    count = expected.shape[0]
    difference = np.linalg.norm((result.double().numpy() - expected).reshape(count, -1), axis=1)
    return difference / np.linalg.norm(expected.reshape(count, -1), axis=1)


def draw(rng: np.random.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape)).to(dtype)


def drawn_shapes(count: int) -> list[tuple[int, ...]]:
    """(B, C, H, W, Fh, Fw): lines, single pixels, odd and even sizes, more and fewer frequencies than pixels.

    Long axes with a common divisor of pixels and frequencies are transformed in two levels.
    """
    rng = np.random.default_rng(3)
    shapes: list[tuple[int, ...]] = [(1, 1, 1, 1, 1, 1), (19, 1, 1, 33, 1, 33), (5, 2, 31, 1, 31, 1)]
    shapes += [(2, 16, 6, 7, 6, 7), (1, 1, 97, 1, 97, 1)]
    shapes += [(2, 1, 96, 3, 96, 3), (1, 2, 3, 105, 4, 105), (3, 1, 224, 2, 120, 2), (2, 1, 1, 512, 1, 512)]
    shapes += [(1, 1, 2, 187, 2, 187), (5, 1, 98, 2, 147, 1)]
    while len(shapes) < count:
        batch, channels, height, width = (int(rng.integers(1, n)) for n in (20, 6, 41, 41))
        if channels * height * width <= 900:
            rows, columns = ((int(rng.integers((n + 1) // 2, n + 3))) for n in (height, width))
            shapes.append((batch, channels, height, width, rows, columns))
    return shapes


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_the_dense_matrix(instruction_set: str, dtype: torch.dtype, signed: bool) -> None:
    rng = np.random.default_rng(0)
    tolerance_v, tolerance_q = TOLERANCE[dtype]
    for batch, channels, height, width, rows, columns in drawn_shapes(36):
        gradient = draw(rng, batch, channels, height, width, dtype=dtype)
        parts = (4,) if signed else ()
        spectrum = draw(rng, *parts, channels, channels, rows, columns, dtype=dtype)
        sigma, flat = dense(spectrum, height, width), gradient.double().numpy().reshape(batch, -1)

        v = OPS.native_product(gradient, spectrum, "highest")
        assert v.dtype == dtype
        assert v.shape == gradient.shape
        assert errors(v.flatten(1), flat @ sigma.T).max() < tolerance_v

        q, v = OPS.native_quadratic_form(gradient, spectrum, True, "highest")
        expected = flat @ (sigma + sigma.T) / 2
        assert errors(v.flatten(1), expected).max() < tolerance_v
        scale = np.linalg.norm(flat, axis=1) * np.linalg.norm(expected, axis=1)
        assert (np.abs(q.double().numpy() - (flat * expected).sum(1)) / scale).max() < tolerance_q

        q_only, empty = OPS.native_quadratic_form(gradient, spectrum, False, "highest")
        assert empty.shape == (0,)
        assert torch.equal(q, q_only)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_spectrum_is_the_sum_of_products(instruction_set: str, dtype: torch.dtype, signed: bool) -> None:
    rng = np.random.default_rng(1)
    for batch, channels, height, width, rows, columns in [*drawn_shapes(24), (70, 2, 5, 6, 5, 6), (2, 1, 3, 4, 130, 9)]:
        a, b = (draw(rng, batch, channels, height, width, dtype=dtype) for _ in range(2))
        for other in (a, b):
            result = OPS.native_cross_spectrum(a, other, rows, columns, signed, "highest").double().numpy()
            expected = correlation(a.double().numpy(), other.double().numpy(), rows, columns, signed)
            assert result.shape == expected.shape
            assert np.abs(result - expected).max() < TOLERANCE[dtype][1] * np.abs(expected).max()


def layouts(rng: np.random.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    """Images (6, 3, 9, 20) in memory that holds NaN wherever they do not."""
    values = draw(rng, 6, 3, 9, 20, dtype=dtype)

    def inside(shape: tuple[int, ...], index: tuple[slice, ...], order: tuple[int, ...]) -> Tensor:
        view = torch.full(shape, math.nan, dtype=dtype)[index].permute(order)
        return view.copy_(values)

    every, identity = slice(None), (0, 1, 2, 3)
    return {
        "channels_last": values.clone(memory_format=torch.channels_last),
        "slice": inside((8, 5, 11, 23), (slice(1, 7), slice(1, 4), slice(2, 11), slice(3, 23)), identity),
        "step": inside((12, 3, 18, 40), (slice(0, 12, 2), every, slice(1, 18, 2), slice(1, 40, 2)), identity),
        "transposed": inside((20, 9, 3, 6), (every,) * 4, (3, 2, 1, 0)),
        "expanded": values[:1, :1].expand(6, 3, 9, 20),
        "one row": values[:, :, :1, :].expand(6, 3, 9, 20),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_layouts_and_neighbours(instruction_set: str, dtype: torch.dtype) -> None:
    """Any strides give the very result of contiguous memory, and nothing around the images is read."""
    rng = np.random.default_rng(2)
    spectrum = draw(rng, 3, 3, 9, 20, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for name, images in layouts(rng, dtype).items():
        plain = images.contiguous()
        q, v = OPS.native_quadratic_form(images, spectrum, True, "highest")
        expected_q, expected_v = OPS.native_quadratic_form(plain, spectrum, True, "highest")
        assert torch.equal(q, expected_q), name
        assert torch.equal(v, expected_v), name
        assert v.is_contiguous(), name
        cross = OPS.native_cross_spectrum(images, plain, 9, 20, False, "highest")
        torch.testing.assert_close(cross, OPS.native_cross_spectrum(plain, plain, 9, 20, False, "highest"))
        assert cross.isfinite().all(), name
    transposed = spectrum.transpose(0, 1).transpose(2, 3).contiguous().transpose(2, 3)
    v = OPS.native_product(plain, transposed, "highest")
    assert torch.equal(v, OPS.native_product(plain, transposed.contiguous(), "highest"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_are_exact(instruction_set: str, dtype: torch.dtype) -> None:
    """A single pixel with Lambda = 1 or 1.1 is multiplied by just that: every 16-bit pattern, and rounding to even."""
    images = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(-1, 1, 1, 1)
    for value in (1.0, 1.1, 0.37, 2.0**-9):
        v = OPS.native_product(images, torch.full((1, 1, 1, 1), value), "highest")
        torch.testing.assert_close(v, (images.float() * value).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_once(instruction_set: str, dtype: torch.dtype) -> None:
    """Low-precision images give the float32 result, rounded at the end."""
    rng = np.random.default_rng(4)
    images, spectrum = draw(rng, 5, 3, 11, 37, dtype=dtype), draw(rng, 3, 3, 11, 37, dtype=torch.float32)
    q, v = OPS.native_quadratic_form(images, spectrum, True, "highest")
    expected_q, expected_v = OPS.native_quadratic_form(images.float(), spectrum, True, "highest")
    assert torch.equal(q, expected_q)
    assert torch.equal(v, expected_v.to(dtype))


def test_empty_batch() -> None:
    images, spectrum = torch.empty(0, 2, 5, 6), torch.ones(2, 2, 5, 6)
    assert OPS.native_product(images, spectrum, "highest").shape == (0, 2, 5, 6)
    q, v = OPS.native_quadratic_form(images, spectrum, True, "highest")
    assert q.shape == (0,)
    assert v.shape == (0, 2, 5, 6)
    cross = OPS.native_cross_spectrum(images, images, 5, 6, False, "highest")
    assert torch.equal(cross, torch.zeros(2, 2, 5, 6))


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_scaled_gradients(instruction_set: str, scale: float) -> None:
    rng = np.random.default_rng(5)
    images, spectrum = draw(rng, 4, 3, 16, 15, dtype=torch.float32), draw(rng, 3, 3, 16, 15, dtype=torch.float32)
    scaled = images * scale
    sigma, flat = dense(spectrum, 16, 15), scaled.double().numpy().reshape(4, -1)
    q, v = OPS.native_quadratic_form(scaled, spectrum, True, "highest")
    expected = flat @ (sigma + sigma.T) / 2
    assert errors(v.flatten(1), expected).max() < 5e-6
    scale_q = np.linalg.norm(flat, axis=1) * np.linalg.norm(expected, axis=1)
    assert (np.abs(q.double().numpy() - (flat * expected).sum(1)) / scale_q).max() < 1e-6


def test_zero_and_subnormal_gradients(instruction_set: str) -> None:
    spectrum = torch.rand(1, 1, 8, 8)
    q, v = OPS.native_quadratic_form(torch.zeros(3, 1, 8, 8), spectrum, True, "highest")
    assert not q.any()
    assert not v.any()
    tiny = torch.full((3, 1, 8, 8), 1e-41)
    _, v = OPS.native_quadratic_form(tiny, spectrum, True, "highest")
    expected = OPS.native_product(torch.full((3, 1, 8, 8), 1.0), spectrum, "highest") * 1e-41
    torch.testing.assert_close(v, expected, rtol=0, atol=1e-43)


@pytest.mark.parametrize("shape", [(40, 1, 7, 5), (9, 3, 28, 28), (5, 2, 3, 70)])
def test_nan_stays_in_its_sample(instruction_set: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(6)
    images, spectrum = (draw(rng, *s, dtype=torch.float32) for s in (shape, (shape[1], shape[1], *shape[2:])))
    q, v = OPS.native_quadratic_form(images, spectrum, True, "highest")
    for bad in (0, shape[0] // 2, shape[0] - 1):
        spoiled = images.clone()
        spoiled[bad, -1, 1, 2] = math.nan
        spoiled_q, spoiled_v = OPS.native_quadratic_form(spoiled, spectrum, True, "highest")
        others = [b for b in range(shape[0]) if b != bad]
        assert spoiled_q[bad].isnan()
        assert spoiled_v[bad].isnan().any()
        assert torch.equal(spoiled_q[others], q[others])
        assert torch.equal(spoiled_v[others], v[others])


@pytest.mark.parametrize("shape", [(70, 1, 28, 28), (1, 3, 200, 230), (3, 2, 130, 33)])
def test_threads_do_not_change_the_result(shape: tuple[int, ...]) -> None:
    """Bitwise, whether the threads share images or parts of one."""
    rng = np.random.default_rng(7)
    images, spectrum = (draw(rng, *s, dtype=torch.float32) for s in (shape, (shape[1], shape[1], *shape[2:])))
    results = []
    for count in (1, 2, 3, 2, 3):
        torch.set_num_threads(count)
        q, v = OPS.native_quadratic_form(images, spectrum, True, "highest")
        results.append((q, v, OPS.native_cross_spectrum(images, images, *shape[2:], False, "highest")))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other))


class Answers(torch.utils.data.Dataset):
    """Quadratic forms, computed in whichever process asks."""

    def __init__(self, images: Tensor, spectrum: Tensor) -> None:
        self.arguments = images, spectrum

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return OPS.native_quadratic_form(*self.arguments, False, "highest")[0]


def test_callers_side_by_side() -> None:
    """Python threads that call at once, and DataLoader workers forked after a parallel call, get the same bits."""
    torch.set_num_threads(2)
    images, spectrum = torch.randn(70, 1, 28, 28), torch.rand(1, 1, 28, 28)

    def answers() -> tuple[Tensor, ...]:
        cross = OPS.native_cross_spectrum(images, images, 28, 28, False, "highest")
        return (*OPS.native_quadratic_form(images, spectrum, True, "highest"), cross)

    expected = answers()
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: answers(), range(40)):
            assert all(torch.equal(x, y) for x, y in zip(found, expected))
    workers = torch.utils.data.DataLoader(
        Answers(images, spectrum), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for q in workers:
        assert torch.equal(q, expected[0])


def test_more_than_two_to_the_31_elements() -> None:
    """An expanded batch of one image: every sample has that image's quadratic form."""
    image, spectrum = torch.randn(1, 1, 64, 64), torch.rand(1, 1, 64, 64)
    batch = 2**31 // image.numel() + 3
    q, _ = OPS.native_quadratic_form(image.expand(batch, 1, 64, 64), spectrum, False, "highest")
    single, _ = OPS.native_quadratic_form(image, spectrum, False, "highest")
    assert q.shape == (batch,)
    torch.testing.assert_close(q, single.expand(batch), rtol=1e-6, atol=0)


def test_stride_beyond_two_to_the_31_elements() -> None:
    """Offsets are 64-bit: two images 2^31 bytes and more apart, in one (sparse) allocation."""
    distance = 2**31 + 5
    storage = torch.UntypedStorage(2 * distance + 64)  # untouched pages take no memory
    images = torch.tensor([], dtype=torch.bfloat16).set_(storage, 0, (2, 1, 4, 8), (distance, 32, 8, 1))
    images.copy_(torch.randn(2, 1, 4, 8))
    spectrum = torch.rand(1, 1, 4, 8)
    v = OPS.native_product(images, spectrum, "highest")
    assert torch.equal(v, OPS.native_product(images.contiguous(), spectrum, "highest"))


def peak_memory(function: object) -> int:
    """Bytes that PyTorch's CPU allocator held at most beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        kept = function()  # type: ignore[operator]
    held = peak = 0
    events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return peak


@pytest.mark.parametrize("shape", [(256, 3, 32, 32), (32, 3, 128, 128), (8, 3, 224, 224)])
def test_memory(shape: tuple[int, ...]) -> None:
    """Beyond outputs and spectrum: scratch that does not grow with the batch, above 128 at most twice the input."""
    torch.set_num_threads(1)
    images, spectrum = torch.randn(*shape), torch.rand(shape[1], shape[1], *shape[2:])
    twice = torch.randn(2 * shape[0], *shape[1:])
    scratch = [
        peak_memory(lambda x=x: OPS.native_quadratic_form(x, spectrum, True, "highest")) - x.nbytes
        for x in (images, twice)
    ]
    assert scratch[1] <= scratch[0] * 1.02
    assert scratch[0] < 2 * images.nbytes
    assert (
        peak_memory(lambda: OPS.native_cross_spectrum(images, images, *shape[2:], False, "highest")) < 2 * images.nbytes
    )


def test_bad_arguments_are_named() -> None:
    images, spectrum = torch.randn(2, 3, 6, 7), torch.rand(3, 3, 6, 7)
    cases = [
        (lambda: OPS.native_product(images.int(), spectrum, "highest"), "gradient: expected float32"),
        (lambda: OPS.native_product(images[0], spectrum, "highest"), "gradient: expected shape"),
        (lambda: OPS.native_product(images, spectrum.double(), "highest"), "spectrum: expected Float"),
        (
            lambda: OPS.native_product(images, spectrum[:2, :2], "highest"),
            r"spectrum: expected shape .* got \(2, 2, 6, 7\)",
        ),
        (lambda: OPS.native_product(images, spectrum[..., :3], "highest"), "frequencies: expected at least half"),
        (lambda: OPS.native_cross_spectrum(images, images[:1], 6, 7, False, "highest"), "b: expected the shape of a"),
        (lambda: OPS.native_cross_spectrum(images, images.double(), 6, 7, False, "highest"), "b: expected the dtype"),
        (lambda: OPS.native_cross_spectrum(images, images, 2, 7, False, "highest"), "frequencies: expected"),
    ]
    for call, message in cases:
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.parametrize("shape", [(8, 3, 224, 224), (4, 3, 512, 512)])
@pytest.mark.parametrize("count", [4, 8])
def test_memory_of_many_threads(count: int, shape: tuple[int, ...]) -> None:
    """Threads share large images rather than have one each, so that scratch stays at twice the input at most."""
    torch.set_num_threads(count)
    images, spectrum = torch.randn(*shape), torch.rand(shape[1], shape[1], *shape[2:])
    peak = peak_memory(lambda: OPS.native_quadratic_form(images, spectrum, True, "highest"))
    assert peak - images.nbytes < 2 * images.nbytes


def test_failed_allocations_raise_pytorchs_error_and_leave_nothing_behind() -> None:
    """Of the result, of scratch, and of a result too large to count; with and without autograd's kernel."""
    images, spectrum = torch.randn(2, 1, 8, 8), torch.rand(1, 1, 8, 8)
    expected = OPS.native_product(images, spectrum, "highest")
    huge = images[:1].expand(2**39, 1, 8, 8)
    with pytest.raises(RuntimeError, match=r"DefaultCPUAllocator: can't allocate memory: you tried to allocate 140737"):
        OPS.native_product(huge, spectrum, "highest")
    with pytest.raises(RuntimeError, match=r"could not allocate 140737488355328 bytes"):  # where autograd is not asked
        OPS.native_product.default.redispatch(
            torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), huge, spectrum, "highest"
        )
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator: can't allocate memory"):
        OPS.native_quadratic_form(huge, spectrum, True, "highest")
    for rows, columns in ((2**39, 2**4), (2**40, 2**40)):
        with pytest.raises(RuntimeError, match=r"can't allocate memory|overflow"):
            OPS.native_cross_spectrum(images, images, rows, columns, False, "highest")
    assert torch.equal(OPS.native_product(images, spectrum, "highest"), expected)


def test_backend_says_why_it_cannot_run() -> None:
    def request(device: str, dtype: torch.dtype) -> Request:
        return Request("product", torch.device(device), dtype, 1, 1, (4, 4), "even")

    assert native.BACKEND.can_run(request("cpu", torch.float32)) is None
    assert "float8" in str(native.BACKEND.can_run(request("cpu", torch.float8_e4m3fn)))
    assert "meta" in str(native.BACKEND.can_run(request("meta", torch.float32)))


@pytest.mark.parametrize(
    ("architecture", "served"),
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)]),
        ("sm_86", [(8, 6), (8, 9)]),
        ("sm_90a", [(9, 0)]),
        ("compute_90", [(9, 0), (10, 0), (10, 3), (12, 0), (12, 1)]),
        ("compute_90a", [(9, 0)]),
        ("sm_100f", [(10, 0), (10, 3)]),
        ("sm_120", [(12, 0), (12, 1)]),
    ],
)
def test_code_runs_on_its_architectures(architecture: str, served: list[tuple[int, int]]) -> None:
    capabilities = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)]
    assert [c for c in capabilities if native.runs_on(architecture, c)] == served


def test_gpus_without_code_are_left_to_other_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_KERNELS", ("cpu", "cuda"))
    monkeypatch.setattr(native, "_ARCHITECTURES", ("sm_80", "sm_90", "compute_90"))
    monkeypatch.setattr(native, "_obstacles", {})
    request = Request("product", torch.device("cuda:0"), torch.float32, 1, 1, (4, 4), "even")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no CUDA device" in str(native.BACKEND.can_run(request))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, reason in (
        ((7, 5), "are for sm_80, sm_90, compute_90.* 7.5; TORCH_CUDA_ARCH_LIST"),
        ((12, 0), ""),
    ):
        monkeypatch.setattr(native, "_obstacles", {})
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        found = native.BACKEND.can_run(request)
        assert found is None if not reason else re.search(reason, str(found))
