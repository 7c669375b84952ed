"""The commands of ``sgr``, one module each."""
