"""All that is above the kernels, with tensors that lie on a device: a rehearsal on a stand-in for a GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sgr_kernels as sgr
from benchmarks.step import CAPTURED
from sgr_kernels.attacks import correlated_noise, deepfool, fgm, fgsm, pgd, uniform_noise
from sgr_kernels.cli import main
from sgr_kernels.functional import covariance_product, covariance_quadratic_form, displacement_covariance
from sgr_kernels.models import carlini_wagner
from sgr_kernels.reproduce.run import EXPERIMENTS, load, reproduce
from sgr_kernels.training import Settings, Trainer
from sgr_kernels.training.datasets import load as load_data
from tests.commands.outcomes import refuses
from tests.data_files import write_idx
from tests.device_stand_in import Device, stand_in
from tests.tiny_lab import TINY, lab_in

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, which the GPU's tests use")

# Every method, the sources of perturbations that they have not, and every way to and part of the penalty.
TRAININGS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in ("clean", "wdecay", "pgd", "fgsm", "gn", "l1", "lrc", "fgsm_sgr", "pgd_sgr")},
    "gradient": {"perturbation": "gradient"},
    "deepfool": {"perturbation": "deepfool"},
    "exponential": {"perturbation": "exponential"},
    "full": {"covariance": "full"},
    "mean": {"mean_correction": True},
    "even": {"binning": "even", "psd": "none"},
    "part": {"fraction": 0.25, "update_every": 2},
    "uniform part": {"fraction": 0.25, "sampling": "uniform"},
    "seldom": {"penalty_every": 2, "warmup": 3},
    "forward mode": {"penalty_method": "forward-mode"},
    "finite difference": {"penalty_method": "finite-difference", "allow_kinks": True},
    "parts": {"accumulate": 2, "clip_gradient": 1.0, "ema": 0.9, "optimizer": "sgd"},
    "bf16": {"amp": "bf16"},
    "smooth": {"activation": "gelu", "pooling": "average", "normalize": ((0.1,), (0.3,))},
}

# A checkpoint of one place goes on on the other.
RESUMED = ("clean", "fgsm_sgr", "full", "parts")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data") / "digits"
    write_idx(folder, 32, 10)
    return str(folder)


@pytest.fixture(scope="module")
def trained(digits: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that was written from the device."""
    out = tmp_path_factory.mktemp("trained")
    with stand_in():
        train = ["train", "--data", digits, "--epochs", "1", "--batch-size", "32", "--perturbation", "fgsm"]
        assert main([*train, "--device", "cuda", "--out", str(out)]) == 0
    return out


def test_the_stand_in_fails_where_a_gpu_does() -> None:
    with stand_in() as device:
        x, host = torch.ones(2, 3, device=device), torch.ones(2, 3)
        assert (x.device, x.is_cuda, (x + 1)[0].device, x.new_ones(2).device) == (device, True, device, device)
        for mixed in (
            lambda: x + host,
            lambda: host @ x.mT,
            lambda: x.copy_(host).add_(host),
            lambda: torch.cat([x, host]),
            lambda: host[torch.tensor([1], device=device)],
            lambda: torch.where(host > 0, x, x),
            lambda: x + torch.zeros(2, 3),
            lambda: torch.stack([x.sum(), torch.tensor(1.0)]),
            lambda: x.masked_fill(host > 2, 0.0),
            lambda: nn.functional.cross_entropy(x, torch.zeros(2, dtype=torch.long)),
        ):
            with pytest.raises(RuntimeError, match="at least two devices"):
                mixed()
        with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
            torch.randn(2, device=device, generator=torch.Generator())
        with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator"):
            host.normal_(generator=torch.Generator(device))
        for array in (x.numpy, lambda: np.asarray(x)):
            with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
                array()
        # What a GPU takes from the host: numbers, places of an index, what is copied.
        assert float((x * torch.tensor(2.0) + x[torch.tensor([1, 0])]).sum()) == 18
        assert torch.equal(x.cpu(), host)
        x[0] = torch.zeros(3)
        assert x.sum().item() == 3
    assert not torch.cuda.is_available()


@pytest.mark.parametrize("name", TRAININGS)
def test_trainings_are_those_of_the_host(name: str, digits: str, tmp_path: Path) -> None:
    """To rounding: a sum may be taken in another order where memory lies elsewhere."""
    settings = Settings("mnist", batch_size=16, **{"strength": 0.1, **TRAININGS[name]})
    data = load_data(digits)

    def train(device: str) -> Trainer:
        trainer = Trainer(settings, data, device=device)
        trainer.run(1, out=tmp_path / device, progress=False)
        return trainer

    expected = train("cpu")
    with stand_in():
        found = train("cuda")
        assert all(isinstance(parameter, Device) for parameter in found.model.parameters())
        for key in ("loss", "cross_entropy", "penalty", "train_accuracy"):
            assert found.history[0][key] == pytest.approx(expected.history[0][key], rel=1e-3, abs=1e-6), key
        if name not in RESUMED:
            return
        resumed = Trainer(settings, data, device="cuda")
        resumed.resume(tmp_path / "cpu")
        resumed.run(2, progress=False)
    there = Trainer(settings, data)
    there.resume(tmp_path / "cuda")
    there.run(2, progress=False)
    assert there.history[1]["loss"] == pytest.approx(resumed.history[1]["loss"], rel=1e-2)


def test_operators_and_covariances_are_those_of_the_host() -> None:
    generator = torch.Generator().manual_seed(0)
    xi = torch.randn(6, 2, 7, 5, generator=generator)

    def answers(device: str) -> list[torch.Tensor]:
        x = xi.to(device)
        values = displacement_covariance(x)
        noise = sgr.CovarianceFunction.exponential(2, (7, 5), 2.0, target_variance=0.3).to(device)
        running = [
            sgr.CovarianceFunction(2, (7, 5), binning=binning).to(device) for binning in ("rounded", "even", "offset")
        ]
        running.append(sgr.FullCovariance(2, (7, 5)).to(device))
        for covariance in running:
            covariance.update(x)
        drawn = torch.Generator(device).manual_seed(3)
        determinant = noise.log_determinant()
        return [
            values,
            covariance_product(x, values),
            covariance_quadratic_form(x, values),
            noise.solve(x),
            noise.mahalanobis(x),
            noise.dense(),
            noise.sample(3, drawn),
            noise.decay_length(),
            torch.tensor(determinant.value),
            *(covariance.quadratic_form(x) for covariance in running),
        ]

    expected = answers("cpu")
    with stand_in():
        found = [answer.cpu() for answer in answers("cuda")]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "attack", [fgm, fgsm, pgd, deepfool, uniform_noise, correlated_noise], ids=lambda attack: attack.__name__
)
def test_attacks_are_those_of_the_host(attack: Any) -> None:
    torch.manual_seed(0)
    images, model = torch.rand(5, 1, 28, 28), carlini_wagner("mnist").eval()
    options: dict[str, Any] = {} if attack is deepfool else {"eps": 0.2}

    def perturbed(device: str) -> torch.Tensor:
        chosen = dict(options)
        if attack is correlated_noise:
            chosen["covariance"] = sgr.CovarianceFunction.exponential(1, (28, 28), 4.0).to(device)
            chosen["draws"] = 3
        if attack not in (fgm, fgsm, deepfool):
            chosen["generator"] = torch.Generator().manual_seed(1)
        return attack(model.to(device), images.to(device), torch.arange(5, device=device), **chosen)

    expected = perturbed("cpu")
    with stand_in():
        found = perturbed("cuda")
        assert isinstance(found, Device)
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)


COMMANDS = {
    "evaluate": ["--images", "6", "--strong-pgd", "--draws", "2", "--decay-lengths", "4"],
    "certify": ["--images", "3", "--draws", "20", "--decay-lengths", "4", "--sigmas", "0.5"],
    "covariance": ["--images", "6"],
    "diagnose": ["--images", "6", "--draws", "2"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str, trained: Path, digits: str, tmp_path: Path) -> None:
    arguments = [command, str(trained), "--data", digits, "--device", "cuda", *COMMANDS[command]]
    place = tmp_path / {"certify": "out", "covariance": "out.png"}.get(command, "out.json")
    with stand_in():
        assert main([*arguments, "--out", str(place)]) == 0
    assert place.exists()


def test_the_paper(tmp_path: Path) -> None:
    methods = ("clean", "pgd", "gn", "sgr_sign", "sgr_exp")
    scale = replace(TINY, methods=methods, repeated=(), twins=("clean",), limit_lengths=(16.0,))
    with stand_in():
        reproduce(lab_in(tmp_path, scale=scale, device="cuda"), list(EXPERIMENTS), "MNIST, tiny")
    for name, found in load(tmp_path / "results").items():
        assert {entry["device"] for entry in found["machines"]} == {"a stand-in for an H100"}, name


def test_the_benchmarks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that run first on a GPU: facts, what was expected of them, operators, steps."""
    facts, operators, steps = (tmp_path / name for name in ("facts.jsonl", "operators.json", "step.json"))
    on = ["--device", "cuda", "--out"]
    with stand_in():
        assert main(["bench", "facts", "--small", *on, str(facts)]) == 0
        assert main(["bench", "predictions", str(facts)]) == 0
        few = ["--shapes", "2,1,12,12", "--budget", "0.01"]
        few += ["--providers", "copy", "sgr auto", "sgr torch", "dense", "rfft2"]
        assert main(["bench", "operators", *few, *on, str(operators)]) == 0
        quick = ["--networks", "carlini-wagner-mnist", "--ways", "sgr", "pgd-7", "--rounds", "2", "--batch", "4"]
        assert main(["bench", "step", *quick, *on, str(steps)]) == 0
    lines = [json.loads(line) for line in facts.read_text().splitlines()]
    errors = {line["fact"]: line["value"]["error"] for line in lines if "error" in line["value"]}
    # The stand-in has no kernels of a GPU.
    assert all("native" in name or "triton" in name for name in errors), errors
    assert {"copy bandwidth", "product rate", "launches"} <= {line["fact"] for line in lines}
    cells = json.loads(operators.read_text())["cells"]
    assert all("milliseconds" in row for cell in cells for row in cell["rows"])
    rows = {row["way"]: row for row in json.loads(steps.read_text())["rows"]}
    assert set(rows) == {f"{way}{captured}" for way in ("clean", "sgr", "pgd-7") for captured in ("", CAPTURED)}
    assert "at least 2" in refuses(["bench", "step", "--rounds", "1"], capsys)
