"""The choice of a backend: explicit, by default, and by measured crossovers."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest
import torch

import sgr_kernels as sgr
from benchmarks.crossovers import OPERATORS, dense_up_to, medians
from benchmarks.cuda_static import DEVICES, RESULT
from sgr_kernels import backends
from sgr_kernels.backends import crossovers, native, registry
from sgr_kernels.backends.circulant import smooth_length


def request_for(dimension: int, operator: str = "quadratic_form") -> backends.Request:
    return backends.Request(operator, torch.device("cpu"), torch.float32, 8, 1, (1, dimension), "even")


@pytest.fixture
def without_compiled_kernels(monkeypatch):
    """As on a machine that has no compiler."""
    for name in ("native", "triton"):
        if name in registry._registered:
            absent = dataclasses.replace(registry._registered[name], can_run=lambda request: "not built")
            monkeypatch.setitem(registry._registered, name, absent)


def test_the_table_says_what_its_measurements_say():
    table = json.loads(crossovers.FILE.read_text())
    assert set(table) <= {"cpu", "cuda"}
    for entry in table.values():
        assert {"command", "device", "torch", "commit"} <= set(entry["source"])
        for backend, limits in entry["dense_up_to"].items():
            assert limits == {o: dense_up_to(entry["measured"], backend, ops) for o, ops in OPERATORS.items()}


def test_dense_wins_up_to_the_first_loss():
    def record(dimension: int, torch_time: float) -> dict:
        return {"operation": "q", "shape": [1, 1, 1, dimension], "milliseconds": {"torch": torch_time, "reference": 1}}

    records = [record(4, 2.0), record(16, 1.5), record(64, 0.5), record(100, 3.0)]
    assert dense_up_to(records, "torch", ("q",)) == 16
    assert dense_up_to(records, "native", ("q",)) == 0


def test_a_wrong_answer_wins_nothing(monkeypatch):
    rows = [
        {"provider": "sgr torch", "milliseconds": 2.0, "correct": True},
        {"provider": "sgr reference", "milliseconds": 1.0, "correct": False},
    ]
    problem = {"batch": 1, "channels": 1, "height": 2, "width": 2}
    (record,) = medians([{"operation": "q", "problem": problem, "rows": rows}])
    assert record["milliseconds"] == {"torch": 2.0}
    assert dense_up_to([record], "torch", ("q",)) == 0


@pytest.mark.parametrize("operator", OPERATORS)
def test_tiny_images_without_kernels_are_served_by_the_dense_matrix(operator, without_compiled_kernels):
    limit = crossovers.dense_up_to("cpu", "torch", operator)
    assert 16 <= limit <= 256
    assert backends.choose("auto", request_for(limit, operator)) == "reference"
    assert backends.choose("auto", request_for(limit + 1, operator)) == "torch"
    g, f = torch.randn(8, 1, 1, limit), torch.rand(1, 1, limit)
    chosen, spectral = (sgr.functional.covariance_quadratic_form(g, f, backend=b) for b in ("auto", "torch"))
    assert chosen.dtype == spectral.dtype
    torch.testing.assert_close(chosen, spectral, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif("native" not in backends.available(), reason="there are no compiled kernels")
@pytest.mark.parametrize(
    ("size", "chosen"),
    [
        ((1, 1024), "native"),
        ((1, 16_000), "torch"),
        ((1, 1021), "torch"),
        ((1021, 1021), "native"),
        ((4093, 64), "torch"),
    ],
)
def test_long_axes_that_do_not_split_well_go_through_fft(size, chosen):
    request = dataclasses.replace(request_for(4), size=size)
    assert backends.choose("auto", request) == chosen
    assert backends.choose("native", request) == "native"


def cuda_request(channels: int, side: int, dtype: torch.dtype = torch.float32, form: str = "even") -> backends.Request:
    return backends.Request("quadratic_form", torch.device("cuda"), dtype, 8, channels, (side, side), form)


@pytest.mark.parametrize(
    ("request_", "chosen"),
    [
        (cuda_request(3, 641), "native"),  # by Fourier transforms of their own
        (cuda_request(3, 1024), "native"),
        (cuda_request(3, 1025), "torch"),  # which has none
        (cuda_request(4, 480), "native"),
        (cuda_request(4, 512), "torch"),
        (dataclasses.replace(cuda_request(1, 1), size=(1, 1024)), "native"),
        (dataclasses.replace(cuda_request(1, 1), size=(1, 1300)), "torch"),
        (cuda_request(3, 512, torch.float64), "torch"),
        (cuda_request(4, 1024, form="signed"), "native"),
        (dataclasses.replace(cuda_request(1, 1024), operator="cross_spectrum"), "native"),
    ],
    ids=str,
)
def test_large_images_on_gpus_go_through_fft(request_, chosen, monkeypatch):
    """Where counts expect it to be faster: on a machine whose kernels run, whatever they are."""
    for name in ("native", "triton"):
        able = dataclasses.replace(registry._registered[name], can_run=lambda request: None)
        monkeypatch.setitem(registry._registered, name, able)
    monkeypatch.setattr(native, "_shared_memory", lambda device: 227 << 10)
    assert backends.choose("auto", request_) == chosen
    assert backends.choose("native", request_) == "native"


def test_fourier_transforms_need_shared_memory_for_all_channels(monkeypatch):
    monkeypatch.setattr(native, "_shared_memory", lambda device: 99 << 10)
    assert not native._slow(cuda_request(3, 896))
    assert native._slow(cuda_request(3, 1024))
    assert not native._slow(cuda_request(2, 1024))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_committed_counts_expect_so(architecture):
    """Instructions at three fifths of the issue rate, against the bytes of rfft2's chain at the GPU's bandwidth."""
    counts = json.loads(RESULT.read_text())[architecture]
    bandwidth = next(iter(DEVICES[architecture].memory_bytes.values()))

    def ratio(batch: int, channels: int, side: int) -> float:
        native_time = counts[f"v+q ({batch},{channels},{side},{side})"]["floors in us"]["issue"] / 0.6
        period = smooth_length(2 * side - 1)
        # Bytes; a half of complex numbers has the padded image's.
        pixels, padded = 4 * batch * channels * side**2, 4 * batch * channels * period**2
        # Padding; two transforms each way; multiply-adds, whose sums are read and written; z y and its sum; the crop.
        moved = (pixels + padded) + 8 * padded + (2 + channels * 2) * padded + 4 * padded + 3 * pixels
        return native_time / (1e6 * moved / bandwidth)

    assert ratio(64, 3, 224) < 0.8
    assert ratio(8, 3, 1024) < 0.2  # by transforms, as at 224 pixels
    assert 0.75 < ratio(8, 4, native._FFT_FROM) < 1.33
    assert ratio(8, 3, 512) < 0.2


def test_a_device_that_was_not_measured_forms_no_matrix():
    assert crossovers.dense_up_to("meta", "torch", "product") == 0


def test_above_a_size_the_dense_matrix_is_refused_with_its_memory():
    g, f = torch.ones(1, 3, 64, 64), torch.ones(3, 3, 8)
    with pytest.raises(RuntimeError, match=r"dimension 12288 would need 1\.1 GiB; the limit is 8192"):
        sgr.functional.covariance_product(g, f, backend="reference")


def test_a_choice_made_early_holds_in_every_block_that_it_opens():
    early = backends.use_backend("torch")
    try:
        for _ in range(2):
            with early:
                assert backends.choose("auto", request_for(4)) == "torch"
            assert registry._choice == "auto"
        with pytest.raises(KeyError), early:
            raise KeyError
        assert registry._choice == "auto"
    finally:
        registry._choice = "auto"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_nothing_runs_on_a_device_that_is_not_there():
    assert backends.available("cuda") == []
    assert {"torch", "reference"} <= set(backends.available())


def test_unknown_names_list_the_valid_ones():
    with pytest.raises(ValueError, match=r"expected one of 'auto', 'native', .*'torch', 'reference', got 'fast'"):
        backends.choose("fast", request_for(4))


def test_auto_tells_its_choice_once_for_a_class_of_shapes(caplog, monkeypatch):
    monkeypatch.setattr(registry, "_logged", set())
    with caplog.at_level(logging.DEBUG, logger="sgr_kernels"):
        for batch in (4, 5):
            backends.choose("auto", dataclasses.replace(request_for(50), batch=batch))
        backends.choose("auto", request_for(60))
    assert len(caplog.records) == 2
