"""What the reproduction's tests share."""

import pytest

from sgr_kernels.reproduce.run import EXPERIMENTS, reproduce
from tests.tiny_lab import lab_in


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A reproduction without a break."""
    folder = tmp_path_factory.mktemp("whole")
    reproduce(lab_in(folder), list(EXPERIMENTS), "MNIST, tiny")
    return folder
