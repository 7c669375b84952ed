"""The Carlini-Wagner networks: the paper's layers, per-image standardisation, constant images."""

import pytest
import torch
from torch import nn

from sgr_kernels.training.models import Standardize, architecture_for, carlini_wagner


@pytest.mark.parametrize(
    ("architecture", "shape", "widths"),
    [
        ("mnist", (1, 28, 28), [32, 32, 64, 64, 200, 200, 10]),
        ("cifar10", (3, 32, 32), [64, 64, 128, 128, 256, 256, 10]),
    ],
)
def test_layers_are_the_papers(architecture, shape, widths):
    model = carlini_wagner(architecture)
    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert [m.weight.shape[0] for m in weighted] == widths
    assert all(m.kernel_size == (3, 3) and m.padding == (0, 0) for m in weighted[:4])
    assert model(torch.rand(2, *shape)).shape == (2, 10)
    assert architecture_for(shape) == architecture


def test_standardized_images_have_mean_zero_and_variance_one():
    images = torch.rand(5, 3, 8, 9, dtype=torch.float64) * torch.tensor([0.1, 1, 3, 0.5, 2]).view(5, 1, 1, 1)
    standardized = Standardize()(images)
    assert standardized.mean(dim=(1, 2, 3)).abs().max() < 1e-12
    assert torch.allclose(standardized.var(dim=(1, 2, 3), correction=0), torch.ones(5, dtype=torch.float64))
    assert torch.allclose(Standardize()(images * 0.5 + 0.2), standardized)


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_constant_images_have_finite_second_derivatives(value):
    model = carlini_wagner("mnist")
    images = torch.full((2, 1, 28, 28), value, requires_grad=True)
    loss = nn.functional.cross_entropy(model(images), torch.tensor([1, 2]), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, images, create_graph=True)
    gradient.square().sum().backward()
    assert gradient.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own forward mode
def test_standardize_passes_gradgradcheck():
    images = torch.rand(2, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Standardize(), images, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(Standardize(), images)


def test_wrong_shapes_and_names_are_refused():
    with pytest.raises(ValueError, match=r"images must be \(B, 1, 28, 28\), got \(2, 3, 32, 32\)"):
        carlini_wagner("mnist")(torch.rand(2, 3, 32, 32))
    with pytest.raises(ValueError, match="architecture must be one of mnist, cifar10, got 'imagenet'"):
        carlini_wagner("imagenet")
    with pytest.raises(ValueError, match=r"images must be 1x28x28 or 3x32x32 .* got 3x64x64"):
        architecture_for((3, 64, 64))
