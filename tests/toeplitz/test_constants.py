"""Constants are built once, and those that a CUDA graph has read stay where they are."""

import torch

from sgr_kernels.toeplitz import constants


def test_what_a_graph_has_used_is_never_forgotten(monkeypatch):
    built = []

    @constants.constant
    def powers(number):
        built.append(number)
        return torch.full((), float(number))

    first, other = powers(0), powers(1)
    with monkeypatch.context() as patch:
        patch.setattr(constants, "recording", lambda: True)
        assert powers(0) is first
        assert powers(-1) is not powers(-1)  # made by the graph: without values before a replay
    for number in range(2, 100):
        powers(number)
    assert powers(1) is not other
    with monkeypatch.context() as patch:
        patch.setattr(constants, "recording", lambda: True)
        assert powers(0) is first
    assert powers(0) is first
    assert built.count(0) == 1
