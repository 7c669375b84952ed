"""A sensor whose noise is measured: dark frames give its covariance, and SGR prepares a network for it."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import sgr_kernels as sgr
from sgr_kernels.training import load


def dark_frames(count: int, generator: torch.Generator) -> Tensor:
    """The sensor in the dark, (count, 1, 28, 28): rows that flicker as a whole, a drift over the frame, shot noise."""
    ground = torch.linspace(0.02, 0.06, 28)  # a fixed pattern: the mean frame, which calibration takes off
    rows = 0.08 * torch.randn(count, 1, 28, 1, generator=generator)
    drift = 0.08 * sgr.CovarianceFunction.exponential(1, 28, decay_length=10.0).sample(count, generator)
    return ground + rows + drift + 0.03 * torch.randn(count, 1, 28, 28, generator=generator)


def train(images: Tensor, labels: Tensor, epochs: int, criterion: sgr.SGRLoss | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2), nn.GELU(), nn.Conv2d(16, 32, 3, stride=2), nn.GELU(), nn.Flatten()),
        *(nn.Linear(32 * 36, 64), nn.GELU(), nn.Linear(64, 10)),
    )
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(images)).split(100):
            x, y = images[part], labels[part]
            loss = nn.functional.cross_entropy(model(x), y) if criterion is None else criterion(model, x, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def run(picture: str | None = None, fast: bool = False) -> dict[str, list[float]]:
    """Accuracies of three networks by gain of the sensor's noise; draws them where a picture is asked for."""
    digits, generator = load("mnist-sample"), torch.Generator().manual_seed(1)
    count, epochs = (1000, 3) if fast else (5000, 8)
    images, labels = digits.train.images[:count] / 255, digits.train.labels[:count]
    frames, variance = dark_frames(500, generator), float(images.var(0).mean())
    # One value for each (|dy|, |dx|): along a row the noise is another than across rows.
    measured = sgr.CovarianceFunction.from_images(frames, binning="even", target_variance=variance)
    white, data = sgr.IdentityCovariance(variance), (images, labels, epochs)
    models = {
        "plain": train(*data),
        "SGR, white noise assumed": train(*data, sgr.SGRLoss(white, strength=30.0)),
        "SGR, noise as measured": train(*data, sgr.SGRLoss(measured, strength=30.0)),
    }
    test, truth = digits.test.images / 255, digits.test.labels
    noise, gains = dark_frames(len(test), generator) - frames.mean(0), [0, 1, 2, 3, 4]  # new frames
    with torch.no_grad():
        found = {
            name: [float((model(test + gain * noise).argmax(1) == truth).float().mean()) for gain in gains]
            for name, model in models.items()
        }
    if picture:
        figure = Figure((11, 2.9), layout="constrained")
        *maps, lines = figure.subplots(1, 4, width_ratios=(1, 1.1, 1, 1.7))
        shown = [frames[0, 0], measured.values[0, 0] / measured.values[0, 0, 0, 0], (test + 3 * noise)[0, 0]]
        for axes, title, image in zip(maps, ("a dark frame", "its covariance", "a digit at gain 3"), shown):
            axes.imshow(image.numpy(), cmap="viridis" if axes is maps[1] else "gray")
            axes.set(title=title, xticks=[], yticks=[])
        figure.colorbar(figure.axes[1].images[0], ax=maps[1], fraction=0.05)
        maps[1].set(xlabel="columns apart", ylabel="rows apart")
        for (name, accuracy), color in zip(found.items(), ("0.3", "tab:orange", "tab:blue")):
            lines.plot(gains, [100 * share for share in accuracy], "o-", label=name, color=color)
        lines.set(title="accuracy on noisy digits [%]", xlabel="gain of the sensor's noise", ylim=(0, 101))
        lines.legend(frameon=False, loc="lower left")
        figure.savefig(picture, dpi=90)
    return found


if __name__ == "__main__":
    for name, accuracy in run("sensor_noise.png").items():
        print(f"{name:25}", *(f"{100 * share:5.1f}" for share in accuracy))
