"""``sgr train --search-strength``: what trials are judged by, and which earlier answers are taken."""

import json
import shutil

import pytest

from sgr_kernels.cli import main
from sgr_kernels.commands import train
from sgr_kernels.training.datasets import load
from tests.commands.outcomes import fails


def searching(data, *options):
    """A short training of method gn."""
    return ["train", "--data", data, "--method", "gn", "--batch-size", "16", "--epochs", "1", *options]


def test_train_can_search_for_its_strength(few_digits, tmp_path, capsys):
    out = tmp_path / "searched"
    command = searching(few_digits, "--out", str(out))
    command += ["--search-strength", "0.5", "2", "--device", "cpu"]
    assert main(command) == 0
    record = json.loads((out / "search.json").read_text())
    assert [trial["strength"] for trial in record["trials"]] == [0.5, 2]
    assert (record["attack"], record["question"]["attack"]["name"]) == ("pgd", "pgd")
    assert f"trained: {out}" in capsys.readouterr().out
    settings = json.loads((out / "history.json").read_text())["settings"]
    assert settings["strength"] == record["strength"] in (0.5, 2)
    assert main([*command, "--resume"]) == 0
    assert "trial" not in capsys.readouterr().out
    without = ["train", "--data", few_digits, "--out", str(tmp_path / "clean"), "--method", "clean", "--epochs", "1"]
    assert "has no strength to search for" in fails([*without, "--search-strength", "1"], capsys)


@pytest.mark.parametrize(
    ("options", "attack"),
    [
        (["--method", "sgr_exp"], "noise"),
        (["--method", "sgr", "--perturbation", "exponential"], "noise"),
        (["--method", "sgr_exp", "--search-under", "pgd"], "pgd"),
    ],
)
def test_a_covariance_of_noise_is_searched_for_under_that_noise(few_digits, tmp_path, options, attack):
    command = ["train", "--data", few_digits, "--out", str(tmp_path), "--batch-size", "16", "--epochs", "1", *options]
    assert main([*command, "--search-strength", "1", "--decay-length", "4", "--device", "cpu"]) == 0
    asked = json.loads((tmp_path / "search.json").read_text())["question"]["attack"]
    assert asked["name"] == attack
    assert asked.get("decay_length") == (4 if attack == "noise" else None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--method", "sgr_sign"], "method: 'sgr_sign', not 'gn'"),
        (["--search-strength", "0.5", "3"], "strengths: [0.5, 3.0], not [0.5]"),
        (["--search-epochs", "2"], "epochs: 2, not 1"),
        (["--seed", "1"], "seed: 1, not 0"),
        (["--penalty-every", "2"], "penalty_every: 2, not 1"),
        (["--data", "mnist-sample"], "data: "),
    ],
)
def test_a_search_for_something_else_is_not_an_answer(few_digits, searched, change, message, capsys):
    command = ["train", "--data", few_digits, "--out", str(searched), "--method", "gn", "--batch-size", "16"]
    command += ["--epochs", "1", "--search-strength", "0.5", "--device", "cpu", "--resume", *change]
    before = (searched / "search.json").read_bytes()
    error = fails(command, capsys)
    assert "search.json answers another question (" + message in error
    assert (searched / "search.json").read_bytes() == before


@pytest.fixture(scope="module")
def searched(few_digits, tmp_path_factory):
    """A training's folder with the record of its search, and no checkpoint yet."""
    out = tmp_path_factory.mktemp("searched") / "gn"
    command = searching(few_digits, "--out", str(out))
    assert main([*command, "--search-strength", "0.5", "--device", "cpu"]) == 0
    (out / "checkpoint.safetensors").unlink()
    return out


@pytest.mark.parametrize("content", ["{}", "[1]", "half a", '{"strength": 3.0}', '{"question": 3}'])
def test_a_record_without_a_question_is_no_answer(few_digits, tmp_path, content, capsys):
    (tmp_path / "search.json").write_text(content)
    command = ["train", "--data", few_digits, "--out", str(tmp_path), "--method", "gn", "--search-strength", "0.5"]
    assert "search.json does not say what it answers" in fails(command, capsys)


def test_trials_of_another_length_are_not_taken_for_these(few_digits, searched, tmp_path):
    """What an earlier search trained stays in its folder, also where its record is gone."""
    out = tmp_path / "again"
    shutil.copytree(searched, out)
    (out / "search.json").unlink()
    command = searching(few_digits)
    command += ["--device", "cpu", "--search-strength", "0.5", "--search-epochs", "2", "--out"]
    assert main([*command, str(out)]) == 0
    assert main([*command, str(tmp_path / "fresh")]) == 0
    again, fresh = (json.loads((folder / "search.json").read_text()) for folder in (out, tmp_path / "fresh"))
    assert again == fresh


def test_a_search_judges_by_images_that_no_trial_has_seen(few_digits, tmp_path, monkeypatch):
    """Neither for accuracy nor under attack, nor by test images."""
    judged, trained_on = [], []
    search, area, trainer = train.strength_search, train.attack_area, train.Trainer

    def searching(settings, strengths, validation, *rest, **options):
        judged.append(validation.images)
        return search(settings, strengths, validation, *rest, **options)

    def attacking(model, images, *rest, **options):
        judged.append(images.images)
        return area(model, images, *rest, **options)

    def training(settings, data, **options):
        trained_on.append(data.train.images)
        return trainer(settings, data, **options)

    for name, replacement in (("strength_search", searching), ("attack_area", attacking), ("Trainer", training)):
        monkeypatch.setattr(train, name, replacement)
    command = ["train", "--data", few_digits, "--out", str(tmp_path), "--method", "gn", "--batch-size", "16"]
    assert main([*command, "--epochs", "1", "--search-strength", "0.5", "--device", "cpu"]) == 0

    def pixels(images):
        return {image.numpy().tobytes() for part in images for image in part}

    data = load(few_digits)
    seen, judges = pixels(trained_on[:2]), pixels(judged)  # of the trials; the last training is the chosen one's
    assert len(judged) == 3
    assert judges
    assert not judges & seen
    assert not judges & pixels([data.test.images])
    assert judges | seen == pixels([data.train.images]) == pixels(trained_on[2:])
