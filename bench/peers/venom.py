"""How others choose the columns of V:N:M masks: VENOM's enumeration, and the largest sums.

:func:`enumerated` is what VENOM's own program does (Castro and others, SC 2023, arXiv 2310.02065;
end2end/grouped_nmv_tensor.py of its repository): in each strip of V rows and group of M columns every choice
of four columns is tried, the N largest of each row are added up, and the largest total wins. Theirs is C++
that is compiled for each shape; here the same loops are compiled by Numba.

:func:`largest_sums` are the two steps of hierarchical pruning (HiNM, arXiv 2407.20496): first the columns of
each strip with the largest sums of scores, here four of each group, then the N largest of each row.

Written from the descriptions, for shapes that V and M divide. Nothing here uses nmsolve.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

COLUMNS = 4


def enumerated(scores: Tensor, v: int, n: int, m: int) -> Tensor:
    """bool mask of ``(rows, cols)`` scores; the columns that keep the most of each strip and group."""
    rows, cols = scores.shape
    columns = np.empty((rows // v, cols // m, COLUMNS), np.int64)
    _enumerate(scores.numpy(), v, n, m, columns)
    return _mask(scores, torch.from_numpy(columns), v, n, m)


def largest_sums(scores: Tensor, v: int, n: int, m: int) -> Tensor:
    """bool mask of ``(rows, cols)`` scores; the columns with the largest sums of each strip and group."""
    sums = scores.unflatten(0, (-1, v)).sum(1).unflatten(1, (-1, m))
    return _mask(scores, sums.topk(COLUMNS, dim=-1).indices, v, n, m)


def _mask(scores: Tensor, columns: Tensor, v: int, n: int, m: int) -> Tensor:
    """The n largest of each row in the ``(S, G, 4)`` columns of its strip."""
    blocks = scores.unflatten(1, (-1, m))
    index = columns.repeat_interleave(v, dim=0)
    best = index.gather(2, blocks.gather(2, index).topk(n, dim=2).indices)
    return torch.zeros(blocks.shape, dtype=torch.bool).scatter_(2, best, True).flatten(1)


@numba.njit(cache=True)
def _enumerate(scores: np.ndarray, v: int, n: int, m: int, columns: np.ndarray) -> None:
    held = np.empty(COLUMNS)
    for s in range(columns.shape[0]):
        for g in range(columns.shape[1]):
            most = -np.inf
            for a in range(m):
                for b in range(a + 1, m):
                    for c in range(b + 1, m):
                        for d in range(c + 1, m):
                            total = 0.0
                            for r in range(s * v, s * v + v):
                                held[0] = scores[r, g * m + a]
                                held[1] = scores[r, g * m + b]
                                held[2] = scores[r, g * m + c]
                                held[3] = scores[r, g * m + d]
                                for i in range(n):
                                    for j in range(i + 1, COLUMNS):
                                        if held[j] > held[i]:
                                            held[i], held[j] = held[j], held[i]
                                    total += held[i]
                            if total > most:
                                most = total
                                columns[s, g, 0] = a
                                columns[s, g, 1] = b
                                columns[s, g, 2] = c
                                columns[s, g, 3] = d
