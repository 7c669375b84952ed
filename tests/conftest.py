"""What all tests share: the backends they run on, and uninitialised memory that shows."""

from __future__ import annotations

import os

# One thread for each test process, so that parallel workers do not fight over the cores; read by the BLAS on import.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import hypothesis
import pytest
import torch

from sgr_kernels import backends
from sgr_kernels.backends import Request

torch.set_num_threads(1)

KNOWN_BACKENDS = ("torch", "reference", "native", "triton")
DEVICES = ("cpu", "cuda")

# Examples are drawn from a fixed seed: a red test is red again. `make fuzz` draws others each time.
hypothesis.settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    max_examples=30,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.register_profile(
    "fresh", hypothesis.settings.get_profile("fixed"), derandomize=False, max_examples=300, print_blob=True
)
hypothesis.settings.load_profile("fixed")


@dataclass(frozen=True)
class Place:
    """A backend and the device it runs on."""

    backend: str
    device: torch.device

    def __str__(self) -> str:
        return f"{self.backend}-{self.device.type}"


def unavailable(backend: str, device: str) -> str | None:
    """Why a backend is not tested on a device; None where it is."""
    if device == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        backends.choose(backend, Request("product", torch.device(device), torch.float32, 1, 1, (28, 28), "even"))
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


PAIRS = [(backend, device) for device in DEVICES for backend in KNOWN_BACKENDS]
PLACES = [Place(b, torch.device(d)) for b, d in PAIRS if unavailable(b, d) is None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", help="of the tests that run on every backend, run those of this one")


def pytest_configure(config: pytest.Config) -> None:
    # Triton's interpreter computes in NumPy, which warns of the NaN and infinities that tests put in.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.triton_interpreter import replace_the_language_once_a_launch

        replace_the_language_once_a_launch()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests on every available backend: all for ``place``, those with registered operators for ``kernels``."""
    only = metafunc.config.getoption("--backend")
    for fixture in {"place", "kernels"} & set(metafunc.fixturenames):
        places = [p for p in PLACES if only in (None, p.backend)]
        if fixture == "kernels":
            places = [p for p in places if p.backend != "reference"]
        marks = {p: [pytest.mark.gpu] if p.device.type == "cuda" else [] for p in places}
        metafunc.parametrize(fixture, [pytest.param(p, id=str(p), marks=marks[p]) for p in places])


def _poisoned(allocate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(allocate)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return allocate(*args, **kwargs)
        result = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] == "sgr_kernels" and result.is_floating_point():
            result.fill_(float("nan"))
        return result

    return call


@pytest.fixture(scope="session", autouse=True)
def poison_uninitialised_memory() -> Iterator[None]:
    """Fill what the package allocates without a value with NaN, so that an unwritten element shows.

    Of PyTorch's ways to do so those that the package uses: the compiler, which uses others, may not meet a wrapper.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", _poisoned(torch.empty))
        patch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
        patch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
        yield


@pytest.fixture(autouse=True)
def process_settings_are_restored() -> Iterator[None]:
    """What a test, or a command that it runs, sets for the whole process does not hold for the next test."""
    with backends.use_backend("auto"):
        yield
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)
