"""Common corruptions: what they do to images whose answer is known, their seeds, and what is said of bad input."""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import json

import numpy as np
import pytest
import torch
from torch import nn

from sgr_kernels.cli import main
from sgr_kernels.evaluation import corrupt, corruption_curves, wilson_interval
from sgr_kernels.evaluation.corrupt import KINDS, SEVERITIES
from sgr_kernels.training.datasets import DataSet, load
from sgr_kernels.training.loop import Trainer
from sgr_kernels.training.methods import Settings
from tests.attack_models import linear
from tests.corruption_package import needs_package, stand_in

STOOD_IN = {
    "gaussian_noise",
    "impulse_noise",
    "fog",
    "brightness",
    "contrast",
    "jpeg_compression",
    "gaussian_blur",
    "spatter",
}


@pytest.fixture
def package(tmp_path):
    with stand_in(tmp_path):
        yield


class Bright(nn.Module):
    """Class 1 if the mean pixel exceeds one half."""

    def forward(self, images):
        score = images.mean((1, 2, 3)) - 0.5
        return torch.stack([-score, score], 1)


def flat(levels, channels=3, size=32):
    """One image of each grey level, of 255."""
    return (torch.tensor(levels, dtype=torch.float32) / 255).view(-1, 1, 1, 1).expand(-1, channels, size, size).clone()


def photographs(count, channels=3, size=32):
    """Smooth images, in whole grey levels."""
    coarse = torch.rand(count, channels, 5, 5, generator=torch.Generator().manual_seed(0))
    fine = nn.functional.interpolate(coarse, (size, size), mode="bilinear", align_corners=True)
    return (fine * 255).round() / 255


def test_accuracy_against_severity_of_a_planted_model(package):
    """Light lifts grey levels by 25.5 a severity: dark images cross one half one after the other."""
    levels = [10, 40, 70, 100, 120, 200]
    labels = torch.tensor([0, 0, 0, 0, 0, 1])
    loader = [(flat(levels[:4]), labels[:4]), (flat(levels[4:]), labels[4:])]
    result = corruption_curves(Bright(), loader, ["brightness", "contrast"])
    crossed = [sum(level / 255 + 0.1 * severity > 0.5 for level in levels[:5]) for severity in SEVERITIES]
    bright = result.curves["brightness"]
    assert bright.accuracy == pytest.approx([1 - count / 6 for count in crossed])
    assert bright.interval()[0] == wilson_interval(6 - crossed[0], 6)
    assert (bright.attack, bright.eps, bright.labels) == ("brightness", [1, 2, 3, 4, 5], "true")
    assert result.curves["contrast"].accuracy == [1] * 5  # a flat image has none
    assert result.clean_accuracy == 1
    assert result.mean_accuracy == pytest.approx((1 + sum(bright.accuracy) / 5) / 2)
    record = json.loads(json.dumps(result.to_dict()))
    assert record["kinds"]["brightness"]["accuracy"] == bright.accuracy
    assert record["severities"] == [1, 2, 3, 4, 5]
    assert not record["padded"]


def test_kinds_that_cannot_be_made_are_named(package):
    loader = [(photographs(3), torch.tensor([0, 1, 0]))]
    result = corruption_curves(Bright(), loader, severities=[2])
    assert set(result.curves) == STOOD_IN
    assert set(result.unavailable) == set(KINDS) - STOOD_IN
    assert "'frost' cannot be made by the packages installed here (FileNotFoundError" in result.unavailable["frost"]
    assert "it makes (31, 32, 3) of an image (32, 32, 3)" in result.unavailable["snow"]
    assert set(result.to_dict()["unavailable"]) == set(result.unavailable)
    for kinds in (["brightness", "frost"], ["frost"]):
        with pytest.raises(ValueError, match="'frost' cannot be made"):
            corruption_curves(Bright(), loader, kinds)


def test_random_numbers_follow_from_seed_kind_and_place_alone(package):
    images, labels = photographs(7), torch.tensor([0, 1, 0, 1, 1, 0, 1])
    random_kinds = ("gaussian_noise", "impulse_noise", "fog")
    for kind in random_kinds:
        whole = corrupt(images, kind, 3, seed=5)
        np.random.seed(1)  # noqa: NPY002 - the stream that the package would draw from
        before = np.random.get_state()[1].copy()  # noqa: NPY002 - same
        parts = [corrupt(images[k : k + 2], kind, 3, seed=5, first=k) for k in range(0, 7, 2)]
        assert torch.equal(whole, torch.cat(parts))
        assert (np.random.get_state()[1] == before).all()  # noqa: NPY002 - same
        assert not torch.equal(whole, corrupt(images, kind, 3, seed=6))
        same = corrupt(images[:1].expand(2, -1, -1, -1), kind, 3)
        assert not torch.equal(same[0], same[1])
    model = linear(4, (3, 32, 32), dtype=torch.float32)
    curves = [
        corruption_curves(model, list(zip(images.split(n), labels.split(n))), random_kinds, seed=2).curves
        for n in (7, 3, 1)
    ]
    for kind in random_kinds:
        assert all(torch.equal(found[kind].correct, curves[0][kind].correct) for found in curves)


def test_a_severity_scales_the_same_draw(package):
    grey = flat([128])
    weak, strong = (corrupt(grey, "gaussian_noise", severity) - grey for severity in (1, 2))
    assert torch.allclose(2 * weak, strong, atol=3.5 / 255)


def test_images_below_32_pixels_are_continued_by_their_edges(package):
    images = photographs(2, channels=1, size=28)
    found = corrupt(images, "brightness", 2)
    assert found.shape == images.shape
    assert torch.allclose(found, (images + 0.2).clamp(max=1), atol=1.01 / 255)
    # Blur moves along rows and takes the mean of three: at the upper edge what continues it is the edge itself.
    blurred = corrupt(images, "gaussian_blur", 1)
    assert torch.allclose(blurred[:, :, 0], (2 * images[:, :, 0] + images[:, :, 1]) / 3, atol=1.01 / 255)
    assert corruption_curves(Bright(), [(images, torch.tensor([0, 1]))], ["fog"]).padded
    assert not corruption_curves(Bright(), [(photographs(1), torch.tensor([0]))], ["fog"]).padded


def test_where_the_package_divides_zero_by_zero_the_image_stays(package):
    images = photographs(1)
    found = corrupt(images, "spatter", 1)
    assert (found[:, :, 0] == 0).all()
    assert torch.equal(found[:, :, 1:], images[:, :, 1:])


def test_dtypes_rounding_and_the_global_streams(package, capsys):
    images = photographs(2)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        assert corrupt(images.to(dtype), "contrast", 1).dtype == dtype
    # What resizing leaves above one is rounding.
    assert torch.equal(corrupt(flat([255]) * (1 + 2.4e-7), "contrast", 1), flat([255]))
    assert corrupt(images[:0], "contrast", 1).shape == (0, 3, 32, 32)
    assert torch.equal(
        corrupt(images.contiguous(memory_format=torch.channels_last), "fog", 2), corrupt(images, "fog", 2)
    )
    corrupt(images, "jpeg_compression", 1)
    assert capsys.readouterr().out == ""


def test_bad_input_is_named(package):
    images, loader = photographs(2), [(photographs(2), torch.tensor([0, 1]))]
    with pytest.raises(ValueError, match=r"kinds: expected some of gaussian_noise, .*, got 'rain'"):
        corruption_curves(Bright(), loader, ["rain"])
    for kinds in ([], ["fog", "fog"]):
        with pytest.raises(ValueError, match="kinds: expected at least one, and each of them once"):
            corruption_curves(Bright(), loader, kinds)
    for severities in ([0], [6], [1.0], [True], []):
        with pytest.raises(ValueError, match="severities: expected whole numbers from 1 to 5, got"):
            corruption_curves(Bright(), loader, ["fog"], severities)
    with pytest.raises(ValueError, match="severities: expected each of them once"):
        corruption_curves(Bright(), loader, ["fog"], [1, 1])
    with pytest.raises(ValueError, match="seed: expected a whole number >= 0, got -1"):
        corruption_curves(Bright(), loader, ["fog"], seed=-1)
    with pytest.raises(ValueError, match=r"images: expected shape \(B, C, H, W\) with C 1 or 3, got \(2, 2, 32, 32\)"):
        corrupt(images[:, :2], "fog", 1)
    with pytest.raises(ValueError, match=r"images: expected values in \[0, 1\]"):
        corrupt(images * 255, "fog", 1)
    with pytest.raises(TypeError, match="divide 8-bit images by 255"):
        corrupt((images * 255).to(torch.uint8), "fog", 1)
    with pytest.raises(ValueError, match="got NaN"):
        corrupt(images * torch.nan, "fog", 1)
    with pytest.raises(ValueError, match="loader: expected at least one image"):
        corruption_curves(Bright(), [], ["fog"])
    with pytest.raises(ValueError, match="labels: expected 0 to 1, got 0 to 7"):
        corruption_curves(Bright(), [(images, torch.tensor([0, 7]))], ["fog"])
    with pytest.raises(ValueError, match="severity: expected a whole number from 1 to 5, got 6"):
        Settings("mnist", corruption="fog", severity=6)
    with pytest.raises(ValueError, match=r"corruption: expected one of .*, got 'rain'"):
        Settings("mnist", corruption="rain")
    with pytest.raises(ValueError, match="corruption: gives method 'sgr' its covariance function, got method 'gn'"):
        Settings("mnist", method="gn", corruption="fog")


def test_without_the_package_its_installation_is_named(monkeypatch, capsys):
    module, find = importlib.import_module("sgr_kernels.evaluation.corrupt"), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "imagecorruptions" else find(name))
    module._library.cache_clear()
    loader = [(photographs(2), torch.tensor([0, 1]))]
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sgr_kernels\[corruptions\]'"):
        corruption_curves(Bright(), loader)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sgr_kernels\[corruptions\]'"):
        corrupt(loader[0][0], "fog", 1)
    assert main(["evaluate", "nowhere", "--corruptions", "fog"]) == 2
    assert "pip install 'sgr_kernels[corruptions]'" in capsys.readouterr().err


def test_the_command_prints_the_table_and_writes_it(package, tmp_path, capsys):
    data = DataSet(*(part.first(8) for part in load("mnist-sample")))
    Trainer(Settings("mnist"), data).run(1, out=tmp_path / "net", progress=False)
    few = ["--images", "6", "--eps", "8", "--pgd-steps", "1", "--draws", "1", "--decay-lengths", "1"]
    command = ["evaluate", str(tmp_path / "net"), "--data", "mnist-sample", *few, "--corruptions"]
    assert main([*command, "fog", "brightness", "--severities", "1", "4"]) == 0
    printed = capsys.readouterr().out
    assert "brightness" in printed
    assert "continued by their edges to 32 pixels" in printed
    record = json.loads((tmp_path / "net" / "evaluation.json").read_text())["corruptions"]
    assert list(record["kinds"]) == ["fog", "brightness"]
    assert record["severities"] == [1, 4]
    assert main([*command, "--severities", "1"]) == 0  # all there are
    assert "not made: kinds: 'frost' cannot be made" in capsys.readouterr().out
    record = json.loads((tmp_path / "net" / "evaluation.json").read_text())["corruptions"]
    assert set(record["kinds"]) == STOOD_IN
    assert main([*command, "fog", "frost"]) == 2  # before an hour of attacks, not after it
    said = capsys.readouterr()
    assert "'frost' cannot be made by the packages installed here" in said.err
    assert "to classify" not in said.out
    assert main([*command[:-1]]) == 0
    assert "corruptions" not in json.loads((tmp_path / "net" / "evaluation.json").read_text())


def test_images_that_cannot_be_corrupted_are_refused_before_the_attacks(package, tmp_path, capsys):
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef small(): return nn.Sequential(nn.Flatten(), nn.Linear(72, 3))\n"
    )
    arrays = {f"{part}_images": np.zeros((9, 2, 6, 6), np.uint8) for part in ("train", "test")}
    arrays |= {f"{part}_labels": np.arange(9) % 3 for part in ("train", "test")}
    np.savez(tmp_path / "two.npz", **arrays)
    command = ["evaluate", "--model", f"{tmp_path / 'net.py'}:small", "--data", str(tmp_path / "two.npz")]
    assert main([*command, "--corruptions", "--out", str(tmp_path / "evaluation.json")]) == 2
    said = capsys.readouterr()
    assert "images: expected shape (B, C, H, W) with C 1 or 3, got (1, 2, 6, 6)" in said.err
    assert "to classify" not in said.out


def test_a_wrong_name_on_the_command_line(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "nowhere", "--corruptions", "rain"])
    assert "invalid choice: 'rain'" in capsys.readouterr().err


@needs_package
def test_every_kind_of_the_package_can_be_made():
    images = photographs(2)
    result = corruption_curves(Bright(), [(images, torch.tensor([0, 1]))], severities=[3])
    assert result.unavailable == {}
    assert list(result.curves) == list(KINDS)
    printing = builtins.print
    for kind in KINDS:
        found = corrupt(images, kind, 5, seed=1)
        assert torch.equal(found, corrupt(images, kind, 5, seed=1)), kind
        assert torch.equal(found[1:], corrupt(images[1:], kind, 5, seed=1, first=1)), kind
        assert not torch.equal(found, images), kind
        assert 0 <= float(found.min()) <= float(found.max()) <= 1
    assert builtins.print is printing
    assert not hasattr(np, "float_")


@needs_package
def test_corruptions_of_the_package_are_what_their_names_say():
    grey, images = flat([128], size=64), photographs(2)
    assert torch.allclose(corrupt(grey, "brightness", 3), grey + 0.3, atol=1.01 / 255)
    contrast = corrupt(images, "contrast", 1)
    mean = images.mean((2, 3), keepdim=True)
    assert torch.allclose(contrast, mean + 0.4 * (images - mean), atol=1.01 / 255)
    noise = corrupt(grey, "gaussian_noise", 1) - grey
    assert float(noise.std()) == pytest.approx(0.08, rel=0.05)
    one = corrupt(flat([128], channels=1, size=64), "gaussian_noise", 1) - grey[:, :1]
    assert float(one.std()) == pytest.approx(0.08, rel=0.05)
    salted = corrupt(grey, "impulse_noise", 1)
    assert float((salted != grey).double().mean()) == pytest.approx(0.03, abs=0.01)
    total = (images - corrupt(images, "gaussian_blur", 1)).abs().mean()
    assert 0 < float(total) < 0.1


@needs_package
def test_spatter_without_a_drop_leaves_the_image():
    """At 32 pixels the package's liquid often falls nowhere; of zero by zero it makes black pictures."""
    images = photographs(12)
    found = corrupt(images, "spatter", 1)
    assert float(found.flatten(1).mean(1).min()) > 0.2
