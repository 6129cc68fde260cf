"""Blocks that float32 is too coarse for, solved once more in float64.

The solvers scale a block by its largest score and work in float32 unless the scores are float64, so they tell
apart what differs by more than some 2^-24 of that score. Where large negative scores stand for what must not
be kept, the others are near that, and a mask can be short of the optimum by a large part of what it keeps.
A block without negative scores keeps at least its largest one, and is short by a rounding error of that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nmsolve.backends.dispatch import REFERENCE, Backend
from nmsolve.blocks import batched_matrices, chosen_blocks, grid_of, split_blocks
from nmsolve.pattern import NMPattern

__all__ = ["coarse_blocks", "solve_wider", "worked_in_float32"]

# A block is coarse whose lowest score is this many times the highest, on the other side of zero, and of whose
# scores an eighth, zeros left out, are below this share of it.
_TIMES = 8.0
_SMALL = 2.0**-10

# Elements of blocks looked at together.
_CHUNK = 1 << 22


def worked_in_float32(scores: Tensor, backend: Backend) -> bool:
    """Whether a backend solves scores in less than float64."""
    return scores.dtype != torch.float64 or not backend.masks_float64


def coarse_blocks(scores: Tensor, pattern: NMPattern) -> Tensor:
    """Which blocks of ``(..., rows, cols)`` have negative scores that dwarf others, ``(..., GR, GC)``."""
    grid = grid_of(scores, pattern)
    shape = (*scores.shape[:-2], grid.block_rows, grid.block_cols)
    coarse = torch.zeros(shape, dtype=torch.bool, device=scores.device)
    if not 0 < pattern.n < pattern.m:
        return coarse
    for matrices, found in batched_matrices(scores, coarse):
        for b, i, j, r, c in grid.tiles(matrices.shape[0], _CHUNK):
            tile = split_blocks(matrices[b, i, j], r, c)
            # The lines of all blocks at once first.
            low, high = tile.amin(-2).amin(-1), tile.amax(-2).amax(-1)
            where = (b, *grid.block_slices(i, j))
            found[where] = -low > _TIMES * high.clamp(min=0)
    for tile, _, at, found in chosen_blocks(coarse.clone(), pattern, (scores,), (coarse,)):
        size = tile[at].abs().double()
        small = (size < _SMALL * size.amax((1, 2), keepdim=True)) & (size > 0)
        found[at] = 8 * small.sum((1, 2)) >= (size > 0).sum((1, 2))
    return coarse


def solve_wider(backend: Backend, scores: Tensor, mask: Tensor, wanted: Tensor, pattern: NMPattern) -> Tensor:
    """Put better masks, in place, where float64 finds them among the ``wanted`` blocks; which those are.

    A backend that has no float64 leaves them to the reference, on the same device.
    """
    solver = (backend if backend.masks_float64 else REFERENCE).masks
    better = torch.zeros_like(wanted)
    for tile, (masks,), at, improved in chosen_blocks(wanted, pattern, (scores, mask), (better,)):
        blocks, before = tile[at].double(), masks[at]
        found = solver.exact(blocks, pattern, warm=None, want_solution=False).mask
        gain = (blocks * (found.double() - before.double())).sum((1, 2)) >= 0
        gain &= (found != before).any(2).any(1)
        masks[at] = torch.where(gain[:, None, None], found, before)
        improved[at] = gain
    return better
