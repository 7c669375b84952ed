"""``sgr train``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from sgr_kernels.commands import common, networks
from sgr_kernels.covariance.layout import FORM_OF_BINNING
from sgr_kernels.evaluation.corrupt import KINDS, SEVERITIES
from sgr_kernels.evaluation.suite import PIXEL_LEVELS, eps_grid
from sgr_kernels.models import ACTIVATIONS, POOLINGS, architecture_for
from sgr_kernels.penalty.choice import METHODS as PENALTY_METHODS
from sgr_kernels.penalty.sampling import SAMPLINGS
from sgr_kernels.report.page import percent
from sgr_kernels.training.checkpoint import CHECKPOINT_FILE
from sgr_kernels.training.datasets import load
from sgr_kernels.training.images import DataSet
from sgr_kernels.training.loop import Trainer
from sgr_kernels.training.methods import (
    COVARIANCES,
    EXPONENTIAL,
    METHODS,
    PERTURBATIONS,
    PRECISIONS,
    SCHEDULES,
    Settings,
)
from sgr_kernels.training.network import Source
from sgr_kernels.training.optimizers import OPTIMIZERS
from sgr_kernels.training.processes import Processes, joined, local_device
from sgr_kernels.training.records import digest, remembered, require_folder
from sgr_kernels.training.search import Attack, attack_area, held_out, strength_search

_SEARCH_IMAGES = 500
_SEARCH_NOISE = [0.3, 0.7]  # of each image's standard deviation
_BINNINGS = (
    "what an estimate keeps apart: distances (rounded to pixels, or spread linearly over two bins), rows and columns "
    "(even), or their signs, too (offset)"
)
_DEFAULTS = {field.name: field.default for field in fields(Settings)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    common.add_data(parser)
    networks.add_network(parser)
    add = parser.add_argument
    add("--init-weights", metavar="FILE", help="to begin with: safetensors, a state dict, or another training")
    add("--out", metavar="DIR", default="runs/latest", help="folder for checkpoint.safetensors and history.json")
    add("--resume", action="store_true", help="continue from the checkpoint in --out, if there is one")
    add("--epochs", type=common.whole, default=50, help="epochs in all, those before --resume included")
    methods = "; ".join(f"{name}: {method.summary}" for name, method in METHODS.items())
    add("--method", choices=METHODS, default=_DEFAULTS["method"], help=methods)
    add(
        "--strength",
        type=common.nonnegative,
        default=_DEFAULTS["strength"],
        help="of the penalty, as a noise-to-signal ratio: the covariance is at the data's own variance",
    )
    add(
        "--search-strength",
        type=common.positive,
        nargs="+",
        metavar="S",
        help="try these strengths first and take the most robust that costs at most a point of accuracy, judged on a "
        "tenth of the training images; the record is search.json in --out",
    )
    add(
        "--search-under",
        choices=("pgd", "noise"),
        help="what robustness is measured under: PGD, or noise over --decay-length; none: noise for an exponential "
        "covariance, PGD for all others",
    )
    add("--search-epochs", type=common.whole, help="of each trial; none: as many as --epochs")
    add(
        "--perturbation",
        choices=PERTURBATIONS,
        default=_DEFAULTS["perturbation"],
        help="what method sgr estimates its covariance from; exponential: a fixed covariance function",
    )
    add(
        "--decay-length",
        type=common.positive,
        default=_DEFAULTS["decay_length"],
        help="of the exponential covariance and of lrc's noise, in pixels",
    )
    add("--covariance", choices=COVARIANCES, default=_DEFAULTS["covariance"], help="full: the matrix, small images")
    add("--update-rate", type=common.positive, default=_DEFAULTS["update_rate"], help="of the running covariance")
    add("--update-every", type=common.whole, default=_DEFAULTS["update_every"], metavar="N", help="of that, in steps")
    add(
        "--penalty-every",
        type=common.whole,
        default=_DEFAULTS["penalty_every"],
        metavar="STEPS",
        help="with that weight",
    )
    add("--fraction", type=common.positive, default=_DEFAULTS["fraction"], help="share of each batch that is penalized")
    add("--sampling", choices=SAMPLINGS, default=_DEFAULTS["sampling"], help="importance: those that carry the penalty")
    add(
        "--penalty-method",
        choices=(*PENALTY_METHODS, "auto"),
        default=_DEFAULTS["penalty_method"],
        help="way to the penalty's gradient; finite-difference is approximate",
    )
    add("--allow-kinks", action="store_true", help="let finite-difference be far from exact, as on ReLU networks")
    add("--warmup", type=common.natural, default=_DEFAULTS["warmup"], metavar="STEPS", help="of the strength")
    add("--mean-correction", action="store_true", help="take the perturbations' mean into account (Eq. 12)")
    add("--binning", choices=FORM_OF_BINNING, default=_DEFAULTS["binning"], help=_BINNINGS)
    add("--psd", choices=("clip", "none"), default=_DEFAULTS["psd"], help="clip: keep the covariance semidefinite")
    add("--weight-decay", type=common.nonnegative, help="squared-norm penalty on the parameters; none: the method's")
    add(
        "--eps",
        type=common.nonnegative,
        help="end of adversarial training's strengths, in 1/255; none: 32 for images like MNIST's, else 8",
    )
    add("--attack-steps", type=common.whole, default=_DEFAULTS["attack_steps"], help="of PGD in adversarial training")
    add(
        "--attack-labels",
        choices=("own", "true"),
        default=_DEFAULTS["attack_labels"],
        help="what adversarial training's FGSM starts from; true labels leak",
    )
    add("--noise-eps", type=common.nonnegative, default=_DEFAULTS["noise_eps"], help="end of lrc's strengths")
    add("--optimizer", choices=OPTIMIZERS, default=_DEFAULTS["optimizer"], help="adam, as the paper's")
    add("--learning-rate", type=common.positive, default=_DEFAULTS["learning_rate"], help="of the optimizer")
    add("--betas", type=common.nonnegative, nargs=2, metavar=("B1", "B2"), help="of adam and adamw; none: 0.9 0.999")
    add("--momentum", type=common.nonnegative, help="of sgd; none: 0.9")
    add("--nesterov", action="store_const", const=True, help="let it be Nesterov's")
    add("--schedule", choices=SCHEDULES, default=_DEFAULTS["schedule"], help="of the learning rate; cosine: down to 0")
    add(
        "--learning-rate-warmup",
        type=common.natural,
        default=_DEFAULTS["learning_rate_warmup"],
        metavar="STEPS",
        help="over which the learning rate grows to its value",
    )
    add(
        "--label-smoothing",
        type=common.nonnegative,
        default=_DEFAULTS["label_smoothing"],
        metavar="SHARE",
        help="of all",
    )
    add(
        "--mixup",
        type=common.nonnegative,
        default=_DEFAULTS["mixup"],
        metavar="ALPHA",
        help="needs torchvision; 0: none",
    )
    add("--ema", type=common.positive, metavar="DECAY", help="train a running average of the weights, by 0.999, say")
    add(
        "--accumulate",
        type=common.whole,
        default=_DEFAULTS["accumulate"],
        metavar="PARTS",
        help="in which each batch is taken, gradients added up: less memory",
    )
    add("--clip-gradient", type=common.positive, metavar="NORM", help="largest norm of a step's gradient; none: any")
    add("--amp", choices=PRECISIONS, default=_DEFAULTS["amp"], help="bf16: the loss under autocast to bfloat16")
    add("--batch-size", type=common.whole, default=_DEFAULTS["batch_size"], help="images in a step")
    add("--drop-last", action="store_true", help="leave an epoch's last batch out where it has fewer images")
    add("--augment", action=argparse.BooleanOptionalAction, default=_DEFAULTS["augment"], help="pad and crop at random")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror half of the images; none: only CIFAR-10's")
    add(
        "--activation",
        choices=ACTIVATIONS,
        default=_DEFAULTS["activation"],
        help="of the paper's networks",
    )
    add("--pooling", choices=POOLINGS, default=_DEFAULTS["pooling"], help="of the paper's networks")
    add(
        "--corruption",
        choices=KINDS,
        metavar="KIND",
        help=f"give method sgr the covariance of a corruption: {', '.join(KINDS)}",
    )
    add("--severity", type=int, choices=SEVERITIES, default=_DEFAULTS["severity"], help="of the corruption")
    add("--seed", type=common.seed, default=_DEFAULTS["seed"], help="of everything random")
    add("--checkpoint-every", type=common.whole, default=200, metavar="STEPS", help="besides each epoch's end")
    common.add_device(parser)
    add(
        "--cuda-graphs",
        action=argparse.BooleanOptionalAction,
        help="capture steps as CUDA graphs and replay them; none: where it can be done, one process on a GPU",
    )


def run(arguments: argparse.Namespace) -> int:
    """Train, alone or as one of the processes that ``torchrun`` started; 1 if interrupted."""
    device = local_device(common.device(arguments.device))
    with joined(device) as processes:
        return _train(arguments, device, processes)


def _train(arguments: argparse.Namespace, device: torch.device, processes: Processes) -> int:
    say = tqdm.write if processes.first else lambda line: None
    out = Path(arguments.out)
    require_folder(out)
    existing = (out / CHECKPOINT_FILE).is_file()
    if existing and not arguments.resume:
        raise ValueError(f"{out} already holds a checkpoint: add --resume to continue it, or name another --out")
    data = load(arguments.data, image_size=arguments.image_size)
    settings = settings_from(arguments, data)
    if arguments.search_strength:
        if processes.size > 1:
            raise ValueError("--search-strength: one process at a time; give the processes the --strength it finds")
        settings = replace(settings, strength=searched_strength(arguments, settings, data, device, out))
    trainer = Trainer(settings, data, device=device, processes=processes, cuda_graphs=arguments.cuda_graphs)
    if existing:
        trainer.resume(out)
        say(f"resuming {out} after {trainer.epoch} epochs and {trainer.step} steps")
    with common.interrupt_between_steps() as interrupted:
        try:
            finished = trainer.run(
                arguments.epochs,
                out=out,
                checkpoint_every=arguments.checkpoint_every,
                on_epoch=lambda record: say(epoch_line(record, arguments.epochs)),
                stop=interrupted,
            )
        except RuntimeError as error:  # not the input's shape but its course: no finite loss, no memory, no connection
            raise ValueError(str(error)) from error
    if not finished:
        say(f"interrupted; to continue: the same command with --resume (checkpoint in {out})")
        return 1
    say(f"trained: {out / CHECKPOINT_FILE}")
    return 0


def aimed_at_noise(settings: Settings) -> bool:
    """Whether the penalty's covariance is that of a noise, and not learned from gradients."""
    return settings.method == "sgr_exp" or (settings.method == "sgr" and settings.perturbation == EXPONENTIAL)


def searched_strength(
    arguments: argparse.Namespace, settings: Settings, data: DataSet, device: torch.device, out: Path
) -> float:
    """The strength found by trials; printed and recorded, and remembered for who asks the same again.

    Raises:
        ValueError: if the record in ``out`` answers another question.
    """
    split = held_out(data, None, max(1, len(data.train) // 10))
    epochs = arguments.search_epochs or arguments.epochs
    attack: Attack = arguments.search_under or ("noise" if aimed_at_noise(settings) else "pgd")
    grey_levels = eps_grid(data.train.shape)
    eps = [level / PIXEL_LEVELS for level in grey_levels] if attack == "pgd" else _SEARCH_NOISE
    shown = {"eps": grey_levels} if attack == "pgd" else {"eps": eps, "decay_length": settings.decay_length}
    strengths = sorted(arguments.search_strength)
    question = {
        "settings": {**settings.record(), "strength": None},
        "strengths": strengths,
        "epochs": epochs,
        "data": data.train.digest(),
        "validation_images": len(split.test),
        "attack": {"name": attack, **shown, "images": _SEARCH_IMAGES},
    }

    def train(trials: Sequence[Settings]) -> list[nn.Module]:
        return [train_one(trial) for trial in trials]

    def train_one(trial: Settings) -> nn.Module:
        key = digest([trial.record(), epochs, split.train.digest()])
        folder = out / "trials" / f"{trial.method}-{trial.strength:g}-{key}"
        trainer = Trainer(trial, split, device=device, cuda_graphs=arguments.cuda_graphs)
        if (folder / CHECKPOINT_FILE).is_file():
            trainer.resume(folder)
        tqdm.write(f"trial: {trial.method}, strength {trial.strength:g}, {epochs} epochs")
        trainer.run(epochs, out=folder)
        return trainer.trained

    def area(model: nn.Module) -> float:
        images = split.test.first(_SEARCH_IMAGES)
        return attack_area(model, images, attack, eps, decay_length=settings.decay_length, device=device)

    def search() -> dict[str, Any]:
        found = strength_search(settings, strengths, split.test, train, area, attack=attack, device=device)
        for trial in found.trials:
            chosen = "  chosen" if trial.strength == found.strength else ""
            under = "PGD" if attack == "pgd" else f"noise over {settings.decay_length:g} pixels"
            shares = f"accuracy {percent(trial.accuracy)}, under {under} {percent(trial.area)}"
            tqdm.write(f"strength {trial.strength:g}: {shares}{chosen}")
        return found.to_dict()

    return float(remembered(out / "search.json", question, search)["strength"])


def settings_from(arguments: argparse.Namespace, data: DataSet) -> Settings:
    """The training settings that the arguments name, for these images."""
    own = networks.source(arguments)
    network = Source(architecture_for(data.train.shape)) if own is None else own
    named = ("architecture", "model_args", "normalize")
    values = {name: getattr(arguments, name) for name in _DEFAULTS if name not in named}
    if values["flip"] is None:
        values["flip"] = data.train.name == "cifar10"
    if values["betas"] is not None:
        values["betas"] = tuple(values["betas"])
    if values["init_weights"] is not None:
        values["init_weights"] = str(Path(values["init_weights"]).absolute())
    return Settings(network.name, model_args=network.arguments, normalize=network.normalize, **values)


def epoch_line(record: dict[str, Any], epochs: int) -> str:
    """One line on a finished epoch; of a penalty only where there is one."""
    penalty = f"penalty {record['penalty']:.4f}  " if record["penalty"] else ""
    return (
        f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}  loss {record['loss']:.4f}  "
        f"cross-entropy {record['cross_entropy']:.4f}  {penalty}"
        f"train {percent(record['train_accuracy'])}  test {percent(record['test_accuracy'])}  {record['seconds']:.0f} s"
    )
