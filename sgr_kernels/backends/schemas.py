"""The operators' schemas: what Python defines and the compiled kernels implement."""

from __future__ import annotations

NAMESPACE = "sgr_kernels"
SCHEMAS = {
    "product": "(Tensor gradient, Tensor spectrum, str precision) -> Tensor",
    "quadratic_form": "(Tensor gradient, Tensor spectrum, bool with_product, str precision) -> (Tensor, Tensor)",
    "cross_spectrum": "(Tensor a, Tensor b, int rows, int columns, bool signed, str precision) -> Tensor",
}
CUDA_SCHEMAS = {
    "update": (
        "(Tensor perturbation, Tensor(a!) values, Tensor(b!) mean, Tensor(c!) scale, Tensor(d!) table, "
        "Tensor(e!) spectrum, Tensor(f!) updates, Tensor(g!) skipped, Tensor(h!) arrivals, Tensor(i!) arranged, "
        "str binning, float decay, float target_variance, bool clip, str precision) -> ()"
    ),
    "arrange": "(Tensor spectrum, Tensor(a!) arranged, int height, int width) -> ()",
    "arranged_quadratic_form": (
        "(Tensor gradient, Tensor spectrum, Tensor arranged, bool with_product, str precision) -> (Tensor, Tensor)"
    ),
}
"""What the compiled kernels for NVIDIA GPUs have beside them: a running covariance's update, and quadratic forms of a
spectrum that lies in the order in which the kernels read it."""
