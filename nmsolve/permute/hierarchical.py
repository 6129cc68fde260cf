r"""Orders of rows and columns that let a V:N:M mask keep more score.

Rows are dealt into strips of V and columns into groups of M; strip b and group g keep the columns S[b, g],
and f(pi, sigma) is the kept score of the optimal mask of ``A[pi][:, sigma]``. Two assignments raise it in
turn. Each maximises a *minorant*: values that are never above what the masks solved anew keep, and that are
exact where nothing moves. Staying is one of the choices, so that f never falls.

**Rows.** In strip b, row r keeps ``W[r, b] = sum_g (the N largest of A[r, S[b, g]])``, as long as the strip's
columns stay. The rows are assigned to the places of the strips; then the strips choose their columns anew.

**Columns.** Take slot s of every group, and let T be K - 1 of the columns that strip b keeps of group g,
without the one in slot s. With column j in that slot the strip keeps at least

    L[b, g, j] = max(Z[b, g], max_T f(T) + sum_r max(0, A[r, j] - t[r])),

with t the N-th largest scores of the rows in T, and Z what it keeps without column j. One assignment on
``sum_b L[b, g, j]`` gives every group the column for its slot s. The sums are L1 distances, as in
:mod:`nmsolve.permute.insertions`.

The alternation over rows and columns is that of gyro-permutation (arXiv 2407.20496), which samples and
clusters channels before it assigns them; here every row, and a column of every group, is assigned at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nmsolve.errors import NMSolveError
from nmsolve.ops.assignment import assignment
from nmsolve.ops.hierarchical import HierarchicalSolution, hierarchical_mask
from nmsolve.ops.validation import check_finite, check_scores, describe
from nmsolve.pattern import VNMPattern, VNMPatternLike
from nmsolve.permute.heuristics import deal_columns

__all__ = ["HierarchicalPermutation", "hierarchical_permutation"]

# Rows that are assigned together: an assignment's time grows faster than its size.
_TOGETHER = 1024

# Iterations that find a principal component; near enough is good enough.
_POWERS = 20

# Elements of the largest temporaries.
_CHUNK = 1 << 22


class HierarchicalPermutation(NamedTuple):
    """Orders of rows and columns, and what they are worth.

    ``rows`` and ``columns`` are int64 ``(..., R)`` and ``(..., C)``: position k of the new order holds line
    ``rows[k]``, so that ``scores[rows][:, columns]`` is the reordered matrix. ``before`` and ``after`` are
    the kept scores of the masks in the old and the new order, float64 ``(...)``.
    """

    rows: Tensor
    columns: Tensor
    before: Tensor
    after: Tensor


def hierarchical_permutation(
    scores: Tensor,
    pattern: VNMPatternLike,
    *,
    rows: bool = True,
    columns: bool = True,
    passes: int = 5,
    tolerance: float = 1e-3,
    backend: str = "auto",
) -> HierarchicalPermutation:
    """Orders of the rows and columns under which the V:N:M mask keeps more.

    Parameters
    ----------
    scores : Tensor
        ``(..., rows, cols)``, higher = keep; V divides the rows if they may move, M the columns. Each matrix
        gets its own orders. For layers that share the order of their columns, concatenate their scores along
        the rows, in whole strips, and set ``rows=False``.
    pattern : VNMPattern, str or (int, int, int)
        As in :func:`nmsolve.hierarchical_mask`.
    rows, columns : bool
        Which lines may move.
    passes : int
        At most this many passes over all slots of the columns and all rows.
    tolerance : float
        The search ends when a pass raises the kept score by less than this share of it; 0 makes all passes.
    backend : {"auto", "cpu", "torch"}
        See :func:`nmsolve.hierarchical_mask`.

    Returns
    -------
    HierarchicalPermutation
        ``after >= before`` always. The search starts from the lines as they are or, where that keeps more,
        from dealt columns (:func:`~nmsolve.permute.deal_columns`) and from rows sorted by their first
        principal component.

    Raises
    ------
    NMSolveError
        If an argument is not as described.

    Examples
    --------
    >>> scores = torch.tensor([[3.0, 3.0, 0.0, 0.0], [0.0, 0.0, 2.0, 2.0]])
    >>> found = hierarchical_permutation(scores, nmsolve.VNMPattern(1, 1, 2, columns=1))
    >>> found.before.item(), found.after.item()
    (5.0, 10.0)
    """
    pattern = VNMPattern.of(pattern)
    check_scores(scores)
    check_finite(scores)
    if rows and scores.shape[-2] % pattern.v:
        raise NMSolveError(f"scores: expected rows that v={pattern.v} divides, got {describe(scores)}")
    if columns and scores.shape[-1] % pattern.m:
        raise NMSolveError(f"scores: expected columns that m={pattern.m} divides, got {describe(scores)}")
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 0:
        raise NMSolveError(f"passes: expected an integer of at least 0, got {passes!r}")
    found = []
    for matrix in scores.detach().reshape(-1, *scores.shape[-2:]) if scores.numel() else ():
        search = _Search(matrix, pattern, backend)
        before = search.objective
        search.run(rows, columns, passes, tolerance)
        found.append((*search.orders, before, search.objective))
    lead = scores.shape[:-2]
    if not found:
        still = [torch.arange(size, device=scores.device).expand(*lead, size) for size in scores.shape[-2:]]
        nothing = torch.zeros(lead, dtype=torch.float64)
        return HierarchicalPermutation(still[0], still[1], nothing, nothing.clone())
    row_orders, column_orders, olds, news = zip(*found, strict=True)
    return HierarchicalPermutation(
        torch.stack(row_orders).view(*lead, -1),
        torch.stack(column_orders).view(*lead, -1),
        torch.tensor(olds, dtype=torch.float64).view(lead),
        torch.tensor(news, dtype=torch.float64).view(lead),
    )


class _Search:
    """The matrix in its present order, with its mask's solution; ``orders`` are those of rows and columns."""

    def __init__(self, scores: Tensor, pattern: VNMPattern, backend: str) -> None:
        self.scores, self.pattern, self.backend = scores, pattern, backend
        self.orders = [torch.arange(size, device=scores.device) for size in scores.shape]
        self.solution = self._solve(scores)
        self.generator = torch.Generator().manual_seed(0)

    @property
    def objective(self) -> float:
        return self.solution.total_objective

    def run(self, rows: bool, columns: bool, passes: int, tolerance: float) -> None:
        v, n, m = self.pattern.v, self.pattern.n, self.pattern.m
        columns = columns and n > 0 and self.scores.shape[1] > m
        rows = rows and n > 0 and self.pattern.columns < m and self.scores.shape[0] > v
        if columns and passes:
            self._move(deal_columns(self.scores, m), 1)
        if rows and passes:
            self._move(_alike(self.scores), 0)
        for _ in range(passes):
            before = self.objective
            state = self.scores, list(self.orders), self.solution
            if columns:
                # A group's columns may stand in any order: dealing them to other slots opens other moves.
                self._move(self._shuffled(1, m), 1, always=True)
                for slot in range(m):
                    self._assign_columns(slot)
            if rows:
                self._move(self._shuffled(0, v), 0, always=True)
                self._assign_rows()
            if self.objective < before:
                # Masks of shuffled lines differ by rounding, and where their search ended early.
                self.scores, self.orders, self.solution = state
            if self.objective - before < tolerance * abs(before):
                break

    def _solve(self, scores: Tensor) -> HierarchicalSolution:
        return hierarchical_mask(scores, self.pattern, backend=self.backend, return_solution=True)

    def _move(self, order: Tensor, axis: int, always: bool = False) -> None:
        """Reorders the lines along ``axis`` and solves the masks, if that keeps more."""
        scores = self.scores.index_select(axis, order)
        solution = self._solve(scores)
        if always or solution.total_objective > self.objective:
            self.scores, self.solution = scores, solution
            self.orders[axis] = self.orders[axis][order]

    def _shuffled(self, axis: int, size: int) -> Tensor:
        """An order of all lines that keeps the lines of every strip or group together."""
        lines = torch.arange(self.scores.shape[axis]).view(-1, size)
        within = torch.rand(lines.shape, generator=self.generator).argsort(dim=1)
        return lines.gather(1, within).flatten().to(self.scores.device)

    def _assign_rows(self) -> None:
        """Some rows of every strip at a time, to its places."""
        v = self.pattern.v
        value = _row_values(self.scores, self.solution.columns, self.pattern)
        places = torch.arange(len(value), device=value.device).view(-1, v)
        strips = len(places)
        order = places.clone()
        for part in torch.arange(v, device=value.device).split(max(1, _TOGETHER // strips)):
            # Place (b, i) is a row of the assignment, and any row of the matrix that stands in one a column.
            moved = places[:, part].flatten()
            chosen = assignment(value.T[:, moved].repeat_interleave(len(part), dim=0))
            order[:, part] = moved[chosen].view(strips, -1)
        self._move(order.flatten(), 0)

    def _assign_columns(self, slot: int) -> None:
        m = self.pattern.m
        chosen = assignment(_slot_values(self.scores, self.solution.columns, self.pattern, slot))
        order = torch.arange(self.scores.shape[1], device=self.scores.device).view(-1, m)
        order[:, slot] = order[chosen, slot]
        self._move(order.flatten(), 1)


def _alike(scores: Tensor) -> Tensor:
    """The rows in the order of their first principal component: those with scores in the same columns meet.

    A strip's columns are those of most of its rows, and the others would find no strip to go to.
    """
    centred = scores.double() / scores.double().abs().amax().clamp(min=1e-300)
    centred -= centred.mean(0)
    component = torch.randn(len(scores), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    component = component.to(scores.device)
    for _ in range(_POWERS):
        component = centred @ (centred.T @ component)
        component = component / component.norm().clamp(min=1e-300)
    return component.argsort(stable=True)


def _row_values(scores: Tensor, chosen: Tensor, pattern: VNMPattern) -> Tensor:
    """``W[r, b]`` of the module's docstring, float64 ``(R, S)``; ``chosen`` is ``(S, G, K)``."""
    groups = torch.arange(chosen.shape[1], device=scores.device) * pattern.m
    n = pattern.n
    value = []
    for held in chosen:
        missing = held < 0
        index = (held + groups[:, None]).masked_fill(missing, 0).flatten()
        kept = []
        for part in scores.split(max(1, _CHUNK // max(1, len(index)))):
            lines = part.index_select(1, index).double().view(-1, *held.shape)
            most = lines.masked_fill_(missing, -torch.inf).topk(n, dim=-1).values
            kept.append(most.masked_fill_(most.isneginf(), 0).sum((1, 2)))
        value.append(torch.cat(kept))
    return torch.stack(value, 1)


def _slot_values(scores: Tensor, chosen: Tensor, pattern: VNMPattern, slot: int) -> Tensor:
    """``sum_b L[b, g, j]`` of the module's docstring, float64 ``(G, G)``: group by column in the slot."""
    m, k, n = pattern.m, pattern.columns, pattern.n
    groups = chosen.shape[1]
    device = scores.device
    value = torch.zeros(groups, groups, dtype=torch.float64, device=device)
    every = torch.arange(k, device=device)
    for strip, held in zip(scores.split(pattern.v), chosen, strict=True):
        columns = strip.double().T.unflatten(0, (groups, m)).contiguous()  # (G, M, V)
        height = columns.shape[2]
        moved = columns[:, slot]

        def columns_at(index: Tensor, columns: Tensor = columns) -> Tensor:
            return columns.gather(1, index.unsqueeze(2).expand(*index.shape, columns.shape[2]))

        inside = held == slot
        within = inside.any(1)
        # T leaves out the slot's column where it is kept, and each of the kept columns in turn where not.
        left_out = torch.where(within[:, None], inside.long().argmax(1, keepdim=True), every)
        stays = torch.stack([(every + 1 + i) % k for i in range(k)])[:, : k - 1]  # all but i, for each i
        trial = held.gather(1, stays[left_out].flatten(1)).view(groups, k, k - 1)
        top = columns_at(trial.flatten(1)).view(groups, k, k - 1, height)
        if n < k:
            top = top.topk(n, dim=2).values
            rest, least = top.sum((2, 3)), top[:, :, -1]
            # max(0, a - t) = (a - t + |a - t|) / 2
            distance = torch.cdist(least.flatten(0, 1), moved, p=1).view(groups, k, groups)
            gain = (moved.sum(1) - least.sum(2, keepdim=True) + distance) / 2
        else:
            rest, gain = top.sum((2, 3)), moved.sum(1).expand(groups, k, groups)
        best = (rest[:, :, None] + gain).amax(1)
        # Without the column: what is kept now, or the best other one in its place.
        now = columns_at(held).topk(n, dim=1).values.sum((1, 2))
        other = (columns - least[:, :1]).clamp(min=0).sum(2) if n < k else columns.sum(2)
        other = other.scatter(1, held, -torch.inf)
        other[:, slot] = -torch.inf
        without = torch.where(within, rest[:, 0] + other.amax(1), now)
        value += torch.maximum(best, without[:, None])
    return value
