"""What the commands' tests share: folders of images."""

import pytest
import torch

from tests.data_files import write_idx


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A folder with 192 training and 40 test digits."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    write_idx(folder, 192, 40)
    return str(folder)


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory):
    """A folder with 40 training and 10 test digits, for what trains or attacks several networks."""
    folder = tmp_path_factory.mktemp("data") / "few"
    write_idx(folder, 40, 10)
    return str(folder)


@pytest.fixture(scope="session")
def cifar(tmp_path_factory):
    """A folder with CIFAR-10's layout and 50 + 10 random pictures."""
    folder = tmp_path_factory.mktemp("cifar") / "cifar-10-batches-bin"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        records = torch.randint(0, 256, (10, 3073), generator=generator, dtype=torch.uint8)
        records[:, 0] %= 10
        (folder / f"{name}.bin").write_bytes(records.numpy().tobytes())
    return str(folder)
