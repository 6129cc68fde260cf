"""nmsolve: provably optimal N:M and transposable N:M sparsity masks."""

from nmsolve.errors import BackendError, NMSolveError
from nmsolve.pattern import NMPattern

__version__ = "0.1.0"

__all__ = ["BackendError", "NMPattern", "NMSolveError", "__version__"]
