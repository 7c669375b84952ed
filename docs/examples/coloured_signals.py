"""Signals under coloured noise: three pulses on a wandering baseline, told apart by a one-dimensional network."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import sgr_kernels as sgr

LENGTH, NAMES = 128, ("bump", "wave", "edge")


def pulses(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Signals (count, 1, 128) and their kinds: a pulse at a random place, of a random width, and white noise."""
    kinds = torch.randint(0, 3, (count,), generator=generator)
    place, width = torch.rand(2, count, 1, generator=generator)
    t = (torch.linspace(-1, 1, LENGTH) - place + 0.5) / (0.1 + 0.1 * width)
    window = torch.exp(-t.square() / 2)
    shapes = torch.stack([window, window * torch.cos(4 * t), window * torch.tanh(2 * t)])
    signals = 0.3 * shapes[kinds, torch.arange(count)] + 0.1 * torch.randn(count, LENGTH, generator=generator)
    return signals[:, None], kinds


def recorded_noise(count: int, generator: torch.Generator) -> Tensor:
    """Recordings without a pulse, (count, 1, 128): a random walk that is pulled back to zero, of variance one."""
    walk = torch.randn(count, 1, LENGTH, generator=generator)
    for k in range(1, LENGTH):
        walk[..., k] = 0.95 * walk[..., k - 1] + (1 - 0.95**2) ** 0.5 * walk[..., k]
    return walk


def train(signals: Tensor, kinds: Tensor, epochs: int, criterion: sgr.SGRLoss | None = None) -> nn.Module:
    torch.manual_seed(0)
    first, *more = (nn.Conv1d(*sizes, 9, stride=2, padding=4) for sizes in ((1, 16), (16, 32), (32, 32)))
    layers = [first, nn.GELU(), more[0], nn.GELU(), more[1], nn.GELU(), nn.AdaptiveAvgPool1d(4)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 3))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(signals)).split(64):
            x, y = signals[part], kinds[part]
            loss = nn.functional.cross_entropy(model(x), y) if criterion is None else criterion(model, x, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def run(picture: str | None = None, fast: bool = False) -> dict[str, list[float]]:
    """Accuracies of three networks by the noise's strength; draws them where a picture is asked for."""
    generator = torch.Generator().manual_seed(0)
    data = (*pulses(1500 if fast else 3000, generator), 6 if fast else 8)
    variance, models = float(data[0].var()), {"plain": train(*data)}
    recorded = sgr.CovarianceFunction.from_images(recorded_noise(300, generator), target_variance=variance)
    for name, covariance in (
        ("white noise assumed", sgr.IdentityCovariance(variance)),
        ("noise as recorded", recorded),
    ):
        models[f"SGR, {name}"] = train(*data, sgr.SGRLoss(covariance, strength=10.0))
    (test, truth), hum, levels = pulses(2000, generator), recorded_noise(2000, generator), [0.0, 0.05, 0.1, 0.2, 0.3]
    noisy = [test + level * hum for level in levels]
    found = {k: [float((model(x).argmax(1) == truth).float().mean()) for x in noisy] for k, model in models.items()}
    if picture:
        figure = Figure((9, 3), layout="constrained")
        *traces, lines = figure.subplots(1, 3, width_ratios=(1, 1, 1.3))
        for axes, x, title in zip(traces, (noisy[0], noisy[3]), ("signals", "with noise of 0.2")):
            for kind, name in enumerate(NAMES):
                axes.plot(x[truth == kind][1, 0].numpy() - kind, color=f"C{kind + 2}", label=name)
            axes.set(title=title, xlabel="sample", yticks=[], ylim=(-2.7, 1.1))
        traces[0].legend(frameon=False, ncols=3, loc="upper center", columnspacing=1, handlelength=1)
        for (name, accuracy), color in zip(found.items(), ("0.3", "tab:orange", "tab:blue")):
            lines.plot(levels, [100 * share for share in accuracy], "o-", label=name, color=color)
        lines.set(title="accuracy [%]; chance is 33", xlabel="standard deviation of the coloured noise", ylim=(0, 101))
        lines.legend(frameon=False, loc="lower left")
        figure.savefig(picture, dpi=90)
    return found


if __name__ == "__main__":
    print(*run("coloured_signals.png").items(), sep="\n")
