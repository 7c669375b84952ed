"""The Carlini-Wagner networks: the paper's layers, per-image standardisation, constant images."""

import pytest
import torch
from torch import nn

from sgr_kernels.models import Standardize, architecture_for, carlini_wagner, smooth


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


def kinks(model, images):
    """How much the input gradient jumps over short ways, relative to what it changes over long ones."""
    labels, direction = torch.zeros(len(images), dtype=torch.long), torch.rand_like(images) - 0.5

    def gradient(t):
        x = (images + t * direction).requires_grad_()
        return torch.autograd.grad(nn.functional.cross_entropy(model(x), labels), x)[0]

    base = gradient(0.0)
    short, long = ((gradient(t) - base).norm() / t for t in (1e-7, 1e-2))
    return float(short / long)


@pytest.mark.parametrize("activation", ["gelu", "silu", "softplus"])
def test_smooth_networks_have_a_continuous_gradient(activation):
    torch.manual_seed(0)
    images = torch.rand(64, 1, 28, 28, dtype=torch.float64)
    paper = carlini_wagner("mnist").double()
    mine = carlini_wagner("mnist", activation, "average").double()
    assert mine.load_state_dict(paper.state_dict())
    assert kinks(mine, images) < 3
    other = smooth(paper, activation)
    torch.testing.assert_close(other(images), mine(images))
    assert any(isinstance(m, nn.ReLU) for m in paper.modules())


def test_smooth_exchanges_shared_nested_and_shaped_modules(caplog):
    shared = nn.ReLU(inplace=True)
    block = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Hardsigmoid())})
    with caplog.at_level("INFO", "sgr_kernels"):
        model = smooth(block, "silu")
    assert isinstance(model["a"], nn.SiLU)
    assert isinstance(model["b"], nn.SiLU)
    assert isinstance(model["c"][1], nn.Sigmoid)
    assert "2 ReLU by SiLU, 1 MaxPool2d by AvgPool2d, 1 Hardsigmoid by Sigmoid" in caplog.text
    images = torch.rand(1, 2, 9, 9)
    assert model["c"][0](images).shape == block["c"][0](images).shape


def test_smooth_says_what_it_left_as_it_was(caplog):
    """Average pooling has no dilation and no indices, and of a class of somebody's own nothing is known."""

    class SamePool(nn.MaxPool2d):
        pass

    poolings = [nn.MaxPool2d(2, dilation=2), nn.MaxPool2d(2, return_indices=True), SamePool(2)]
    poolings += [nn.AdaptiveMaxPool2d(2, return_indices=True), nn.FractionalMaxPool2d(2, 3)]
    with caplog.at_level("WARNING", "sgr_kernels"):
        model = smooth(nn.Sequential(nn.ReLU(), *poolings))
    assert [type(pooling) for pooling in model[1:]] == [type(pooling) for pooling in poolings]
    left = "smooth: left as they are: 2 MaxPool2d, 1 SamePool, 1 AdaptiveMaxPool2d, 1 FractionalMaxPool2d"
    assert caplog.messages == [left]


def test_unknown_activations_and_nothing_to_exchange_are_refused():
    with pytest.raises(ValueError, match="activation: expected one of 'relu', 'gelu'"):
        carlini_wagner("mnist", "tanh")
    with pytest.raises(ValueError, match="pooling: expected one of 'max', 'average'"):
        carlini_wagner("mnist", pooling="min")
    with pytest.raises(ValueError, match="activation: expected one of 'gelu'"):
        smooth(nn.ReLU(), "relu")
    with pytest.raises(ValueError, match="no ReLU"):
        smooth(nn.Linear(2, 2))


@pytest.mark.parametrize("activation", ["relu", nn.ReLU()], ids=["function", "module"])
def test_smooth_reaches_transformer_layers_and_their_fast_path(activation):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, activation=activation, batch_first=True)
    model, x = smooth(layer).eval(), torch.randn(2, 5, 32)
    with torch.no_grad():
        fast = model(x)
    torch.testing.assert_close(fast, model(x.requires_grad_()).detach())
    assert (fast - layer.eval()(x)).abs().max() > 1e-3


def test_smooth_pools_what_there_is_and_keeps_the_mode():
    stem = nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1)).eval()
    model = smooth(stem)
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(model[1](torch.ones(1, 1, 8, 8)), torch.ones(1, 1, 4, 4))


def test_what_is_no_module_cannot_be_smooth():
    for value in (None, torch.relu, {"a": 1}):
        with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got"):
            smooth(value)
