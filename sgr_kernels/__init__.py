"""Structured gradient regularization (SGR) for PyTorch. What is public:

SGRLoss                   cross-entropy plus the penalty: the loss that trains
linear_warmup             a schedule of its strength
cross_entropy_per_sample  its default ``loss_fn``
perturbations             where its covariance may learn from, beside the sources that it knows by name
PenaltyGradientError      why the penalty's gradient cannot be had from a model, and what to do
CovarianceFunction        covariance of perturbations by displacement: a running estimate, or fixed
FullCovariance            their full matrix, for low-dimensional data
IdentityCovariance        a multiple of the identity: the gradient-norm penalty
Covariance                the interface of all three, for one's own
NormPenalty               in their place: the gradient's norm itself
functional                the differentiable operators: products, quadratic forms, second moments, solves
attacks                   the paper's attacks
evaluation                accuracy against strength, and checks that an evaluation can be trusted
diagnose                  whether the quadratic approximation holds for a model, and which strength fits
models                    the paper's networks
training                  resumable training by every method, as ``sgr train`` does it
backends                  the ways to compute the operators, and what is compiled in
use_backend               choose one of them for the whole process
__version__               of this package

docs/api.md lists the modules' names as well.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sgr_kernels import backends, functional
from sgr_kernels._version import __version__
from sgr_kernels.backends import use_backend
from sgr_kernels.covariance import Covariance, CovarianceFunction, FullCovariance, IdentityCovariance
from sgr_kernels.loss import SGRLoss, linear_warmup
from sgr_kernels.penalty.norms import NormPenalty
from sgr_kernels.penalty.per_sample import cross_entropy_per_sample
from sgr_kernels.penalty.wrappers import PenaltyGradientError

if TYPE_CHECKING:
    from sgr_kernels import attacks, evaluation, models, perturbations, training
    from sgr_kernels.evaluation import diagnose

__all__ = [
    "Covariance",
    "CovarianceFunction",
    "FullCovariance",
    "IdentityCovariance",
    "NormPenalty",
    "PenaltyGradientError",
    "SGRLoss",
    "__version__",
    "attacks",
    "backends",
    "cross_entropy_per_sample",
    "diagnose",
    "evaluation",
    "functional",
    "linear_warmup",
    "models",
    "perturbations",
    "training",
    "use_backend",
]

# What a training loop does without is imported when it is first asked for.
_LATER = {
    "attacks": ("sgr_kernels.attacks", None),
    "evaluation": ("sgr_kernels.evaluation", None),
    "diagnose": ("sgr_kernels.evaluation", "diagnose"),
    "models": ("sgr_kernels.models", None),
    "perturbations": ("sgr_kernels.perturbations", None),
    "training": ("sgr_kernels.training", None),
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'sgr_kernels' has no attribute {name!r}")
    path, part = _LATER[name]
    module = importlib.import_module(path)
    return module if part is None else getattr(module, part)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
