"""Every barrier of the CUDA kernels, and every wait for what arrives, is needed, and its absence does not pass unseen.

The emulated device leaves out one, by its place in the sources, and lets warps run as far apart as the others allow:
some result must then differ, or memory be touched that is not there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sgr_kernels as sgr
from tests.cuda_emulator import GROUPS, HOPPER, KERNELS, STAGED_ONLY, Emulator, build, missing_compiler

_REASON = missing_compiler()
pytestmark = [pytest.mark.skipif(_REASON is not None, reason=str(_REASON)), pytest.mark.slow]

_CALL = re.compile(r"__sync(?:threads|warp)\(\)|\.wait\(\)")


def sites() -> list[str]:
    """Places, file:line, of all barriers and waits that the emulator compiles."""
    found = []
    for path in sorted(KERNELS.glob("*.cuh")):
        text = path.read_text()
        lines, skipped = text.splitlines(), range(0)
        if path.name == "device.cuh":  # the emulated device has copies of its own
            skipped = range(text.index("struct Arrival"), text.index("// Warp-wide d += a b"))
        for match in _CALL.finditer(text):
            line = text.count("\n", 0, match.start())
            # After a fence a barrier is for other blocks, which the emulated device runs one after the other.
            if match.start() not in skipped and "//" not in lines[line] and "__threadfence" not in lines[line - 1]:
                found.append(f"{path.name}:{line + 1}")
    return found


def images(*shape: int, strided: bool = False) -> Tensor:
    batch = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return batch.transpose(2, 3).contiguous().transpose(2, 3) if strided else batch


def spectrum(channels: int, rows: int, columns: int, steep: bool) -> Tensor:
    values = torch.randn(channels, channels, rows, columns, generator=torch.Generator().manual_seed(2))
    if steep:
        values[..., -1, -1] *= 1e6
    return values


Run = Callable[[Emulator, str], list[Tensor]]


def product(batch: Tensor, shared: int = HOPPER, steep: bool = False) -> Run:
    def run(emulator: Emulator, order: str) -> list[Tensor]:
        lam = spectrum(*batch.shape[1:], steep)
        found = emulator.product(batch, lam, shared=shared, order=order)
        return [tensor for tensor in found if tensor is not None]

    return run


def sums(batch: Tensor, shared: int = HOPPER) -> Run:
    def run(emulator: Emulator, order: str) -> list[Tensor]:
        return [emulator.cross_spectrum(batch, None, (batch.shape[2], batch.shape[3]), shared=shared, order=order)]

    return run


def update(batch: Tensor, unit: float = 1.0) -> Run:
    def run(emulator: Emulator, order: str) -> list[Tensor]:
        covariance = sgr.CovarianceFunction(batch.shape[1], (batch.shape[2], batch.shape[3]), target_variance=1.0)
        names = ("values", "mean", "scale", "updates", "skipped", "table", "spectrum")
        state = {name: getattr(covariance, name).clone() for name in names}
        state["arrivals"] = torch.zeros(GROUPS, dtype=torch.int32)
        state["arranged"] = Emulator.arranged(covariance.spectrum, covariance.image_size)
        emulator.update(unit * batch, state, "rounded", 0.1, 1.0, True, order=order)
        state["arranged"] = state["arranged"].view(torch.int32)  # its exponent is none of floats
        return [*state.values()]

    return run


SMALL, STRIDED, TALL = (
    product(images(8, 1, 4, 8)),
    product(images(5, 1, 4, 5, strided=True)),
    product(images(5, 1, 40, 4)),
)
UPDATE = update(images(20, 2, 6, 8))
SUMS = sums(images(9, 2, 4, 8))
CASES = {
    "covariance_update": [UPDATE, update(images(4, 2, 6, 8), 1e25)],  # whose squares are not finite
    "device": [UPDATE, update(torch.zeros(20, 2, 6, 8))],
    "fourier": [product(images(1, 1, 32, 80))],
    "fourier_product": [product(images(1, 1, 32, 80))],
    "fused_cross_spectrum": [SUMS, sums(images(600, 1, 4, 4))],
    "fused_product": [SMALL, TALL],
    "image_tiles": [SMALL, STRIDED],
    "spectrum_tiles": [product(images(2, 1, 4, 8), steep=True)],
    "staged_channels": [product(images(1, 1, 20, 20), STAGED_ONLY)],
    "staged_transform": [product(images(2, 1, 40, 40), STAGED_ONLY)],
}


@pytest.fixture(scope="module")
def emulator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """The emulated device, built once for given sources."""
    binary = build(Path(request.config.cache.mkdir("cuda-emulation")))
    return Emulator(binary, tmp_path_factory.mktemp("emulation"))


@pytest.fixture(scope="module")
def expected() -> dict[Run, list[Tensor]]:
    """Results with all barriers in place."""
    return {}


def differs(found: list[Tensor], expected: list[Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("site", sites())
def test_a_missing_barrier_is_noticed(
    emulator: Emulator, expected: dict[Run, list[Tensor]], monkeypatch: pytest.MonkeyPatch, site: str
) -> None:
    for run in CASES[site.partition(".")[0]]:
        if run not in expected:
            expected[run] = run(emulator, "ascending")
            assert not any(tensor.isnan().any() for tensor in expected[run])
        for order in ("descending", "ascending"):
            with monkeypatch.context() as patch:
                patch.setenv("SGR_OMIT", site)
                try:
                    found = run(emulator, order)
                except AssertionError:
                    return
            if differs(found, expected[run]):
                return
    pytest.fail(f"nothing notices that {site} is missing")
