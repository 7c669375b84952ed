"""How much of everything a reproduction does, by data set and scale: all of it data."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sgr_kernels.training.search import STRENGTHS

PAPER_METHODS = ("clean", "wdecay", "pgd", "fgsm", "gn", "sgr_grad", "sgr_sign", "fgsm_sgr", "pgd_sgr")
METHODS = (*PAPER_METHODS, "sgr_exp", "lrc")
NOISE_METHODS = ("clean", "gn", "sgr_sign", "sgr_exp", "lrc")


@dataclass(frozen=True)
class SearchScale:
    """How a penalty's strength is searched for.

    Attributes:
        strengths: To try.
        train_images, epochs: Of each trial's training; None: as many as the scale's.
        validation_images: Held out of the training set, for accuracy.
        attack_images: Of these, attacked.
        eps, noise_eps: Strengths of PGD (1/255) and of correlated noise (standard deviations).
        draws: Of noise.
    """

    strengths: tuple[float, ...]
    train_images: int | None
    epochs: int | None
    validation_images: int
    attack_images: int
    eps: tuple[float, ...]
    noise_eps: tuple[float, ...]
    draws: int


@dataclass(frozen=True)
class Beyond:
    """How much of what the paper has not.

    Attributes:
        seeds: Networks of each method, at most.
        certified_images: Test images that are certified.
        certified_draws: Of noise for each.
        certified_sigmas: Scales of the noise, in pixel units; the first is the main one, the others for one seed.
        autoattack_eps: Strength of AutoAttack, in 1/255.
        autoattack_images: Test images under it.
        corrupted_images: Test images under common corruptions.
        ensemble_images: Test images under the whole ensemble of AutoAttack.
    """

    seeds: int = 3
    certified_images: int = 100
    certified_draws: int = 1_000
    certified_sigmas: tuple[float, ...] = (0.5, 0.25, 1.0)
    autoattack_eps: float = 32.0
    autoattack_images: int = 100
    corrupted_images: int = 200
    ensemble_images: int = 300


@dataclass(frozen=True)
class Scale:
    """How much of everything.

    Attributes:
        name: ``"smoke"``, ``"cpu"`` or ``"full"``.
        train_images: First images of the training set; None: all.
        epochs, batch_size: Of each training.
        methods: Trained for the tables.
        seeds: Networks of each method in ``repeated``; the others have one.
        repeated: Methods with several seeds. Their second network is also the twin for self-transfer.
        twins: Further methods that get a second network, as a twin only.
        search: Of the strengths.
        update_every: Steps from one update of a covariance of FGSM or PGD perturbations to the next.
        eps: Grid of attack strengths, in 1/255; cells are means over it.
        single_eps: Single strengths of transferred attacks, in 1/255.
        attack_images, deepfool_images: Test images for gradient attacks.
        pgd_steps: Of every PGD.
        sanity_images: Test images of the sanity reports.
        decay_length: Of the exponential covariance that SGR and the noise-augmented training use.
        decay_lengths: Of the correlated noise.
        noise_eps: Its strengths, in units of each image's standard deviation; the first is the main one.
        noise_images, draws: Test images under correlated noise, and draws for each.
        limit_lengths: Decay lengths of SGR's covariance in the comparison with GN (towards 0).
        covariance_images: Test images whose perturbations are averaged.
        covariance_eps: Strength of these perturbations, in 1/255.
        full_covariance: Whether SGR with the full matrix is trained too.
        leaking_network: Whether FGSM training with leaking labels is trained too.
        leaking_images: Test images for label leaking.
        mean_correction_network: Whether SGR with Eq. 12 is trained too.
        line_images, line_points: Images and points in the softmax along a line.
        schedule: Of the learning rate. The paper's is constant; a few epochs of it end at a point of chance.
        beyond: How much of what the paper has not.
    """

    name: str
    train_images: int | None
    epochs: int
    batch_size: int
    methods: tuple[str, ...]
    seeds: int
    repeated: tuple[str, ...]
    twins: tuple[str, ...]
    search: SearchScale
    update_every: int
    eps: tuple[float, ...]
    single_eps: tuple[float, ...]
    attack_images: int
    deepfool_images: int
    pgd_steps: int
    sanity_images: int
    decay_length: float
    decay_lengths: tuple[float, ...]
    noise_eps: tuple[float, ...]
    noise_images: int
    draws: int
    limit_lengths: tuple[float, ...]
    covariance_images: int
    covariance_eps: float
    full_covariance: bool
    leaking_network: bool
    leaking_images: int
    mean_correction_network: bool
    line_images: int
    line_points: int
    schedule: str = "constant"
    beyond: Beyond = Beyond()

    def seeds_of(self, method: str) -> tuple[int, ...]:
        """Seeds of the networks of a method that count in its averages."""
        return tuple(range(self.seeds if method in self.repeated else 1))

    def with_seeds(self, seeds: int) -> Scale:
        """The same with another number of networks of each method that has several, or may have; of one, no twins."""
        return replace(
            self,
            seeds=seeds,
            repeated=self.repeated or NOISE_METHODS,
            twins=() if seeds == 1 else self.twins,
            beyond=replace(self.beyond, seeds=seeds),
        )

    def has_twin(self, method: str) -> bool:
        """Whether a second network of the method is trained."""
        return method in self.twins or len(self.seeds_of(method)) > 1


_SMOKE = Scale(
    name="smoke",
    train_images=640,
    epochs=1,
    batch_size=16,
    methods=METHODS,
    seeds=2,
    repeated=("clean", "sgr_exp"),
    twins=("gn",),
    search=SearchScale((1.0, 10.0), 320, 1, 200, 40, (16.0,), (0.7,), 3),
    update_every=10,
    eps=(0.0, 16.0, 32.0),
    single_eps=(32.0, 64.0),
    attack_images=40,
    deepfool_images=10,
    pgd_steps=5,
    sanity_images=8,
    decay_length=16.0,
    decay_lengths=(1.0, 16.0),
    noise_eps=(0.7, 1.4),
    noise_images=50,
    draws=5,
    limit_lengths=(0.25, 16.0),
    covariance_images=50,
    covariance_eps=8.0,
    full_covariance=True,
    leaking_network=True,
    leaking_images=200,
    mean_correction_network=True,
    line_images=20,
    line_points=13,
    beyond=Beyond(2, 10, 100, (0.5, 1.0), autoattack_images=4, corrupted_images=10, ensemble_images=6),
)

_MNIST_CPU = Scale(
    name="cpu",
    train_images=20_000,
    epochs=5,
    batch_size=128,
    methods=METHODS,
    seeds=5,
    repeated=NOISE_METHODS,
    twins=(),
    search=SearchScale((10.0, 30.0, 100.0, 300.0), None, None, 2_000, 250, (16.0, 32.0), (0.5, 0.7), 10),
    update_every=10,
    eps=(0.0, 8.0, 16.0, 24.0, 32.0),
    single_eps=(32.0, 64.0),
    attack_images=300,
    deepfool_images=100,
    pgd_steps=20,
    sanity_images=128,
    decay_length=16.0,
    decay_lengths=(1.0, 4.0, 16.0),
    noise_eps=(0.3, 0.7),
    noise_images=1_000,
    draws=30,
    limit_lengths=(0.25, 16.0),
    covariance_images=1_000,
    covariance_eps=8.0,
    full_covariance=True,
    leaking_network=False,
    leaking_images=2_000,
    mean_correction_network=False,
    line_images=200,
    line_points=41,
    schedule="cosine",
)

_CIFAR_CPU = replace(
    _MNIST_CPU,
    train_images=10_000,
    epochs=8,
    methods=("clean", "pgd", "fgsm", "gn", "sgr_sign", "sgr_exp", "lrc"),
    seeds=1,
    repeated=(),
    search=SearchScale((0.3, 1.0, 3.0, 10.0), None, 3, 2_000, 200, (2.0, 4.0), (0.3,), 10),
    eps=(0.0, 2.0, 4.0, 6.0, 8.0),
    single_eps=(4.0, 8.0),
    attack_images=150,
    deepfool_images=60,
    pgd_steps=10,
    sanity_images=32,
    noise_eps=(0.3,),
    noise_images=300,
    draws=20,
    limit_lengths=(0.25, 16.0),
    covariance_images=300,
    covariance_eps=4.0,
    full_covariance=False,
    leaking_images=1_000,
    line_images=60,
    beyond=Beyond(1, autoattack_eps=4.0),
)

_MNIST_FULL = replace(
    _MNIST_CPU,
    name="full",
    train_images=None,
    epochs=50,
    seeds=3,
    twins=METHODS,
    search=SearchScale(STRENGTHS, 20_000, 10, 5_000, 1_000, tuple(range(0, 33, 4)), (0.1, 0.3, 0.5, 0.7), 30),
    update_every=1,
    eps=tuple(range(0, 33, 4)),
    attack_images=10_000,
    deepfool_images=10_000,
    sanity_images=512,
    noise_eps=(0.3, 0.1, 0.5, 0.7),
    noise_images=10_000,
    draws=100,
    decay_lengths=(1.0, 2.0, 4.0, 8.0, 16.0),
    limit_lengths=(0.25, 1.0, 4.0, 16.0),
    covariance_images=10_000,
    leaking_network=True,
    leaking_images=10_000,
    mean_correction_network=True,
    line_images=500,
    schedule="constant",
    beyond=Beyond(5, 1_000, 10_000, autoattack_images=1_000, corrupted_images=10_000, ensemble_images=10_000),
)

_CIFAR_FULL = replace(
    _MNIST_FULL,
    # Six times the arithmetic of a digit's network.
    seeds=1,
    twins=("clean", "gn", "sgr_sign", "sgr_exp"),
    search=replace(_MNIST_FULL.search, eps=tuple(range(9))),
    eps=tuple(range(9)),
    single_eps=(4.0, 8.0),
    noise_eps=(0.3, 0.7),
    covariance_eps=4.0,
    full_covariance=False,
    beyond=replace(_MNIST_FULL.beyond, autoattack_eps=4.0),
)

SCALES: dict[str, dict[str, Scale]] = {
    "mnist": {"smoke": _SMOKE, "cpu": _MNIST_CPU, "full": _MNIST_FULL},
    "cifar10": {
        "smoke": replace(_SMOKE, eps=(0.0, 4.0, 8.0), single_eps=(4.0, 8.0), covariance_eps=4.0, full_covariance=False),
        "cpu": _CIFAR_CPU,
        "full": _CIFAR_FULL,
    },
}
