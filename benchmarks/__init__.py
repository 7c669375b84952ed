"""Measurements: of the operators (``operators``) and of training steps (``step``). Results lie in ``results/``."""
