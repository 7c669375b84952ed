"""The page on corruptions at the smallest scale, with a stand-in for the package that makes them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from sgr_kernels.evaluation import corrupt
from sgr_kernels.reproduce import corruptions, stats
from sgr_kernels.reproduce.lab import Lab
from sgr_kernels.reproduce.run import load, reproduce, show
from sgr_kernels.reproduce.scales import SCALES, SearchScale
from sgr_kernels.training.datasets import DataSet
from sgr_kernels.training.datasets import load as load_data
from sgr_kernels.training.loop import Trainer
from sgr_kernels.training.methods import Settings
from tests.corruption_package import stand_in

KINDS = ("gaussian_noise", "fog", "brightness")
TINY = replace(
    SCALES["mnist"]["smoke"], train_images=32, batch_size=16, search=SearchScale((1.0,), 32, 1, 20, 10, (), (), 2)
)


def lab_in(folder, say=lambda line: None):
    train, test = load_data("mnist-sample")
    return Lab("mnist", TINY, DataSet(train.first(200), test.first(40)), folder, say=say, progress=False)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A run; its folder and what it said."""
    folder, said, seeds = tmp_path_factory.mktemp("page"), [], set()

    def seen(images, kind, severity, *, seed=0, first=0):
        seeds.add((len(images), seed))
        return corrupt(images, kind, severity, seed=seed, first=first)

    with pytest.MonkeyPatch.context() as patch, stand_in(tmp_path_factory.mktemp("package")):
        patch.setattr(corruptions, "corrupt", seen)
        patch.setattr(corruptions, "KINDS", {kind: corruptions.KINDS[kind] for kind in KINDS})
        reproduce(lab_in(folder, said.append), ["corruptions"], "MNIST, tiny")
        first = len(said)
        reproduce(lab_in(folder, said.append), ["corruptions"], "MNIST, tiny")
        assert seeds == {(32, 0), (20, 1), (40, 2)}  # training, validation, test
        yield folder, said[:first], said[first:]


def test_every_network_is_tested_on_every_kind(page):
    folder, said, again = page
    found = load(folder / "results")["corruptions"]
    moved = [kind for kind in KINDS if found["moments"][kind]["mean_share"] > 0.5]
    assert set(moved) == {"fog", "brightness"}
    families = {"sgr": KINDS, "eq12": moved, "data": KINDS}
    names = [f"{family} {kind}" for family, kinds in families.items() for kind in kinds]
    assert sorted(found["networks"]) == sorted(["clean", "gn", *names])
    for entry in found["networks"].values():
        assert list(entry["kinds"]) == list(KINDS)
        assert all(record["eps"] == [1, 2, 3, 4, 5] and record["images"] == 40 for record in entry["kinds"].values())
    # GN's search, noise's and fog's, over one plain training.
    assert sum(line.startswith("searching") for line in said) == 3
    assert sum(line.startswith("training trial of clean") for line in said) == 1
    assert [line for line in again if "training" in line or "searching" in line or "corrupting" in line] == []


def test_the_page_says_what_the_numbers_say(page, tmp_path):
    folder, _, _ = page
    results = folder / "results"
    text = (results / "corruptions.md").read_text()
    assert "nan" not in text
    assert "| SGR, fog |" in text
    assert "Eq. 12, brightness:" in text
    assert text.count("of 3 kinds") == 8
    assert (results / "corruptions.png").is_file()
    assert "corruptions.md" in (results / "README.md").read_text()
    (tmp_path / "corruptions.json").write_bytes((results / "corruptions.json").read_bytes())
    show(tmp_path)
    assert (tmp_path / "corruptions.md").read_text() == text


def test_gains_turn_with_the_numbers(page):
    """A network that is right everywhere gains what the other one misses."""
    results = json.loads(json.dumps(load(page[0] / "results")["corruptions"]))
    shares = {"clean": 0.5, "gn": 0.5, "sgr fog": 0.75, "data fog": 1.0}
    for name, entry in results["networks"].items():
        right = np.arange(400) < shares.get(name, 0.5) * 400
        for record in entry["kinds"].values():
            record |= {"masks": [np.packbits(right).tobytes().hex()] * 5, "images": 400}
    assert corruptions.gain(results, "sgr fog", "clean", ["fog"]).mean == pytest.approx(0.25)
    assert corruptions.gain(results, "data fog", "sgr fog", ["brightness", "fog"], 1).mean == pytest.approx(0.25)
    lines = corruptions.conclusions(results)
    assert lines[0].startswith("SGR with a corruption's covariance against plain training, on that corruption: better")
    assert "better for 1 of 3 kinds, worse for 0, undecided for 2" in lines[0]
    assert f"fog {stats.Estimate(0.25, 0.25 * 0.0866, None, 1).points()[:5]}" in lines[0]


def test_half_of_what_is_trained_on_is_corrupted(page):
    lab = lab_in(page[0])
    both = corruptions.with_corrupted(lab, "brightness").train
    images = lab.data.train.images
    assert torch.equal(both.images[:32], images)
    assert torch.equal(both.labels, lab.data.train.labels.repeat(2))
    expected = (images.float() / 255 + 0.2).clamp(max=1) * 255
    assert float((both.images[32:].float() - expected).abs().max()) <= 1.01


def test_a_training_for_a_corruption_has_its_covariance(page):
    data = DataSet(*(part.first(30) for part in load_data("mnist-sample")))
    settings = Settings("mnist", method="sgr", corruption="brightness", severity=2, mean_correction=True)
    criterion = Trainer(settings, data).criterion
    images = data.train.images.float() / 255
    xi = corrupt(images, "brightness", 2) - images
    assert criterion.covariance.frozen
    assert float(criterion.covariance.values[0, 0, 0]) == pytest.approx(float(xi.square().mean()), rel=1e-4)
    assert torch.allclose(criterion.covariance.mean, xi.mean(0), atol=1e-6)
    variance = float(criterion.covariance.dense().diagonal().mean())
    assert variance == pytest.approx(data.train.pixel_variance(), rel=1e-4)
    assert "corruption" not in Settings("mnist").record()
    assert settings.record()["corruption"] == "brightness"
