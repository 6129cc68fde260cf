"""What more than one backend does the same way."""

from __future__ import annotations

import torch
from torch import Tensor

from nmsolve.solution import BlockResult

__all__ = ["assignment_of", "nth_largest", "permute_columns", "rms_norm_permute", "sum_largest", "sum_maxima"]

# Elements of the largest temporaries.
_ELEMENTS = 1 << 22


def assignment_of(scores: Tensor, result: BlockResult, want_solution: bool) -> tuple[Tensor, ...]:
    """What a backend's ``assignment`` returns, from the 1:M masks of blocks as large as the matrices."""
    permutation = result.mask.view(torch.uint8).argmax(2)
    if not want_solution:
        return (permutation,)
    _, u, v, objective, bound = result
    assert u is not None and v is not None and objective is not None and bound is not None  # noqa: PT018
    scale = scores.gather(2, permutation.unsqueeze(2)).double().abs().sum((1, 2))
    return permutation, u[:, 0, 0].double(), v[:, 0, 0].double(), objective[:, 0, 0], bound[:, 0, 0], scale


def permute_columns(x: Tensor, permutation: Tensor) -> Tensor:
    """``x[:, permutation]`` of ``(rows, cols)``; on a CPU as fast as memory."""
    return x.index_select(1, permutation)


def rms_norm_permute(x: Tensor, weight: Tensor, permutation: Tensor, eps: float) -> Tensor:
    """``(x / sqrt(mean(x^2) + eps) * weight)[:, permutation]``, in float32 at least, rounded once."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (wide.square().mean(1, keepdim=True) + eps).rsqrt()
    return (wide * scale * weight.to(wide.dtype)).to(x.dtype).index_select(1, permutation)


def nth_largest(columns: Tensor, groups: Tensor, n: int) -> Tensor:
    """The n-th largest of several columns, row by row.

    Parameters
    ----------
    columns : Tensor
        ``(C, R)``, float32 or float64, contiguous; R is a multiple of 16.
    groups : Tensor
        int64 ``(G, k)``: the numbers of the columns, k >= n.
    n : int

    Returns
    -------
    Tensor
        ``(G, R)`` in the columns' dtype.
    """
    step = max(1, _ELEMENTS // max(1, groups.shape[1] * columns.shape[1]))
    least = [columns[some].topk(n, dim=1).values[:, -1] for some in groups.split(step)]
    return torch.cat(least) if least else columns.new_empty(0, columns.shape[1])


def sum_maxima(thresholds: Tensor, columns: Tensor, index: Tensor) -> Tensor:
    """``sum_r max(thresholds[b, g, r], columns[index[b, i], r])``, float64 ``(B, G, J)``.

    Parameters
    ----------
    thresholds : Tensor
        ``(B, G, R)``, contiguous, and
    columns : Tensor
        ``(C, R)``, contiguous, of one dtype: float32 or float64; R is a multiple of 16.
    index : Tensor
        int64 ``(B, J)``, contiguous.
    """
    found = []
    for least, some in zip(thresholds, index, strict=True):
        wide, moved = least.double(), columns[some].double()
        # max(t, a) = (t + a + |t - a|) / 2, and a matrix of L1 distances needs no temporary of its own size
        # times the rows.
        found.append((wide.sum(1)[:, None] + moved.sum(1) + torch.cdist(wide, moved, p=1)) / 2)
    return torch.stack(found)


def sum_largest(columns: Tensor, members: Tensor, subsets: Tensor, n: int) -> Tensor:
    """What groups made of a few columns keep: the sums over rows of their n largest, float64 ``(P, K)``.

    Parameters
    ----------
    columns : Tensor
        ``(C, R)``, float32 or float64, contiguous; R is a multiple of 16.
    members : Tensor
        int64 ``(P, k)``, contiguous: the columns at hand.
    subsets : Tensor
        int64 ``(K, m)``, contiguous: the groups, as places among the members.
    n : int
    """
    step = max(1, _ELEMENTS // max(1, subsets.numel() * columns.shape[1]))
    kept = [
        columns[some][:, subsets].double().topk(n, dim=2).values.sum((2, 3)) for some in members.split(step)
    ]
    return torch.cat(kept) if kept else columns.new_empty(0, len(subsets), dtype=torch.float64)
