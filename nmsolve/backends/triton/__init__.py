"""The Triton backend: allocation, grids and launches of the kernels in :mod:`nmsolve.kernels`."""
