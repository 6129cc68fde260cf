"""Orders of rows and columns for transposable masks, with a mask solved for every choice of a slot's rows.

What a search by exchanges (nmsolve.permute) is measured against: it values the same moves exactly, at the
price of one mask for each of the C(M, N) choices of rows in every block. The masks are nmsolve's.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

import nmsolve

__all__ = ["forced_masks"]

# Elements of the blocks that are solved together.
_CHUNK = 1 << 20


def forced_masks(scores: Tensor, n: int, m: int, passes: int) -> Tensor:
    """``scores`` in the order found, columns first in every pass; m divides rows and columns."""
    generator = torch.Generator().manual_seed(0)
    for turn in range(passes):
        for _ in range(2):
            if turn:
                lines = torch.arange(scores.shape[1]).view(-1, m)
                within = torch.rand(lines.shape, generator=generator).argsort(1)
                scores = scores[:, lines.gather(1, within).flatten()]
            for slot in range(m):
                scores = _step(scores, n, m, slot)
            scores = scores.T.contiguous()
    return scores


def _kept(scores: Tensor, n: int, m: int) -> Tensor:
    return nmsolve.transposable_mask(scores, n, m, return_solution=True).objective.sum(0)


def _step(scores: Tensor, n: int, m: int, slot: int) -> Tensor:
    """One assignment of the columns in ``slot``; only the cycles that raise what is kept are made."""
    chosen = nmsolve.assignment(_values(scores, n, m, slot))

    def order(chosen: Tensor) -> Tensor:
        lines = torch.arange(scores.shape[1]).view(-1, m).clone()
        lines[:, slot] = lines[chosen, slot]
        return lines.flatten()

    gain = _kept(scores[:, order(chosen)], n, m) - _kept(scores, n, m)
    following, still = chosen.tolist(), list(range(len(chosen)))
    made, seen = list(still), [False] * len(chosen)
    for start in still:
        cycle = []
        while not seen[start]:
            seen[start] = True
            cycle.append(start)
            start = following[start]
        if cycle and sum(float(gain[g]) for g in cycle) > 1e-9 * float(scores.abs().sum()) / len(still):
            for g in cycle:
                made[g] = following[g]
    return scores[:, order(torch.tensor(made))]


def _values(scores: Tensor, n: int, m: int, slot: int) -> Tensor:
    """The kept score of every group of columns with every column in the slot, float64 ``(G, G)``."""
    choices = list(itertools.combinations(range(m), n))
    subsets = torch.zeros(len(choices), m).scatter_(1, torch.tensor(choices), 1)
    blocks = scores.unflatten(1, (-1, m)).unflatten(0, (-1, m)).transpose(1, 2)
    moved = subsets @ scores[:, slot::m].unflatten(0, (-1, m))
    bands, groups = blocks.shape[:2]
    values = torch.zeros(groups, groups, dtype=torch.float64)
    step = max(1, _CHUNK // (groups * len(choices) * m * m))
    for first in range(0, bands, step):
        some = blocks[first : first + step]
        # An entry of the forced column outweighs whatever an exchange elsewhere in the block can gain.
        weight = 2 * m * some.amax((2, 3), keepdim=True)
        trial = some.unsqueeze(1).repeat(1, len(choices), 1, 1, 1)
        trial[..., slot] = (weight * subsets.T).permute(0, 3, 1, 2)
        solved = nmsolve.solve_blocks(trial.flatten(0, 2), n).objective.view(len(some), -1, groups)
        rest = (solved - n * weight.double().view(len(some), 1, groups)).float()
        for kept, column in zip(rest, moved[first : first + step], strict=True):
            values += (kept[:, :, None] + column[:, None, :]).amax(0)
    return values
