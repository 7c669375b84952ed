"""Peak memory of the operators, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

_MEASURE = """
import resource
import torch
from sgr_kernels.functional import covariance_quadratic_form

def resident():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * resource.getpagesize()

torch.set_num_threads(2)
f = torch.rand(3, 3, 316)
warm = torch.randn(2, 3, 224, 224, requires_grad=True)
covariance_quadratic_form(warm, f, backend="{backend}").sum().backward()
g = torch.randn(32, 3, 224, 224, requires_grad=True)
before = resident()
covariance_quadratic_form(g, f, backend="{backend}").sum().backward()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print((peak - before) / (g.numel() * g.element_size()))
"""


def test_value_and_gradient_of_large_images_take_less_than_four_gradients() -> None:
    command = [sys.executable, "-c", _MEASURE.format(backend="torch")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert float(output) < 4
