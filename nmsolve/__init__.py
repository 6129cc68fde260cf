"""nmsolve: provably optimal N:M and transposable N:M sparsity masks."""

from nmsolve.errors import BackendError, NMSolveError
from nmsolve.masks import check_mask, nm_mask, solve_blocks, transposable_mask
from nmsolve.pattern import NMPattern
from nmsolve.solution import BlockSolution, dual_bound, kept_score

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BlockSolution",
    "NMPattern",
    "NMSolveError",
    "__version__",
    "check_mask",
    "dual_bound",
    "kept_score",
    "nm_mask",
    "solve_blocks",
    "transposable_mask",
]
