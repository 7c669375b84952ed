"""The paper's attacks, as functions ``attack(model, images, labels, *, eps, generator, ...) -> adversarial images``.

Images are (B, C, H, W), floating point, in ``bounds=(0, 1)``; strengths are in the same units (8/255). ``labels=None``
means the model's own prediction. The model, its gradients, mode and buffers and the global random streams are left as
they were; random numbers come from ``generator`` or, without one, from a private one with a fixed seed.
"""

from sgr_kernels.attacks.deepfool import deepfool, relative_norm
from sgr_kernels.attacks.gradient import STRONG_PGD, fgm, fgsm, pgd
from sgr_kernels.attacks.noise import correlated_noise, uniform_noise

__all__ = ["STRONG_PGD", "correlated_noise", "deepfool", "fgm", "fgsm", "pgd", "relative_norm", "uniform_noise"]
