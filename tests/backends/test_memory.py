"""Peak memory of the operators, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

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
