"""What a reproduction remembers: how it survives a kill, goes on elsewhere, and does nothing twice."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sgr_kernels.reproduce import lab
from sgr_kernels.reproduce.measurements import MeasurementError
from sgr_kernels.reproduce.run import EXPERIMENTS, load, reproduce
from sgr_kernels.reproduce.trainings import Training
from sgr_kernels.training.datasets import load as load_data
from sgr_kernels.training.search import Search
from tests.tiny_lab import TINY, files, lab_in


def test_a_run_interrupted_everywhere_ends_with_the_same_files(whole, tmp_path):
    """Interrupted at every message, which is before and after each training and at the start of each experiment."""
    stops = 0

    def interrupt_soon():
        left = 2

        def say(line):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt

        return say

    for _ in range(200):
        try:
            reproduce(lab_in(tmp_path, interrupt_soon()), ["table1", "lrc"], "MNIST, tiny")
        except KeyboardInterrupt:
            stops += 1
        else:
            break
    assert stops > 10
    expected = files(whole)
    for name, content in files(tmp_path).items():
        if name not in ("README.md",):
            assert content == expected[name], name


@pytest.mark.slow
def test_a_run_killed_within_a_training_ends_with_the_same_numbers(whole, tmp_path):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import pathlib, torch; torch.set_num_threads(1)\n"
        "from sgr_kernels.reproduce.run import reproduce\nfrom tests.tiny_lab import lab_in\n"
        "reproduce(lab_in(pathlib.Path(sys.argv[2]), say=lambda line: print(line, flush=True)), ['smoothness'], 't')"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parents[2]), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("training sgr_sign"):
                time.sleep(0.02)
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.read()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "results" / "smoothness.json").exists()
    reproduce(lab_in(tmp_path), ["smoothness"], "MNIST, tiny")
    assert files(tmp_path)["smoothness.json"] == files(whole)["smoothness.json"]


def test_nothing_is_trained_or_measured_twice(whole):
    said = []
    before = {path: path.stat().st_mtime_ns for path in (whole / "measurements").rglob("*.json")}
    lab = lab_in(whole, said.append)
    for name, experiment in EXPERIMENTS.items():
        measured = json.loads(json.dumps(experiment.measure(lab)))
        assert measured == {key: value for key, value in load(whole / "results")[name].items() if key in measured}
    assert not [line for line in said if "training" in line or "searching" in line]
    assert {path: path.stat().st_mtime_ns for path in (whole / "measurements").rglob("*.json")} == before


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_was_measured_needs_no_networks(jobs, whole, tmp_path):
    """On another machine, say, that has the measurements alone; what is missing there trains what it is about."""
    shutil.copytree(whole / "measurements", tmp_path / "measurements")
    said = []
    lab = lab_in(tmp_path, said.append)
    reproduce(lab, list(EXPERIMENTS), "MNIST, tiny")
    assert files(tmp_path) == files(whole)
    assert not (tmp_path / "networks").exists()
    lost = [path for path in (tmp_path / "measurements" / "leaking").iterdir() if path.name.startswith(("gn", "lrc"))]
    for path in lost:
        path.unlink()
    said.clear()
    lab.jobs = jobs
    EXPERIMENTS["leaking"].measure(lab)
    started = [line.partition(":")[0] for line in said if line.startswith("training")]
    assert started == ["training gn (seed 0, strength 1)", "training lrc (seed 0)"]
    assert all(path.is_file() for path in lost)
    assert len(list((tmp_path / "networks").iterdir())) == 2


def measured(folder):
    """Files of measurements, but for searches'."""
    return [path for path in (folder / "measurements").rglob("*.json") if path.parent.name != "search"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_network_is_measured_before_all_are_trained(jobs, tmp_path):
    """So that an interruption, after which the networks may be lost, takes little."""
    counts = []

    def say(line):
        if line.startswith("trained") and "trial" not in line:
            counts.append(len(measured(tmp_path)))

    lab = lab_in(tmp_path, say)
    lab.jobs = jobs
    EXPERIMENTS["lrc"].measure(lab)
    assert len(counts) > 5
    assert counts[3] > 0
    assert counts == sorted(counts)
    assert len(set(counts)) > 3
    # Every measurement of a network is among those that are made at once; the rest needs none anew.
    shutil.rmtree(tmp_path / "networks")
    said = []
    EXPERIMENTS["lrc"].measure(lab_in(tmp_path, said.append))
    assert not said


def test_a_damaged_measurement_is_made_again(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    place = next((tmp_path / "copy" / "measurements" / "leaking").iterdir())
    content = place.read_bytes()
    place.write_bytes(content[:100])
    EXPERIMENTS["leaking"].measure(lab_in(tmp_path / "copy"))
    assert json.loads(place.read_text())["found"] == json.loads(content)["found"]


def test_an_experiment_that_fails_does_not_stop_the_next(tmp_path, monkeypatch):
    def broken(lab):
        raise MeasurementError("no memory")

    monkeypatch.setattr(EXPERIMENTS["table1"], "measure", broken)
    said = []
    with pytest.raises(MeasurementError, match="no memory"):
        reproduce(lab_in(tmp_path, said.append), ["table1", "smoothness"], "MNIST, tiny")
    assert "table1: no memory" in said
    assert set(load(tmp_path / "results")) == {"search", "smoothness"}


def test_networks_that_were_trained_twice_are_named(whole, tmp_path):
    """As on another machine, which rounds differently."""
    shutil.copytree(whole / "measurements", tmp_path / "measurements")
    (one,) = (path for path in (tmp_path / "measurements" / "leaking").iterdir() if path.name.startswith("gn"))
    kept = json.loads(one.read_text())
    one.write_text(json.dumps(kept | {"weights": dict.fromkeys(kept["weights"], "0123456789ab")}))
    reproduce(lab_in(tmp_path), ["leaking"], "MNIST, tiny")
    assert "Trained more than once" not in (tmp_path / "results" / "README.md").read_text()
    reproduce(lab_in(tmp_path), ["leaking", "table1"], "MNIST, tiny")
    (sentence,) = re.findall(r"Trained more than once.*: (.*)\.", (tmp_path / "results" / "README.md").read_text())
    assert sentence == "gn-seed0"


def test_pages_of_fewer_seeds_are_told_from_those_of_more(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "more")
    reproduce(lab_in(tmp_path / "more", scale=replace(TINY, seeds=3)), ["table1"], "MNIST, tiny")
    summary = (tmp_path / "more" / "results" / "README.md").read_text()
    assert "2 seeds of clean, sgr_exp" in summary
    assert "More seeds: White-box attacks (3)." in summary
    assert "More seeds" not in (whole / "results" / "README.md").read_text()


def test_a_result_names_what_measured_it(whole, tmp_path, monkeypatch):
    """Each machine, where several did, and its commit."""
    shutil.copytree(whole / "measurements", tmp_path / "measurements")
    (one, *_) = (tmp_path / "measurements" / "leaking").iterdir()
    made = json.loads(one.read_text())
    one.write_text(json.dumps(made | {"machine": made["machine"] | {"device": "a GPU", "commit": "abc1234"}}))
    reproduce(lab_in(tmp_path), ["leaking", "smoothness"], "MNIST, tiny")
    results = load(tmp_path / "results")
    (here,) = results["smoothness"]["machines"]
    assert {*here} >= {"device", "commit", "torch", "cuda", "python", "sgr_kernels"}
    assert [entry["device"] for entry in results["leaking"]["machines"]].count("a GPU") == 1
    assert len(results["leaking"]["machines"]) == 2
    summary = (tmp_path / "results" / "README.md").read_text()
    assert f"at commit {here['commit']}, torch {torch.__version__}, {here['device']}" in summary


def test_another_seed_costs_no_more_than_itself(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "more")
    before = set((tmp_path / "more" / "measurements").rglob("*.json"))
    said = []
    lab = lab_in(tmp_path / "more", said.append, replace(TINY, seeds=3, repeated=("clean",)))
    EXPERIMENTS["table1"].measure(lab)
    assert [line.partition(":")[0] for line in said] == ["training clean (seed 2)", "trained clean (seed 2)"]
    made = {path for path in (tmp_path / "more" / "measurements").rglob("*.json") if path not in before}
    assert made
    assert all("clean-seed2" in path.name for path in made)


def test_a_search_judges_by_images_that_no_trial_has_seen(tmp_path, monkeypatch):
    judged, seen = [], []

    def searching(settings, strengths, validation, train, area, **options):
        judged.append(validation.images)
        area(train([settings])[0])
        return Search(settings.method, "pgd", 1.0, 1.0, [], 1.0)

    def train(self, progress):
        seen.append(self.data.train.images)
        run(self, progress)

    run = Training.run

    monkeypatch.setattr(lab, "strength_search", searching)
    monkeypatch.setattr(lab, "attack_area", lambda model, images, *rest, **options: judged.append(images.images))
    monkeypatch.setattr(Training, "run", train)
    lab_in(tmp_path).search("gn")

    def pixels(images):
        return {image.numpy().tobytes() for part in images for image in part}

    assert len(judged) == 2
    assert pixels(judged)
    assert not pixels(judged) & pixels(seen)
    assert not pixels(judged) & pixels([load_data("mnist-sample").test.images])
