"""Masks for scripts in the style of Wanda's and SparseGPT's, which count and mark what is pruned."""

from __future__ import annotations

from torch import Tensor

from nmsolve.pattern import NMPattern
from nmsolve.prune.rule import MaskRule

__all__ = ["prune_mask"]


def prune_mask(
    w_metric: Tensor,
    prune_n: int,
    prune_m: int,
    *,
    transposable: bool = True,
    method: str = "exact",
    backend: str = "auto",
) -> Tensor:
    """The entries of ``W_metric`` to set to zero: **True = prune**, ``prune_n`` of every ``prune_m``.

    Both are the other way round than in the rest of nmsolve, as those scripts have them.

    Parameters
    ----------
    w_metric : Tensor
        ``(out, in)``, higher = more important; or ``prune_m`` columns of it, as SparseGPT's loop has them.
    prune_n, prune_m : int
        Pruned entries per line, and block size.
    transposable : bool
        Prune ``prune_n`` in every row and column of each block, or only in each row, as the scripts do.
    method, backend
        As in :func:`nmsolve.transposable_mask`; an ordinary mask has only one method.

    Returns
    -------
    Tensor
        bool, shape and device of ``w_metric``, True = prune.

    Raises
    ------
    NMSolveError
        If an argument is not as described.

    Examples
    --------
    >>> weight = torch.randn(32, 64)
    >>> weight[prune_mask(weight.abs(), 3, 4)] = 0
    >>> nmsolve.check_mask(weight != 0, 1, 4)
    """
    pattern = NMPattern.from_pruned(prune_n, prune_m)
    return ~MaskRule(pattern, transposable, method, backend).step(w_metric)
