"""The lines of one side of a matrix with a transposable mask, and the step that gives them to other groups.

:mod:`nmsolve.permute.transposable` has the mathematics.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nmsolve.backends.dispatch import AUTO, select
from nmsolve.ops.assignment import assignment
from nmsolve.ops.masks import transposable_mask
from nmsolve.pattern import NMPattern
from nmsolve.permute.exchanges import steps_of, subsets_of
from nmsolve.permute.insertions import make_small
from nmsolve.permute.windows import deal_windows

__all__ = ["MAX_SUBSETS", "Side"]

MAX_SUBSETS = 70
"""Above this many choices of rows (those of 4:8) insertions are bounded by duals."""

# What a backend may count on: the number of blocks is a multiple of it.
_LANES = 16

# Elements that are summed while they are in the cache.
_CACHED = 1 << 16

# Bytes of values that are there at a time.
_CHUNK = 1 << 27


class Side:
    """Groups of lines, and the optimal mask of the matrix that they make.

    Parameters
    ----------
    lines : Tensor
        ``(C, R)``, float32 or float64; M of them in their order make a group, M of their entries a block.
    mask : Tensor, optional
        The optimal mask of this matrix, if it is known.
    pattern : NMPattern
    backend : str
        For the masks.
    size : int
        Groups of a window.
    """

    def __init__(
        self, lines: Tensor, mask: Tensor | None, pattern: NMPattern, backend: str, size: int
    ) -> None:
        self.pattern, self.backend, self.size = pattern, backend, size
        self.lines = lines.contiguous()
        count, m = len(lines), pattern.m
        self.order = torch.arange(count, device=lines.device).view(-1, m)
        self.bounded = math.comb(m, pattern.n) > MAX_SUBSETS
        if self.bounded or mask is None:
            self.mask, self.duals = self._solved(self.lines)
        else:
            self.mask, self.duals = mask.contiguous(), None
        self.kept = self._kept(self.lines, self.mask)
        if self.bounded:
            return
        self.blocks = self._side_by_side(self.lines)
        make_small(self.blocks)
        self.held = self._side_by_side(self.mask).to(lines.dtype)
        self.subsets, self.steps = (of(pattern.n, m).to(lines.device) for of in (subsets_of, steps_of))
        self._solver = select(AUTO, lines.device).permutations

    def shuffle(self, generator: torch.Generator) -> None:
        """Puts the lines of every group into another order; the masks go with them."""
        within = torch.rand(self.order.shape, generator=generator).argsort(dim=1).to(self.order.device)
        self.order = self.order.gather(1, within)

    def step(self, slot: int, generator: torch.Generator) -> float:
        """One assignment of the lines in ``slot`` for every window, of which the cycles are made that gain.

        Returns what they gain.
        """
        device = self.order.device
        windows = deal_windows(len(self.order), self.size, generator).to(device)
        values = torch.stack([self._values(window, slot) for window in windows])
        chosen = torch.arange(len(self.order), device=device)
        chosen[windows] = windows.gather(1, assignment(values))
        trial = self.order.clone()
        trial[:, slot] = trial[chosen, slot]
        changed = (chosen != torch.arange(len(chosen), device=device)).nonzero()[:, 0]
        if not len(changed):
            return 0.0
        # Cycles touch disjoint groups, whose gains from masks solved anew add up.
        lines = self.lines.index_select(0, trial[changed].flatten())
        mask, duals = self._solved(lines)
        kept = self._kept(lines, mask)
        gain = torch.zeros_like(self.kept).index_copy_(0, changed, kept - self.kept[changed]).cpu()
        cycle = _cycles(chosen.cpu())
        total = torch.zeros_like(gain).index_add_(0, cycle, gain)
        made = (total[cycle] > 1e-12 * self.kept.abs().max().cpu()).to(device)
        now = made[changed]
        self._make(changed[now], trial, mask.view(len(changed), -1)[now], kept[now])
        if duals is not None and self.duals is not None:
            self.duals[changed[now]] = duals[now]
        return float(gain[made.cpu()].sum())

    def _make(self, groups: Tensor, trial: Tensor, mask: Tensor, kept: Tensor) -> None:
        """Gives these groups their lines of the trial, with the masks solved for them."""
        lines = trial[groups].flatten()
        self.order[groups] = trial[groups]
        self.kept[groups] = kept
        self.mask[lines] = mask.reshape(len(lines), self.lines.shape[1])
        if not self.bounded:
            self.held[lines] = self._side_by_side(self.mask[lines]).to(self.held.dtype)

    def _solved(self, lines: Tensor) -> tuple[Tensor, Tensor | None]:
        """The optimal mask, and if they are needed the duals of the other side ``(G, B, m)``."""
        n, m = self.pattern.n, self.pattern.m
        if not self.bounded:
            return transposable_mask(lines, n, m, backend=self.backend), None
        solution = transposable_mask(lines, n, m, backend=self.backend, return_solution=True)
        return solution.mask, solution.col_duals

    def _kept(self, lines: Tensor, mask: Tensor) -> Tensor:
        """The kept score of every group, float64."""
        step = max(1, _CACHED // max(1, lines.shape[1]))
        parts = zip(lines.split(step), mask.split(step), strict=True)
        sums = [torch.where(held, some, 0).sum(1, dtype=torch.float64) for some, held in parts]
        return torch.cat(sums).view(-1, self.pattern.m).sum(1) if sums else self.order.new_zeros(0).double()

    def _side_by_side(self, lines: Tensor) -> Tensor:
        """``(C, m, B)``: entry i of every block, block by block, B filled up with zeros.

        It becomes an odd multiple of the lanes, so that what is read together lies in different cache sets.
        """
        count, width = lines.shape
        blocks = width // self.pattern.m
        room = lines.new_zeros(count, self.pattern.m, (-(-blocks // _LANES) | 1) * _LANES)
        room[:, :, :blocks] = lines.view(count, blocks, self.pattern.m).transpose(1, 2)
        return room

    def _values(self, window: Tensor, slot: int) -> Tensor:
        """``F_s[g, j]`` for the groups of a window, float64 ``(G, G)``, up to a constant of g."""
        groups = self.order[window]
        moved = groups[:, slot].contiguous()
        if self.bounded:
            assert self.duals is not None
            return bounded_values(self.lines[moved], self.duals[window], self.pattern)
        size = len(self.subsets) * self.blocks.shape[2] * self.blocks.element_size()
        values = [
            self._solver.sum_best(
                self._solver.exchange_values(
                    self.blocks, self.held, some.contiguous(), slot, self.subsets, self.steps
                ),
                self.blocks,
                moved,
                self.subsets,
            )
            for some in groups.split(max(1, _CHUNK // max(1, size)))
        ]
        return torch.cat(values)


def bounded_values(moved: Tensor, duals: Tensor, pattern: NMPattern) -> Tensor:
    """The dual bound on ``F_s[g, j]`` up to a constant of each g, float64 ``(G, G)``.

    ``moved`` are the lines ``(G, R)`` in the slot, and ``duals`` ``(G, B, m)`` those of the blocks' entries.
    """
    entries, duals = moved.double().unflatten(1, (-1, pattern.m)), duals.double()
    values = torch.zeros(len(moved), len(moved), dtype=torch.float64, device=moved.device)
    for block in range(entries.shape[1]):
        reduced = entries[None, :, block] - duals[:, None, block]
        values += reduced.topk(pattern.n, dim=-1).values.sum(-1)
    return values


def _cycles(permutation: Tensor) -> Tensor:
    """For each index, the smallest index of its cycle."""
    following = permutation.tolist()
    label = [-1] * len(following)
    for start in range(len(following)):
        at = start
        while label[at] < 0:
            label[at] = start
            at = following[at]
    return torch.tensor(label)
