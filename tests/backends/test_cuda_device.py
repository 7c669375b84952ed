"""The CUDA kernels on a GPU: what emulation cannot show. The operators' contract is in ``test_operators``."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import sgr_kernels as sgr
from sgr_kernels.backends import extension
from sgr_kernels.covariance import on_device
from sgr_kernels.functional.operators import spectrum_sizes
from sgr_kernels.ops import call
from sgr_kernels.toeplitz.spectrum import spectrum_from_table
from tests.helpers import assert_product_close, assert_quadratic_close, covariances, dense_product, gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.skipif("cuda" not in extension.build_info()["kernels"], reason="this build has no CUDA kernels"),
]

OPS = torch.ops.sgr_kernels
# Fused kernels of one and two tiles a side, the general path, Fourier transforms of both kinds along both axes.
SHAPES = [
    (9, 1, 28, 28),
    (7, 3, 32, 32),
    (3, 4, 19, 32),
    (5, 3, 40, 33),
    (4, 1, 64, 64),
    (3, 5, 20, 12),
    (2, 4, 70, 9),
    (2, 1, 70, 31),
    (3, 1, 32, 80),
    (1, 1, 128, 32),
    (2, 2, 3, 230),
    (1, 2, 230, 3),
]


def problem(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A gradient and a spectrum on the GPU, and v and q of the symmetric part in float64."""
    gradient = gradients(shape, dtype=dtype)
    covariance = covariances("even", shape[1], (shape[2], shape[3]), smooth=True)
    covariance = (covariance + covariance.transpose(0, 1)) / 2
    v, q = dense_product(gradient, covariance, "even")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    frequencies = spectrum_sizes(covariance.cuda(), (shape[2], shape[3]), "even", dtype)
    spectrum = spectrum_from_table(covariance, frequencies, "even", wide)
    return gradient.cuda(), spectrum.cuda(), v, q


def quadratic_form(gradient: Tensor, spectrum: Tensor, precision: str = "highest") -> tuple[Tensor, Tensor]:
    q, v = OPS.native_quadratic_form(gradient, spectrum, True, precision)
    return q, v


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_agrees_with_the_dense_matrix(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gradient, spectrum, v, q = problem(shape, dtype)
    limits = (5e-6, 1e-6) if dtype == torch.float32 else (1e-12, 1e-12)
    form, product = quadratic_form(gradient, spectrum)
    assert_product_close(product, v, limits[0])
    assert_quadratic_close(form, q, gradient, v, limits[1])
    assert_product_close(OPS.native_product(gradient, spectrum, "highest"), v, limits[0])
    alone, nothing = OPS.native_quadratic_form(gradient, spectrum, False, "highest")
    assert_quadratic_close(alone, q, gradient, v, limits[1])
    assert nothing.shape == (0,)


@pytest.mark.parametrize("shape", [(6, 1, 28, 28), (6, 3, 32, 32), (3, 3, 64, 40)], ids=str)
@pytest.mark.parametrize(("precision", "limits"), [("high", (1e-2, 5e-4)), ("medium", (6e-2, 5e-3))], ids=str)
def test_lower_precision(shape: tuple[int, ...], precision: str, limits: tuple[float, float]) -> None:
    gradient, spectrum, v, q = problem(shape)
    form, product = quadratic_form(gradient, spectrum, precision)
    assert_product_close(product, v, limits[0])
    assert_quadratic_close(form, q, gradient, v, limits[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("factor", [1e-15, 1e15], ids=str)
def test_scaled_gradients(shape: tuple[int, ...], factor: float) -> None:
    gradient, spectrum, _, _ = problem(shape)
    scaled = gradient * factor
    q, v = quadratic_form(scaled, spectrum)
    exact_q, exact_v = OPS.torch_quadratic_form(scaled.double(), spectrum.double(), True, "highest")
    assert_product_close(v, exact_v.cpu(), 5e-6)
    assert_quadratic_close(q, exact_q.cpu(), scaled, exact_v, 1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nan_stays_in_its_sample(shape: tuple[int, ...]) -> None:
    gradient, spectrum, v, _ = problem(shape)
    gradient[0, 0, 1, 2] = math.nan
    gradient[1:2] = 0
    q, product = quadratic_form(gradient, spectrum)
    assert product[0].isnan().all()
    assert q[0].isnan()
    assert (product[1:2] == 0).all()
    assert_product_close(product[2:], v[2:], 5e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_every_time(shape: tuple[int, ...]) -> None:
    gradient, spectrum, _, _ = problem((shape[0] * 50, *shape[1:]) if shape[1] < 5 else shape)
    gradient = gradient.repeat(7, 1, 1, 1)
    first = (
        *quadratic_form(gradient, spectrum),
        OPS.native_cross_spectrum(gradient, gradient, *shape[2:], False, "highest"),
    )
    for _ in range(3):
        q, v = quadratic_form(gradient, spectrum)
        s = OPS.native_cross_spectrum(gradient, gradient, *shape[2:], False, "highest")
        assert torch.equal(q, first[0])
        assert torch.equal(v, first[1])
        assert torch.equal(s, first[2])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_replayed_graphs_compute_anew(shape: tuple[int, ...]) -> None:
    gradient, spectrum, v, q = problem(shape)
    input_, lam = torch.zeros_like(gradient), torch.zeros_like(spectrum)
    quadratic_form(input_, lam)
    OPS.native_cross_spectrum(input_, input_, *shape[2:], False, "highest")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        form, product = quadratic_form(input_, lam)
        sums = OPS.native_cross_spectrum(input_, input_, *shape[2:], False, "highest")
    for sign in (1, -1):
        input_.copy_(sign * gradient)
        lam.copy_(sign * spectrum)
        graph.replay()
        assert_product_close(product, v, 5e-6)
        assert_quadratic_close(form, sign * q, gradient, v, 1e-6)
        assert torch.equal(sums, OPS.native_cross_spectrum(input_, input_, *shape[2:], False, "highest"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_runs_on_the_current_stream(shape: tuple[int, ...]) -> None:
    gradient, spectrum, v, _ = problem(shape)
    late = torch.zeros_like(gradient)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(gradient)
        _, product = quadratic_form(late, spectrum)
    stream.synchronize()
    assert_product_close(product, v, 5e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_runs_on_the_tensors_device() -> None:
    gradient, spectrum, v, _ = problem((5, 3, 32, 32))
    assert torch.cuda.current_device() == 0
    _, product = quadratic_form(gradient.to("cuda:1"), spectrum.to("cuda:1"))
    assert product.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert_product_close(product, v, 5e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layouts(shape: tuple[int, ...]) -> None:
    gradient, spectrum, v, _ = problem(shape)
    batch, channels, height, width = shape
    frame = gradient.new_full((batch, channels, height + 2, width + 3), math.nan)
    frame[:, :, 1:-1, 2:-1] = gradient
    for view in (gradient.contiguous(memory_format=torch.channels_last), frame[:, :, 1:-1, 2:-1]):
        _, product = quadratic_form(view, spectrum.transpose(0, 1))
        assert_product_close(product, v, 5e-6)
        assert product.is_contiguous()


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 1, 64, 64), (1, 5, 12, 12), (1, 2, 32, 80)], ids=str)
def test_more_elements_than_32_bits_count(shape: tuple[int, ...]) -> None:
    gradient, spectrum, v, q = problem(shape)
    batch = 2**31 // gradient.numel() + 3
    expanded = gradient.expand(batch, *shape[1:])
    assert expanded.numel() > 2**31
    form, _ = OPS.native_quadratic_form(expanded, spectrum, False, "highest")
    assert (form == form[0]).all()
    assert_quadratic_close(form[-1:], q, gradient, v, 1e-6)


@pytest.mark.parametrize("shape", [(0, 3, 32, 32), (0, 5, 9, 8), (0, 1, 32, 80)], ids=str)
def test_empty_batch(shape: tuple[int, ...]) -> None:
    _, spectrum, _, _ = problem((1, *shape[1:]))
    gradient = torch.zeros(shape, device="cuda")
    q, v = quadratic_form(gradient, spectrum)
    assert q.shape == (0,)
    assert v.shape == shape
    assert not OPS.native_cross_spectrum(gradient, gradient, *shape[2:], False, "highest").any()


def test_a_failed_call_leaves_nothing_behind() -> None:
    gradient, spectrum, v, _ = problem((5, 3, 32, 32))
    with pytest.raises(RuntimeError, match="spectrum"):
        quadratic_form(gradient, spectrum.double())
    with pytest.raises(RuntimeError, match="precision"):
        quadratic_form(gradient, spectrum, "low")
    total = torch.cuda.get_device_properties(0).total_memory
    large = gradient[:1].expand(total // gradient[0].nbytes, -1, -1, -1)
    with pytest.raises(torch.OutOfMemoryError):
        call("product", "native", large, spectrum, "highest")
    with pytest.raises(RuntimeError, match=r"could not allocate \d+ bytes"):
        OPS.native_product.default.redispatch(
            torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), large, spectrum, "highest"
        )
    _, product = quadratic_form(gradient, spectrum)
    assert_product_close(product, v, 5e-6)


UPDATES = pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((9, 1, 28, 28), {}),
        ((13, 3, 32, 32), {"target_variance": 0.7}),
        ((5, 2, 7, 1), {"binning": "even"}),
        ((6, 3, 64, 40), {"binning": "linear", "psd": "none"}),
        ((3, 4, 19, 32), {"max_displacement": 4}),
    ],
    ids=str,
)


def batches(shape: tuple[int, ...]) -> list[Tensor]:
    """Noise that is alike from pixel to pixel, and differs from channel to channel; of the third batch some is NaN."""
    generator = torch.Generator().manual_seed(sum(shape))
    noise = torch.randn(4, *shape, generator=generator) + 0.3
    noise = (noise + noise.roll(1, -1) + 0.4 * noise.flip(2)) * torch.arange(1, shape[1] + 1).view(-1, 1, 1)
    noise[2, -1, 0, 0, -1] = torch.nan
    return list(noise)


@UPDATES
def test_updates_are_those_of_the_general_path(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    ours = sgr.CovarianceFunction(shape[1], shape[2:], **options).cuda()
    exact = sgr.CovarianceFunction(shape[1], shape[2:], **options).double()
    gradient = gradients(shape)
    for batch in batches(shape):
        assert on_device.serves_update(batch.cuda(), ours.values, ours.layout)
        ours.update(batch.cuda())
        exact.update(batch.double())
        assert (ours.updates.item(), ours.skipped.item()) == (exact.updates.item(), exact.skipped.item())
        top = exact.values.flatten(2)[..., 0].diagonal().mean()
        assert (ours.values.cpu().double() - exact.values).abs().max() <= 2e-5 * top
        spectrum = exact.spectrum
        assert (ours.spectrum.cpu().double() - spectrum).abs().max() <= 2e-6 * spectrum.abs().max()
        leaf = gradient.float().cuda().requires_grad_()
        q = ours.quadratic_form(leaf)  # by the spectrum that the update arranged
        v = exact.product(gradient.double())
        assert_product_close(torch.autograd.grad(q.sum(), leaf)[0] / 2, v, 2e-5)
        assert_quadratic_close(q, (v * gradient).sum((1, 2, 3)), gradient, v, 1e-5)
    assert exact.skipped == 1


@UPDATES
def test_recorded_updates_are_those_of_eager_ones(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    recorded, eager = (sgr.CovarianceFunction(shape[1], shape[2:], **options).cuda() for _ in range(2))
    leaf, found = gradients(shape).float().cuda().requires_grad_(), []
    images = torch.empty(shape, device="cuda")

    def step(covariance: sgr.CovarianceFunction) -> tuple[Tensor, Tensor]:
        covariance.update(images)
        q = covariance.quadratic_form(leaf)
        (v,) = torch.autograd.grad(q.sum(), leaf)
        return q, v

    first, *others = batches(shape)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        images.copy_(first)
        step(recorded)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(recorded)
    for batch in others:
        images.copy_(batch)
        graph.replay()
        found.append([*(result.detach().clone() for result in results), recorded.values.clone()])
    images.copy_(first)
    step(eager)
    for batch, replayed in zip(others, found, strict=True):
        images.copy_(batch)
        for one, other in zip(replayed, [*step(eager), eager.values], strict=True):
            assert torch.equal(one, other)
    assert recorded.skipped == eager.skipped == 1
