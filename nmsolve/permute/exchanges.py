"""Choices of N rows of a block, and the order in which sums over them are made."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

__all__ = ["steps_of", "subsets_of"]


def subsets_of(n: int, m: int) -> Tensor:
    """All n of m rows, ascending, int64 ``(K, n)``.

    Examples
    --------
    >>> subsets_of(2, 3).tolist()
    [[0, 1], [0, 2], [1, 2]]
    """
    return torch.tensor(list(itertools.combinations(range(m), n)))


def steps_of(n: int, m: int) -> Tensor:
    """How the best bijections of all subsets come from those of smaller ones, int64 ``(T, 4)``.

    A row ``(q, target, parent, i)`` says that row i joins the subset ``parent`` of q rows and makes the
    subset ``target`` of q + 1, both by their numbers in :func:`subsets_of`. A target's rows stand together.

    Examples
    --------
    >>> steps_of(2, 2).tolist()
    [[0, 0, 0, 0], [0, 1, 0, 1], [1, 0, 1, 0], [1, 0, 0, 1]]
    """
    smaller: dict[tuple[int, ...], int] = {(): 0}
    steps = []
    for q in range(n):
        larger: dict[tuple[int, ...], int] = {
            subset: k for k, subset in enumerate(itertools.combinations(range(m), q + 1))
        }
        for subset, target in larger.items():
            for i in subset:
                parent = tuple(row for row in subset if row != i)
                steps.append((q, target, smaller[parent], i))
        smaller = larger
    return torch.tensor(steps)
