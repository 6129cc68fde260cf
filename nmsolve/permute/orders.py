"""Orders of columns, and what an N:M mask keeps in them.

A permutation is an int64 tensor ``p`` of shape ``(..., C)``: position k of the new order holds column
``p[k]``, so that the reordered scores are ``scores[..., p]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nmsolve.errors import NMSolveError
from nmsolve.ops.masks import nm_mask
from nmsolve.ops.validation import check_finite, check_scores, describe
from nmsolve.pattern import PatternLike

__all__ = ["check_permutation", "retained_score"]


def check_permutation(permutation: object, columns: int, name: str = "permutation") -> Tensor:
    """``permutation`` if it is an int64 tensor ``(..., columns)`` that names every column once.

    Raises
    ------
    NMSolveError
        If it is not.
    """
    if (
        not isinstance(permutation, Tensor)
        or permutation.dtype != torch.int64
        or permutation.ndim == 0
        or permutation.shape[-1] != columns
    ):
        raise NMSolveError(
            f"{name}: expected an int64 tensor of shape (..., {columns}), got {describe(permutation)}"
        )
    expected = torch.arange(columns, device=permutation.device)
    if not (permutation.sort(dim=-1).values == expected).all():
        raise NMSolveError(f"{name}: expected each of 0 to {columns - 1} exactly once")
    return permutation


def retained_score(
    scores: Tensor, n: int | PatternLike, m: int | None = None, permutation: Tensor | None = None
) -> Tensor:
    """Score that the N:M mask along the last dimension keeps of reordered columns.

    Parameters
    ----------
    scores : Tensor
        ``(..., rows, cols)``, higher = keep.
    n, m : int
        Pattern, or in one piece, as in :func:`nmsolve.transposable_mask`.
    permutation : Tensor, optional
        int64 ``(..., cols)``; identity if left out.

    Returns
    -------
    Tensor
        float64 ``(...)``: kept score of each matrix.

    Examples
    --------
    >>> scores = torch.tensor([[4.0, 3.0, 0.0, 1.0]])
    >>> retained_score(scores, 1, 2), retained_score(scores, 1, 2, torch.tensor([0, 2, 1, 3]))
    (tensor(5., dtype=torch.float64), tensor(7., dtype=torch.float64))
    """
    check_scores(scores)
    check_finite(scores)
    if permutation is not None:
        check_permutation(permutation, scores.shape[-1])
        index = permutation.unsqueeze(-2).expand(*scores.shape[:-1], permutation.shape[-1])
        scores = scores.gather(-1, index)
    return (scores.double() * nm_mask(scores, n, m)).sum((-2, -1))
