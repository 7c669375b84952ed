"""Evaluation: accuracy against strength, AutoAttack, and checks that an evaluation can be trusted."""

from sgr_kernels.evaluation.autoattack import AutoAttackPart, AutoAttackResult, autoattack
from sgr_kernels.evaluation.certify import Certification, certify
from sgr_kernels.evaluation.corrupt import corrupt
from sgr_kernels.evaluation.corruptions import CorruptionCurves, corruption_curves
from sgr_kernels.evaluation.curves import RobustnessCurve, robustness_curve, transfer_curves, wilson_interval
from sgr_kernels.evaluation.diagnose import Diagnosis, diagnose
from sgr_kernels.evaluation.sanity import SanityReport, sanity_report

__all__ = [
    "AutoAttackPart",
    "AutoAttackResult",
    "Certification",
    "CorruptionCurves",
    "Diagnosis",
    "RobustnessCurve",
    "SanityReport",
    "autoattack",
    "certify",
    "corrupt",
    "corruption_curves",
    "diagnose",
    "robustness_curve",
    "sanity_report",
    "transfer_curves",
    "wilson_interval",
]
