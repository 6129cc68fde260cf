"""The mask solvers as operators; see :mod:`nmsolve.ops.registration`.

Their real implementations check the values of the scores and run a backend. Whatever can be checked without
the values is checked by :mod:`nmsolve.ops.masks`, the door in front of these operators, so that it raises
while a model is traced.

Duals are float64 for float64 scores and float32 for all others, whatever a backend computes in. Outputs are
contiguous, but for the mask of :func:`nm_mask`, whose groups' dimension is the innermost.

The overloads ``default`` are those of earlier versions, for programs that were exported with them.
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
from nmsolve.ops.validation import check_finite_duals, check_numbers
from nmsolve.ops.wider import (
    Certificates,
    coarse_blocks,
    finite_part,
    infinite_blocks,
    over_blocks,
    refuse_short_groups,
    solve_wider,
    stand_ins,
    violating_blocks,
)
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
Solution = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def solution_shapes(shape: Sequence[int], m: int) -> list[tuple[int, ...]]:
    """The shapes of a solution's tensors for scores of ``shape``.

    Examples
    --------
    >>> solution_shapes((2, 8, 10), 4)
    [(2, 8, 10), (2, 2, 3, 4), (2, 2, 3, 4), (2, 2, 3), (2, 2, 3), (2, 2, 3), (2, 2, 3)]
    """
    *lead, rows, cols = shape
    blocks = (*lead, -(-rows // m), -(-cols // m))
    return [tuple(shape), (*blocks, m), (*blocks, m), blocks, blocks, blocks, blocks]


# --- outputs without values: of fake tensors, and of empty ones ---------------------------------------------


def _blank_mask(scores: Tensor) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.bool)


def _blank_solution(scores: Tensor, m: int) -> Solution:
    dtypes = (torch.bool, _dual_dtype(scores), _dual_dtype(scores), *[torch.float64] * 3, torch.bool)
    shapes = solution_shapes(scores.shape, m)
    mask, u, v, objective, bound, scale, resolved = (
        scores.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    return mask, u, v, objective, bound, scale, resolved


def _blank_lines(scores: Tensor, dim: int) -> Tensor:
    lines = scores.movedim(dim, -1)
    return lines.new_empty(lines.shape, dtype=torch.bool).movedim(-1, dim)


def _dual_dtype(scores: Tensor) -> torch.dtype:
    return torch.promote_types(scores.dtype, torch.float32)


# --- running backends ---------------------------------------------------------------------------------------


class _Problem(NamedTuple):
    """A matrix as backends take it, all of it finite, and what is left for :mod:`nmsolve.ops.wider`."""

    name: str
    runner: Backend
    scores: Tensor  # as they came
    finite: Tensor  # the same tensor where all are finite
    infinite: Tensor | None  # the blocks with infinite scores, if there are any
    low: float  # the least of the finite ones

    def again(self, pattern: NMPattern) -> Tensor | None:
        """The blocks that are to be solved again whatever a backend found, or None."""
        wide = self.finite.dtype == torch.float64 and self.runner.masks_float64
        worked_in = torch.float64 if wide else torch.float32
        coarse = coarse_blocks(self.finite, pattern, worked_in) if self.low < 0 else None
        if coarse is None or self.infinite is None:
            return coarse if self.infinite is None else self.infinite
        return coarse | self.infinite

    def is_left_out(self) -> bool:
        """Whether no block is worth a backend's own solution."""
        return self.infinite is not None and bool(self.infinite.all())


def _masks(
    scores: Sequence[Tensor],
    warm: Sequence[Tensor],
    n: int,
    m: int,
    method: str,
    backend: str,
    iterations: int,
    tau: float,
    allow_short: bool = False,
) -> list[Tensor]:
    """One mask per matrix; ``warm`` are the duals of a single matrix, or nothing."""
    pattern = NMPattern(n, m)
    problems = _checked(scores, warm, backend, pattern)
    if method != "exact":
        masks = _approximate(problems, pattern, method, iterations, tau)
        for problem, mask in zip(problems, masks, strict=True):
            if problem.infinite is not None:
                wrong = violating_blocks(problem.scores, mask, pattern)
                _solve_again(problem, mask, wrong, pattern, allow_short)
        return masks
    masks = [result.mask for result in _exact(problems, warm, pattern, False)]
    for problem, mask in zip(problems, masks, strict=True):
        again = problem.again(pattern)
        if again is not None:
            _solve_again(problem, mask, again, pattern, allow_short)
    return masks


def _solutions(
    scores: Sequence[Tensor],
    warm: Sequence[Tensor],
    n: int,
    m: int,
    method: str,
    backend: str,
    iterations: int,
    tau: float,
    allow_short: bool = False,
) -> list[Solution]:
    """One solution per matrix. That of an approximate method has the exact one's duals and bound."""
    pattern = NMPattern(n, m)
    problems = _checked(scores, warm, backend, pattern)
    results = _exact(problems, warm, pattern, True)
    masks = None if method == "exact" else _approximate(problems, pattern, method, iterations, tau)
    solutions = []
    for i, (problem, (mask, u, v, objective, bound)) in enumerate(zip(problems, results, strict=True)):
        assert u is not None
        assert v is not None
        assert objective is not None
        assert bound is not None
        matrix = problem.finite
        u, v = u.to(_dual_dtype(matrix)), v.to(_dual_dtype(matrix))
        if problem.low >= 0:
            scale = objective.clone()
        else:
            objective, scale = kept_score(matrix, mask, pattern)
        tighten(matrix, mask, (u, v), objective, bound, scale, pattern)
        wanted = bound - objective > enough(matrix.dtype) * scale
        again = problem.again(pattern)
        if again is not None:
            wanted |= again
        certificates = Certificates(u, v, objective, bound, scale)
        resolved = _solve_again(problem, mask, wanted, pattern, allow_short, certificates)
        best = mask
        if masks is not None:
            mask = masks[i]
            if problem.infinite is not None:
                wrong = violating_blocks(problem.scores, mask, pattern)
                mask = torch.where(over_blocks(wrong, mask, pattern), best, mask)
            objective, scale = kept_score(matrix, mask, pattern)
            bound = torch.maximum(bound, objective)
        fit(matrix, best, mask, (u, v), objective, bound, scale, pattern)
        solutions.append((mask, u, v, objective, bound, scale, resolved))
    return solutions


def _solve_again(
    problem: _Problem,
    mask: Tensor,
    wanted: Tensor,
    pattern: NMPattern,
    allow_short: bool,
    *proofs: Certificates,
) -> Tensor:
    """Masks of the ``wanted`` blocks anew, in place; which those were."""
    return solve_wider(
        problem.runner,
        problem.scores,
        mask,
        wanted,
        pattern,
        allow_short=allow_short,
        certificates=proofs[0] if proofs else None,
        name=problem.name,
    )


def _checked(
    scores: Sequence[Tensor], warm: Sequence[Tensor], backend: str, pattern: NMPattern
) -> list[_Problem]:
    """Each matrix with its backend; raises before any work if one cannot be solved."""
    runners = [select(backend, matrix.device, pattern.m) for matrix in scores]
    ends = check_numbers(scores)
    check_finite_duals(warm)
    problems = []
    for i, (runner, matrix, (low, high)) in enumerate(zip(runners, scores, ends, strict=True)):
        name = f"scores[{i}]" if len(scores) > 1 else "scores"
        if matrix.numel() == 0 or (low > -inf and high < inf):
            problems.append(_Problem(name, runner, matrix, matrix, None, low))
            continue
        finite = finite_part(matrix)
        infinite = infinite_blocks(matrix, pattern)
        problems.append(_Problem(name, runner, matrix, finite, infinite, float(finite.min())))
    return problems


def _exact(
    problems: Sequence[_Problem], warm: Sequence[Tensor], pattern: NMPattern, want_solution: bool
) -> list[BlockResult]:
    """Optimal masks of the finite parts, with duals, objective and bound when asked; zeros if left out."""
    left_out = [problem.is_left_out() for problem in problems]
    views = [
        _View(index, part, (duals[0], duals[1]) if duals else None)
        for index, problem in enumerate(problems)
        if problem.finite.numel() and not left_out[index]
        for part, *duals in batched_matrices(problem.finite, *warm)
    ]
    fields = 5 if want_solution else 1
    found: list[list[tuple[Any, ...]]] = [[] for _ in problems]
    runners = [problem.runner for problem in problems]
    for view, result in zip(views, _solve_views(runners, views, pattern, want_solution), strict=True):
        found[view.matrix].append(result[:fields])
    results = []
    for problem, parts in zip(problems, found, strict=True):
        if parts:
            joined = [_joined(field, problem.finite.shape[:-2]) for field in zip(*parts, strict=True)]
        else:
            joined = [field.zero_() for field in _blank_solution(problem.finite, pattern.m)[:fields]]
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
    problems: Sequence[_Problem], pattern: NMPattern, method: str, iterations: int, tau: float
) -> list[Tensor]:
    """Masks by a method that knows no infinite scores, and may keep a -inf or leave out a +inf."""
    given = {"iterations": iterations, "tau": tau}
    options = {name: given[name] for name in MASK_METHODS[method]}

    def solve(problem: _Problem) -> Tensor:
        matrix = problem.scores if problem.infinite is None else stand_ins(problem.scores, pattern)
        solver = getattr(problem.runner.masks, method)
        parts = [solver(part, pattern, **options) for (part,) in batched_matrices(matrix)]
        return _joined(parts, matrix.shape[:-2])

    return [solve(problem) if problem.scores.numel() else _blank_mask(problem.scores) for problem in problems]


def _joined(parts: Sequence[Any], lead: torch.Size) -> Tensor:
    """The parts of :func:`batched_matrices` as one tensor with the leading dimensions back."""
    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return whole.view(*lead, *whole.shape[1:])


def _lines(scores: Tensor, n: int, m: int, dim: int, backend: str, allow_short: bool = False) -> Tensor:
    """The ordinary mask, groups along ``dim``."""
    pattern = NMPattern(n, m)
    runner = select(backend, scores.device, m)
    ((low, high),) = check_numbers([scores])
    if scores.numel() == 0:
        return _blank_lines(scores, dim)
    moved = scores.movedim(dim, -1)
    lines = torch.atleast_2d(moved)
    parts = [runner.masks.ordinary(part, pattern) for (part,) in batched_matrices(lines)]
    mask = _joined(parts, lines.shape[:-2]).view(moved.shape)
    if low == -inf or high == inf:
        if not allow_short:
            refuse_short_groups(moved, mask, pattern, dim)
        mask &= moved > -inf
    return mask.movedim(-1, dim)


# --- operators ----------------------------------------------------------------------------------------------

_SINGLE = "Tensor scores, Tensor? row_duals, Tensor? col_duals"
_OPTIONS = "int n, int m, str method, str backend, int iterations, float tau"


def _given(*duals: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in duals if tensor is not None]


def _first(solution: Solution) -> tuple[Tensor, ...]:
    """What there was before it was said which blocks were solved again."""
    return solution[:6]


register(
    "transposable_mask",
    f"({_SINGLE}, {_OPTIONS}) -> Tensor",
    lambda scores, u, v, *options: _masks([scores], _given(u, v), *options)[0],
    lambda scores, *_: _blank_mask(scores),
)
register(
    "transposable_solution",
    f"({_SINGLE}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda scores, u, v, *options: _first(_solutions([scores], _given(u, v), *options)[0]),
    lambda scores, u, v, n, m, *_: _first(_blank_solution(scores, m)),
)
register(
    "transposable_masks",
    f"(Tensor[] scores, {_OPTIONS}) -> Tensor[]",
    lambda scores, *options: _masks(scores, (), *options),
    lambda scores, *_: [_blank_mask(matrix) for matrix in scores],
)
register(
    "transposable_solutions",
    f"(Tensor[] scores, {_OPTIONS}) -> Tensor[]",
    lambda scores, *options: list(chain.from_iterable(map(_first, _solutions(scores, (), *options)))),
    lambda scores, n, m, *_: list(
        chain.from_iterable(_first(_blank_solution(matrix, m)) for matrix in scores)
    ),
)
register(
    "nm_mask",
    "(Tensor scores, int n, int m, int dim, str backend) -> Tensor",
    _lines,
    lambda scores, n, m, dim, backend: _blank_lines(scores, dim),
)

transposable_mask = register(
    "transposable_mask.short",
    f"({_SINGLE}, {_OPTIONS}, bool allow_short) -> Tensor",
    lambda scores, u, v, *options: _masks([scores], _given(u, v), *options)[0],
    lambda scores, *_: _blank_mask(scores),
)
transposable_solution = register(
    "transposable_solution.short",
    f"({_SINGLE}, {_OPTIONS}, bool allow_short) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda scores, u, v, *options: _solutions([scores], _given(u, v), *options)[0],
    lambda scores, u, v, n, m, *_: _blank_solution(scores, m),
)
transposable_masks = register(
    "transposable_masks.short",
    f"(Tensor[] scores, {_OPTIONS}, bool allow_short) -> Tensor[]",
    lambda scores, *options: _masks(scores, (), *options),
    lambda scores, *_: [_blank_mask(matrix) for matrix in scores],
)
# The tensors of the first matrix's solution, then those of the second's, and so on.
transposable_solutions = register(
    "transposable_solutions.short",
    f"(Tensor[] scores, {_OPTIONS}, bool allow_short) -> Tensor[]",
    lambda scores, *options: list(chain.from_iterable(_solutions(scores, (), *options))),
    lambda scores, n, m, *_: [part for matrix in scores for part in _blank_solution(matrix, m)],
)
# dim is negative, so that it means the same with a batch dimension in front.
nm_mask = register(
    "nm_mask.short",
    "(Tensor scores, int n, int m, int dim, str backend, bool allow_short) -> Tensor",
    _lines,
    lambda scores, n, m, dim, *_: _blank_lines(scores, dim),
)
