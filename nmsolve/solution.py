"""What the solvers return: masks, duals and the certificate that joins them; and the ratios of reports."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from nmsolve.blocks import Demand, batched_matrices, demand, grid_of, split_blocks
from nmsolve.pattern import NMPattern, PatternLike

__all__ = ["BlockResult", "BlockSolution", "dual_bound", "kept_score", "relative_gap", "retained_share"]

Value = TypeVar("Value", float, Tensor)

# Elements looked at together where a whole matrix is reduced block by block: bounds the working memory.
_CHUNK = 1 << 20

# Exactly undone, and small enough that sums of numbers near the largest float64 are numbers.
_ROOM = 2.0**-64


class BlockResult(NamedTuple):
    """A backend's answer for ``(batch, rows, cols)`` scores tiled into ``(batch, GR, GC)`` blocks.

    ``mask`` is bool of the scores' shape. ``row_duals`` and ``col_duals`` are ``(batch, GR, GC, M)``;
    ``objective`` and ``bound`` are ``(batch, GR, GC)`` float64. A backend leaves the last four out unless it
    was asked for a solution.
    """

    mask: Tensor
    row_duals: Tensor | None = None
    col_duals: Tensor | None = None
    objective: Tensor | None = None
    bound: Tensor | None = None


@dataclass(frozen=True)
class BlockSolution:
    """A mask with its certificate, block by block.

    Of a DTensor's solution every tensor is a DTensor, and the numbers below are those of the whole.

    Attributes
    ----------
    mask : Tensor
        bool, shape and device of the scores; True = keep.
    row_duals, col_duals : Tensor
        ``(*batch, GR, GC, M)``, or ``(B, M)`` from :func:`nmsolve.solve_blocks`; prices u and v of the
        lines of each block, in the unit of the scores. Lines beyond the edge of a partial block hold 0.
    objective : Tensor
        float64 ``(*batch, GR, GC)`` or ``(B,)``: kept score of each block.
    bound : Tensor
        float64, as ``objective``: no mask of this pattern keeps more. It follows from the duals alone
        (docs/internals/solver.md), so :func:`nmsolve.dual_bound` recomputes it, up to the rounding of that
        sum. It is never below the objective. Where the duals' type is too coarse for the prices, or they are
        beyond its largest number, it is that of the prices before they were rounded.
    scale : Tensor
        float64, as ``objective``: sum of the absolute kept scores, what ``gap`` is relative to. It equals the
        objective where no score is negative.
    resolved : Tensor, optional
        bool, as ``objective``: the blocks that were solved once more in float64, since they have infinite
        scores or ones that are too far apart for the backend's own arithmetic. None in a solution that was
        put together from the others.

    Notes
    -----
    Scores of +inf and -inf count as 0 in objective, bound and scale, which are of what is left to choose: no
    mask that keeps all of the former and none of the latter has more than the bound. Of a block that is short
    (``allow_short`` of :func:`nmsolve.transposable_mask`) no mask with as many +inf and as many entries has;
    its duals are those of a larger block, whose further lines hold what is lacking, and
    :func:`nmsolve.dual_bound` does not give that bound.

    Of a block whose absolute scores sum to more than float64 holds, objective, bound and scale are divided by
    the least power of two with which that sum is below 2^1023.
    """

    mask: Tensor
    row_duals: Tensor
    col_duals: Tensor
    objective: Tensor
    bound: Tensor
    scale: Tensor
    resolved: Tensor | None = None

    @property
    def resolved_blocks(self) -> int:
        """How many blocks were solved once more in float64."""
        return 0 if self.resolved is None else int(_gathered(self.resolved).sum())

    @property
    def gap(self) -> Tensor:
        """``(bound - objective) / scale`` of each block: 0 proves that the block's mask is optimal.

        That of an optimal block is at most 1e-6 (1e-12 for float64 scores), which is rounding, unless what it
        keeps is smaller than a rounding error of its largest score in float64: then it says so.
        """
        return relative_gap(self.bound - self.objective, self.scale)

    @property
    def max_gap(self) -> float:
        """The largest gap of any block (0.0 if there is none)."""
        gap = _gathered(self.gap)
        return float(gap.max()) if gap.numel() else 0.0

    @property
    def total_objective(self) -> float:
        """Kept score of the whole tensor."""
        return float(_gathered(self.objective).sum())

    @property
    def total_bound(self) -> float:
        """Upper bound of the kept score of the whole tensor."""
        return float(_gathered(self.bound).sum())

    @property
    def relative_gap(self) -> float:
        """``(total_bound - total_objective)`` relative to the sum of the absolute kept scores."""
        objective, bound, scale = map(_gathered, (self.objective, self.bound, self.scale))
        parts = bound - objective, scale
        missing, kept = (part.sum() for part in parts)
        if not torch.isfinite(kept):
            missing, kept = ((part * _ROOM).sum() for part in parts)
        return float(relative_gap(missing, kept))


# So that vmap, export and other transforms of PyTorch take a solution apart into its tensors.
torch.export.register_dataclass(BlockSolution, serialized_type_name="nmsolve.BlockSolution")


def _gathered(values: Tensor) -> Tensor:
    """All values of a DTensor (this communicates: a number per block), or the tensor itself."""
    return values.full_tensor() if hasattr(values, "full_tensor") else values


def relative_gap(difference: Value, scale: Value) -> Value:
    """``difference / scale``: bound minus objective, relative to the sum of the absolute kept scores.

    0 where nothing is missing, even of nothing; infinite where nothing was kept and something is missing.

    Examples
    --------
    >>> relative_gap(1.0, 4.0), relative_gap(0.0, 0.0)
    (0.25, 0.0)
    """
    if isinstance(difference, Tensor):
        return torch.where(difference == 0, 0.0, difference / scale)
    if difference == 0:
        return 0.0
    return difference / scale if scale else math.copysign(math.inf, difference)


def retained_share(objective: float, score: float) -> float:
    """``objective / score``: the kept share of scores of which none is negative; all of nothing is 1."""
    return objective / score if score else 1.0


def kept_score(scores: Tensor, mask: Tensor, pattern: PatternLike) -> tuple[Tensor, Tensor]:
    """Kept score of every block, and the sum of its absolute kept scores; infinite scores count as 0.

    Parameters
    ----------
    scores, mask : Tensor
        ``(..., rows, cols)`` real, and bool of the same shape.
    pattern : NMPattern, str or (int, int)
        Its ``m`` is the block size.

    Returns
    -------
    objective, scale : Tensor
        float64 ``(..., GR, GC)``; infinite where a sum is beyond float64.

    Examples
    --------
    >>> scores = torch.tensor([[3.0, 1.0], [1.0, -2.0]])
    >>> objective, scale = kept_score(scores, torch.eye(2, dtype=torch.bool), NMPattern(1, 2))
    >>> objective.item(), scale.item()
    (1.0, 5.0)
    """
    grid = grid_of(scores, NMPattern.of(pattern))
    shape = (*scores.shape[:-2], grid.block_rows, grid.block_cols)
    objective = torch.zeros(shape, dtype=torch.float64, device=scores.device)
    scale = torch.zeros_like(objective)
    for a, s, o, t in batched_matrices(scores, mask, objective, scale):
        for b, i, j, r, c in grid.tiles(a.shape[0], _CHUNK):
            kept = split_blocks(a[b, i, j], r, c).double() * split_blocks(s[b, i, j], r, c)
            at = (b, *grid.block_slices(i, j))
            t[at] = kept.abs().sum((-2, -1))
            o[at] = kept.sum((-2, -1))
            if not torch.isfinite(t[at]).all():
                finite = split_blocks(a[b, i, j], r, c).double()
                kept = finite.masked_fill(finite.isinf(), 0) * split_blocks(s[b, i, j], r, c)
                t[at] = kept.abs().sum((-2, -1))
                o[at] = kept.sum((-2, -1))
                o[at] = o[at].where(torch.isfinite(t[at]), (kept * _ROOM).sum((-2, -1)) / _ROOM)
    return objective, scale


def dual_bound(scores: Tensor, row_duals: Tensor, col_duals: Tensor, pattern: PatternLike) -> Tensor:
    r"""Upper bound on the kept score of every block, from prices of its lines.

    For a full block ``D(u, v) = N sum(u) + N sum(v) + sum_ij max(0, A_ij - u_i - v_j)``, in float64. Weak
    duality makes D a bound for *any* u and v, so whoever trusts this function needs to trust no solver. In a
    partial block the lines of the longer side hold at most N, so their prices count as at least 0. A score of
    -inf, which is never kept, adds nothing; one of +inf, which always is but counts as 0, ``-u_i - v_j``.

    Parameters
    ----------
    scores : Tensor
        ``(..., rows, cols)``, real.
    row_duals, col_duals : Tensor
        ``(..., GR, GC, M)``.
    pattern : NMPattern, str or (int, int)

    Returns
    -------
    Tensor
        float64 ``(..., GR, GC)``; infinite where the bound is beyond float64.

    Examples
    --------
    >>> scores = torch.tensor([[3.0, 1.0], [1.0, 2.0]])
    >>> u, v = torch.tensor([[[1.5, 1.0]]]), torch.tensor([[[0.5, 0.5]]])
    >>> dual_bound(scores, u, v, NMPattern(1, 2)).item()
    5.0
    """
    pattern = NMPattern.of(pattern)
    grid = grid_of(scores, pattern)
    bound = torch.zeros(row_duals.shape[:-1], dtype=torch.float64, device=scores.device)
    for a, us, vs, out in batched_matrices(scores, row_duals, col_duals, bound):
        for b, i, j, r, c in grid.tiles(a.shape[0], _CHUNK):
            at = (b, *grid.block_slices(i, j))
            u, v = us[at][..., :r].double(), vs[at][..., :c].double()
            if r > c:
                u = u.clamp(min=0)
            if r < c:
                v = v.clamp(min=0)
            need = demand(r, c, pattern.n)
            parts = split_blocks(a[b, i, j], r, c).double(), u, v
            out[at] = _block_bound(*parts, need)
            if not torch.isfinite(out[at]).all():
                x, y, z = (part * _ROOM for part in parts)
                less = _block_bound(x, y, z, need) / _ROOM
                out[at] = out[at].where(torch.isfinite(out[at]), less)
    return bound


def _block_bound(blocks: Tensor, u: Tensor, v: Tensor, need: Demand) -> Tensor:
    """The sum of :func:`dual_bound` for ``(..., R, C)`` blocks of one shape."""
    surplus = (blocks - u.unsqueeze(-1) - v.unsqueeze(-2)).clamp(min=0)
    bound = need.row * u.sum(-1) + need.col * v.sum(-1) + surplus.sum((-2, -1))
    if torch.isfinite(bound).all():
        return bound
    surplus = torch.where(blocks == math.inf, -u.unsqueeze(-1) - v.unsqueeze(-2), surplus)
    return need.row * u.sum(-1) + need.col * v.sum(-1) + surplus.sum((-2, -1))
