"""Covariances of perturbations as modules: running estimates, fixed functions, and the identity.

All share one interface: ``update(perturbation)``, ``product(g)``, ``quadratic_form(g)``, ``dense()``, ``sample(n)``.
State lives in buffers, never below float32. An update runs on the device without a host synchronization.
"""

from sgr_kernels.covariance.base import Covariance
from sgr_kernels.covariance.dense import FullCovariance, IdentityCovariance
from sgr_kernels.covariance.function import CovarianceFunction

__all__ = ["Covariance", "CovarianceFunction", "FullCovariance", "IdentityCovariance"]
