"""The documented integrations train; each is tested where its library is installed."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sgr_kernels as sgr
from tests.graph_emulator import EmulatedGraph

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def load(name: str) -> Any:
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # where the compiler looks for what a function refers to
    specification.loader.exec_module(module)
    return module


def separable(count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (count,), generator=generator)
    images = torch.rand(count, 1, 6, 6, generator=generator) * 0.4
    images[:, 0, :3] += 0.5 * labels[:, None, None]
    return images, labels


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.GELU(), nn.Linear(16, 2))


def test_plain_loop_learns(capsys: pytest.CaptureFixture[str]) -> None:
    images, labels = separable()
    model = classifier()
    criterion = load("plain_loop").train(model, list(zip(images.split(16), labels.split(16))), epochs=30, lr=1e-2)
    assert (model(images).argmax(1) == labels).float().mean() > 0.95
    assert int(criterion.covariance.updates) == 120
    assert "penalty" in capsys.readouterr().out


def test_a_loop_with_cuda_graphs_learns_to_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = separable()
    batches = list(zip(images.split(16), labels.split(16)))
    eager, captured = classifier(), classifier()
    example = load("cuda_graph_loop")
    assert example.train(eager, batches, 30, lr=1e-2).captured == 0
    assert (eager(images).argmax(1) == labels).float().mean() > 0.95
    monkeypatch.setattr(example, "graphs_on", lambda device: EmulatedGraph)
    assert example.train(captured, batches, 30, lr=1e-2).captured == 1
    for one, other in zip(captured.parameters(), eager.parameters()):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_a_compiled_step_is_the_criterions_step(backend: str) -> None:
    """Loss and gradients of one graph equal those of `SGRLoss` by double backward."""
    if backend not in sgr.backends.available():
        pytest.skip(f"the {backend} backend does not run here")
    torch._dynamo.reset()
    images, labels = separable(8)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(64, 2)).double()
    covariance = sgr.CovarianceFunction(1, 6).double()
    parameters = dict(model.named_parameters())
    with sgr.use_backend(backend):
        step = load("compiled_step").compiled_step(model, covariance, 3.0, "aot_eager")
        for _ in range(2):
            covariance.update(torch.rand_like(images.double()))
            gradients, loss = step({n: p.detach() for n, p in parameters.items()}, images.double(), labels)
            expected = sgr.SGRLoss(covariance, 3.0, perturbation=None)(model, images.double(), labels)
            torch.testing.assert_close(loss, expected.detach())
            wanted = torch.autograd.grad(expected, list(parameters.values()))
            torch.testing.assert_close([gradients[name] for name in parameters], list(wanted))


def test_a_compiled_step_learns() -> None:
    images, labels = separable()
    model, batches = classifier(), list(zip(images.split(16), labels.split(16))) * 30
    covariance = sgr.CovarianceFunction.exponential(1, 6, 2.0, target_variance=0.05)
    load("compiled_step").train(model, covariance, batches, lr=1e-2, backend="aot_eager")
    assert (model(images).argmax(1) == labels).float().mean() > 0.95


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_and_restores_the_criterion(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    images, labels = separable()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 16)
    module = load("lightning_module").Robust(classifier(), sgr.CovarianceFunction(1, (6, 6), target_variance=0.1))
    trainer = lightning.Trainer(
        max_epochs=2, logger=False, default_root_dir=tmp_path, enable_progress_bar=False, accelerator="cpu"
    )
    trainer.fit(module, loader, loader)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    state = torch.load(tmp_path / "saved.ckpt", weights_only=True)["state_dict"]
    assert int(state["criterion.covariance.updates"]) == 8


def hugging_face() -> tuple[Any, Any]:
    """The library and the example; skips where it is not installed."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers, load("huggingface_trainer")


def hugging_face_norms(folder: Path, strength: float | None, **options: Any) -> tuple[list[float], Any]:
    """Norm of the gradient at each step of an epoch, and the trainer; the library's own where there is no strength."""
    transformers, example = hugging_face()
    configuration = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=6, patch_size=2,
        num_channels=1, num_labels=2,
    )  # fmt: skip
    norms = []

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
            gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            norms.append(float(torch.cat(gradients).norm()))

    images, labels = separable()
    data = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels)]
    arguments = transformers.TrainingArguments(
        str(folder), num_train_epochs=1, report_to=[], use_cpu=True, max_grad_norm=0, save_strategy="no", **options
    )
    rest = {"args": arguments, "train_dataset": data, "eval_dataset": data, "callbacks": [Look()]}
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(configuration)
    if strength is None:
        trainer = transformers.Trainer(model, **rest)
    else:
        covariance = sgr.CovarianceFunction(1, (6, 6), target_variance=0.1)
        trainer = example.RobustTrainer(model, covariance, strength, **rest)
    trainer.train()
    return norms, trainer


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_trainer_trains(tmp_path: Path) -> None:
    _, trainer = hugging_face_norms(tmp_path, 1.0)
    assert int(trainer.model.criterion.covariance.updates) > 0
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [
    {"per_device_train_batch_size": 16},
    {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
    {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    {"per_device_train_batch_size": 16, "label_smoothing_factor": 0.3},
    {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "label_smoothing_factor": 0.3},
    {"per_device_train_batch_size": 16, "gradient_checkpointing": True},
    {"per_device_train_batch_size": 16, "torch_compile": True, "torch_compile_backend": "eager"},
], ids=lambda options: "-".join(list(options)[1:]) or "plain")  # fmt: skip
def test_hugging_face_options_mean_what_they_mean_without_a_penalty(tmp_path: Path, options: dict[str, Any]) -> None:
    """Without a penalty's strength the gradients are the library's own; with one every option still works."""
    own, reference = hugging_face_norms(tmp_path / "own", None, **options)
    found, trainer = hugging_face_norms(tmp_path / "found", 0.0, **options)
    assert len(own) == 4
    assert found == pytest.approx(own, rel=1e-3)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(reference.evaluate()["eval_loss"], rel=1e-3)
    penalized, _ = hugging_face_norms(tmp_path / "penalized", 10.0, **options)
    assert penalized[0] == pytest.approx(own[0], rel=0.5)
    assert penalized[0] != pytest.approx(own[0], rel=1e-4)


GALLERY = {
    "sensor_noise": ("plain", "SGR, noise as measured"),
    "coloured_signals": ("plain", "SGR, noise as recorded"),
    "fine_tune": ("as trained", "fine-tuned with SGR"),
}


@pytest.mark.parametrize("name", GALLERY)
def test_gallery_gains_under_noise(name: str, tmp_path: Path) -> None:
    """In their fast form the programs show what their pictures do: the penalized network stands more noise."""
    found = load(name).run(str(tmp_path / "picture.png"), fast=True)
    before, after = (found[key] for key in GALLERY[name])
    assert len(before) == len(after) == 5
    assert sum(after) > sum(before) + 0.1
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_gallery_of_random_fields(tmp_path: Path) -> None:
    """The likelihood finds the decay length to its grid's next steps, and the estimate is the regression's mean."""
    found = load("random_fields").run(str(tmp_path / "picture.png"), fast=True)
    assert found["decay_length"] == pytest.approx(found["truth"], rel=0.5)
    assert found["error_after"] < 0.6 * found["error_before"]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
