"""Structured gradient regularization (SGR) for PyTorch."""

from sgr_kernels import attacks, backends, functional
from sgr_kernels._version import __version__
from sgr_kernels.backends import use_backend
from sgr_kernels.covariance import CovarianceFunction, FullCovariance, IdentityCovariance
from sgr_kernels.evaluation import diagnose
from sgr_kernels.loss import SGRLoss, linear_warmup
from sgr_kernels.penalty.per_sample import cross_entropy_per_sample
from sgr_kernels.penalty.wrappers import PenaltyGradientError
from sgr_kernels.training import models

__all__ = [
    "CovarianceFunction",
    "FullCovariance",
    "IdentityCovariance",
    "PenaltyGradientError",
    "SGRLoss",
    "__version__",
    "attacks",
    "backends",
    "cross_entropy_per_sample",
    "diagnose",
    "functional",
    "linear_warmup",
    "models",
    "use_backend",
]
