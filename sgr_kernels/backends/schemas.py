"""The operators' schemas: what Python defines and the compiled kernels implement."""

from __future__ import annotations

NAMESPACE = "sgr_kernels"
SCHEMAS = {
    "product": "(Tensor gradient, Tensor spectrum, str precision) -> Tensor",
    "quadratic_form": "(Tensor gradient, Tensor spectrum, bool with_product, str precision) -> (Tensor, Tensor)",
    "cross_spectrum": "(Tensor a, Tensor b, int rows, int columns, bool signed, str precision) -> Tensor",
}
