"""Which entries a layer keeps: one call of a public mask function, and a tally of what it cost and proved."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nmsolve.backends.dispatch import check_mask_method
from nmsolve.errors import NMSolveError
from nmsolve.ops.masks import nm_mask, transposable_mask
from nmsolve.ops.validation import check_finite
from nmsolve.pattern import NMPattern
from nmsolve.solution import relative_gap, retained_share

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

    def choose(self, scores: Tensor) -> Tensor:
        """The mask of non-negative ``(..., out, in)`` scores, counted in the tally with its certificate."""
        start = time.perf_counter()
        check_finite(scores)
        n, m = self.pattern.n, self.pattern.m
        if self.transposable:
            solution = transposable_mask(
                scores, n, m, method=self.method, backend=self.backend, return_solution=True
            )
            mask, objective, bound = solution.mask, solution.total_objective, solution.total_bound
            self.tally.max_gap = max(self.tally.max_gap, solution.max_gap)
        else:
            mask = nm_mask(scores, n, m, backend=self.backend)
            objective = bound = _sum(torch.where(mask, scores, 0))
        self.tally.score += _sum(scores)
        self.tally.objective += objective
        self.tally.bound += bound
        self._count(start)
        return mask

    def step(self, scores: Tensor) -> Tensor:
        """The mask of scores of any sign without its certificate: the tally counts the time alone."""
        start = time.perf_counter()
        check_finite(scores)
        n, m = self.pattern.n, self.pattern.m
        if self.transposable:
            mask = transposable_mask(scores, n, m, method=self.method, backend=self.backend)
        else:
            mask = nm_mask(scores, n, m, backend=self.backend)
        self._count(start)
        return mask

    def _count(self, start: float) -> None:
        self.tally.seconds += time.perf_counter() - start
        self.tally.solves += 1


def _sum(scores: Tensor) -> float:
    return float(scores.sum(dtype=torch.float64))
