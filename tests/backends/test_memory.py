"""Peak memory of the operators, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

_MEASURE = """
import re
from pathlib import Path
import torch
from sgr_kernels.functional import covariance_quadratic_form

def kilobytes(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(2)
f = torch.rand(3, 3, 316)
warm = torch.randn(2, 3, 224, 224, requires_grad=True)
covariance_quadratic_form(warm, f, backend="{backend}").sum().backward()
g = torch.randn(32, 3, 224, 224, requires_grad=True)
before = kilobytes("VmRSS")
covariance_quadratic_form(g, f, backend="{backend}").sum().backward()
print((kilobytes("VmHWM") - before) * 1024 / (g.numel() * g.element_size()))
"""


def test_value_and_gradient_of_large_images_take_less_than_four_gradients() -> None:
    command = [sys.executable, "-c", _MEASURE.format(backend="torch")]
    # A kernel that takes idle pages back before the call makes it look larger: the least of a few counts.
    peaks = []
    while len(peaks) < 4 and min(peaks, default=4.0) >= 4:
        peaks.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert min(peaks) < 4, peaks


_LONG = """
import re
from pathlib import Path
import torch
from sgr_kernels import CovarianceFunction

def kilobytes(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(2)
CovarianceFunction(1, (30,)).update(torch.randn(2, 1, 30))
before = kilobytes("VmRSS")
size = {size}
xi = torch.randn(2, 1, *size)
covariance = CovarianceFunction(1, size, binning="{binning}", psd="{psd}")
covariance.update(xi)
covariance.quadratic_form(covariance.product(xi).requires_grad_()).sum().backward()
print((kilobytes("VmHWM") - before) / 1024)
"""


@pytest.mark.parametrize(
    ("size", "binning", "psd", "megabytes"),
    [((16_001,), "rounded", "clip", 100), ((16_000,), "offset", "clip", 100), ((4_096, 8), "rounded", "none", 100)],
)
def test_memory_is_linear_in_the_length(size, binning, psd, megabytes) -> None:
    """A matrix of 16,000 x 16,000 would take 2,000 MB, one of 4,096 x 8,192 in float64 256 MB."""
    program = _LONG.format(size=size, binning=binning, psd=psd)
    peak = float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
    assert peak < megabytes
