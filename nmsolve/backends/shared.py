"""What more than one backend does the same way."""

from __future__ import annotations

import torch
from torch import Tensor

from nmsolve.solution import BlockResult

__all__ = [
    "assignment_of",
    "exchange_values",
    "nth_largest",
    "nth_largest_of",
    "permute_columns",
    "rms_norm_permute",
    "sum_best",
    "sum_gains",
    "sum_largest",
    "sum_maxima",
]

# Elements of the largest temporaries.
_ELEMENTS = 1 << 22

# More than any path of exchanges gains, and far from the largest float32.
_FAR = 1e30


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


def nth_largest_of(columns: Tensor, values: Tensor, groups: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """As :func:`nth_largest`, and what ``values`` (shaped as ``columns``) has there.

    Of equal scores the first in the group counts as larger.
    """
    step = max(1, _ELEMENTS // max(1, groups.shape[1] * columns.shape[1]))
    least, held = [columns[:0]], [values[:0]]
    for some in groups.split(step):
        score = columns[some]
        which = score.argsort(dim=1, descending=True, stable=True)[:, n - 1 : n]
        least.append(score.gather(1, which)[:, 0])
        held.append(values[some].gather(1, which)[:, 0])
    return torch.cat(least), torch.cat(held)


def sum_gains(thresholds: Tensor, held: Tensor, columns: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """What columns gain in groups where their score is above a threshold, float64 ``(B, G, J)``.

    With j = index[b, i] the sum over the rows r with ``columns[j, r] > thresholds[b, g, r]`` of
    ``values[j, r] - held[b, g, r]``.

    Parameters
    ----------
    thresholds, held : Tensor
        ``(B, G, R)``, contiguous, and
    columns, values : Tensor
        ``(C, R)``, contiguous, of one dtype: float32 or float64; R is a multiple of 16.
    index : Tensor
        int64 ``(B, J)``, contiguous.
    """
    batch, groups, rows = thresholds.shape
    out = torch.empty(batch, groups, index.shape[1], dtype=torch.float64, device=columns.device)
    step = max(1, _ELEMENTS // max(1, index.shape[1] * rows))
    for b, some in enumerate(index):
        scores, worth = columns[some], values[some]
        for low in range(0, groups, step):
            part = slice(low, low + step)
            above = scores > thresholds[b, part, None]
            gains = torch.where(above, worth - held[b, part, None], 0)
            out[b, part] = gains.sum(2, dtype=torch.float64)
    return out


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


def exchange_values(
    lines: Tensor, kept: Tensor, groups: Tensor, slot: int, subsets: Tensor, steps: Tensor
) -> Tensor:
    r"""What the other columns of every block keep, for every choice of rows in one slot.

    Let S0 be the rows that the block's optimal mask keeps in the slot. Along a path from row i to row k of
    the block, each row passes a kept entry of one of the other columns on to the next one, which had none
    there; the best path gains ``D[i, k]``, and ``D[i, i] = 0``. When row i joins S0 and row k leaves it the
    other columns gain D[i, k] exactly. What they keep is a valuated matroid of the slot's rows, so that

        V(S) <= V(S0) + max over bijections p from S to S0 of  sum_{i in S} D[i, p(i)]

    (the upper-bound lemma: Murota, Matrices and Matroids for Systems Analysis, section 5.2), exact where S is
    one exchange away.

    Parameters
    ----------
    lines : Tensor
        ``(C, m, B)``, float32 or float64, contiguous: row i of block b of each column; B is a multiple of 16.
    kept : Tensor
        As ``lines``, 1 where the optimal mask keeps the entry and 0 elsewhere.
    groups : Tensor
        int64 ``(G, m)``, contiguous: the columns of each group.
    slot : int
    subsets : Tensor
        int64 ``(K, n)``: the choices, ascending.
    steps : Tensor
        int64 ``(T, 4)``, see :func:`nmsolve.permute.exchanges.steps_of`.

    Returns
    -------
    Tensor
        ``(G, K, B)`` in the lines' dtype: the bound on ``V(S) - V(S0)``.
    """
    m, blocks = lines.shape[1:]
    n = subsets.shape[1]
    step = max(1, _ELEMENTS // max(1, m**3 * blocks))
    found = []
    for some in groups.split(step):
        x, held = lines[some], kept[some] > 0.5  # (g, c, m, B)
        others = [c for c in range(m) if c != slot]
        loses = torch.where(held, -x, -_FAR)[:, others]
        gains = torch.where(held, -_FAR, x)[:, others]
        paths = (loses[:, :, :, None] + gains[:, :, None]).amax(1)  # (g, i, k, B)
        paths.diagonal(dim1=1, dim2=2).zero_()
        for via in range(m):
            paths = torch.maximum(paths, paths[:, :, via, None] + paths[:, via, None])
        # The rows in S0 come first; blocks that keep none have no paths worth anything.
        order = held[:, slot].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :n]
        ends = paths.gather(2, order[:, None].expand(-1, m, -1, -1))  # (g, i, q, B)
        ends = ends * held[:, slot].any(1)[:, None, None]
        sums: list[Tensor] = []
        for q in range(n):
            level = steps[steps[:, 0] == q]
            value = ends[:, level[:, 3], q]
            if q:
                value = value + sums[-1][:, level[:, 2]]
            sums.append(value.unflatten(1, (-1, q + 1)).amax(2))
        found.append(sums[-1])
    return torch.cat(found) if found else lines.new_empty(0, len(subsets), blocks)


def sum_best(values: Tensor, lines: Tensor, index: Tensor, subsets: Tensor) -> Tensor:
    """``sum_b max_k (values[g, k, b] + sum_{i in subset k} lines[index[j], i, b])``, float64 ``(G, J)``.

    Parameters
    ----------
    values : Tensor
        ``(G, K, B)``, contiguous, and
    lines : Tensor
        ``(C, m, B)``, contiguous, of one dtype: float32 or float64; B is a multiple of 16.
    index : Tensor
        int64 ``(J,)``.
    subsets : Tensor
        int64 ``(K, n)``.
    """
    moved = lines[index][:, subsets].sum(2)  # (J, K, B)
    step = max(1, _ELEMENTS // max(1, moved.numel()))
    best = [(some[:, None] + moved[None]).amax(2).sum(2, dtype=torch.float64) for some in values.split(step)]
    return torch.cat(best) if best else lines.new_empty(0, len(index), dtype=torch.float64)
