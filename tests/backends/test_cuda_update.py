"""A running covariance's update by the CUDA kernels, executed without a GPU, against the general path in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sgr_kernels as sgr
from sgr_kernels.covariance import on_device
from tests.cuda_emulator import GROUPS, Emulator, build, missing_compiler

_REASON = missing_compiler()
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


@pytest.fixture(scope="module")
def emulator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """The emulated device, built once for given sources."""
    binary = build(Path(request.config.cache.mkdir("cuda-emulation")))
    return Emulator(binary, tmp_path_factory.mktemp("emulation"))


def batches(shape: tuple[int, ...], count: int = 3) -> list[Tensor]:
    """Correlated noise, of channels that differ."""
    generator = torch.Generator().manual_seed(sum(shape))
    found = []
    for _ in range(count):
        noise = torch.randn(shape, generator=generator) + 0.3
        smooth = noise + noise.roll(1, -1) + 0.5 * noise.roll(1, -2) + 0.4 * noise.flip(1)
        found.append(smooth * torch.arange(1, shape[1] + 1).view(-1, 1, 1))
    return found


def state_of(covariance: sgr.CovarianceFunction) -> dict[str, Tensor]:
    """What an update rewrites; table and spectrum are not read."""
    nothing = {name: torch.full_like(getattr(covariance, name), torch.nan) for name in ("table", "spectrum")}
    names = ("values", "mean", "scale", "updates", "skipped")
    return {
        **{name: getattr(covariance, name).clone() for name in names},
        **nothing,
        "arranged": Emulator.arranged(covariance.spectrum, covariance.image_size),
        "arrivals": torch.zeros(GROUPS, dtype=torch.int32),
    }


def check(state: dict[str, Tensor], exact: sgr.CovarianceFunction) -> None:
    """Against the general path in float64, relative to the covariance at displacement zero."""
    assert not state["arrivals"].any()
    assert (state["updates"], state["skipped"]) == (exact.updates, exact.skipped)
    zero = exact.values.flatten(2)[..., 0].diagonal().mean()
    error = (state["values"].double() - exact.values).abs()
    assert error.max() <= 2e-5 * zero
    if error.dim() == 3 and error.shape[-1] > 1:
        assert error[..., : error.shape[-1] // 2].max() <= 1e-6 * zero
    assert (state["mean"].double() - exact.mean).abs().max() <= 1e-6 * exact.mean.abs().max()
    torch.testing.assert_close(state["scale"].double(), exact.scale, rtol=2e-6, atol=0)
    # The table has its own errors of the last bins, and the projection mixes them into all of it.
    top = exact.table.flatten(2)[..., 0].diagonal().mean()
    assert (state["table"].double() - exact.table).abs().max() <= 2e-5 * top
    norm = exact.spectrum.abs().max()
    assert (state["spectrum"].double() - exact.spectrum).abs().max() <= 2e-6 * norm


CASES = [
    ((9, 1, 12, 10), {}),
    ((13, 3, 32, 32), {"target_variance": 0.7}),
    ((5, 3, 9, 14), {"binning": "linear", "target_variance": 1.0}),
    ((5, 2, 7, 1), {"binning": "even"}),
    ((3, 4, 8, 11), {"max_displacement": 4}),
    ((3, 2, 40, 33), {"binning": "linear", "max_displacement": 9, "psd": "none", "target_variance": 0.1}),
    ((4, 3, 10, 20), {"binning": "even", "max_displacement": 6, "psd": "none"}),
    ((2, 1, 1, 1), {}),
]


@pytest.mark.parametrize(("shape", "options"), CASES, ids=str)
def test_an_update_is_that_of_the_general_path(emulator: Emulator, shape: tuple[int, ...], options: dict) -> None:
    order = "ascending" if shape[0] % 2 else "descending"
    single = sgr.CovarianceFunction(shape[1], shape[2:], **options)
    exact = sgr.CovarianceFunction(shape[1], shape[2:], **options).double()
    state = state_of(single)
    clip = single.psd == "clip"
    for batch in batches(shape, 2):
        emulator.update(batch, state, single.binning, single.decay, single.target_variance, clip, order=order)
        assert emulator.launches == 2
        exact.update(batch.double())
        check(state, exact)
    gradient = batches(shape, 1)[0]
    at_once = emulator.product(gradient, state["spectrum"], order=order)
    assert emulator.launches == 2
    ready = emulator.product(gradient, state["spectrum"], order=order, arranged=state["arranged"])
    assert emulator.launches == 1
    assert all(torch.equal(a, b) for a, b in zip(ready, at_once))  # type: ignore[arg-type]


@pytest.fixture
def served(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """CPU tensors' updates go to the emulated kernels; the list counts them."""
    calls: list[int] = []
    names = ("values", "mean", "scale", "table", "spectrum", "updates", "skipped", "arrivals")

    def update(perturbation: Tensor, *arguments: Any) -> None:
        binning, decay, target_variance, clip, precision = arguments[9:]
        state = dict(zip(names, arguments))
        size = (perturbation.shape[2], perturbation.shape[3])
        room = Emulator.arranged(state["spectrum"], size)
        state["arranged"] = arguments[8] if len(arguments[8]) else room
        for name in ("table", "spectrum"):  # written, not read
            state[name].fill_(torch.nan)
        emulator.update(perturbation, state, binning, decay, target_variance, clip, precision)
        calls.append(len(perturbation))

    library = torch.library.Library("sgr_kernels", "FRAGMENT")
    library.impl("native_update", update, "CPU")
    monkeypatch.setattr(on_device, "serves_update", lambda images, values, layout: len(images) > 0)
    yield calls
    library._destroy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_running_covariance_updates_so(served: list[int], dtype: torch.dtype) -> None:
    """The first batch sets the estimate, what is not finite is skipped and counted, an empty batch is nothing."""
    shape, options = (3, 2, 6, 8), {"target_variance": 1.0, "decay": 0.25}
    covariance, exact = (sgr.CovarianceFunction(2, (6, 8), **options) for _ in range(2))
    exact.double()
    first, second, third = (batch.to(dtype) for batch in batches(shape))
    broken = second.clone()
    broken[1, 0, 2, 3] = torch.inf
    state_before = covariance.spectrum._version
    for batch in (broken, first, first[:0], second[..., ::2].repeat_interleave(2, -1)[..., :8], broken, third):
        covariance.update(batch)
        if len(batch):
            with general_path():
                exact.update(batch.double())
        current = {name: getattr(covariance, name) for name in ("values", "mean", "scale", "table", "spectrum")}
        counts = {name: getattr(covariance, name) for name in ("updates", "skipped")}
        check({**current, **counts, "arrivals": covariance._counters_on_device}, exact)
    assert served == [3] * 5
    assert covariance.spectrum._version > state_before
    with pytest.warns(RuntimeWarning, match="2 batches"):
        covariance.warn_if_skipped()


def test_signals(served: list[int]) -> None:
    covariance, exact = (sgr.CovarianceFunction(1, (13,)) for _ in range(2))
    exact.double()
    for batch in batches((2, 1, 1, 13), 2):
        covariance.update(batch[:, :, 0])
        with general_path():
            exact.update(batch[:, :, 0].double())
    names = ("values", "mean", "scale", "table", "spectrum", "updates", "skipped")
    check({**{name: getattr(covariance, name) for name in names}, "arrivals": covariance._counters_on_device}, exact)


@contextlib.contextmanager
def general_path() -> Iterator[None]:
    """Without the operator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_device, "serves_update", lambda *_: False)
        yield


def test_what_the_operator_leaves_to_the_general_path() -> None:
    images, layout = torch.zeros(2, 3, 32, 32), sgr.CovarianceFunction(3, 32).layout
    assert not on_device.serves_update(images, torch.zeros(3, 3, 45), layout)  # not on a GPU
