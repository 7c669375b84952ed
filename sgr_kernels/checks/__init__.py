"""What arguments are expected to be, and the user's line that warnings name."""

from sgr_kernels.checks.arguments import (
    as_images,
    check_count,
    check_floating_point,
    check_form,
    check_images,
    check_in_graph,
    check_max_displacement,
    check_number,
    check_same_device,
    check_table,
    covariance_form,
    describe,
    image_size,
    is_whole,
    number,
)
from sgr_kernels.checks.caller import warn_caller

__all__ = [
    "as_images",
    "check_count",
    "check_floating_point",
    "check_form",
    "check_images",
    "check_in_graph",
    "check_max_displacement",
    "check_number",
    "check_same_device",
    "check_table",
    "covariance_form",
    "describe",
    "image_size",
    "is_whole",
    "number",
    "warn_caller",
]
