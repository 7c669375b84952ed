"""Small data for training tests."""

import pytest

from sgr_kernels.training.datasets import DataSet, load


@pytest.fixture(scope="session")
def digits():
    """200 training and 100 test digits."""
    train, test = load("mnist-sample")
    return DataSet(train.first(200), test.first(100))
