"""How fast the mask methods and the tiles of the Triton kernels are, on this machine."""

from nmsolve.backends.dispatch import MASK_METHODS

__all__ = ["TIMED"]

TIMED = (*MASK_METHODS, "ordinary")
"""What can be timed: every method of transposable masks, and ordinary N:M."""
