r"""Row and column orders that let a *transposable* mask keep more score.

For an order pi of the rows and sigma of the columns let f(pi, sigma) be the kept score of the optimal
transposable mask of ``A[pi][:, sigma]``, a sum over M x M blocks. Both orders are free wherever a layer's
outputs and inputs can be reordered, and f is what they should raise.

Fixed masks and one assignment of all columns do not get anywhere: the optimal masks have been chosen for the
columns as they stand, so that staying is nearly always the best assignment. The step used here therefore
*re-solves the masks for every move*. Take one slot s of every block column g. With column j in it, block
(b, g) keeps

    E[b, g, j] = max over N-subsets S of the block's rows of  V[b, g, S] + sum_{i in S} A[b M + i, j],

where ``V[b, g, S]`` is the best that the block's other M - 1 columns keep when the rows in S give one of
their N entries to slot s: one exact mask with that column forced, whatever j is. ``F_s[g, j] = sum_b E[b, g,
j]`` is then the exact kept score of block column g with column j, and one linear assignment on F_s finds the
best of all ``(C / M)!`` ways to give the columns in slot s to the block columns, *with every mask optimal for
it*. The subsets are enumerated while there are at most 70 (2:4, 4:8, 1:M); beyond that F_s is replaced by its
dual bound

    E[b, g, j] <= const + sum of the N largest of A[b M + i, j] - u[b, g, i]

with the row duals u of the present masks, exact for the column that is there.

**Monotone.** The assignment is a permutation of the block columns and falls into cycles. Cycles touch
disjoint block columns, so that their gains, taken from masks solved anew, add up; a cycle is made only if its
gain is positive. So f rises with every change, whether F_s was exact or a bound; as there are finitely many
orders the search ends. Rows are columns of the transposed matrix, whose transposable masks are the transposed
masks.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from nmsolve.errors import NMSolveError
from nmsolve.ops.assignment import assignment
from nmsolve.ops.masks import solve_blocks, transposable_mask
from nmsolve.ops.validation import check_finite, check_scores, describe
from nmsolve.pattern import NMPattern, PatternLike
from nmsolve.permute.heuristics import deal_columns
from nmsolve.solution import BlockSolution

__all__ = ["TransposablePermutation", "transposable_permutation"]

# Above this many row subsets (those of 4:8) insertions are bounded by duals, not enumerated.
_MAX_SUBSETS = 70

# Elements of the blocks that are solved together.
_CHUNK = 1 << 20


class TransposablePermutation(NamedTuple):
    """Orders of rows and columns, and what they are worth.

    ``rows`` and ``columns`` are int64 ``(..., R)`` and ``(..., C)``: position k of the new order holds line
    ``rows[k]``, so that ``scores[rows][:, columns]`` is the reordered matrix. ``before`` and ``after`` are
    the kept scores of the optimal masks in the old and the new order, float64 ``(...)``.
    """

    rows: Tensor
    columns: Tensor
    before: Tensor
    after: Tensor


def transposable_permutation(
    scores: Tensor,
    n: int | PatternLike,
    m: int | None = None,
    *,
    rows: bool = True,
    columns: bool = True,
    passes: int = 10,
    tolerance: float = 1e-4,
    restarts: int = 0,
    seed: int = 0,
    backend: str = "auto",
) -> TransposablePermutation:
    """Orders of the rows and columns under which the optimal transposable mask keeps more.

    Parameters
    ----------
    scores : Tensor
        ``(..., rows, cols)``, higher = keep; ``m`` divides both. Each matrix gets its own orders. For layers
        that share the order of their columns, concatenate their scores along the rows and set ``rows=False``.
    n, m : int
        Pattern, or in one piece, as in :func:`nmsolve.transposable_mask`.
    rows, columns : bool
        Which lines may move.
    passes : int
        At most this many passes over all slots of the columns and of the rows.
    tolerance : float
        A search ends when a pass raises the kept score by less than this share of it.
    restarts : int
        Further searches, the first from dealt lines (see :func:`~nmsolve.permute.deal_columns`), the others
        from random orders; the best result counts.
    seed : int
        Of the random orders.
    backend : {"auto", "triton", "cpu", "torch"}
        See :func:`nmsolve.transposable_mask`.

    Returns
    -------
    TransposablePermutation
        ``after >= before`` always.

    Raises
    ------
    NMSolveError
        If an argument is not as described.

    Examples
    --------
    >>> scores = torch.tensor([[3.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    >>> found = transposable_permutation(scores, 1, 2)
    >>> found.before.item(), found.after.item()
    (3.0, 6.0)
    """
    pattern = NMPattern.of(n, m)
    m = pattern.m
    check_scores(scores)
    check_finite(scores)
    if scores.shape[-1] % m or scores.shape[-2] % m:
        raise NMSolveError(f"scores: expected rows and columns that m={m} divides, got {describe(scores)}")
    if passes < 0 or restarts < 0:
        raise NMSolveError(f"passes, restarts: expected 0 or more, got {passes!r} and {restarts!r}")
    flat = scores.detach().reshape(-1, *scores.shape[-2:])
    generator = torch.Generator().manual_seed(seed)
    found = []
    for matrix in flat:
        search = _Search(matrix, pattern, backend)
        before = search.objective
        best = search.run(rows, columns, passes, tolerance)
        for restart in range(restarts):
            orders = _start(matrix, m, restart, generator)
            other = _Search(matrix, pattern, backend)
            if rows:
                other.move(orders[0], 0)
            if columns:
                other.move(orders[1], 1)
            best = max(best, other.run(rows, columns, passes, tolerance), key=lambda s: s.objective)
        found.append((best.orders[0], best.orders[1], before, best.objective))
    lead = scores.shape[:-2]
    if not found:
        empty = [
            torch.zeros(*lead, size, dtype=torch.int64, device=scores.device) for size in scores.shape[-2:]
        ]
        nothing = torch.zeros(lead, dtype=torch.float64)
        return TransposablePermutation(empty[0], empty[1], nothing, nothing.clone())
    row_orders, column_orders, olds, news = zip(*found, strict=True)
    return TransposablePermutation(
        torch.stack(row_orders).view(*lead, -1),
        torch.stack(column_orders).view(*lead, -1),
        torch.tensor(olds, dtype=torch.float64).view(lead),
        torch.tensor(news, dtype=torch.float64).view(lead),
    )


def _start(scores: Tensor, m: int, restart: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    if restart == 0:
        return deal_columns(scores.T, m), deal_columns(scores, m)
    orders = (torch.randperm(size, generator=generator).to(scores.device) for size in scores.shape)
    return next(orders), next(orders)


class _Search:
    """The matrix in its present order, with the masks' solution; ``orders`` are those of rows and columns."""

    def __init__(self, scores: Tensor, pattern: NMPattern, backend: str) -> None:
        self.scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        self.pattern = pattern
        self.backend = backend
        self.orders = [torch.arange(size, device=scores.device) for size in scores.shape]
        self.solution = self._solve(self.scores)

    @property
    def objective(self) -> float:
        return self.solution.total_objective

    def run(self, rows: bool, columns: bool, passes: int, tolerance: float) -> _Search:
        """Passes over the slots until one gains too little; returns itself."""
        sides = [axis for axis, wanted in ((1, columns), (0, rows)) if wanted and self._can_move(axis)]
        generator = torch.Generator().manual_seed(0)
        for turn in range(passes):
            before = self.objective
            state = self.scores, list(self.orders), self.solution
            for axis in sides:
                if turn:
                    # A block's lines may stand in any order: dealing them to other slots opens other moves.
                    self.move(self._shuffled(axis, generator), axis)
                for slot in range(self.pattern.m):
                    self._step(axis, slot)
            if self.objective < before:
                # Shuffled blocks solved anew may differ by rounding where no step gained anything.
                self.scores, self.orders, self.solution = state
            if self.objective - before <= tolerance * abs(before):
                break
        return self

    def move(self, order: Tensor, axis: int) -> None:
        """Reorders the lines along ``axis`` and solves the masks."""
        self.scores = self.scores.index_select(axis, order)
        self.orders[axis] = self.orders[axis][order]
        self.solution = self._solve(self.scores)

    def _shuffled(self, axis: int, generator: torch.Generator) -> Tensor:
        """An order of all lines that keeps every group's lines together."""
        lines = torch.arange(self.scores.shape[axis]).view(-1, self.pattern.m)
        within = torch.rand(lines.shape, generator=generator).argsort(dim=1)
        return lines.gather(1, within).flatten().to(self.scores.device)

    def _can_move(self, axis: int) -> bool:
        n, m = self.pattern.n, self.pattern.m
        return 0 < n < m and self.scores.shape[axis] > m and self.scores.numel() > 0

    def _solve(self, scores: Tensor) -> BlockSolution:
        n, m = self.pattern.n, self.pattern.m
        return transposable_mask(scores, n, m, backend=self.backend, return_solution=True)

    def _step(self, axis: int, slot: int) -> None:
        """One assignment of the lines in ``slot``; only the cycles that raise the objective are made."""
        n, m = self.pattern.n, self.pattern.m
        scores = self.scores if axis == 1 else self.scores.T
        if math.comb(m, n) <= _MAX_SUBSETS:
            values = _insertion_values(scores, self.pattern, slot, self.backend)
        else:
            duals = self.solution.row_duals if axis == 1 else self.solution.col_duals.transpose(0, 1)
            values = _bounded_values(scores, self.pattern, slot, duals)
        chosen = assignment(values).cpu()
        kept = self.solution.objective.sum(1 - axis).cpu()
        trial = self._solve(self.scores.index_select(axis, self._order(chosen, axis, slot)))
        gain = trial.objective.sum(1 - axis).cpu() - kept
        cycle = _cycles(chosen)
        total = torch.zeros_like(gain).index_add_(0, cycle, gain)
        made = total[cycle] > 1e-12 * kept.abs().max()
        if made.any():
            still = torch.arange(len(chosen))
            self.move(self._order(torch.where(made, chosen, still), axis, slot), axis)

    def _order(self, chosen: Tensor, axis: int, slot: int) -> Tensor:
        """The order of all lines when group g takes the line in ``slot`` of group ``chosen[g]``."""
        order = torch.arange(self.scores.shape[axis]).view(-1, self.pattern.m).clone()
        order[:, slot] = order[chosen, slot]
        return order.flatten().to(self.scores.device)


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


def _subsets(n: int, m: int, device: torch.device) -> Tensor:
    """``(K, m)`` float32: the indicator rows of all n-subsets of m."""
    chosen = torch.tensor(list(itertools.combinations(range(m), n)), device=device)
    return torch.zeros(len(chosen), m, device=device).scatter_(1, chosen, 1)


def _insertion_values(scores: Tensor, pattern: NMPattern, slot: int, backend: str) -> Tensor:
    """``F_s[g, j]`` of the module's docstring: float64 ``(G, G)``, exact."""
    n, m = pattern.n, pattern.m
    subsets = _subsets(n, m, scores.device).to(scores.dtype)
    blocks = scores.unflatten(1, (-1, m)).unflatten(0, (-1, m)).transpose(1, 2)  # (b, g, m, m)
    moved = scores[:, slot::m].unflatten(0, (-1, m))  # (b, m, j)
    bands, groups = blocks.shape[:2]
    values = torch.zeros(groups, groups, dtype=torch.float64, device=scores.device)
    step = max(1, _CHUNK // (groups * len(subsets) * m * m))
    for first in range(0, bands, step):
        rest = _forced_scores(blocks[first : first + step], subsets, n, slot, backend)
        for kept, column in zip(rest, subsets @ moved[first : first + step], strict=True):
            best = kept[0][:, None] + column[0]
            for k in range(1, len(subsets)):
                torch.maximum(best, kept[k][:, None] + column[k], out=best)
            values += best
    return values


def _forced_scores(blocks: Tensor, subsets: Tensor, n: int, slot: int, backend: str) -> Tensor:
    """``V[b, S, g]``: what the other columns of each block keep when ``slot`` takes exactly the rows in S."""
    bands, groups, m, _ = blocks.shape
    low, high = blocks.amin((2, 3), keepdim=True), blocks.amax((2, 3), keepdim=True)
    # An entry of the forced column outweighs whatever an exchange of entries elsewhere in the block can gain.
    weight = 2 * m * (high - low)
    trial = (blocks - low).unsqueeze(1).repeat(1, len(subsets), 1, 1, 1)
    trial[..., slot] = (weight * subsets.T).permute(0, 3, 1, 2)
    kept = solve_blocks(trial.flatten(0, 2), n, backend=backend).objective.view(bands, -1, groups)
    constant = n * ((m - 1) * low.double() - weight.double())
    return (kept + constant.view(bands, 1, groups)).to(blocks.dtype)


def _bounded_values(scores: Tensor, pattern: NMPattern, slot: int, row_duals: Tensor) -> Tensor:
    """The dual bound on ``F_s[g, j]`` up to a constant of each g; ``row_duals`` are ``(b, g, m)``."""
    n, m = pattern.n, pattern.m
    moved = scores[:, slot::m].unflatten(0, (-1, m))
    values = torch.zeros(moved.shape[2], moved.shape[2], dtype=torch.float64, device=scores.device)
    for columns, duals in zip(moved, row_duals, strict=True):
        reduced = columns.T[None, :, :] - duals[:, None, :]
        values += reduced.topk(n, dim=-1).values.sum(-1)
    return values
