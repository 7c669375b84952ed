"""What sweeping strengths costs against one strength, and DeepFool on a thousand digits; processor seconds."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

from sgr_kernels.attacks import correlated_noise, deepfool, fgsm, pgd, relative_norm
from sgr_kernels.covariance import CovarianceFunction
from sgr_kernels.evaluation import robustness_curve
from sgr_kernels.models import carlini_wagner
from sgr_kernels.training.batches import Batches
from sgr_kernels.training.datasets import load

pytestmark = pytest.mark.benchmark(timer=time.process_time)

GRID = [4 * k / 255 for k in range(1, 9)]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """Two epochs on the shipped digits: attacks take as many steps as on a real classifier."""
    torch.manual_seed(0)
    model = carlini_wagner("mnist")
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    batches = Batches(load("mnist-sample").train, 128, shuffle=True)
    for epoch in range(2):
        for images, labels in batches.epoch(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def digits() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(Batches(load("mnist-sample").test, 128))


def median_time(run: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return sorted(times)[rounds // 2]


def test_fgsm_curve_of_eight_strengths_costs_less_than_three(benchmark, network, digits):
    one = median_time(lambda: robustness_curve(network, digits[:4], fgsm, GRID[3:4]), 5)
    benchmark.pedantic(lambda: robustness_curve(network, digits[:4], fgsm, GRID), rounds=5, warmup_rounds=1)
    ratio = benchmark.stats.stats.median / one
    benchmark.extra_info["times one strength"] = ratio
    assert ratio < 3


@pytest.mark.parametrize("early_stop", [False, True])
def test_pgd_curve_of_eight_strengths(benchmark, network, digits, early_stop):
    """Only the clean predictions can be shared exactly, so the gain over separate runs is small."""
    attack = functools.partial(pgd, steps=20, early_stop=early_stop)
    apart = sum(median_time(lambda eps=eps: robustness_curve(network, digits[:1], attack, [eps]), 3) for eps in GRID)
    benchmark.pedantic(lambda: robustness_curve(network, digits[:1], attack, GRID), rounds=3)
    benchmark.extra_info["times separate runs"] = benchmark.stats.stats.median / apart


def test_correlated_noise(benchmark, network, digits):
    """128 digits, 100 draws, nothing broken early to speak of."""
    covariance = CovarianceFunction.exponential(1, 28, 8.0)
    images, labels = digits[0]
    attack = functools.partial(correlated_noise, network, images, labels, covariance=covariance, eps=0.1, draws=100)
    benchmark.pedantic(attack, rounds=3)


def test_deepfool_on_a_thousand_digits_takes_less_than_a_minute_on_two_cores(benchmark, network, digits):
    images = torch.cat([images for images, _ in digits])[:1000]

    def run() -> torch.Tensor:
        return torch.cat([deepfool(network, part) for part in images.split(250)])

    adversarial = benchmark.pedantic(run, rounds=1)
    with torch.no_grad():
        broken = network(adversarial).argmax(1) != network(images).argmax(1)
    benchmark.extra_info["broken"] = float(broken.double().mean())
    benchmark.extra_info["mean relative norm"] = float(relative_norm(images, adversarial).mean())
    assert benchmark.stats.stats.median < 2 * 60
