"""The Triton backend where Triton cannot run, or not all of it, and what a compiler sees of its operators."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses import FakeTensorMode

from sgr_kernels.backends import Request, choose, triton_spectral
from sgr_kernels.toeplitz.spectrum import spectrum_from_table
from tests.helpers import assert_product_close, covariances, dense_product, gradients

triton = pytest.importorskip("triton")
GPU = torch.device("cuda", 0)
REQUEST = Request("product", GPU, torch.float32, 8, 3, (32, 32), "even")


@pytest.fixture(autouse=True)
def judged_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found out of this machine is forgotten before and restored after a test."""
    monkeypatch.setattr(triton_spectral, "_obstacles", {})
    monkeypatch.setattr(triton_spectral, "_failure", None)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with compute capability 9.0 that Triton can use, as far as `torch.cuda` tells."""
    from sgr_kernels.backends.triton_spectral import probe

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(probe, "run", lambda device: None)


def _break(obstacle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sgr_kernels.backends.triton_spectral import probe

    def unwritable(device: torch.device) -> None:
        raise PermissionError(30, "Read-only file system", "/cache")

    if obstacle == "missing":
        monkeypatch.setitem(sys.modules, "triton", None)
    elif obstacle == "too old":
        monkeypatch.setattr(triton, "__version__", "3.5.1")
    elif obstacle == "old GPU":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    else:
        monkeypatch.setattr(probe, "run", unwritable)


@pytest.mark.usefixtures("gpu")
def test_a_capable_gpu_is_served() -> None:
    assert choose("triton", REQUEST) == "triton"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("obstacle", "reason"),
    [
        ("missing", "Triton cannot be imported"),
        ("too old", r"Triton 3\.5\.1 is too old; 3\.6 or newer is needed"),
        ("old GPU", r"GPU has compute capability 7\.5; 8\.0 or newer is needed"),
        ("read-only cache", r"Triton cannot compile or launch a kernel \(PermissionError: .*Read-only file system"),
    ],
)
def test_an_obstacle_is_told_in_one_line_and_the_next_backend_serves(
    obstacle: str, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _break(obstacle, monkeypatch)
    caplog.set_level(logging.WARNING, logger="sgr_kernels")
    for _ in range(2):
        assert choose("auto", REQUEST) in ("native", "torch")
        with pytest.raises(RuntimeError, match=f"backend 'triton' cannot run product: {reason}"):
            choose("triton", REQUEST)
    (record,) = caplog.records
    assert record.getMessage().startswith("backend 'triton' is left out: ")
    assert "\n" not in record.getMessage()


def test_the_probe_is_launched_on_the_device_in_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, where another device's memory cannot be written."""
    from sgr_kernels.backends.triton_spectral import probe

    device = torch.device("meta")
    entered: list[torch.Tensor] = []
    launched: list[torch.Tensor] = []

    class Guard:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

        def __enter__(self) -> None:
            entered.append(self.tensor)

        def __exit__(self, *_: object) -> None:
            entered.pop()

    def launch(target: torch.Tensor) -> None:
        assert [tensor.device for tensor in entered] == [device]
        launched.append(target)

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    monkeypatch.setattr(probe, "_probe_kernel", {(1,): launch})
    probe.run(device)
    assert [target.device for target in launched] == [device]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 3000, 3000), (70000, 5, 1, 2), (1, 70, 2, 3), (1, 2, 1, 9000)])
def test_grids_stay_within_the_limits_of_a_launch(shape: tuple[int, ...], signed: bool) -> None:
    """2^31 - 1 programs along the first axis, 65535 along the others; `launches` asserts it."""
    from sgr_kernels.backends.triton_spectral import launch
    from tests.triton_launches import launches

    images, (channels, *size) = torch.empty(shape, device="meta"), shape[1:]
    spectrum = torch.empty(*([4] if signed else []), channels, channels, *size, device="meta")
    assert launches(lambda: launch.quadratic_form(images, spectrum, True, "highest"))
    assert launches(lambda: launch.cross_spectrum(images, images, *size, signed, "highest"))


@pytest.mark.parametrize("shape", [(128, 1, 28, 28), (1024, 3, 32, 32), (256, 3, 64, 64), (5, 4, 17, 9)])
def test_small_images_take_one_launch_with_an_arranged_spectrum(shape: tuple[int, ...]) -> None:
    from sgr_kernels.backends.triton_spectral import launch
    from sgr_kernels.covariance.on_device import _words
    from tests.triton_launches import recorded

    images, spectrum = torch.empty(shape, device="meta"), torch.empty(shape[1], *shape[1:], device="meta")
    arranged = torch.empty(_words("triton", spectrum, (shape[2], shape[3])), device="meta")
    (arranging,) = recorded(lambda: launch.arrange(spectrum, arranged, *shape[2:]))
    (product,) = recorded(lambda: launch.arranged_quadratic_form(images, spectrum, arranged, True, "highest"))
    given = recorded(lambda: launch.quadratic_form(images, spectrum, True, "highest"))
    assert given == [arranging, product]
    with pytest.raises(ValueError, match="arranged: expected"):
        launch.arranged_quadratic_form(images, spectrum, arranged[1:], True, "highest")
    with pytest.raises(ValueError, match="arranged: expected room for"):
        launch.arrange(spectrum, arranged[1:], *shape[2:])


@pytest.mark.parametrize("shape", [(64, 3, 224, 224), (8, 3, 512, 512)])
def test_large_images_take_three_passes(shape: tuple[int, ...]) -> None:
    """The rows' coefficients are written, rewritten in place and read; a given spectrum is arranged before."""
    from sgr_kernels.backends.triton_spectral import launch
    from tests.triton_launches import recorded

    images, spectrum = torch.empty(shape, device="meta"), torch.empty(shape[1], *shape[1:], device="meta")
    made = recorded(lambda: launch.quadratic_form(images, spectrum, True, "highest"))
    assert [found.name for found, _ in made] == ["arrange_kernel", "forward_kernel", "columns_kernel", "inverse_kernel"]
    pixels = images.numel() * images.itemsize
    assert sum(touched for _, touched in made) <= 9.1 * pixels  # 3 + 2 + 3, the spectrum and the bases
    made = recorded(lambda: launch.quadratic_form(images, spectrum, False, "highest"))
    assert [found.name for found, _ in made] == ["arrange_kernel", "forward_kernel", "columns_kernel"]


def test_offsets_within_an_image_have_32_bits() -> None:
    from sgr_kernels.backends.triton_spectral.launch import _addressable

    ordinary = torch.empty(2**21, 3, 28, 28, device="meta")
    assert _addressable(ordinary) is ordinary
    planes_apart = torch.empty(3, 2**21, 28, 28, device="meta").transpose(0, 1)
    assert planes_apart.stride(1) < 2**31 < 2 * planes_apart.stride(1)
    assert _addressable(planes_apart).stride(1) == 28 * 28


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RuntimeError, match="sees no CUDA device"):
        choose("triton", REQUEST)
    assert not caplog.records


@pytest.mark.skipif(triton_spectral.interpreting(), reason="Triton interprets its kernels in this process")
def test_a_cache_folder_that_cannot_be_written_leaves_the_numbers_to_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The compiler is the real one; a file stands where its cache folder should be."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sgr_kernels.backends.triton_spectral.probe import _probe_kernel

    calls = []

    def compile_first(*args: object) -> None:
        calls.append(args)
        source = ASTSource(_probe_kernel, {"target": "*fp32"}, {})
        triton.compile(source, target=GPUTarget("cuda", 90, 32))

    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    launchers = SimpleNamespace(product=compile_first)
    monkeypatch.setattr(triton_spectral, "_launchers", lambda: launchers)
    g, f = gradients((3, 2, 6, 5)).float(), covariances("even", 2, (6, 5)).float()
    spectrum = spectrum_from_table(f, (6, 5), "even", torch.float32)
    for _ in range(2):
        v = torch.ops.sgr_kernels.triton_product(g, spectrum, "highest")
        assert_product_close(v, dense_product(g, f, "even")[0], 5e-6)
    assert len(calls) == 1
    (record,) = caplog.records
    assert "Triton cannot store a compiled kernel (NotADirectoryError" in record.getMessage()
    with pytest.raises(RuntimeError, match="cannot store a compiled kernel"):
        choose("triton", REQUEST)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that only names its GPU: all that the analysis of a kernel asks for."""
    from triton.backends.compiler import GPUTarget

    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)


@pytest.mark.usefixtures("hopper")
@pytest.mark.skipif(triton_spectral.interpreting(), reason="Triton interprets its kernels in this process")
@pytest.mark.parametrize("size", [(32, 28), (70, 20)])
def test_a_compiler_sees_the_kernels_and_what_they_write(size: tuple[int, int]) -> None:
    def operators(g: torch.Tensor, spectrum: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, v = torch.ops.sgr_kernels.triton_quadratic_form(g, spectrum, True, "highest")
        return q, torch.ops.sgr_kernels.triton_cross_spectrum(g, v, *size, False, "highest")

    with FakeTensorMode():
        arguments = (torch.empty(4, 3, *size), torch.empty(3, 3, *size))
        graph = aot_export_joint_simple(operators, arguments, trace_joint=False)
    kernels = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    written = [set(node.kwargs["tensors_to_clone"]) for node in kernels]
    if max(size) <= 64:
        assert written == [{"arranged"}, {"product", "form"}, {"sums"}]
    else:
        passes = [{"target"}, {"half", "form"}, {"target"}]
        assert written == [{"arranged"}, *passes, *[{"target"}] * 4, {"sums"}]
    assert not any("sgr_kernels" in str(node.target) for node in graph.graph.nodes)
