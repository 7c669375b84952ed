"""From the loss down to the CUDA kernels on a stand-in for a GPU: what the package does with them, and what they do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sgr_kernels as sgr
from sgr_kernels.functional import covariance_product, covariance_quadratic_form, displacement_covariance
from tests.cuda_emulator import Emulator, build, missing_compiler
from tests.device_kernels import Kernels
from tests.device_stand_in import stand_in

_REASON = missing_compiler()
pytestmark = [
    pytest.mark.skipif(_REASON is not None, reason=str(_REASON)),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, which the GPU's tests use"),
]


@pytest.fixture
def compiled(request: pytest.FixtureRequest, tmp_path: Path) -> Kernels:
    """The emulated kernels, built once for given sources."""
    binary = build(Path(request.config.cache.mkdir("cuda-emulation")))
    return Kernels(Emulator(binary, tmp_path))


def images(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def steps(device: str, shape: tuple[int, ...], count: int, **options: Any) -> list[tuple[float, ...]]:
    """Loss, penalty and gradient norm of steps of SGR, and the covariance's state after them."""
    torch.manual_seed(0)
    features = nn.Conv2d(shape[1], 3, 3, padding=1)
    model = nn.Sequential(features, nn.GELU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 10)).to(device)
    settings = {name: options.pop(name) for name in ("binning", "psd", "target_variance") if name in options}
    covariance = options.pop("covariance", None)
    if covariance is None:
        covariance = sgr.CovarianceFunction(shape[1], shape[2:], **{"target_variance": 0.06, **settings})
    criterion = sgr.SGRLoss(covariance, strength=10.0, **options).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found = []
    for number in range(count):
        x, y = images(shape, number).to(device), torch.arange(shape[0]).to(device)
        if number == 1:
            x[0, 0, 0, 0] = torch.nan  # a batch that counts as skipped
        loss = criterion(model, x, y)
        optimizer.zero_grad()
        if number != 1:
            loss.backward()
            optimizer.step()
            assert features.weight.grad is not None
            penalty = criterion.last.penalty
            found.append((loss.item(), float("nan") if penalty is None else float(penalty)))
            found.append((float(features.weight.grad.norm()),))
    state = {name: value.cpu() for name, value in criterion.covariance.state_dict().items()}
    found += [tuple(value.double().flatten().tolist()[:50]) for value in state.values()]
    return found


SMALL = {"native_update": 5, "native_arrange": 1, "native_arranged_quadratic_form": 5}


@pytest.mark.parametrize(
    ("shape", "options", "calls"),
    [
        ((5, 1, 28, 28), {}, SMALL),
        ((4, 3, 32, 32), {"binning": "even"}, SMALL),
        ((3, 3, 40, 33), {"binning": "linear", "psd": "none"}, SMALL),
        ((3, 1, 12, 20), {"mean_correction": True, "target_variance": None}, None),
        ((6, 1, 28, 28), {"fraction": 0.5, "update_every": 2}, None),
        ((4, 1, 28, 28), {"covariance": sgr.CovarianceFunction.exponential(1, (28, 28), 4.0)}, None),
        ((2, 1, 70, 31), {}, None),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else "",
)
@pytest.mark.filterwarnings("ignore:CovarianceFunction. 1 batches with non-finite:RuntimeWarning")
def test_steps_are_those_of_the_host(
    shape: tuple[int, ...], options: dict[str, Any], calls: dict[str, int] | None, compiled: Kernels
) -> None:
    """The first call of a kernel is arranged for; then an update leaves the spectrum as the kernels read it."""
    expected = steps("cpu", shape, 5, **copy.deepcopy(options))
    with stand_in(compiled):
        found = steps("cuda", shape, 5, **copy.deepcopy(options))
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-6, nan_ok=True)
    if calls is not None:
        assert compiled.calls == calls
    assert any("quadratic_form" in name for name in compiled.calls)


@pytest.mark.parametrize("shape", [(3, 1, 28, 28), (2, 3, 20, 12), (2, 5, 9, 7), (1, 1, 70, 40)], ids=str)
@pytest.mark.parametrize("form", ["radial", "even", "signed"])
def test_operators_and_their_derivatives_are_those_of_the_host(
    shape: tuple[int, ...], form: Any, compiled: Kernels
) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator)
    values = displacement_covariance(x, form=form, backend="torch")

    def answers(device: str, backend: str) -> list[Tensor]:
        g, f = (tensor.clone().to(device).requires_grad_() for tensor in (x, values))
        v = covariance_product(g, f, form=form, backend=backend)
        q = covariance_quadratic_form(g, f, form=form, backend=backend)
        first = torch.autograd.grad((q.square().sum() + (v * x.to(device)).sum()), (g, f), create_graph=True)
        second = torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), (g, f))
        return [v, q, *first, *second, displacement_covariance(g, form=form, backend=backend)]

    expected = answers("cpu", "torch")
    with stand_in(compiled):
        found = [answer.detach().cpu() for answer in answers("cuda", "native")]
    for ours, theirs in zip(found, expected, strict=True):
        scale = float(theirs.detach().norm())
        assert float((ours - theirs.detach()).norm()) <= 1e-5 * scale
    assert {"native_product", "native_cross_spectrum"} <= set(compiled.calls)


def test_the_default_backend_is_that_of_the_compiled_kernels(compiled: Kernels) -> None:
    x = images((2, 1, 28, 28))
    host = sgr.CovarianceFunction.exponential(1, (28, 28), 4.0)
    with stand_in(compiled):
        covariance = copy.deepcopy(host).to("cuda")
        there = covariance.product(x.to("cuda"))
        assert sum(compiled.calls.values()) > 0
        for precision in ("high", "medium"):
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(precision)
            try:
                rough = covariance.product(x.to("cuda"))
            finally:
                torch.set_float32_matmul_precision(before)
            difference = float((rough - there).norm() / there.norm())
            assert 1e-6 < difference < (1e-3 if precision == "high" else 1e-2)
        there = there.cpu()
    torch.testing.assert_close(there, host.product(x), rtol=1e-4, atol=1e-4)
