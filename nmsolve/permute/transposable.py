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
their N entries to slot s. ``F_s[g, j] = sum_b E[b, g, j]`` is then the kept score of block column g with
column j, and one linear assignment on F_s finds the best of all ``(C / M)!`` ways to give the columns in slot
s to the block columns, *with every mask optimal for it*.

V comes from the present masks. Let S0 be the rows that one of them keeps in the slot, and D[i, k] what the
other columns gain when row i joins S0 and row k leaves it: the best path of exchanges between the rows, all
of which Floyd and Warshall's recursion finds at once. V(S0) plus the best bijection from S to S0 is V(S)
where S is one exchange away, and a bound on it elsewhere (:func:`nmsolve.backends.shared.exchange_values`).
The subsets are enumerated while there are at most 70 (2:4, 4:8, 1:M); beyond that F_s is replaced by its dual
bound

    E[b, g, j] <= const + sum of the N largest of A[b M + i, j] - u[b, g, i]

with the row duals u of the present masks, exact for the column that is there.

**Monotone.** The assignment is a permutation of the block columns and falls into cycles. Cycles touch
disjoint block columns, so that their gains, taken from masks solved anew, add up; a cycle is made only if its
gain is positive. So f rises with every change, although F_s is a bound; as there are finitely many orders
the search ends. Rows are columns of the transposed matrix, whose transposable masks are the transposed masks.

**Windows.** The values of G block columns take time as G squared. Where there are many, they are dealt into
windows at random, anew for every slot, each with its own assignment.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nmsolve.errors import NMSolveError
from nmsolve.ops.validation import check_finite, check_scores, describe
from nmsolve.pattern import NMPattern, PatternLike
from nmsolve.permute.heuristics import deal_columns
from nmsolve.permute.side import MAX_SUBSETS, Side
from nmsolve.permute.windows import check_window

__all__ = ["TransposablePermutation", "transposable_permutation"]

# Of a window by default, the groups squared times the choices of rows in a slot: 1,290 groups at 2:4, 377 at
# 4:8. Of a large matrix their values cost about as much as its masks, or twice as much.
_WINDOW_VALUES = 10_000_000


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
    window: int | None = None,
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
    window : int, optional
        Lines that are given to groups together, at least two groups; all where they are no more. If left out,
        5,160 at 2:4 and 3,016 at 4:8.
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
    size = check_window(window, pattern, _window_groups(pattern))
    flat = scores.detach().reshape(math.prod(scores.shape[:-2]), *scores.shape[-2:])
    generator = torch.Generator().manual_seed(seed)
    found = []
    for matrix in flat:
        search = _Search(matrix, pattern, backend, size)
        before = search.objective
        best = search.run(rows, columns, passes, tolerance)
        for restart in range(restarts):
            orders = _start(matrix, m, restart, generator)
            other = _Search(matrix, pattern, backend, size)
            other.move({axis: orders[axis] for axis, wanted in ((0, rows), (1, columns)) if wanted})
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


def _window_groups(pattern: NMPattern) -> int:
    """Groups of a window by default; where insertions are bounded, a value costs sorting the block's rows."""
    choices = math.comb(pattern.m, pattern.n)
    return max(16, math.isqrt(_WINDOW_VALUES // (choices if choices <= MAX_SUBSETS else 16 * pattern.m)))


def _start(scores: Tensor, m: int, restart: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    if restart == 0:
        return deal_columns(scores.T, m), deal_columns(scores, m)
    orders = (torch.randperm(size, generator=generator).to(scores.device) for size in scores.shape)
    return next(orders), next(orders)


class _Search:
    """The matrix with its present orders of rows and columns, and what the optimal mask keeps."""

    def __init__(self, scores: Tensor, pattern: NMPattern, backend: str, size: int) -> None:
        self.scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        self.pattern = pattern
        self.backend = backend
        self.size = size
        self.orders = [torch.arange(size, device=scores.device) for size in scores.shape]
        self.side = Side(self.scores.T, None, pattern, backend, size)
        self.axis = 1
        self.objective = float(self.side.kept.sum())

    def run(self, rows: bool, columns: bool, passes: int, tolerance: float) -> _Search:
        """Passes over the slots until one gains too little; returns itself."""
        sides = [axis for axis, wanted in ((1, columns), (0, rows)) if wanted and self._can_move(axis)]
        generator = torch.Generator().manual_seed(0)
        for turn in range(passes):
            gained = 0.0
            for axis in sides:
                self._turn_to(axis)
                if turn:
                    # A block's lines may stand in any order: dealing them to other slots opens other moves.
                    self.side.shuffle(generator)
                gained += sum(self.side.step(slot, generator) for slot in range(self.pattern.m))
            self.objective += gained
            if gained <= tolerance * abs(self.objective):
                break
        self._settle()
        return self

    def move(self, orders: dict[int, Tensor]) -> None:
        """Reorders the lines along these axes and solves the masks."""
        for axis, order in orders.items():
            self.scores = self.scores.index_select(axis, order)
            self.orders[axis] = self.orders[axis][order]
        self.side = Side(self.scores.T, None, self.pattern, self.backend, self.size)
        self.axis = 1
        self.objective = float(self.side.kept.sum())

    def _settle(self) -> None:
        """Takes the order over that the lines have found."""
        order = self.side.order.flatten()
        self.scores = self.scores.index_select(self.axis, order)
        self.orders[self.axis] = self.orders[self.axis][order]

    def _turn_to(self, axis: int) -> None:
        if axis == self.axis:
            return
        self._settle()
        mask = self.side.mask.index_select(0, self.side.order.flatten())
        lines = self.scores if axis == 0 else self.scores.T
        self.side = Side(lines, mask.T, self.pattern, self.backend, self.size)
        self.axis = axis

    def _can_move(self, axis: int) -> bool:
        n, m = self.pattern.n, self.pattern.m
        return 0 < n < m and self.scores.shape[axis] > m and self.scores.numel() > 0
