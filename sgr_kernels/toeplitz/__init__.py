"""The mathematics of displacement-indexed matrices: geometry, spectra, eigenvalues. Uses nothing above it."""
