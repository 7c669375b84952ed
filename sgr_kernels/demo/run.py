"""The demonstration: three networks on shipped digits, attacked side by side, in a report a person can read."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sgr_kernels._version import __version__
from sgr_kernels.attacks import pgd
from sgr_kernels.covariance import CovarianceFunction
from sgr_kernels.demo.report import Demonstration, Pictures, write_report
from sgr_kernels.evaluation.certificates import CertificatePlan, Certificates, certificates
from sgr_kernels.evaluation.perturbations import perturbation_covariance
from sgr_kernels.evaluation.suite import EPS_GRIDS, PIXEL_LEVELS, Evaluation, Plan, evaluate
from sgr_kernels.report.covariance import DisplacementFunction
from sgr_kernels.training.batches import Batches
from sgr_kernels.training.checkpoint import write_atomically
from sgr_kernels.training.datasets import SAMPLE, DataSet, ImageSet, load
from sgr_kernels.training.loop import Trainer
from sgr_kernels.training.methods import EXPONENTIAL, Settings
from sgr_kernels.training.records import require_folder

CLEAN, GN, SGR = "clean", "GN", "SGR"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """The size of a demonstration.

    Attributes:
        epochs: Of each training.
        images: Test images attacked.
        draws: Draws of noise for each image; the worst counts.
        strength: Of both penalties, at the data's variance.
        decay_length: Of SGR's covariance function, in pixels.
        train_images: Training images; None: all 5,000.
        seed: Of everything random.
        plan: The attacks; its ``draws`` and ``seed`` are replaced by those above.
        certified: Test images certified, the first of those attacked.
        certificate_plan: The noise of the certificates, of one scale; its ``seed`` is replaced by that above.
    """

    epochs: int = 6
    images: int = 500
    draws: int = 15
    strength: float = 5.0
    decay_length: float = 16.0
    train_images: int | None = None
    seed: int = 0
    plan: Plan = field(default_factory=lambda: Plan(EPS_GRIDS["mnist"], noise_eps=(0.3, 0.5, 0.7)))

    certified: int = 100
    certificate_plan: CertificatePlan = field(
        default_factory=lambda: CertificatePlan((1.0, 16.0), (0.5,), draws=300, selection=50)
    )

    def attacks(self) -> Plan:
        """The plan with the options' own draws and seed."""
        return replace(self.plan, draws=self.draws, seed=self.seed)


def run(out: str | Path, options: Options, *, device: torch.device | str = "cpu", say: Say = print) -> Demonstration:
    """Train, attack, compare, and write the report folder.

    Args:
        out: Folder for report.md, results.json and the pictures; made if need be.
        options: The demonstration's size.
        device: Where to compute.
        say: Told what is being done.
    """
    begun = time.perf_counter()
    folder = Path(out)
    require_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = load(SAMPLE)
    data = DataSet(data.train.first(options.train_images), data.test)
    methods = {
        CLEAN: _settings(options, "clean"),
        GN: _settings(options, "gn"),
        SGR: _settings(options, "sgr"),
    }
    models, seconds, accuracies = {}, {}, {}
    for name, settings in methods.items():
        say(f"training {name}: {options.epochs} epochs on {len(data.train):,} digits")
        trainer = Trainer(settings, data, device=device)
        trainer.run(options.epochs, out=folder / "networks" / name)
        models[name] = trainer.model.eval()
        seconds[name] = sum(record["seconds"] for record in trainer.history)
        accuracies[name] = trainer.history[-1]["test_accuracy"]
        say(f"  {seconds[name]:.0f} s, {100 * accuracies[name]:.1f} % of {len(data.test):,} test digits")
    images = data.test.first(options.images)
    plan = options.attacks()
    evaluations: dict[str, Evaluation] = {}
    for name, model in models.items():
        say(f"attacking {name}: FGSM, PGD and correlated noise on {len(images)} test digits")
        evaluations[name] = evaluate(model, Batches(images, 100, device=device), plan)
    say(f"certifying the first {min(options.certified, len(images))} of them")
    plan_certified = replace(options.certificate_plan, seed=options.seed)
    certified = _certificates(models, images.first(options.certified), plan_certified, device)
    say("measuring covariance functions and drawing")
    demonstration = Demonstration(
        options_text=_options_text(options, data),
        methods={name: asdict(settings) for name, settings in methods.items()},
        plan=plan,
        test_images=len(data.test),
        test_accuracy=accuracies,
        training_seconds=seconds,
        evaluations=evaluations,
        certificate_plan=plan_certified,
        certificates=certified,
        noise_covariances=_noise_covariances(images, options),
        gradient_covariances=_gradient_covariances(models, images, options, device),
        pictures=_pictures(models, images, options, device),
        seconds=time.perf_counter() - begun,
    )
    results = {
        "sgr_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        **demonstration.to_dict(),
    }
    write_atomically(folder / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    write_report(demonstration, folder)  # from the numbers, which must not be lost where drawing fails
    return demonstration


def _settings(options: Options, method: str) -> Settings:
    return Settings(
        "mnist",
        method=method,
        strength=options.strength,
        perturbation=EXPONENTIAL,
        decay_length=options.decay_length,
        augment=False,
        seed=options.seed,
    )


def _options_text(options: Options, data: DataSet) -> str:
    return (
        f"Carlini-Wagner networks for MNIST, {options.epochs} epochs on {len(data.train):,} digits, Adam 1e-3, "
        f"batches of 128, no augmentation, seed {options.seed}. GN and SGR have the same strength, "
        f"{options.strength:g} at the digits' own variance; SGR's covariance function is the fixed exponential "
        f"exp(-r / {options.decay_length:g} pixels)."
    )


def _certificates(
    models: dict[str, nn.Module], images: ImageSet, plan: CertificatePlan, device: torch.device | str
) -> Certificates:
    pixels, labels = next(iter(Batches(images, len(images), device=device)))
    return certificates(models, pixels, labels, plan, chunk_size=250)


def _noise_covariances(images: ImageSet, options: Options) -> list[DisplacementFunction]:
    """Of the noise that SGR was told of and, for comparison, of the digits."""
    size = tuple(images.images.shape[2:])
    noise = CovarianceFunction.exponential(1, size, options.decay_length, rounded=True)
    digits = CovarianceFunction.from_images(images.images)
    return [_displacement_function("the digits themselves", digits), _displacement_function("SGR's noise", noise)]


def _gradient_covariances(
    models: dict[str, nn.Module], images: ImageSet, options: Options, device: torch.device | str
) -> list[DisplacementFunction]:
    """Of the networks' loss gradients: what each of them still listens to."""
    size = tuple(images.images.shape[2:])
    functions = []
    for name, model in models.items():
        values = perturbation_covariance(model, Batches(images, 100, device=device), "gradient", eps=0.0).cpu()
        functions.append(_displacement_function(name, CovarianceFunction.from_values(values, size)))
    return functions


def _displacement_function(name: str, function: CovarianceFunction) -> DisplacementFunction:
    return DisplacementFunction(name, function.profile().numpy(), float(function.decay_length().diagonal().mean()))


def _pictures(models: dict[str, nn.Module], images: ImageSet, options: Options, device: torch.device | str) -> Pictures:
    """For each class the first digit that all networks recognise, but not all of them under long-range noise.

    Where noise confuses no network on any digit of a class, that class is left out.
    """
    pixels, labels = next(iter(Batches(images, len(images), device=device)))
    generator = torch.Generator().manual_seed(options.seed)
    strength = max(options.plan.noise_eps)
    rows = {"no perturbation": pixels}
    for length in (4.0, 16.0):
        covariance = CovarianceFunction.exponential(1, tuple(pixels.shape[2:]), length)
        noise = covariance.sample(len(pixels), generator).to(pixels)
        deviation = pixels.std((1, 2, 3), correction=0, keepdim=True)
        rows[f"noise, decay\nlength {length:g}"] = pixels + strength * deviation * noise
    rows["PGD against\nthe clean network,\neps 16/255"] = pgd(models[CLEAN], pixels, eps=16 / PIXEL_LEVELS)

    @torch.no_grad()
    def answers(batch: Tensor) -> dict[str, Tensor]:
        return {name: model(batch).argmax(1) for name, model in models.items()}

    given = {row: answers(batch) for row, batch in rows.items()}
    right = {row: torch.stack([answer == labels for answer in found.values()]) for row, found in given.items()}
    telling = right["no perturbation"].all(0) & ~right["noise, decay\nlength 16"].all(0)
    chosen = [int(k[0]) for c in labels.unique() if len(k := (telling & (labels == c)).nonzero())]
    return Pictures(
        noise_eps=strength,
        labels=[images.classes[int(labels[k])] for k in chosen],
        rows={
            row: [
                (_shown(batch[k, 0]), {name: images.classes[int(a[k])] for name, a in given[row].items()})
                for k in chosen
            ]
            for row, batch in rows.items()
        },
    )


def _shown(image: Tensor) -> np.ndarray:
    """A noisy image has pixels outside [0, 1]: it is shown from its own darkest to its own brightest."""
    low, high = min(0.0, float(image.min())), max(1.0, float(image.max()))
    return ((image - low) / (high - low)).cpu().numpy()
