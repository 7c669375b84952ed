"""Benchmarks run on request: measured, or not at all."""

import pytest


@pytest.fixture(autouse=True)
def _measured(request):
    if not request.config.getoption("benchmark_enable"):
        pytest.skip("nothing is measured without --benchmark-enable")
