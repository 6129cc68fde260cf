r"""What every group of columns keeps with every other column in one of its slots.

Let ``t[r, g]`` be the N-th largest score of row r among the columns of group g other than the one in slot s,
and ``b[r, g]`` the sum of its N - 1 largest. With column j in slot s the row keeps
``b[r, g] + max(t[r, g], A[r, j])``, so that the group keeps, up to a constant of g,

    F_s[g, j] = sum_r max(t[r, g], A[r, j]).

Masks may go by these scores, and what a group is worth by other values V of its kept entries. Column j then
takes the place of the entry with the N-th largest score, of value h[r, g], where its own is larger:

    F_s[g, j] = sum_r [A[r, j] > t[r, g]] (V[r, j] - h[r, g]).
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from nmsolve.backends.dispatch import AUTO, select
from nmsolve.pattern import NMPattern

__all__ = ["Insertions", "make_small"]

# What a backend may count on: the number of rows is a multiple of it.
_LANES = 16

# Scores up to here add up in float32, whatever the rows.
_LARGE = 2.0**40

# Bytes of thresholds that are there at a time.
_CHUNK = 1 << 27


def make_small(scores: Tensor) -> None:
    """Divides scores whose sums may not be numbers of their type by a power of two, in place."""
    largest = float(scores.abs().amax()) if scores.numel() else 0.0
    if largest > _LARGE:
        scores.mul_(2.0 ** -min(math.frexp(largest)[1], 126)).mul_(
            2.0 ** -max(0, math.frexp(largest)[1] - 126)
        )


class Insertions:
    """The columns of one matrix, side by side in memory, and the values of moving them.

    Parameters
    ----------
    scores : Tensor
        ``(rows, cols)``; float16 and bfloat16 are widened to float32.
    pattern : NMPattern
    """

    def __init__(self, scores: Tensor, pattern: NMPattern) -> None:
        self.n, self.m = pattern.n, pattern.m
        rows, cols = scores.shape
        wide = torch.promote_types(scores.dtype, torch.float32)
        # An odd multiple: columns that are read together lie in different cache sets.
        self.columns = scores.new_zeros(cols, (-(-rows // _LANES) | 1) * _LANES, dtype=wide)
        self.columns[:, :rows] = scores.detach().T
        make_small(self.columns)
        self.rounding = 1e-12 if wide == torch.float64 else 2e-7
        """The share of a sum below which a gain is none."""
        self._solver = select(AUTO, scores.device).permutations
        self._worth: Tensor | None = None

    def weighed(self, values: Tensor) -> Insertions:
        """The same columns, whose groups are worth what ``values`` ``(rows, cols)`` has where masks keep."""
        found = copy.copy(self)
        found._worth = torch.zeros_like(self.columns)
        found._worth[:, : len(values)] = values.detach().T
        return found

    def of_slot(self, groups: Tensor, slot: int) -> Tensor:
        """``F_s[w, g, i]`` float64 ``(W, G, G)`` of windows ``(W, G, m)``: group g with group i's column."""
        others = torch.cat([groups[..., :slot], groups[..., slot + 1 :]], -1)
        return self._values(others, groups[..., slot].contiguous())

    def of_all(self, groups: Tensor) -> Tensor:
        """``F_s[g, j]`` float64 ``(G, m, C)``: groups ``(G, m)`` with every column in every slot s."""
        slots = [[k for k in range(self.m) if k != slot] for slot in range(self.m)]
        others = groups[:, slots].flatten(0, 1)
        every = torch.arange(len(self.columns), device=groups.device)
        return self._values(others[None], every[None]).view(len(groups), self.m, -1)

    def of_ways(self, members: Tensor, ways: Tensor) -> Tensor:
        """What ways ``(K, 2 m)`` of dealing ``(P, 2 m)`` columns into two groups keep, float64 ``(P, K)``."""
        first, second = ways[:, : self.m].contiguous(), ways[:, self.m :].contiguous()
        subsets = torch.cat([first, second])
        kept = self._solver.sum_largest(self.columns, members.contiguous(), subsets, self.n)
        return kept[:, : len(ways)] + kept[:, len(ways) :]

    def _values(self, others: Tensor, moved: Tensor) -> Tensor:
        """The values of groups ``(W, G, m - 1)`` with columns ``(W, J)``."""
        rows = self.columns.shape[1]
        windows, count = others.shape[:2]
        size = self.columns.element_size() * rows
        step = max(1, _CHUNK // max(1, size * count))
        part = max(1, min(count, _CHUNK // max(1, size)))
        values = []
        for first in range(0, windows, step):
            some, index = others[first : first + step], moved[first : first + step]
            bands = []
            for low in range(0, count, part):
                band = some[:, low : low + part]
                bands.append(self._of_band(band, index))
            values.append(torch.cat(bands, 1))
        return torch.cat(values)

    def _of_band(self, others: Tensor, moved: Tensor) -> Tensor:
        rows, members = self.columns.shape[1], others.flatten(0, 1).contiguous()
        shape = (*others.shape[:2], rows)
        if self._worth is None:
            least = self._solver.nth_largest(self.columns, members, self.n)
            return self._solver.sum_maxima(least.view(shape), self.columns, moved)
        least, held = self._solver.nth_largest_of(self.columns, self._worth, members, self.n)
        return self._solver.sum_gains(least.view(shape), held.view(shape), self.columns, self._worth, moved)
