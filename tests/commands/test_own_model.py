"""Networks and images of one's own on the command line: one folder that every command reads, and clear refusals."""

import contextlib
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sgr_kernels.cli import main
from sgr_kernels.commands import autoattack
from sgr_kernels.training import checkpoint
from sgr_kernels.training.datasets import load
from sgr_kernels.training.trained import load_model
from tests.autoattack_stand_in import stand_in
from tests.commands.outcomes import fails, refuses, weights
from tests.own_network import write_network


@pytest.fixture(scope="module", autouse=True)
def _state_home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The shipped digits of three classes as PNG files."""
    folder = tmp_path_factory.mktemp("pictures")
    digits = load("mnist-sample").train
    for k in (digits.labels < 3).nonzero().flatten()[:80].tolist():
        path = folder / f"digit {int(digits.labels[k])}" / f"{k}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(digits.images[k, 0].numpy()).resize((24, 20)).save(path)
    return folder


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """Coloured noise of two classes."""
    path = tmp_path_factory.mktemp("arrays") / "noise.npz"
    images = np.random.default_rng(0).integers(0, 256, (30, 12, 12, 3), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(30) % 2)
    return str(path)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_network(tmp_path_factory.mktemp("networks"))


@pytest.fixture(scope="module")
def trained(file, pictures, tmp_path_factory):
    """A training of a network of one's own on a folder of images."""
    out = tmp_path_factory.mktemp("runs") / "own"
    command = ["train", "--model", f"{file}:small", "--model-args", '{"classes": 3}', "--normalize", "0.1", "0.3"]
    command += ["--data", f"imagefolder:{pictures}", "--epochs", "2", "--batch-size", "24", "--device", "cpu"]
    command += ["--optimizer", "sgd", "--schedule", "cosine", "--learning-rate-warmup", "2", "--ema", "0.5"]
    assert main([*command, "--out", str(out)]) == 0
    return out


FEW = {
    "evaluate": ["--eps", "0", "8", "--pgd-steps", "2", "--decay-lengths", "2", "--draws", "2"],
    "covariance": ["--source", "data", "sign"],
    "diagnose": ["--draws", "2", "--strengths", "0.1", "1"],
}


def test_one_folder_is_read_without_being_told_again(trained, tmp_path, capsys):
    for command, options in FEW.items():
        ending = "png" if command == "covariance" else "json"
        assert main([command, str(trained), *options, "--out", str(tmp_path / f"{command}.{ending}")]) == 0
    printed = capsys.readouterr().out
    assert "the covariance it was trained with" in printed
    results = {command: json.loads((tmp_path / f"{command}.json").read_text()) for command in FEW}
    last = json.loads((trained / "history.json").read_text())["epochs"][-1]
    assert results["evaluate"]["clean"]["accuracy"][0] == pytest.approx(last["test_accuracy"])
    assert results["evaluate"]["settings"]["normalize"] == [[0.1], [0.3]]
    assert results["covariance"]["images"] == results["evaluate"]["images"] == 8
    assert results["diagnose"]["images"] == 8
    assert [row["strength"] for row in results["diagnose"]["rows"]] == [0.1, 1]


def test_attacks_from_true_labels_never_mend_an_answer(trained, tmp_path, capsys):
    found = {}
    for labels in ("true", "own"):
        out = tmp_path / f"{labels}.json"
        assert main(["evaluate", str(trained), *FEW["evaluate"], "--attack-labels", labels, "--out", str(out)]) == 0
        found[labels] = json.loads(out.read_text())["attacks"]
        assert {curve["labels"] for curve in found[labels].values()} == {labels}
    assert main(["evaluate", str(trained), *FEW["evaluate"], "--out", str(tmp_path / "default.json")]) == 0
    printed = capsys.readouterr().out
    assert "gradient attacks from the true labels (PGD: 2 steps)" in printed
    assert "gradient attacks from the network's own answers (PGD: 2 steps)" in printed
    assert "at most 24 gradients for FGSM and PGD, and 16 noisy images to classify" in printed
    assert json.loads((tmp_path / "default.json").read_text())["attacks"] == found["true"]
    for curve in found["true"].values():
        assert curve["accuracy"] == sorted(curve["accuracy"], reverse=True)


def test_a_network_of_timm_on_a_folder(pictures, tmp_path):
    """From training to certificate, by the commands of docs/own-model.md."""
    pytest.importorskip("timm", reason="timm is not installed")
    coloured = tmp_path / "coloured"
    for path in pictures.rglob("*.png"):
        target = coloured / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("RGB").save(target)
    out, few = str(tmp_path / "timm"), ["--images", "2", "--decay-lengths", "2", "--sigmas", "0.25", "--draws", "20"]
    command = ["train", "--model", "timm:create_model", "--model-args", '{"model_name": "resnet18", "num_classes": 3}']
    command += ["--normalize", "0.485,0.456,0.406", "0.229,0.224,0.225", "--data", f"imagefolder:{coloured}"]
    command += ["--image-size", "32", "--epochs", "1", "--batch-size", "24", "--fraction", "0.25", "--device", "cpu"]
    assert main([*command, "--out", out]) == 0
    for name, options in {**FEW, "certify": [*few, "--selection", "5"]}.items():
        assert main([name, out, *options]) == 0
    written = {path.name for path in (tmp_path / "timm").iterdir()}
    assert {"evaluation.json", "covariance.png", "diagnosis.json", "certificates.json"} <= written


def test_autoattack_beside_pgd(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", stand_in())
    command = ["evaluate", str(trained), *FEW["evaluate"], "--out", str(tmp_path / "e.json")]
    more = ["--autoattack", "--autoattack-images", "5", "--autoattack-attacks", "apgd-ce", "square"]
    assert main([*command, *more, "--autoattack-eps", "8", "16"]) == 0
    records = json.loads((tmp_path / "e.json").read_text())["autoattack"]
    assert [record["robustbench"]["eps"] for record in records] == ["8/255", "16/255"]
    assert {record["n_ex"] for record in records} == {5}
    assert {record["version"] for record in records} == {"custom"}
    assert [part["name"] for part in records[0]["attacks"]] == ["apgd-ce", "square"]
    assert records[0]["pgd"]["steps"] == 2
    assert "16/255, 5 images" in capsys.readouterr().out
    assert main([*command, "--autoattack", "--autoattack-attacks", "fab-t"]) == 0
    (record,) = json.loads((tmp_path / "e.json").read_text())["autoattack"]
    assert record["n_ex"] == 8
    assert record["robustbench"]["eps"] == "8/255"


def test_what_is_known_is_kept_when_autoattack_breaks(trained, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(autoattack, "run", interrupted)
    command = ["evaluate", str(trained), *FEW["evaluate"], "--out", str(tmp_path / "e.json")]
    with contextlib.suppress(KeyboardInterrupt):
        main(command)
    assert set(json.loads((tmp_path / "e.json").read_text())["attacks"]) == {"fgsm", "pgd"}


def test_autoattack_that_cannot_run(trained, capsys, monkeypatch):
    assert main(["evaluate", str(trained), "--autoattack-images", "5"]) == 2
    assert "--autoattack-images: goes with --autoattack" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pyautoattack", stand_in())
    message = fails(["evaluate", str(trained), "--autoattack"], capsys)
    assert "--autoattack-attacks: apgd-t expects at least 4 classes, got a model with 3" in message
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    assert main(["evaluate", str(trained), "--autoattack"]) == 2
    assert "pip install 'sgr_kernels[autoattack]'" in capsys.readouterr().err


def test_weights_alone_do_as_well(trained, file, pictures, tmp_path, capsys):
    model, _ = load_model(trained)
    save_file(model.network.state_dict(), tmp_path / "weights.safetensors")
    own = ["--model", f"{file}:small", "--model-args", '{"classes": 3}', "--normalize", "0.1", "0.3"]
    own += ["--weights", str(tmp_path / "weights.safetensors"), "--data", f"imagefolder:{pictures}"]
    assert main(["evaluate", *own, *FEW["evaluate"]]) == 0
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert result["network"]["model_args"] == '{"classes": 3}'
    assert main(["evaluate", str(trained), *FEW["evaluate"], "--out", str(tmp_path / "same.json")]) == 0
    same = json.loads((tmp_path / "same.json").read_text())
    assert result["attacks"] == same["attacks"]
    assert result["noise"] == same["noise"]
    assert main(["diagnose", *own, *FEW["diagnose"], "--source", "sign"]) == 0
    assert json.loads((tmp_path / "diagnosis.json").read_text())["source"] == "sign"
    assert "the covariance of perturbations by sign" in capsys.readouterr().out
    assert main(["diagnose", str(trained), *FEW["diagnose"]]) == 0
    assert main(["diagnose", *own, *FEW["diagnose"], "--covariance-of", str(trained)]) == 0
    assert f"the covariance {trained} was trained with" in capsys.readouterr().out
    borrowed, theirs = (json.loads((place / "diagnosis.json").read_text()) for place in (tmp_path, trained))
    assert borrowed["rows"] == theirs["rows"]


def test_certificates_of_a_training_are_those_of_its_weights(trained, file, pictures, tmp_path, capsys):
    few = ["--images", "3", "--decay-lengths", "2", "--sigmas", "0.25", "--draws", "20", "--selection", "5"]
    model, _ = load_model(trained)
    save_file(model.network.state_dict(), tmp_path / "weights.safetensors")
    own = ["--model", f"{file}:small", "--model-args", '{"classes": 3}', "--normalize", "0.1", "0.3"]
    given = [*own, "--weights", str(tmp_path / "weights.safetensors"), "--data", f"imagefolder:{pictures}"]
    found = {}
    for name, network in {"folder": [str(trained)], "named anew": [str(trained), *own], "weights": given}.items():
        assert main(["certify", *network, *few, "--out", str(tmp_path / name)]) == 0
        (cell,) = json.loads((tmp_path / name / "certificates.json").read_text())["certificates"]
        found[name] = cell["counts"], cell["radii"], cell["labels"]
        assert all(sum(counts) == 20 for counts in cell["counts"])
    assert main(["certify", *given, *few]) == 0
    assert (tmp_path / "certificates.json").is_file(), "expected beside the weights"
    assert found["folder"] == found["named anew"] == found["weights"]
    assert "certified accuracy" in capsys.readouterr().out


def test_weights_of_any_type_are_certified(file, tmp_path):
    few = ["--images", "1", "--decay-lengths", "2", "--sigmas", "0.25", "--draws", "10", "--selection", "2"]
    assert main(["certify", "--model", f"{file}:half", *few, "--out", str(tmp_path)]) == 0


def test_a_moved_network_is_named_anew_and_keeps_its_arguments(trained, tmp_path):
    command = ["evaluate", str(trained), *FEW["evaluate"], "--out"]
    assert main([*command, str(tmp_path / "as_recorded.json")]) == 0
    assert (
        main([*command, str(tmp_path / "moved.json"), "--model", f"{write_network(tmp_path, 'moved.py')}:small"]) == 0
    )
    found, wanted = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("moved", "as_recorded"))
    assert found["attacks"] == wanted["attacks"]


@pytest.mark.parametrize(("package", "extra"), [("torchvision", "vision"), ("PIL", "images")])
def test_a_package_that_is_not_installed_is_named_with_its_extra(
    pictures, tmp_path, monkeypatch, package, extra, capsys
):
    monkeypatch.setitem(sys.modules, package, None)
    options = ["--mixup", "0.2"] if package == "torchvision" else ["--data", f"imagefolder:{pictures}"]
    error = fails(["train", *options, "--out", str(tmp_path / "none")], capsys)
    assert f"{package} is not installed: pip install 'sgr_kernels[{extra}]'" in error


def test_other_images_are_brought_to_the_networks_size(trained, tmp_path):
    for k in range(12):
        path = tmp_path / "pictures" / f"digit {k % 3}" / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((30 + k, 50), 20 * k, np.uint8)).save(path)
    command = ["evaluate", str(trained), "--data", f"imagefolder:{tmp_path / 'pictures'}", *FEW["evaluate"]]
    assert main([*command, "--out", str(tmp_path / "e.json")]) == 0


def test_images_are_of_the_classes_trained_on_by_name(trained, pictures, tmp_path, capsys):
    """The training knows digits 0, 1 and 2; of the images that are looked at none is a 0, and names decide."""
    for part in ("train", "test"):
        for kind in ("digit 1", "digit 2"):
            shutil.copytree(pictures / kind, tmp_path / "some" / part / kind)
    test = load(f"imagefolder:{tmp_path / 'some'}").test
    images, labels = test.read(torch.arange(len(test)))
    model, state = load_model(trained)
    assert state["data"]["classes"] == ["digit 0", "digit 1", "digit 2"]
    right = float((model(images / 255).argmax(1) == labels + 1).double().mean())
    few = ["--eps", "0", "--pgd-steps", "1", "--decay-lengths", "2", "--noise-eps", "0.1", "--draws", "1"]
    command = ["evaluate", "--data", f"imagefolder:{tmp_path / 'some'}", *few, "--out", str(tmp_path / "e.json")]
    assert main([*command, str(trained)]) == 0
    assert json.loads((tmp_path / "e.json").read_text())["clean"]["accuracy"][0] == pytest.approx(right)
    for part in ("train", "test"):
        (tmp_path / "some" / part / "digit 2").rename(tmp_path / "some" / part / "emu")
    error = fails([*command, str(trained)], capsys)
    assert "--data: some has the class 'emu', which the checkpoint's training lacks: 'digit 1', 'emu', not" in error
    other = ["--out", str(tmp_path / "certificates"), "--images", "1", "--draws", "2", "--selection", "1"]
    assert "has the class 'emu'" in fails(["certify", str(trained), *command[1:3], *other], capsys)
    del state["data"]["classes"]  # as of checkpoints from before
    checkpoint.save(tmp_path / "checkpoint.safetensors", state)
    assert main([*command, str(tmp_path)]) == 0
    state["data"]["classes"] = ["a", 1, "b"]
    checkpoint.save(tmp_path / "checkpoint.safetensors", state)
    assert "the checkpoint's data.classes.1: expected '' or the like, got 1" in fails([*command, str(tmp_path)], capsys)


def test_networks_of_classes_in_another_order_are_not_compared(trained, tmp_path, capsys):
    _, state = load_model(trained)
    state["data"]["classes"].reverse()
    (tmp_path / "turned").mkdir()
    checkpoint.save(tmp_path / "turned" / "checkpoint.safetensors", state)
    few = ["--images", "1", "--draws", "2", "--selection", "1", "--out", str(tmp_path / "certificates")]
    error = fails(["certify", str(trained), str(tmp_path / "turned"), *few], capsys)
    assert "turned: expected a network of the first one's classes, got one of others" in error


@pytest.mark.parametrize("command", ["train", "demo", "reproduce", "certify"])
def test_a_file_is_no_folder_to_write_into(command, trained, tmp_path, capsys):
    (tmp_path / "file").touch()
    more = {"reproduce": ["table1"], "certify": [str(trained)]}
    for out in (tmp_path / "file", tmp_path / "file" / "deeper"):
        error = fails([command, *more.get(command, []), "--out", str(out)], capsys)
        assert f"error: --out: expected a folder, got {out}: {tmp_path / 'file'} is a file" in error


def test_a_training_of_ones_own_is_continued_and_searched_for(file, arrays, tmp_path, capsys):
    command = ["train", "--model", f"{file}:small", "--model-args", '{"channels": 3, "classes": 2}', "--data", arrays]
    command += ["--method", "gn", "--batch-size", "9", "--device", "cpu", "--accumulate", "2"]
    command += ["--optimizer", "adamw", "--betas", "0.8", "0.95"]
    assert main([*command, "--epochs", "1", "--out", str(tmp_path / "parts")]) == 0
    assert main([*command, "--epochs", "2", "--out", str(tmp_path / "parts"), "--resume"]) == 0
    assert main([*command, "--epochs", "2", "--out", str(tmp_path / "whole")]) == 0
    other = weights(tmp_path / "whole")
    assert all(torch.equal(value, other[name]) for name, value in weights(tmp_path / "parts").items())
    settings = json.loads((tmp_path / "whole" / "history.json").read_text())["settings"]
    assert settings["flip"] is False
    begun = ["--init-weights", str(tmp_path / "whole"), "--epochs", "1", "--out", str(tmp_path / "tuned")]
    assert main([*command, *begun, "--learning-rate", "1e-12"]) == 0
    after = weights(tmp_path / "tuned")
    assert all(torch.allclose(other[k], after[k], atol=1e-6) for k in other if k.startswith(("first", "head")))
    searching = ["--epochs", "1", "--out", str(tmp_path / "searched"), "--search-strength", "0.5"]
    assert main([*command, *searching]) == 0
    record = json.loads((tmp_path / "searched" / "search.json").read_text())
    assert record["question"]["attack"]["eps"] == list(range(9))


def test_bad_networks_and_images_get_one_line(trained, file, arrays, pictures, tmp_path, capsys):
    out = ["--out", str(tmp_path / "none"), "--epochs", "1"]
    small = ["train", "--model", f"{file}:small", *out]
    digits = f"imagefolder:{pictures}"

    def refused(arguments, *parts):
        error = fails(arguments, capsys)
        assert all(part in error for part in parts), error

    refused(["train", "--model", f"{file}:large", *out], "error: --model: ", "has no 'large'; it has Small, small")
    refused(["train", "--model", f"{file}:no_module", *out], "--model: ", "must return an nn.Module, got list [1, 2]")
    refused(["train", "--model", f"{file}:needs", *out], "--model-args: ", "missing a required argument: 'classes'")
    refused(["train", "--model-args", "{}", *out], "error: --model-args: goes with --model")
    refused(["train", "--normalize", "0", "1", *out], "error: --normalize: goes with --model")
    refused([*small, "--normalize", "0.5", "0"], "error: --normalize: expected means and positive deviations")
    refused([*small, "--data", arrays], "error: --model: on images 3x12x12 of noise: RuntimeError")
    refused(
        [*small, "--model-args", '{"classes": 2}'], "error: --data: mnist-sample has 10 classes, the network's head 2"
    )
    refused([*small, "--momentum", "0.9"], "error: --momentum: an option of sgd; optimizer adam takes betas")
    refused([*small, "--init-weights", str(tmp_path / "no")], "error: --init-weights: there is no file")
    save_file({"head.weight": torch.zeros(7, 8)}, tmp_path / "w.safetensors")
    weighed = ["evaluate", "--model", f"{file}:small", "--weights", str(tmp_path / "w.safetensors")]
    refused(weighed, "error: --weights: ", "w.safetensors lacks 'unused', 'first.weight', 'first.bias' and")
    refused(["evaluate", str(trained), "--weights", "w"], "error: --weights: CHECKPOINT has its own")
    refused(["covariance", "--weights", "w", "--out", str(tmp_path / "c.png")], "CHECKPOINT: name a training's folder")
    refused(["evaluate"], "CHECKPOINT: name a training's folder, or a --model and its --weights")
    refused(["train", "--data", arrays, *out], "for a Carlini-Wagner network, got 3x12x12; model (--model) names")
    refused(
        ["train", "--data", arrays, "--image-size", "8", *out], "error: --image-size: an option of data imagefolder"
    )
    refused(["evaluate", str(trained), "--data", arrays], "trained on ", "--data ", "holds noise")
    clean = ["train", "--model", f"{file}:small", "--data", digits, "--method", "clean", "--epochs", "1"]
    assert main([*clean, "--out", str(tmp_path / "clean")]) == 0
    refused(["diagnose", str(tmp_path / "clean"), "--source", "trained"], "--source: the network was trained without")
    borrowed = ["diagnose", str(trained), "--covariance-of", str(tmp_path / "clean")]
    refused(borrowed, "--covariance-of: ", "clean was trained without a covariance")
    refused([*borrowed, "--source", "sign"], "--covariance-of: names the covariance, and so does --source sign")
    larger = ["diagnose", "--model", f"{file}:small", "--model-args", '{"classes": 10}', "--data", "mnist-sample"]
    refused([*larger, "--covariance-of", str(trained)], "was trained on images of 1x20x24, and these are 1x28x28")
    (pictures / "digit 0" / "bad.png").write_bytes(b"no picture")
    try:
        refused(["evaluate", str(trained)], "digit 0/bad.png cannot be read as a PNG or JPEG image")
        Image.fromarray(np.zeros((9, 9), np.uint8)).save(pictures / "digit 0" / "bad.png")
        refused([*small, "--data", digits], "bad.png is 9 x 9 pixels", "20 x 24", "--image-size")
    finally:
        (pictures / "digit 0" / "bad.png").unlink()
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "--model-args", "[1]"],
            "argument --model-args: expected a JSON object of names and values, got [1]",
        ),
        (["train", "--model-args", "{"], "argument --model-args: expected a JSON object, got {"),
        (["train", "--normalize", "0.1,x", "1"], "argument --normalize: expected numbers with commas between them"),
        (["train", "--image-size", "0"], "argument --image-size: expected a number of pixels or ROWSxCOLUMNS, got 0"),
        (["train", "--image-size", "3x4x5"], "argument --image-size: expected a number of pixels or ROWSxCOLUMNS"),
        (["train", "--optimizer", "lion"], "invalid choice: 'lion'"),
        (["train", "--amp", "fp16"], "invalid choice: 'fp16'"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    assert message in refuses(arguments, capsys)
