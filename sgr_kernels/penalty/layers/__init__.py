"""Layers written out where PyTorch's own derivatives are slow, missing or wrong."""
