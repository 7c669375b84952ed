"""The training methods by name: each turns settings and training data into a criterion ``(model, images, labels)``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from sgr_kernels.covariance import Covariance, CovarianceFunction, FullCovariance, IdentityCovariance
from sgr_kernels.evaluation.corrupt import KINDS, SEVERITIES, corrupt
from sgr_kernels.evaluation.suite import eps_grid
from sgr_kernels.loss import SGRLoss, linear_warmup
from sgr_kernels.models import ACTIVATIONS, ARCHITECTURES, POOLINGS
from sgr_kernels.penalty.norms import NormPenalty
from sgr_kernels.penalty.per_sample import cross_entropy_per_sample
from sgr_kernels.penalty.statistics import Criterion
from sgr_kernels.perturbations import ATTACKS, FREE
from sgr_kernels.training import optimizers
from sgr_kernels.training.criteria import CrossEntropy, LossFunction, with_fgsm, with_noise, with_pgd
from sgr_kernels.training.images import Images
from sgr_kernels.training.network import Source, Statistics

EXPONENTIAL = "exponential"
PERTURBATIONS = (*FREE, *ATTACKS, EXPONENTIAL)
COVARIANCES = ("function", "full")
SCHEDULES = optimizers.SCHEDULES
PRECISIONS = ("none", "bf16")
_CORRUPTED_IMAGES = 1000


@dataclass(frozen=True)
class Settings:
    """Everything that decides a training's result, apart from the data and the number of epochs.

    Attributes:
        architecture: Carlini-Wagner network, ``"mnist"`` or ``"cifar10"``; or a network of one's own,
            ``"MODULE:CALLABLE"`` or ``"FILE.py:CALLABLE"`` (`sgr_kernels.training.network.Source`), or ``"given"`` for
            one that is made in Python.
        activation: Of a Carlini-Wagner network, ``"relu"`` as the paper's, ``"gelu"``, ``"silu"`` or ``"softplus"``.
        pooling: Of a Carlini-Wagner network, ``"max"`` as the paper's, or ``"average"``.
        method: A name in ``METHODS``.
        strength: The penalty's strength, lambda; the covariance is at the training data's own variance, so that it
            reads as a noise-to-signal ratio; of ``"l1"`` the bound on a perturbation of pixels in [0, 1].
        perturbation: What method ``"sgr"`` estimates its covariance from, or ``"exponential"`` for a fixed covariance
            function exp(-r / decay_length), half of it between channels. The other methods bring their own.
        decay_length: Of the fixed exponential covariance and of the noise that ``"lrc"`` trains with, in pixels.
        covariance: The estimate: ``"function"`` of displacement, or the ``"full"`` matrix (small images only).
        update_rate: Weight of a new batch in the running estimate (beta of Eq. 14).
        update_every: Steps from one update of the estimate to the next.
        penalty_every: Steps from one penalty to the next, each with that weight.
        fraction: Share of each batch of which the penalty's gradient is taken.
        sampling: How that share is drawn, ``"importance"`` or ``"uniform"``.
        penalty_method: Way to the penalty's gradient, as `SGRLoss` takes it.
        allow_kinks: Whether finite differences may be far from exact.
        warmup: Steps over which the strength grows linearly to its value; 0: none.
        mean_correction: Whether the penalty takes the perturbations' mean into account (Eq. 12).
        binning: How displacements enter the estimate: ``"rounded"`` as in the paper, or another of
            `CovarianceFunction`'s.
        psd: ``"clip"`` keeps the estimate positive semidefinite, ``"none"`` is the paper's.
        weight_decay: Squared-norm penalty on the parameters; None: the method's own default.
        eps: Adversarial training draws its strengths uniformly up to this, in grey levels (1/255); None: to the end
            of the attacks on such images (`sgr_kernels.evaluation.suite.eps_grid`).
        attack_steps: Of PGD in adversarial training.
        attack_labels: What FGSM in adversarial training starts from: the model's ``"own"`` predictions, or the
            ``"true"`` labels, which leak.
        noise_eps: ``"lrc"`` draws the strengths of its noise uniformly up to this, in units of each image's standard
            deviation.
        learning_rate: The optimizer's, at the first step after its warm-up.
        schedule: The learning rate stays ``"constant"``, as the paper's, or falls along half a ``"cosine"`` to 0 over
            the whole training.
        batch_size: Images in a batch.
        augment: Whether images are padded and cropped at random.
        flip: Whether half of them are mirrored; only with ``augment``.
        seed: Of initial weights, order, augmentation and random starts.
        model_args: Keyword arguments of one's own network's callable, a JSON object.
        normalize: Means and standard deviations of channels, for a first layer that takes them off; None: none.
        init_weights: File of the weights to begin with; None: those the network is made with.
        optimizer: ``"adam"``, as the paper's, ``"adamw"`` or ``"sgd"``.
        betas: Of Adam and AdamW; None: 0.9 and 0.999.
        momentum: Of SGD; None: 0.9.
        nesterov: Whether SGD's momentum is Nesterov's; None: not.
        learning_rate_warmup: Steps over which the learning rate grows linearly; 0: none.
        label_smoothing: Share of a label's probability that is spread over all classes.
        mixup: Parameter alpha of the Beta distribution by which two images and their labels are mixed; 0: they are not.
        ema: Decay of the running average of weights, which then is the trained network; None: there is none.
        accumulate: Parts in which a batch is taken, one after the other, their gradients added up.
        clip_gradient: Largest norm of a step's gradient; None: any.
        amp: ``"bf16"`` takes the loss under autocast to bfloat16, ``"none"`` in the precision of the weights.
        corruption: Kind of corruption (`sgr_kernels.evaluation.corrupt.KINDS`) whose covariance method ``"sgr"`` takes,
            fixed, in place of one that learns from ``perturbation``: of a thousand training images. None: none.
        severity: Of the corruption, 1 to 5.
        drop_last: Whether an epoch's last batch is left out where it has fewer images than the others.
    """

    architecture: str
    method: str = "sgr"
    strength: float = 1.0
    perturbation: str = "sign"
    decay_length: float = 8.0
    covariance: str = "function"
    update_rate: float = 0.1
    update_every: int = 1
    penalty_every: int = 1
    fraction: float = 1.0
    sampling: str = "importance"
    penalty_method: str = "double-backward"
    allow_kinks: bool = False
    warmup: int = 0
    mean_correction: bool = False
    binning: str = "rounded"
    psd: str = "clip"
    weight_decay: float | None = None
    eps: float | None = None
    attack_steps: int = 7
    attack_labels: str = "own"
    noise_eps: float = 0.7
    learning_rate: float = 1e-3
    schedule: str = "constant"
    batch_size: int = 128
    augment: bool = True
    flip: bool = False
    seed: int = 0
    activation: str = "relu"
    pooling: str = "max"
    model_args: str = "{}"
    normalize: Statistics | None = None
    init_weights: str | None = None
    optimizer: str = "adam"
    betas: tuple[float, float] | None = None
    momentum: float | None = None
    nesterov: bool | None = None
    learning_rate_warmup: int = 0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    ema: float | None = None
    accumulate: int = 1
    clip_gradient: float | None = None
    amp: str = "none"
    corruption: str | None = None
    severity: int = 3
    drop_last: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            _require_kind(field.name, getattr(self, field.name), str(field.type))
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.perturbation not in PERTURBATIONS:
            raise ValueError(f"perturbation must be one of {', '.join(PERTURBATIONS)}, got {self.perturbation!r}")
        if self.covariance not in COVARIANCES:
            raise ValueError(f"covariance must be one of {', '.join(COVARIANCES)}, got {self.covariance!r}")
        for name, allowed in (("activation", ACTIVATIONS), ("pooling", POOLINGS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
            if self.architecture not in ARCHITECTURES and getattr(self, name) not in ("relu", "max"):
                raise ValueError(
                    f"{name}: of the paper's networks; of one's own, sgr.models.smooth(model) exchanges it"
                )
        if self.attack_labels not in ("own", "true"):
            raise ValueError(f"attack_labels must be 'own' or 'true', got {self.attack_labels!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.attack_steps < 1:
            raise ValueError(f"attack_steps must be at least 1, got {self.attack_steps}")
        if METHODS[self.method].perturbation is not None:
            object.__setattr__(self, "perturbation", METHODS[self.method].perturbation)
        for name in ("strength", "weight_decay", "eps", "noise_eps"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number >= 0, got {value}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be a number of steps >= 0, got {self.warmup}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be a whole number from 0 to 2**64 - 1, got {self.seed}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be a finite number > 0, got {self.learning_rate}")
        self._check_corruption()
        self._check_optimization()

    def _check_corruption(self) -> None:
        if self.severity not in SEVERITIES:
            raise ValueError(f"severity: expected a whole number from 1 to 5, got {self.severity}")
        if self.corruption is None:
            return
        if self.corruption not in KINDS:
            raise ValueError(f"corruption: expected one of {', '.join(KINDS)}, got {self.corruption!r}")
        if self.method != "sgr" or self.covariance == "full":
            raise ValueError(
                f"corruption: gives method 'sgr' its covariance function, got method {self.method!r} with covariance "
                f"{self.covariance!r}"
            )

    def _check_optimization(self) -> None:
        optimizers.options_of(self.optimizer, self.optimizer_options)
        if self.amp not in PRECISIONS:
            raise ValueError(f"amp: expected one of {', '.join(PRECISIONS)}, got {self.amp!r}")
        if self.learning_rate_warmup < 0:
            raise ValueError(f"learning_rate_warmup: expected a number of steps >= 0, got {self.learning_rate_warmup}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: expected a number in [0, 1), got {self.label_smoothing}")
        if not 0 <= self.mixup < float("inf"):
            raise ValueError(f"mixup: expected a finite number >= 0, got {self.mixup}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema: expected a number in (0, 1), got {self.ema}")
        if self.clip_gradient is not None and not 0 < self.clip_gradient < float("inf"):
            raise ValueError(f"clip_gradient: expected a finite number > 0, got {self.clip_gradient}")
        if self.accumulate < 1:
            raise ValueError(f"accumulate: expected a number of parts >= 1, got {self.accumulate}")

    @property
    def network(self) -> Source:
        """Where the network comes from."""
        arguments = self.model_args
        if (self.activation, self.pooling) != ("relu", "max"):
            arguments = json.dumps({"activation": self.activation, "pooling": self.pooling})
        return Source(self.architecture, arguments, self.normalize)

    @property
    def optimizer_options(self) -> dict[str, Any]:
        """Options of the optimizer beside learning rate and weight decay, None where not given."""
        return {"betas": self.betas, "momentum": self.momentum, "nesterov": self.nesterov}

    def record(self) -> dict[str, Any]:
        """What names the training in records; of what later versions brought, after ``seed``, only what is used."""
        defaults = {field.name: field.default for field in fields(self)}
        later = list(defaults)[list(defaults).index("seed") + 1 :]
        return {name: value for name, value in asdict(self).items() if name not in later or value != defaults[name]}

    def differences(self, other: Settings) -> list[str]:
        """Each setting that differs, as ``"name: own value, not the other's"``."""
        pairs = [(field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        # A file is the same wherever it lies now; what it makes is compared by its weights.
        alike = ("architecture", "init_weights")
        pairs = [(k, Path(v).name, Path(w).name) if k in alike and v and w else (k, v, w) for k, v, w in pairs]
        return [f"{name}: {own!r}, not {theirs!r}" for name, own, theirs in pairs if own != theirs]


def _require_kind(name: str, value: Any, kind: str) -> None:
    """Expect what a setting's annotation says; whole numbers are numbers, and truth values are not."""
    if value is None and kind.endswith("| None"):
        return
    kind = kind.removesuffix(" | None")
    if kind in _ROWS:
        sound, words = _ROWS[kind]
        if not (isinstance(value, tuple | list) and len(value) == 2 and sound(value)):
            raise ValueError(f"{name} must be {words}, got {' '.join(repr(value).split())}")
        return
    kinds = {"str": (str, "a string"), "int": (int, "a whole number"), "bool": (bool, "True or False")}
    accepted, words = kinds.get(kind, ((int, float), "a number"))
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind != "bool"):
        raise ValueError(f"{name} must be {words}, got {' '.join(repr(value).split())}")


def _numbers(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(type(entry) in (int, float) for entry in value)


_ROWS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "tuple[float, float]": (_numbers, "two numbers"),
    "Statistics": (lambda value: all(map(_numbers, value)), "means and deviations, a row of numbers each"),
}


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        summary: One line for the command's help.
        criterion: (settings, training data) -> module computing the loss from (model, images, labels).
        weight_decay: Used where the settings name none.
        perturbation: The method's own, in place of the settings'.
        penalized: Whether the strength plays a part.
    """

    summary: str
    criterion: Callable[[Settings, Images], Criterion]
    weight_decay: float = 0.0
    perturbation: str | None = None
    penalized: bool = False


def _plain(settings: Settings, data: Images) -> Criterion:
    return CrossEntropy(_loss(settings))


def _fgsm(settings: Settings, data: Images) -> Criterion:
    return with_fgsm(_largest(settings, data), true_labels=settings.attack_labels == "true", loss_fn=_loss(settings))


def _pgd(settings: Settings, data: Images) -> Criterion:
    return with_pgd(_largest(settings, data), settings.attack_steps, loss_fn=_loss(settings))


def _largest(settings: Settings, data: Images) -> float:
    return (max(eps_grid(data.shape)) if settings.eps is None else settings.eps) / 255


def _loss(settings: Settings) -> LossFunction:
    if not settings.label_smoothing:
        return cross_entropy_per_sample
    return partial(cross_entropy_per_sample, label_smoothing=settings.label_smoothing)


def _noise(settings: Settings, data: Images) -> Criterion:
    return with_noise(settings.noise_eps, _exponential(settings, data), loss_fn=_loss(settings))


def _gradient_norm(settings: Settings, data: Images) -> Criterion:
    return _penalized(settings, IdentityCovariance(data.pixel_variance(), data.shape))


def _absolute(settings: Settings, data: Images) -> Criterion:
    return _penalized(settings, NormPenalty(1))


def _structured(settings: Settings, data: Images) -> Criterion:
    if settings.corruption is not None:
        covariance = _of_corruption(settings, data, settings.corruption)
        return _penalized(settings, covariance, mean_correction=settings.mean_correction)
    if settings.perturbation == EXPONENTIAL:
        return _penalized(settings, _exponential(settings, data))
    channels, height, width = data.shape
    variance = data.pixel_variance()
    running: Covariance
    if settings.covariance == "full":
        running = FullCovariance(channels, (height, width), decay=settings.update_rate, target_variance=variance)
    else:
        running = CovarianceFunction(
            channels,
            (height, width),
            decay=settings.update_rate,
            binning=settings.binning,
            target_variance=variance,
            psd=settings.psd,
        )
    return _penalized(
        settings,
        running,
        perturbation=settings.perturbation,
        update_every=settings.update_every,
        mean_correction=settings.mean_correction,
    )


def _exponential(settings: Settings, data: Images) -> CovarianceFunction:
    channels, height, width = data.shape
    return CovarianceFunction.exponential(
        channels, (height, width), settings.decay_length, target_variance=data.pixel_variance()
    )


def _of_corruption(settings: Settings, data: Images, kind: str) -> CovarianceFunction:
    images = data.some(_CORRUPTED_IMAGES)
    return CovarianceFunction.from_pairs(
        images,
        corrupt(images, kind, settings.severity),
        target_variance=data.pixel_variance(),
        binning=settings.binning,
        psd=settings.psd,
    )


def _penalized(settings: Settings, covariance: Covariance | NormPenalty, **options: Any) -> SGRLoss:
    strength = linear_warmup(settings.strength, settings.warmup) if settings.warmup else settings.strength
    return SGRLoss(
        covariance,
        strength,
        penalty_every=settings.penalty_every,
        fraction=settings.fraction,
        sampling=settings.sampling,
        method=settings.penalty_method,
        allow_kinks=settings.allow_kinks,
        loss_fn=_loss(settings),
        count_calls=settings.accumulate == 1,
        **options,
    )


METHODS: dict[str, Method] = {
    "clean": Method("cross-entropy alone", _plain),
    "wdecay": Method("cross-entropy with weight decay", _plain, weight_decay=5e-4),
    "pgd": Method("adversarial training with PGD: half of each batch perturbed", _pgd),
    "fgsm": Method("adversarial training with FGSM: half of each batch perturbed", _fgsm),
    "gn": Method("gradient-norm penalty: SGR with an identity covariance", _gradient_norm, penalized=True),
    "l1": Method("L1 norm of the gradient, at a strength in [0, 1] pixel units", _absolute, penalized=True),
    "sgr": Method("structured gradient regularization, covariance by --perturbation", _structured, penalized=True),
    "sgr_grad": Method("SGR, covariance of loss gradients", _structured, perturbation="gradient", penalized=True),
    "sgr_sign": Method("SGR, covariance of their signs", _structured, perturbation="sign", penalized=True),
    "sgr_exp": Method("SGR, exponential covariance", _structured, perturbation=EXPONENTIAL, penalized=True),
    "fgsm_sgr": Method("SGR, covariance of FGSM perturbations", _structured, perturbation="fgsm", penalized=True),
    "pgd_sgr": Method("SGR, covariance of PGD perturbations", _structured, perturbation="pgd", penalized=True),
    "lrc": Method("half of each batch under noise with an exponential covariance", _noise),
}
"""The paper's methods (section 4.1), by its own names, ``"sgr"`` for all other variants, and ``"l1"`` beside them."""


def build_criterion(settings: Settings, data: Images) -> Criterion:
    """The criterion of ``settings.method``, its covariance scaled to the variance of ``data``."""
    return METHODS[settings.method].criterion(settings, data)


def weight_decay(settings: Settings) -> float:
    """The weight decay that applies: the settings' own or the method's default."""
    if settings.weight_decay is not None:
        return settings.weight_decay
    return METHODS[settings.method].weight_decay


def settings_from_dict(values: dict[str, Any]) -> Settings:
    """Settings as ``dataclasses.asdict`` wrote them.

    Raises:
        ValueError: for unknown names.
    """
    unknown = sorted(set(values) - {field.name for field in fields(Settings)})
    if unknown:
        raise ValueError(f"unknown training setting {unknown[0]!r}: written by another version?")
    return Settings(**values)
