"""The mask solvers as operators; see :mod:`nmsolve.ops.registration`.

Their real implementations check the values of the scores and run a backend. Whatever can be checked without
the values is checked by :mod:`nmsolve.ops.masks`, the door in front of these operators, so that it raises
while a model is traced.

Duals are float64 for float64 scores and float32 for all others, whatever a backend computes in. Outputs are
contiguous, but for the mask of :func:`nm_mask`, whose groups' dimension is the innermost.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from math import inf
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from nmsolve.backends.dispatch import MASK_METHODS, Backend, GroupMaskSolver, select
from nmsolve.blocks import batched_matrices
from nmsolve.ops.certificates import enough, fit, tighten
from nmsolve.ops.registration import register
from nmsolve.ops.validation import check_all_finite, check_finite_duals
from nmsolve.ops.wider import coarse_blocks, solve_wider, worked_in_float32
from nmsolve.pattern import NMPattern
from nmsolve.solution import BlockResult, kept_score

__all__ = [
    "nm_mask",
    "solution_shapes",
    "transposable_mask",
    "transposable_masks",
    "transposable_solution",
    "transposable_solutions",
]

# The tensors of a solution, in the order of BlockSolution's fields.
Solution = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def solution_shapes(shape: Sequence[int], m: int) -> list[tuple[int, ...]]:
    """The shapes of a solution's tensors for scores of ``shape``.

    Examples
    --------
    >>> solution_shapes((2, 8, 10), 4)
    [(2, 8, 10), (2, 2, 3, 4), (2, 2, 3, 4), (2, 2, 3), (2, 2, 3), (2, 2, 3)]
    """
    *lead, rows, cols = shape
    blocks = (*lead, -(-rows // m), -(-cols // m))
    return [tuple(shape), (*blocks, m), (*blocks, m), blocks, blocks, blocks]


# --- outputs without values: of fake tensors, and of empty ones ---------------------------------------------


def _blank_mask(scores: Tensor) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.bool)


def _blank_solution(scores: Tensor, m: int) -> Solution:
    dtypes = (torch.bool, _dual_dtype(scores), _dual_dtype(scores), *[torch.float64] * 3)
    shapes = solution_shapes(scores.shape, m)
    mask, u, v, objective, bound, scale = (
        scores.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    return mask, u, v, objective, bound, scale


def _blank_lines(scores: Tensor, dim: int) -> Tensor:
    lines = scores.movedim(dim, -1)
    return lines.new_empty(lines.shape, dtype=torch.bool).movedim(-1, dim)


def _dual_dtype(scores: Tensor) -> torch.dtype:
    return torch.promote_types(scores.dtype, torch.float32)


# --- running backends ---------------------------------------------------------------------------------------


def _masks(
    scores: Sequence[Tensor], warm: Sequence[Tensor], n: int, m: int, method: str, backend: str, *options: Any
) -> list[Tensor]:
    """One mask per matrix; ``warm`` are the duals of a single matrix, or nothing."""
    pattern = NMPattern(n, m)
    runners, lowest = _checked(scores, warm, backend, m)
    if method == "exact":
        masks = [result.mask for result in _exact(runners, scores, warm, pattern, False)]
        for runner, matrix, low, mask in zip(runners, scores, lowest, masks, strict=True):
            if low < 0 and worked_in_float32(matrix, runner):
                solve_wider(runner, matrix, mask, coarse_blocks(matrix, pattern), pattern)
        return masks
    return _approximate(runners, scores, pattern, method, *options)


def _solutions(
    scores: Sequence[Tensor], warm: Sequence[Tensor], n: int, m: int, method: str, backend: str, *options: Any
) -> list[Solution]:
    """One solution per matrix. That of an approximate method has the exact one's duals and bound."""
    pattern = NMPattern(n, m)
    runners, lowest = _checked(scores, warm, backend, m)
    results = _exact(runners, scores, warm, pattern, True)
    masks = None if method == "exact" else _approximate(runners, scores, pattern, method, *options)
    solutions = []
    for i, (matrix, low, (mask, u, v, objective, bound)) in enumerate(
        zip(scores, lowest, results, strict=True)
    ):
        assert u is not None
        assert v is not None
        assert objective is not None
        assert bound is not None
        u, v = u.to(_dual_dtype(matrix)), v.to(_dual_dtype(matrix))
        if low >= 0:
            scale = objective.clone()
        else:
            objective, scale = kept_score(matrix, mask, pattern)
        tighten(matrix, mask, (u, v), objective, bound, scale, pattern)
        if worked_in_float32(matrix, runners[i]):
            short = bound - objective > enough(matrix.dtype) * scale
            if low < 0:
                short |= coarse_blocks(matrix, pattern)
            better = solve_wider(runners[i], matrix, mask, short, pattern)
            if better.any():
                objective, scale = kept_score(matrix, mask, pattern)
                tighten(matrix, mask, (u, v), objective, bound.masked_fill_(better, inf), scale, pattern)
        best = mask
        if masks is not None:
            mask = masks[i]
            objective, scale = kept_score(matrix, mask, pattern)
            bound = torch.maximum(bound, objective)
        fit(matrix, best, mask, (u, v), objective, bound, scale, pattern)
        solutions.append((mask, u, v, objective, bound, scale))
    return solutions


def _checked(
    scores: Sequence[Tensor], warm: Sequence[Tensor], backend: str, m: int
) -> tuple[list[Backend], list[float]]:
    """Each matrix's backend and smallest score; raises before any work if one cannot be solved."""
    runners = [select(backend, matrix.device, m) for matrix in scores]
    lowest = check_all_finite(scores)
    check_finite_duals(warm)
    return runners, lowest


def _exact(
    runners: Sequence[Backend],
    scores: Sequence[Tensor],
    warm: Sequence[Tensor],
    pattern: NMPattern,
    want_solution: bool,
) -> list[BlockResult]:
    """Optimal masks, with duals, objective and bound when asked."""
    views = [
        _View(index, part, (duals[0], duals[1]) if duals else None)
        for index, matrix in enumerate(scores)
        if matrix.numel()
        for part, *duals in batched_matrices(matrix, *warm)
    ]
    fields = 5 if want_solution else 1
    found: list[list[tuple[Any, ...]]] = [[] for _ in scores]
    for view, result in zip(views, _solve_views(runners, views, pattern, want_solution), strict=True):
        found[view.matrix].append(result[:fields])
    results = []
    for matrix, parts in zip(scores, found, strict=True):
        if parts:
            joined = [_joined(field, matrix.shape[:-2]) for field in zip(*parts, strict=True)]
        else:
            joined = list(_blank_solution(matrix, pattern.m)[:fields])
        results.append(BlockResult(*joined))
    return results


class _View(NamedTuple):
    matrix: int  # the one that it belongs to
    scores: Tensor  # (batch, rows, cols)
    warm: tuple[Tensor, Tensor] | None


def _solve_views(
    runners: Sequence[Backend], views: Sequence[_View], pattern: NMPattern, want_solution: bool
) -> list[BlockResult]:
    """One result per view; those of a dtype and device in one call where their backend takes many."""
    takes_many = {row for row in set(runners) if len(views) > 1 and isinstance(row.masks, GroupMaskSolver)}
    groups: dict[tuple[Backend, torch.device, torch.dtype], list[int]] = {}
    solved: dict[int, BlockResult] = {}
    for place, (index, part, warm) in enumerate(views):
        if warm is None and runners[index] in takes_many:
            groups.setdefault((runners[index], part.device, part.dtype), []).append(place)
        else:
            solved[place] = runners[index].masks.exact(part, pattern, warm=warm, want_solution=want_solution)
    for (runner, *_), places in groups.items():
        parts = [views[place].scores for place in places]
        solver = cast(GroupMaskSolver, runner.masks)
        results = solver.exact_group(parts, pattern, warm=None, want_solution=want_solution)
        solved.update(zip(places, results, strict=True))
    return [solved[place] for place in range(len(views))]


def _approximate(
    runners: Sequence[Backend],
    scores: Sequence[Tensor],
    pattern: NMPattern,
    method: str,
    iterations: int,
    tau: float,
) -> list[Tensor]:
    given = {"iterations": iterations, "tau": tau}
    options = {name: given[name] for name in MASK_METHODS[method]}

    def solve(runner: Backend, part: Tensor) -> Tensor:
        mask: Tensor = getattr(runner.masks, method)(part, pattern, **options)
        return mask

    return [
        _joined([solve(runner, part) for (part,) in batched_matrices(matrix)], matrix.shape[:-2])
        if matrix.numel()
        else _blank_mask(matrix)
        for runner, matrix in zip(runners, scores, strict=True)
    ]


def _joined(parts: Sequence[Any], lead: torch.Size) -> Tensor:
    """The parts of :func:`batched_matrices` as one tensor with the leading dimensions back."""
    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return whole.view(*lead, *whole.shape[1:])


def _lines(scores: Tensor, n: int, m: int, dim: int, backend: str) -> Tensor:
    """The ordinary mask, groups along ``dim``."""
    pattern = NMPattern(n, m)
    (runner,), _ = _checked([scores], (), backend, m)
    if scores.numel() == 0:
        return _blank_lines(scores, dim)
    moved = scores.movedim(dim, -1)
    lines = torch.atleast_2d(moved)
    parts = [runner.masks.ordinary(part, pattern) for (part,) in batched_matrices(lines)]
    return _joined(parts, lines.shape[:-2]).view(moved.shape).movedim(-1, dim)


# --- operators ----------------------------------------------------------------------------------------------

_SINGLE = "Tensor scores, Tensor? row_duals, Tensor? col_duals"
_OPTIONS = "int n, int m, str method, str backend, int iterations, float tau"


def _given(*duals: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in duals if tensor is not None]


transposable_mask = register(
    "transposable_mask",
    f"({_SINGLE}, {_OPTIONS}) -> Tensor",
    lambda scores, u, v, *options: _masks([scores], _given(u, v), *options)[0],
    lambda scores, *_: _blank_mask(scores),
)
transposable_solution = register(
    "transposable_solution",
    f"({_SINGLE}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda scores, u, v, *options: _solutions([scores], _given(u, v), *options)[0],
    lambda scores, u, v, n, m, *_: _blank_solution(scores, m),
)
transposable_masks = register(
    "transposable_masks",
    f"(Tensor[] scores, {_OPTIONS}) -> Tensor[]",
    lambda scores, *options: _masks(scores, (), *options),
    lambda scores, *_: [_blank_mask(matrix) for matrix in scores],
)
# The tensors of the first matrix's solution, then those of the second's, and so on.
transposable_solutions = register(
    "transposable_solutions",
    f"(Tensor[] scores, {_OPTIONS}) -> Tensor[]",
    lambda scores, *options: list(chain.from_iterable(_solutions(scores, (), *options))),
    lambda scores, n, m, *_: [part for matrix in scores for part in _blank_solution(matrix, m)],
)
# dim is negative, so that it means the same with a batch dimension in front.
nm_mask = register(
    "nm_mask",
    "(Tensor scores, int n, int m, int dim, str backend) -> Tensor",
    _lines,
    lambda scores, n, m, dim, backend: _blank_lines(scores, dim),
)
