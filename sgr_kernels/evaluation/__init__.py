"""Evaluation: accuracy against strength, and checks that an evaluation can be trusted."""

from sgr_kernels.evaluation.curves import RobustnessCurve, robustness_curve, transfer_curves, wilson_interval

__all__ = ["RobustnessCurve", "robustness_curve", "transfer_curves", "wilson_interval"]
