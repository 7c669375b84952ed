"""Data, networks, training methods and resumable training."""
