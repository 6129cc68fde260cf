"""Which entries a layer keeps: one call of a public mask function, and a tally of what it cost and proved."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from nmsolve.backends.dispatch import check_mask_method
from nmsolve.errors import NMSolveError
from nmsolve.ops.masks import nm_mask, solve_blocks, transposable_mask
from nmsolve.ops.validation import check_finite
from nmsolve.pattern import NMPattern
from nmsolve.solution import BlockSolution, relative_gap, retained_share

__all__ = ["MaskRule", "Tally"]


@dataclass
class Tally:
    """Sums over the masks of one layer.

    ``score`` is the sum of all scores, ``objective`` that of the kept ones, ``bound`` what no mask of the
    pattern exceeds; ``retained`` and ``gap`` are their ratios, ``max_gap`` the largest gap of one block.
    ``seconds`` is the time spent in the mask functions, over all ``solves`` calls.
    """

    score: float = 0.0
    objective: float = 0.0
    bound: float = 0.0
    max_gap: float = 0.0
    seconds: float = 0.0
    solves: int = 0

    @property
    def retained(self) -> float:
        """``objective / score``; all of nothing is 1."""
        return retained_share(self.objective, self.score)

    @property
    def gap(self) -> float:
        """``(bound - objective) / objective``; 0 proves that no other mask keeps more."""
        return relative_gap(self.bound - self.objective, self.objective)


@dataclass
class MaskRule:
    """A pattern and the way its masks are solved.

    Parameters
    ----------
    pattern : NMPattern, str or (int, int)
        ``"8:16"`` keeps 8 of 16.
    transposable : bool
        N:M along rows and columns of every M x M block, or only along the input of each output.
    method : {"exact", "tsenor", "greedy"}
        Solver of transposable masks; see :func:`nmsolve.transposable_mask`.
    backend : {"auto", "triton", "cpu", "torch"}

    Examples
    --------
    >>> MaskRule("1:2", transposable=False).choose(torch.tensor([[1.0, 3.0, 2.0, 0.0]]))
    tensor([[False,  True,  True, False]])
    """

    pattern: NMPattern
    transposable: bool = True
    method: str = "exact"
    backend: str = "auto"
    tally: Tally = field(default_factory=Tally, repr=False)

    def __post_init__(self) -> None:
        self.pattern = NMPattern.of(self.pattern)
        check_mask_method(self.method, "mask_method")
        if not self.transposable and self.method != "exact":
            raise NMSolveError(
                f"mask_method: {self.method!r} needs transposable=True; ordinary N:M has only one method"
            )

    def choose(self, scores: Tensor, allowed: Tensor | None = None) -> Tensor:
        """The mask of non-negative ``(..., out, in)`` scores, counted in the tally with its certificate.

        Of what ``allowed``, bool of the scores' shape, leaves, the mask that keeps the most: at most N of a
        line, and fewer where no more are allowed or more would keep less, but N in blocks that are allowed as
        a whole. The backend may have to hold blocks
        of twice the size then.
        """
        start = time.perf_counter()
        check_finite(scores)
        if allowed is not None:
            scores = scores * allowed
        if not self.transposable:
            mask = self._ordinary(scores)
            objective = bound = _sum(torch.where(mask, scores, 0))
        else:
            solution = self._solution(scores) if allowed is None else self._solution_within(scores, allowed)
            mask, objective, bound = solution.mask, solution.total_objective, solution.total_bound
            self.tally.max_gap = max(self.tally.max_gap, solution.max_gap)
        if allowed is not None:
            mask = mask & allowed
        self.tally.score += _sum(scores)
        self.tally.objective += objective
        self.tally.bound += bound
        self._count(start)
        return mask

    def step(self, scores: Tensor, allowed: Tensor | None = None) -> Tensor:
        """The mask of an iteration, without its certificate: the tally counts the time alone.

        Scores may have any sign, unless ``allowed`` is given. Then it is what is allowed in the best mask of
        scores that are 0 elsewhere: no more work than without, and a few thousandths less score than the
        best, which :meth:`choose` takes.
        """
        start = time.perf_counter()
        check_finite(scores)
        if allowed is not None:
            scores = scores * allowed
        if self.transposable:
            n, m = self.pattern.n, self.pattern.m
            mask = transposable_mask(scores, n, m, method=self.method, backend=self.backend)
        else:
            mask = self._ordinary(scores)
        if allowed is not None:
            mask = mask & allowed
        self._count(start)
        return mask

    def _ordinary(self, scores: Tensor) -> Tensor:
        return nm_mask(scores, self.pattern.n, self.pattern.m, backend=self.backend)

    def _solution(self, scores: Tensor) -> BlockSolution:
        """The transposable mask with its certificate."""
        n, m = self.pattern.n, self.pattern.m
        return transposable_mask(scores, n, m, method=self.method, backend=self.backend, return_solution=True)

    def _solution_within(self, scores: Tensor, allowed: Tensor) -> BlockSolution:
        """Of scores that are 0 where nothing may be kept, what keeps the most with at most N in each line.

        Blocks that are allowed as a whole keep N in each line, as without an earlier mask.

        The prices of a block for N in each line prove it as well for at most N, if a price can be moved from
        its rows to its columns so that none is negative. Other blocks are solved as corners of larger ones,
        whose K further lines have scores of 0 and hold what is lacking, up to N K entries. If they hold
        fewer, the optimum is that of any K, since the problem is a linear one.
        """
        n, m = self.pattern.n, self.pattern.m
        rows, cols = scores.shape[-2:]
        padded = pad(scores, (0, -cols % m, 0, -rows % m))
        solution = self._solution(padded)
        found = solution.objective, solution.bound, solution.scale
        forbidden = _blocks(pad(~allowed, (0, -cols % m, 0, -rows % m), value=True), m).any(-1).any(-1)
        unproven = forbidden & (solution.row_duals.amin(-1) + solution.col_duals.amin(-1) < 0)
        for further in (max(n, -(-m // 2)), m):
            if not bool(unproven.any()):
                break
            blocks = pad(_blocks(padded, m)[unproven], (0, further, 0, further))
            larger = solve_blocks(blocks, n, method=self.method, backend=self.backend)
            corner = larger.mask[:, :m, :m]
            _blocks(solution.mask, m)[unproven] = corner
            for values, better in zip(found, (larger.objective, larger.bound, larger.scale), strict=True):
                values[unproven] = better
            unproven[unproven.clone()] = n * m - corner.sum((1, 2)) == n * further
        return BlockSolution(solution.mask[..., :rows, :cols], solution.row_duals, solution.col_duals, *found)

    def _count(self, start: float) -> None:
        self.tally.seconds += time.perf_counter() - start
        self.tally.solves += 1


def _blocks(entries: Tensor, m: int) -> Tensor:
    """``(..., GR, GC, M, M)``, a view."""
    return entries.unflatten(-1, (-1, m)).unflatten(-3, (-1, m)).transpose(-3, -2)


def _sum(scores: Tensor) -> float:
    return float(scores.sum(dtype=torch.float64))
