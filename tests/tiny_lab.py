"""A reproduction so small that a test can make a whole one."""

from dataclasses import replace

from sgr_kernels.reproduce.lab import Lab
from sgr_kernels.reproduce.scales import SCALES, SearchScale
from sgr_kernels.training.datasets import DataSet
from sgr_kernels.training.datasets import load as load_data

TINY = replace(
    SCALES["mnist"]["smoke"],
    train_images=48,
    batch_size=16,
    methods=("clean", "pgd", "fgsm", "gn", "sgr_sign", "sgr_exp", "lrc"),
    search=SearchScale((1.0,), 32, 1, 20, 10, (16.0,), (0.7,), 2),
    eps=(0.0, 32.0),
    attack_images=10,
    deepfool_images=2,
    pgd_steps=2,
    sanity_images=4,
    noise_images=10,
    draws=2,
    covariance_images=10,
    leaking_images=10,
    line_images=6,
    line_points=5,
)


def lab_in(folder, say=lambda line: None, scale=TINY, device="cpu"):
    train, test = load_data("mnist-sample")
    return Lab(
        "mnist", scale, DataSet(train.first(200), test.first(60)), folder, say=say, progress=False, device=device
    )


def files(folder):
    return {path.name: path.read_bytes() for path in (folder / "results").iterdir()}
