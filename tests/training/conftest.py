"""Small data for training tests."""

import pytest
import torch

from sgr_kernels.training.datasets import DataSet, load


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny networks: threads only cost time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digits():
    """200 training and 100 test digits."""
    train, test = load("mnist-sample")
    return DataSet(train.first(200), test.first(100))
