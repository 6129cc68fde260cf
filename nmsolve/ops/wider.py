"""Blocks that a backend's own arithmetic is too coarse for, or that have infinite scores, solved once more.

The solvers scale a block by its largest score and work in float32 unless the scores are float64, so they tell
apart what differs by more than some 2^-24 of that score. Where large negative scores stand for what must not
be kept, the others are near that, and a mask can be short of the optimum by a large part of what it keeps.
A block without negative scores keeps at least its largest one, and is short by a rounding error of that.
Scores of +inf and -inf, which are kept always and never, no backend knows at all.

Such blocks are solved by :mod:`nmsolve.ops.levels`, and an ordinary matrix has none: its least and its
largest score, which are read for the check of its values, say whether to look for any.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nmsolve.backends.dispatch import REFERENCE, Backend
from nmsolve.blocks import batched_matrices, chosen_blocks, grid_of, split_blocks
from nmsolve.errors import NMSolveError
from nmsolve.ops.levels import block_solvers, solve_levels
from nmsolve.pattern import NMPattern

__all__ = [
    "Certificates",
    "coarse_blocks",
    "finite_part",
    "infinite_blocks",
    "over_blocks",
    "reason_of",
    "refuse_short_groups",
    "solve_wider",
    "stand_ins",
    "violating_blocks",
]

# A block is coarse whose lowest score is this many times the highest, on the other side of zero, and of whose
# scores an eighth, zeros left out, are below this share of it; by what they are solved in.
_TIMES = 8.0
_SMALL = {torch.float32: 2.0**-10, torch.float64: 2.0**-36}

# Elements of blocks looked at together.
_CHUNK = 1 << 22


class Certificates(NamedTuple):
    """What certifies the masks of a matrix, as in :class:`nmsolve.BlockSolution`; written in place."""

    row_duals: Tensor
    col_duals: Tensor
    objective: Tensor
    bound: Tensor
    scale: Tensor


def coarse_blocks(scores: Tensor, pattern: NMPattern, worked_in: torch.dtype) -> Tensor:
    """Which blocks of finite ``(..., rows, cols)`` scores have negative ones that dwarf others.

    ``worked_in`` is what they are solved in, float64 or float32.
    """
    share = _SMALL[worked_in]
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
        small = (size < share * size.amax((1, 2), keepdim=True)) & (size > 0)
        found[at] = 8 * small.sum((1, 2)) >= (size > 0).sum((1, 2))
    return coarse


def infinite_blocks(scores: Tensor, pattern: NMPattern) -> Tensor:
    """Which blocks have infinite scores."""
    return _any_in_blocks(scores.isinf(), pattern)


def violating_blocks(scores: Tensor, mask: Tensor, pattern: NMPattern) -> Tensor:
    """Which blocks of a mask lack a +inf or keep a -inf."""
    return _any_in_blocks(torch.where(mask, scores == -math.inf, scores == math.inf), pattern)


def _any_in_blocks(where: Tensor, pattern: NMPattern) -> Tensor:
    grid = grid_of(where, pattern)
    shape = (*where.shape[:-2], grid.block_rows, grid.block_cols)
    found = torch.zeros(shape, dtype=torch.bool, device=where.device)
    for matrices, out in batched_matrices(where, found):
        for rows, cols, r, c in grid.regions():
            at = (slice(None), *grid.block_slices(rows, cols))
            out[at] = split_blocks(matrices[:, rows, cols], r, c).any(-1).any(-1)
    return found


def over_blocks(per_block: Tensor, scores: Tensor, pattern: NMPattern) -> Tensor:
    """A value per block at each of its entries."""
    rows, cols = scores.shape[-2:]
    across = per_block.repeat_interleave(pattern.m, -1)[..., :cols]
    return across.repeat_interleave(pattern.m, -2)[..., :rows, :]


def finite_part(scores: Tensor) -> Tensor:
    """Scores with 0 for infinite ones."""
    return scores.masked_fill(scores.isinf(), 0)


def stand_ins(scores: Tensor, pattern: NMPattern) -> Tensor:
    """Scores with twice the block's largest in size for infinite ones: for methods without a proof."""
    grid = grid_of(scores, pattern)
    finite = finite_part(scores)
    largest = finite.new_zeros((*scores.shape[:-2], grid.block_rows, grid.block_cols))
    for matrices, out in batched_matrices(finite.abs(), largest):
        for rows, cols, r, c in grid.regions():
            at = (slice(None), *grid.block_slices(rows, cols))
            out[at] = split_blocks(matrices[:, rows, cols], r, c).amax(-1).amax(-1)
    size = (2 * torch.where(largest > 0, largest, 1)).clamp(max=torch.finfo(scores.dtype).max)
    return torch.where(scores.isinf(), over_blocks(size, scores, pattern) * scores.sign(), scores)


def solve_wider(
    backend: Backend,
    scores: Tensor,
    mask: Tensor,
    wanted: Tensor,
    pattern: NMPattern,
    *,
    allow_short: bool = False,
    certificates: Certificates | None = None,
    name: str = "scores",
) -> Tensor:
    """Solve the ``wanted`` blocks again, masks and ``certificates`` in place; which those were.

    A backend that has no float64 leaves them to the reference, on the same device.

    Raises
    ------
    NMSolveError
        If a block has no mask of the pattern, unless a short one will do.
    """
    solvers = block_solvers((backend if backend.masks_float64 else REFERENCE).masks, pattern.n)
    short = torch.zeros_like(wanted)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    for tile, (masks,), at, lacking, *proofs in chosen_blocks(
        wanted, pattern, (scores, mask), (short, *(certificates or ()))
    ):
        blocks = tile[at].double()
        rows, cols = blocks.shape[1:]
        found = solve_levels(
            blocks, pattern.n, dtype, *solvers, allow_short=allow_short, want_duals=bool(proofs)
        )
        lacking[at] = ~found.full
        blocks = blocks.masked_fill(blocks.isinf(), 0)
        masks[at] = found.mask
        if proofs:
            u, v, objective, bound, scale = proofs
            u[..., :rows][at], v[..., :cols][at] = found.row_duals, found.col_duals
            kept = blocks * masks[at]
            objective[at], scale[at] = kept.sum((1, 2)), kept.abs().sum((1, 2))
            bound[at] = objective[at] + found.loss
    if not allow_short and short.any():
        _refuse_short(scores, short, pattern, name)
    return wanted


def _refuse_short(scores: Tensor, short: Tensor, pattern: NMPattern, name: str) -> None:
    """Raise for the first of the blocks without a mask of the pattern, with a line that shows it, if any."""
    where = short.nonzero()[0].tolist()
    inside = [slice(k * pattern.m, (k + 1) * pattern.m) for k in where[-2:]]
    at = (*where[:-2], *inside)
    block = scores[at]
    raise NMSolveError(
        f"{name}: block {tuple(where)} has no {pattern} mask that keeps every inf and no -inf"
        f"{reason_of(block, pattern)}; allow_short=True keeps what fits there"
    )


def reason_of(block: Tensor, pattern: NMPattern) -> str:
    """A line that shows why a block has no mask of the pattern, if there is one."""
    rows, cols = block.shape
    for name, dim, lines, others in (("row", 1, rows, cols), ("column", 0, cols, rows)):
        most = min(pattern.n, others)
        forced = (block == math.inf).sum(dim).tolist()
        allowed = (block > -math.inf).sum(dim).tolist()
        for line in range(lines):
            if forced[line] > most:
                return f": {name} {line} holds {forced[line]} inf, and keeps {most}"
            if lines <= others and allowed[line] < most:
                return f": {name} {line} holds {allowed[line]} other than -inf, and keeps {most}"
    return ""


def refuse_short_groups(lines: Tensor, mask: Tensor, pattern: NMPattern, dim: int) -> None:
    """Raise for the first group of an ordinary mask that keeps a -inf or lacks a +inf, along the last dim."""
    wrong = torch.where(mask, lines == -math.inf, lines == math.inf)
    if not wrong.any():
        return
    first = wrong.nonzero()[0].tolist()
    line, place = tuple(first[:-1]), first[-1]
    group = place // pattern.m
    held = lines[line][group * pattern.m : (group + 1) * pattern.m]
    most = min(pattern.n, len(held))
    if held[place % pattern.m] > 0:
        reason = f"holds {int((held == math.inf).sum())} inf"
    else:
        reason = f"holds {int((held > -math.inf).sum())} other than -inf"
    raise NMSolveError(
        f"scores: line {line}, group {group} along dim {dim} {reason}, and keeps {most} (pattern "
        f"{pattern}); allow_short=True keeps what fits there"
    )
