"""A reproduction from end to end at the smallest scale: what it measures and what it writes."""

import json
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from sgr_kernels.cli import main
from sgr_kernels.reproduce import certified, claims, ensemble, lrc, paper, pictures, smooth, stats, transfer
from sgr_kernels.reproduce.covariance import second_moments
from sgr_kernels.reproduce.run import EXPERIMENTS, load, reproduce, show
from sgr_kernels.reproduce.scales import METHODS, SCALES, Beyond
from sgr_kernels.reproduce.smoothness import softmax_along
from tests.autoattack_stand_in import stand_in
from tests.tiny_lab import TINY, files, lab_in


def test_results_of_another_scale_are_not_mixed_in(whole, tmp_path):
    """Neither measured beside them, nor shown with them."""
    shutil.copytree(whole / "results", tmp_path / "results")
    other = lab_in(tmp_path, scale=replace(TINY, draws=3))
    with pytest.raises(ValueError, match=r"\.json answers another question \(draws: 3, not 2\)"):
        reproduce(other, ["smoothness"], "MNIST, tiny")
    assert files(tmp_path) == files(whole)
    record = tmp_path / "results" / "lrc.json"
    changed = json.loads(record.read_text())
    changed["question"]["data"] = ["other", "images"]
    record.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"lrc\.json answers another question \(data: "):
        show(tmp_path / "results")


def test_pages_are_made_from_the_results_alone(whole, tmp_path, capsys):
    (tmp_path / "results").mkdir()
    for path in (whole / "results").glob("*.json"):
        (tmp_path / "results" / path.name).write_bytes(path.read_bytes())
    assert main(["reproduce", "all", "--out", str(tmp_path), "--pages-only"]) == 0
    assert files(tmp_path) == files(whole)
    with pytest.raises(FileNotFoundError, match="no results in"):
        show(tmp_path / "nowhere")


def test_pages_show_every_picture_and_every_method(whole):
    folder = whole / "results"
    shown = set()
    for page in folder.glob("*.md"):
        text = page.read_text()
        assert "nan" not in text.replace("finance", "")
        shown |= set(re.findall(r"\]\(([\w.-]+\.png)\)", text))
    assert shown == {path.name for path in folder.glob("*.png")}
    for method in TINY.methods:
        assert f"| {method} |" in (folder / "table1.md").read_text()
    summary = (folder / "README.md").read_text()
    assert all(f"({name}.md)" in summary for name in EXPERIMENTS)
    assert "No twin for self-transfer" in summary


def test_results_are_consistent_between_experiments(whole):
    results = load(whole / "results")
    assert set(results) == {"search", *EXPERIMENTS}
    table, moved = results["table1"]["methods"], results["transfer"]["sources"]
    for method in TINY.methods:
        clean = table[method][0]["curves"]["pgd"]["accuracy"][0]
        # Every source meets the same network, which without a perturbation answers the same.
        assert {moved[source][method]["accuracy"][0] for source in TINY.methods} == {clean}
        assert results["leaking"]["networks"][method]["true"]["accuracy"][0] == clean
    assert [len(table[m]) for m in ("clean", "sgr_exp", "gn")] == [2, 2, 1]
    assert set(results["transfer"]["twins"]) == {"clean", "sgr_exp", "gn"}
    noise = results["lrc"]["methods"]["clean"][0]["curves"]
    assert set(noise) == {"1", "16", "data set"}


def test_strengths_are_grey_levels_on_pages_and_pixels_in_attacks(tmp_path):
    """FGSM at the table's eps 32 changes pixels by 32 grey levels."""
    lab = lab_in(tmp_path)
    network = lab.method("clean")
    seen = []
    original = network.model.forward

    def forward(images):
        seen.append(images.detach().clone())
        return original(images)

    network.model.forward = forward
    from sgr_kernels.reproduce.leaking import under_fgsm

    curve = under_fgsm(lab, network)["true"]
    images, _ = lab.pixels(TINY.leaking_images)
    assert curve["eps"] == pytest.approx([0, 32])
    largest = max(float((x - images).abs().max()) for x in seen if x.shape == images.shape)
    assert largest == pytest.approx(32 / 255, abs=1e-6)


def test_the_transfer_matrix_has_targets_in_rows_and_twins_on_its_diagonal(whole):
    results = load(whole / "results")["transfer"]
    names = list(results["sources"])
    values = transfer.matrix(results, 64.0)
    row, column = names.index("gn"), names.index("pgd")
    curve = results["sources"]["pgd"]["gn"]
    assert values[row, column] == curve["accuracy"][stats.at(curve, 64.0)]
    assert np.isnan(values[column, column])
    assert values[row, row] == results["twins"]["gn"]["accuracy"][stats.at(results["twins"]["gn"], 64.0)]
    own = transfer.matrix(results, 64.0, white_box=True)
    assert own[row, row] == results["sources"]["gn"]["gn"]["accuracy"][-1]


def test_second_moments_of_known_noise():
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(400, 1, 28, 28, generator=generator)
    found = second_moments(list(white.split(100)))
    assert found["second_moment"] == pytest.approx(784, rel=0.02)
    # The sample's squared mean is 1/400 of the second moment; the true one is zero.
    assert abs(found["mean_share"]) < 4e-4
    assert found["decay_length"] == pytest.approx(1 - 1 / np.e, abs=0.02)
    shifted = second_moments(list((white + 0.5).split(100)))
    assert shifted["mean_share"] == pytest.approx(0.25 / 1.25, rel=0.05)


def test_softmax_along_a_line_of_a_linear_network():
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    images, perturbed = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    found = softmax_along(lambda x: x @ weight, images, perturbed, torch.tensor([0.0, 0.5, 1.0]))
    expected = torch.tensor([2.0, 0.0, -2.0]).sigmoid()
    assert torch.allclose(found[:, 0, 0].float(), expected)


def test_images_survive_json():
    images = torch.rand(3, 3, 5, 4)
    assert (
        np.abs(
            pictures.decode(json.loads(json.dumps(pictures.encode(images)))) - images.permute(0, 2, 3, 1).numpy()
        ).max()
        <= 0.5 / 255 + 1e-6
    )
    noisy = torch.linspace(-1, 3, 16).view(1, 1, 4, 4)
    assert pictures.decode(pictures.encode(noisy))[0, 0, 0] == 0
    assert pictures.decode(pictures.encode(noisy))[0, 3, 3] == 1


def test_the_papers_tables_are_whole():
    for tables in paper.TRANSFER.values():
        for table in tables.values():
            assert all(len(row) == 9 and set(row) == set(table) for row in table.values())
    assert paper.TRANSFER["mnist"][32]["clean"]["clean"] == 24.7
    assert paper.TRANSFER["cifar10"][8]["fgsm_sgr"]["pgd_sgr"] == 43.9
    assert paper.WHITE_BOX["mnist"]["pgd"] == (99.5, 99.5, 99.1, 99.3, 0.453)


def test_verdicts_turn_with_the_numbers(whole):
    """Swapping the names of two methods turns a claim that compares them around."""
    results = load(whole / "results")

    def verdict(method_scores):
        changed = json.loads(json.dumps(results["lrc"]))
        for method in changed["methods"]:
            share = method_scores.get(method, 0.7)
            right = np.arange(200) < share * 200
            mask = np.packbits(right).tobytes().hex()
            for run in changed["methods"][method]:
                for curve in run["curves"].values():
                    curve |= {"masks": [mask] * len(curve["eps"]), "images": 200}
        found = claims.judge({"lrc": changed})
        return next(v.verdict for v in found if v.claim.startswith("Under long-range"))

    assert verdict({"sgr_exp": 0.9, "gn": 0.5}) == claims.YES
    assert verdict({"sgr_exp": 0.5, "gn": 0.9}) == claims.NO
    assert verdict({"sgr_exp": 0.5, "gn": 0.5}) == claims.OPEN
    assert {v.experiment for v in claims.judge(results)} == set(EXPERIMENTS)


@pytest.mark.parametrize("eps", [[0.7, 1.4], [0.3, 0.7]])
def test_the_papers_numbers_under_noise_stand_beside_ours_where_the_strength_is_the_same(eps, whole, tmp_path):
    """The smoke scale has not the paper's strength."""
    results = load(whole / "results")["lrc"] | {"dataset": "cifar10", "eps": eps}
    for runs in results["methods"].values():
        for run in runs:
            for curve in run["curves"].values():
                curve["eps"] = eps
    lrc.show(results, tmp_path)
    assert ("| clean |" in (tmp_path / "lrc.md").read_text().partition("beside the paper")[2]) == (0.3 in eps)
    margins = [v for v in claims.judge({"lrc": results}) if v.claim.startswith("... by more than 25 points")]
    assert len(margins) == (0.3 in eps)


@pytest.mark.parametrize("dataset", SCALES)
def test_scales_agree_with_the_paper(dataset):
    full = SCALES[dataset]["full"]
    end = {"mnist": 32, "cifar10": 8}[dataset]
    assert (full.epochs, full.batch_size, full.draws, full.train_images) == (50, 128, 100, None)
    for scale in SCALES[dataset].values():
        assert (min(scale.eps), max(scale.eps)) == (0, end)
        assert set(scale.single_eps) == set(paper.TRANSFER[dataset])
        assert set(scale.methods) <= set(METHODS)


@pytest.mark.parametrize(("dataset", "scale"), [("mnist", "full"), ("cifar10", "cpu"), ("mnist", "smoke")])
def test_as_many_seeds_as_asked_for(dataset, scale, tmp_path, monkeypatch):
    """Also of a scale that has one of each method."""
    labs = []
    monkeypatch.setattr("sgr_kernels.commands.reproduce.reproduce", lambda lab, *_: labs.append(lab))
    monkeypatch.setattr("sgr_kernels.commands.reproduce.architecture_for", lambda shape: dataset)
    command = ["reproduce", "all", "--dataset", dataset, "--scale", scale, "--out", str(tmp_path)]
    for options in ([], ["--seeds", "1"], ["--seeds", "4"]):
        assert main([*command, *options]) == 0
    usual, one, four = (lab.scale for lab in labs)
    assert usual == SCALES[dataset][scale]
    assert one.seeds_of("sgr_exp") == (0,)
    assert four.seeds_of("sgr_exp") == (0, 1, 2, 3)
    assert not any(one.has_twin(method) for method in METHODS)
    assert (one.beyond.seeds, four.beyond.seeds) == (1, 4)


def test_the_dataset_must_fit_the_data(tmp_path, capsys):
    assert main(["reproduce", "table1", "--dataset", "cifar10", "--out", str(tmp_path)]) == 2
    assert "--dataset cifar10, but --data mnist-sample holds images for mnist" in capsys.readouterr().err
    assert main(["reproduce", "table1", "--pages-only", "--out", str(tmp_path)]) == 2
    assert "no results in" in capsys.readouterr().err


def test_smooth_networks_get_a_page_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(smooth, "METHODS", {name: smooth.METHODS[name] for name in ("clean", "l1")})
    monkeypatch.setattr(smooth, "_TIMED_ROUNDS", 1)
    monkeypatch.setattr(smooth, "_TIMED_STEPS", 1)
    monkeypatch.setattr(smooth, "_KINKED_IMAGES", 32)
    scale = replace(TINY, seeds=1, search=replace(TINY.search, attack_images=4, validation_images=10))
    scale = replace(scale, beyond=Beyond(1, 4, 20, (0.5,), autoattack_images=6, corrupted_images=4))
    said = []
    reproduce(lab_in(tmp_path, said.append, scale), ["smooth"], "MNIST, tiny")
    found = load(tmp_path / "results")["smooth"]["networks"]
    rough, round_ = ([runs[0]["gradient_cosine"] for runs in methods.values()] for methods in found.values())
    assert max(rough) < 0.9 < min(round_)
    page = (tmp_path / "results" / "smooth.md").read_text()
    assert "| gradient norm, L1 |" in page
    assert "smooth.png" in page
    assert "smooth.md" in (tmp_path / "results" / "README.md").read_text()
    # The strengths of each kind of network are its own.
    assert sum(line.startswith("searching l1") for line in said) == 2


def test_the_ensemble_beside_pgd_gets_a_page_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", stand_in())
    monkeypatch.setattr(ensemble, "METHODS", {name: ensemble.METHODS[name] for name in ("clean", "gn")})
    monkeypatch.setattr(ensemble, "STRONG_PGD", {**ensemble.STRONG_PGD, "steps": 4, "restarts": 2})
    scale = replace(TINY, beyond=Beyond(ensemble_images=12), search=replace(TINY.search, validation_images=10))
    reproduce(lab_in(tmp_path, scale=scale), ["ensemble"], "MNIST, tiny")
    found = load(tmp_path / "results")["ensemble"]["networks"]
    assert [row["method"] for row in found] == ["clean", "gn"]
    for row in found:
        check = row["check"]
        assert check["version"] == "standard"
        assert check["n_ex"] == row["pgd"]["images"] == row["strong"]["images"] == 12
        broken = sum(part["broken"] for part in check["attacks"])
        assert row["autoattack"]["accuracy"] == [pytest.approx(check["clean_accuracy"] - broken / 12)]
    page = (tmp_path / "results" / "ensemble.md").read_text()
    assert "| after apgd-ce | after apgd-t | after fab-t | after square | PGD − AutoAttack |" in page
    for row in found:
        last = f"{100 * row['autoattack']['accuracy'][0]:.1f} ±"
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {ensemble.METHODS[row['method']]} |")]
        assert line.split(" | ")[7].startswith(last)
        pgd = check["pgd"]
        misjudged = round(12 * (pgd["accuracy"] - pgd["neither_breaks"])) - sum(pgd["won_by"].values())
        counted = "".join(f" | {pgd['won_by'][name]}" for name in ("apgd-ce", "apgd-t", "fab-t", "square"))
        found = f"| {ensemble.METHODS[row['method']]}{counted} | {misjudged} |" in page
        assert found == (pgd["difference"] > 0.02)


def test_certificates_get_a_page_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(certified, "METHODS", {name: certified.METHODS[name] for name in ("clean", "gn")})
    scale = replace(TINY, beyond=Beyond(2, 4, 20, (0.5, 1.0)), search=replace(TINY.search, validation_images=10))
    reproduce(lab_in(tmp_path, scale=scale), ["certified"], "MNIST, tiny")
    found = load(tmp_path / "results")["certified"]
    # Each seed under the main scale of the noise, the first one under the other, too.
    assert [(run["seed"], run["sigma"]) for run in found["certificates"] if run["method"] == "gn"] == [
        (0, 0.5), (0, 1.0), (0, 0.5), (0, 1.0), (1, 0.5), (1, 0.5),
    ]  # fmt: skip
    # 20 draws that all agree prove p > 0.708 at alpha 0.001, so sigma 0.5 at most a radius of 0.27.
    assert max(max(run["radii"]) for run in found["certificates"]) <= 1.0 * 0.548
    page = (tmp_path / "results" / "certified.md").read_text()
    assert "| gradient norm, squared |" in page
    # A change of the plan measures anew what it is about, and trains nothing.
    said = []
    reproduce(lab_in(tmp_path, said.append, replace(scale, beyond=Beyond(2, 3, 20, (0.5,)))), ["certified"], "MNIST")
    assert not [line for line in said if line.startswith(("training", "searching"))]
