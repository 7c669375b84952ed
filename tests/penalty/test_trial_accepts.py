"""The trial of what is right: it is accepted, and nothing that it touched has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sgr_kernels import CovarianceFunction, IdentityCovariance, PenaltyGradientError, SGRLoss
from sgr_kernels.models import carlini_wagner
from sgr_kernels.penalty.choice import METHODS
from tests.support_matrix import CLASSES, SIZE, Lambda


def test_kinks_close_together_are_not_a_fault() -> None:
    """Images of little contrast, brought to full contrast by the model: a small relative step crosses many kinks."""
    torch.manual_seed(0)
    model = carlini_wagner("cifar10")
    model.standardize = Lambda(lambda x: (x - 0.5) / 1e-5)  # type: ignore[assignment]
    images, labels = 0.5 + 1e-5 * (torch.rand(16, 3, 32, 32) - 0.5), torch.arange(16) % 10
    SGRLoss(CovarianceFunction(3, (32, 32)), 1.0)(model, images, labels).backward()


@pytest.mark.parametrize("layer", [nn.GELU, nn.ReLU])
def test_a_loss_that_hardly_depends_on_the_images_is_not_a_fault(layer: type[nn.Module]) -> None:
    """Twenty layers without normalization: what a short step changes is below rounding."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1)]
    for _ in range(20):
        layers += [nn.Conv2d(16, 16, 3, padding=1), layer()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    SGRLoss(IdentityCovariance(), 1.0)(model, torch.rand(8, 3, 12, 12), torch.arange(8) % 5).backward()


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_the_trial_leaves_the_images_as_they_are(fraction: float) -> None:
    """Also in float64, of which a wider copy is none, and for a model that writes into its input."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, CLASSES)).double()
    model = nn.Sequential(Lambda(lambda x: x.sub_(0.5).mul_(2)), *body)
    images, labels = torch.rand(6, 1, SIZE, SIZE, dtype=torch.float64), torch.arange(6) % CLASSES
    before = images.clone()
    SGRLoss(IdentityCovariance(), 1.0, fraction=fraction)(model, images, labels)
    assert torch.equal(images, before)


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_an_island_without_autocast_keeps_its_precision(fraction: float) -> None:
    class Island(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 32, 3)
            self.rest = nn.Sequential(nn.GELU(), nn.Flatten(), nn.Linear(3200, 5))

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                first = self.first(x.float())
            return self.rest(first)

    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = SGRLoss(IdentityCovariance(), 1.0, fraction=fraction)
        loss(Island(), torch.rand(8, 3, 12, 12), torch.arange(8) % 5).backward()


def test_half_precision_statistics_of_batch_norm_cannot_serve_a_part() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(144, 5)).bfloat16()
    images, labels = torch.rand(16, 1, 8, 8).bfloat16(), torch.arange(16) % 5
    with pytest.raises(PenaltyGradientError, match="fraction: the batch's statistics cannot be told"):
        SGRLoss(IdentityCovariance(), 1.0, fraction=0.25)(model, images, labels)
    SGRLoss(IdentityCovariance(), 1.0)(model, images, labels).backward()


def test_a_compiled_part_of_a_model_stays_in_one_graph() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    part = torch.compile(nn.Sequential(nn.Conv2d(3, 32, 3), nn.GELU()), backend="eager", fullgraph=True)
    model = nn.Sequential(part, nn.Flatten(), nn.Linear(3200, 5))
    loss = SGRLoss(IdentityCovariance(), 1.0, method="finite-difference", fraction=0.25)
    loss(model, torch.rand(8, 3, 12, 12), torch.arange(8) % 5).backward()


class Wrapped(nn.Module):
    """A network that can be compiled in place into one graph, which nn.Sequential cannot."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(64, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def compiled(how: str, model: Wrapped) -> Any:
    # As inductor does, this one gives buffers away in its first backward; and it refuses to leave its graph.
    options = {"backend": "aot_eager", "fullgraph": True}
    if how == "in place":
        model.compile(**options)
    elif how == "a part":
        model.body[0] = torch.compile(model.body[0], **options)
    elif how == "hidden in a callable":
        hidden = torch.compile(model, **options)
        return lambda x: hidden(x)
    return torch.compile(model, **options) if how == "whole" else model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["whole", "in place", "a part", "hidden in a callable"])
@pytest.mark.parametrize("method", [*METHODS, "auto"])
@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_compiled_models_get_the_same_gradient(how: str, method: str, fraction: float) -> None:
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(16, 1, 6, 6, generator=generator), torch.arange(16) % 5
    found = []
    for how_in_turn in ("not at all", how):
        model = Wrapped()
        covariance = CovarianceFunction.exponential(1, (6, 6), 2.0)
        loss = SGRLoss(covariance, 1.0, method="double-backward" if how_in_turn == "not at all" else method,
                       fraction=fraction)  # fmt: skip
        loss(compiled(how_in_turn, model), images, labels).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    # A part of a batch under a whole compiled model has BatchNorm's statistics of its own.
    tolerance = 1e-2 if fraction == 1 or how != "whole" or method not in ("finite-difference", "auto") else 0.5
    assert float((found[0] - found[1]).norm() / found[0].norm()) < tolerance
