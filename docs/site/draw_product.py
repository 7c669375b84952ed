"""Draws docs/pictures/product.png, the structured product in one figure: ``python docs/site/draw_product.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import sgr_kernels as sgr
from sgr_kernels.toeplitz.spectrum import basis, spectrum_from_table
from sgr_kernels.training import load

SIZE = 14


def show(axes: Any, image: Tensor, title: str, below: str, colors: str = "RdBu_r", spread: float = 1.0) -> None:
    """An image about zero, with its name above and what it is below."""
    limit = float(image.abs().max()) * spread
    axes.imshow(image.numpy(), cmap=colors, vmin=-limit, vmax=limit)
    axes.set(title=title, xticks=[], yticks=[])
    axes.set_xlabel(below, fontsize=8)


def operator(axes: Any, text: str, below: str = "") -> None:
    """An arrow or an equals sign between two images."""
    axes.axis("off")
    axes.text(0.5, 0.55, text, ha="center", va="center", fontsize=15)
    axes.text(0.5, 0.36, below, ha="center", va="top", fontsize=8)


def draw(path: Path) -> None:
    """Compute ``v = Sigma g`` both ways, check that they agree, and draw every step."""
    digit = load("mnist-sample").test.images[0, 0].double()[::2, ::2] / 255
    g = digit - digit.roll(1, 1) + 0.2 * torch.randn(SIZE, SIZE, dtype=torch.float64, generator=torch.manual_seed(0))
    covariance = sgr.CovarianceFunction.exponential(1, SIZE, 3.0).double()
    sigma, a = covariance.dense(), basis(SIZE, SIZE, torch.float64, torch.device("cpu"))
    eigenvalues = spectrum_from_table(covariance.table, (SIZE, SIZE), covariance.form, torch.float64)[0, 0]
    z = a.mT @ g @ a
    y = eigenvalues.repeat(2, 2) * z
    v = a @ y @ a.mT
    torch.testing.assert_close(v.flatten(), sigma @ g.flatten())

    figure = Figure((10, 5.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    above.suptitle(
        "What is equal: a matrix of $N^2 \\times N^2$ entries, $2N^4$ operations", fontsize=10, x=0.01, ha="left"
    )
    below.suptitle(
        "What is computed: small matrices of cosines and sines, $12 N^3$ operations", fontsize=10, x=0.01, ha="left"
    )
    row = above.subplots(1, 5, width_ratios=(1.3, 0.25, 1, 0.25, 1))
    show(row[0], sigma, r"$\Sigma$", f"{SIZE**2} x {SIZE**2}; {SIZE} x {SIZE} blocks", "viridis")
    row[0].images[0].set_clim(0, 1)
    operator(row[1], r"$\times$")
    show(row[2], g, "$g$", f"the gradient, {SIZE} x {SIZE} pixels")
    operator(row[3], "=")
    show(row[4], v, "$v$", "the product")
    row = below.subplots(1, 7, width_ratios=(1, 0.65, 1, 0.65, 1, 0.65, 1))
    show(row[0], g, "$g$", "pixels")
    operator(row[1], r"$\rightarrow$", "cosines and sines\nof odd frequencies")
    show(row[2], z, "$Z = A^T g\\, A$", "four parities, which never mix", spread=0.5)
    operator(row[3], r"$\rightarrow$", "times $\\Lambda$, eigenvalues\nof an embedding of $\\Sigma$")
    show(row[4], y, r"$Y = \Lambda\, Z$", "low frequencies remain; $g^T v = \\sum ZY$", spread=0.5)
    operator(row[5], r"$\rightarrow$", "and back")
    show(row[6], v, "$v = A\\, Y A^T$", "pixels")
    for axes in (row[2], row[4]):
        axes.axhline(SIZE - 0.5, color="0.4", linewidth=0.8)
        axes.axvline(SIZE - 0.5, color="0.4", linewidth=0.8)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    draw(Path(__file__).parents[1] / "pictures" / "product.png")
