"""A network of one's own, as its owner's file has it, for tests of trainings and commands."""

NETWORK = '''
"""Networks for tests."""
import pathlib

import torch
from torch import nn

pathlib.Path(__file__).with_suffix(".ran").touch()


class Small(nn.Module):
    def __init__(self, classes, channels, width):
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, stride=2)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, classes)
        self.unused = nn.Parameter(torch.zeros(3))

    def forward(self, images):
        return self.head(torch.tanh(self.norm(self.first(images))).mean((2, 3)))


def small(classes=10, channels=1, width=8):
    return Small(classes, channels, width)


def needs(classes):
    return Small(classes, 1, 8)


def no_module():
    return [1, 2]


def fails():
    raise RuntimeError("out of\\nluck")


def flat(classes=10):
    return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, classes))


def half():
    network = flat()
    network.register_buffer("scale", torch.ones(2, dtype=torch.bfloat16))
    return network


number = 3
'''


def write_network(folder, name="net.py"):
    """The file in a folder; returns its path as text."""
    path = folder / name
    path.write_text(NETWORK)
    return str(path)
