"""The Numba backend: blocks side by side in vector registers, shared out over torch's threads."""
