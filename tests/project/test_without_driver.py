"""A build of PyTorch with CUDA on a machine without an NVIDIA driver, which a plain ``pip install torch`` gives.

Its stand-in: whatever would start the driver fails as it does there. ``make versions`` runs the real thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import sgr_kernels as sgr
from sgr_kernels import cli
from sgr_kernels.models import carlini_wagner
from tests.data_files import write_idx


@pytest.fixture(autouse=True)
def no_driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CUDA is built in, and the first call that needs the driver raises."""

    def refusing() -> Callable[..., None]:
        def refuse(*_: object, **__: object) -> None:
            raise torch.AcceleratorError("CUDA driver version is insufficient for CUDA runtime version")

        return refuse

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    for name in ("is_current_stream_capturing", "current_stream", "synchronize", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, refusing())
    yield
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize("size", [(5, 7), (9, 9)], ids=str)
def test_operators_and_their_gradients(size: tuple[int, int]) -> None:
    gradient = torch.randn(3, 2, *size, requires_grad=True)
    covariance = sgr.functional.displacement_covariance(gradient)
    q = sgr.functional.covariance_quadratic_form(gradient, covariance)
    v = sgr.functional.covariance_product(gradient, covariance, form="radial")
    (q.sum() + v.sum()).backward()
    assert gradient.grad is not None


@pytest.mark.parametrize("method", ["double-backward", "forward-mode", "finite-difference", "auto"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_a_training_step(method: str, fraction: float) -> None:
    model = carlini_wagner("mnist")
    covariance = sgr.CovarianceFunction(1, 28, target_variance=0.1)
    criterion = sgr.SGRLoss(covariance, 1.0, method=method, fraction=fraction, allow_kinks=True)
    criterion(model, torch.rand(4, 1, 28, 28), torch.arange(4)).backward()
    assert int(criterion.covariance.updates) == 1


def test_fixed_covariances_and_their_samples() -> None:
    covariance = sgr.CovarianceFunction.exponential(3, 8, 2.0)
    assert covariance.sample(2).shape == (2, 3, 8, 8)
    assert sgr.CovarianceFunction(2, 8, psd="clip").resize(12).dense().shape == (288, 288)


def test_attacks() -> None:
    model, images = carlini_wagner("mnist"), torch.rand(2, 1, 28, 28)
    sgr.attacks.pgd(model, images, eps=0.1, steps=2)
    sgr.attacks.deepfool(model, images, max_iterations=2)
    noise = sgr.CovarianceFunction.exponential(1, 28, 2.0)
    sgr.attacks.correlated_noise(model, images, torch.arange(2), covariance=noise, eps=0.1, draws=2)


def test_the_training_command(tmp_path: Path) -> None:
    data = tmp_path / "digits"
    write_idx(data, 64, 16)
    options = ["--epochs", "1", "--batch-size", "32", "--out", str(tmp_path / "run"), "--method", "sgr_sign"]
    assert cli.main(["train", "--data", str(data), *options]) == 0
