"""Fine-tune a trained network: a residual network that learned digits plainly is made to stand structured noise."""

from __future__ import annotations

import copy
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import sgr_kernels as sgr
from sgr_kernels.training import load


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = ([nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)] for _ in range(2))
        self.body = nn.Sequential(*first, nn.ReLU(), *second)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.BatchNorm2d(16), nn.ReLU())
    body = nn.Sequential(Block(16), nn.AvgPool2d(2), Block(16), nn.AvgPool2d(2))
    return nn.Sequential(stem, body, nn.Sequential(nn.Flatten(), nn.Linear(144, 10)))


def plain(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(images), labels)


def train(model: nn.Sequential, images: Tensor, labels: Tensor, epochs: int, rate: float, loss_of: Any) -> None:
    """In the mode that the model is in; the head learns ten times as fast as the rest."""
    rest = [p for part in model[:2] for p in part.parameters()]
    optimizer = torch.optim.AdamW([{"params": rest, "lr": rate}, {"params": model[2].parameters(), "lr": 10 * rate}])
    for _ in range(epochs):
        for part in torch.randperm(len(images)).split(100):
            optimizer.zero_grad()
            loss_of(model, images[part], labels[part]).backward()
            optimizer.step()


def run(picture: str | None = None, fast: bool = False) -> dict[str, list[float]]:
    """Accuracies under noise by its decay length, before and after; draws them where a picture is asked for."""
    digits, (count, epochs, tested) = load("mnist-sample"), (600, 2, 60) if fast else (5000, 4, 500)
    images, labels, models = digits.train.images[:count] / 255, digits.train.labels[:count], {"as trained": network()}
    train(models["as trained"], images, labels, epochs, 1e-3, plain)
    # Noise over 8 pixels, whose unit is the digits' variance; the strength grows over the first 50 steps.
    covariance = sgr.CovarianceFunction.exponential(1, 28, 8.0, target_variance=float(images.var(0).mean()))
    criterion = sgr.SGRLoss(covariance, sgr.linear_warmup(30.0, 50), fraction=1 / 4)
    for name, loss_of in (("fine-tuned plainly", plain), ("fine-tuned with SGR", criterion)):
        models[name] = copy.deepcopy(models["as trained"]).eval()  # so that BatchNorm keeps what it learned
        train(models[name], images, labels, epochs // 2, 3e-4, loss_of)
    test, truth = digits.test.images[:tested] / 255, digits.test.labels[:tested]
    found: dict[str, list[float]] = {name: [] for name in models}
    for length in (lengths := ("1", "2", "4", "8", "16")):
        noise = sgr.CovarianceFunction.exponential(1, 28, float(length))
        for name, model in models.items():
            noisy = sgr.attacks.correlated_noise(model.eval(), test, truth, covariance=noise, eps=0.7, draws=10)
            found[name].append(float((model(noisy).argmax(1) == truth).float().mean()))
    if picture:
        figure = Figure((6, 3.2), layout="constrained")
        axes = figure.subplots()
        for (name, accuracy), color in zip(found.items(), ("0.3", "tab:orange", "tab:blue")):
            axes.plot(lengths, [100 * share for share in accuracy], "o-", label=name, color=color)
        title, label = "accuracy under the worst of 10 noises [%]", "decay length of the noise [pixels]"
        axes.set(title=title, xlabel=label, ylim=(0, 101))
        axes.legend(frameon=False, loc="lower right")
        figure.savefig(picture, dpi=90)
    return found


if __name__ == "__main__":
    for name, accuracy in run("fine_tune.png").items():
        print(f"{name:20}", *(f"{100 * share:5.1f}" for share in accuracy))
