"""Every operator on ragged sizes on a GPU, checked against the ``torch`` backend; for compute-sanitizer.

``compute-sanitizer --tool memcheck python -m benchmarks.ragged`` (see ``gpu.sh``).
"""

from __future__ import annotations

import argparse
import sys

import torch

import sgr_kernels as sgr
from sgr_kernels.toeplitz.geometry import bin_count

SHAPES = [(1, 1, 1, 1), (3, 1, 7, 5), (2, 3, 17, 31), (5, 2, 28, 28), (2, 3, 32, 32), (1, 4, 33, 63), (1, 3, 64, 64)]
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES += [(1, 5, 9, 13), (1, 1, 1, 70), (1, 1, 130, 3), (1, 3, 96, 101), (2, 3, 32, 80)]
SHAPES += [(1, 2, 3, 230), (1, 3, 230, 3), (1, 4, 70, 9)]


def check(backend: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """Run the three operators on a strided batch and compare.

    Raises:
        AssertionError: If an answer differs from the torch backend's.
    """
    torch.manual_seed(0)
    batch, channels, height, width = shape
    images = torch.randn(batch, channels, height, 2 * width, device=device, dtype=dtype)[..., ::2]
    f = torch.exp(-torch.arange(bin_count((height, width)), device=device) / 4.0).expand(channels, channels, -1)
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-10}.get(dtype, 5e-2)

    def answers(name: str) -> list[torch.Tensor]:
        leaf = images.detach().requires_grad_()
        q = sgr.functional.covariance_quadratic_form(leaf, f, backend=name)
        (grad,) = torch.autograd.grad(q.sum(), leaf)
        product = sgr.functional.covariance_product(images, f, backend=name)
        return [q.detach(), grad, product, sgr.functional.displacement_covariance(images, backend=name)]

    for mine, other in zip(answers(backend), answers("torch")):
        difference = (mine.double() - other.double()).norm()
        assert difference <= tolerance * other.double().norm() + 1e-30, (backend, shape, dtype, float(difference))


def main() -> int:
    """Run all shapes on every compiled or Triton backend there is."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backends", nargs="+", help="default: native and triton where they run")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    available = sgr.backends.available(options.device)
    chosen = options.backends or [b for b in ("native", "triton") if b in available]
    for backend in chosen:
        for shape in SHAPES:
            for dtype in options.dtypes:
                check(backend, shape, DTYPES[dtype], options.device)
            print(f"{backend} {shape} agrees with the torch backend", flush=True)
    if torch.device(options.device).type == "cuda":
        torch.cuda.synchronize()
    return 0 if chosen else 1


if __name__ == "__main__":
    sys.exit(main())
