"""The differentiable operators: ``v = Sigma g``, ``q = g^T Sigma g``, the covariance of a displacement, the solve.

The first three are linear or quadratic in each argument and differentiable to any order in all of them, in reverse and
in forward mode, under ``torch.compile`` and under ``torch.func``. They check shapes, dtypes and devices but never
values; NaN propagates. Accumulation is in float32, or in float64 for float64 gradients, also under autocast.
``torch.set_float32_matmul_precision`` applies to them on GPUs as it does to matrix products.
"""

from sgr_kernels.functional.operators import covariance_product, covariance_quadratic_form, displacement_covariance
from sgr_kernels.functional.solve import covariance_solve

__all__ = ["covariance_product", "covariance_quadratic_form", "covariance_solve", "displacement_covariance"]
