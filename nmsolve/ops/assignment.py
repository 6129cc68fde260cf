"""Hard permutations: batches of linear assignment problems, solved to proven optimality."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from nmsolve.backends.dispatch import (
    AUTO,
    BACKENDS,
    REFERENCE,
    Backend,
    check_backend,
    select,
)
from nmsolve.errors import BackendError, NMSolveError
from nmsolve.ops.certificates import fit, tighten
from nmsolve.ops.levels import block_solvers, solve_levels
from nmsolve.ops.registration import register
from nmsolve.ops.validation import check_numbers, check_scores, describe
from nmsolve.ops.wider import coarse_blocks, reason_of
from nmsolve.pattern import NMPattern
from nmsolve.solution import relative_gap

__all__ = ["AssignmentSolution", "assignment"]


@dataclass(frozen=True)
class AssignmentSolution:
    """Optimal permutations with their certificates.

    Attributes
    ----------
    permutation : Tensor
        int64 ``(..., M)``: the column of each row.
    row_duals, col_duals : Tensor
        float64 ``(..., M)``: prices u and v of rows and columns, in the unit of the scores.
    objective : Tensor
        float64 ``(...)``: total score of the permutation; those of +inf count as 0.
    bound : Tensor
        float64 ``(...)``: ``sum(u) + sum(v) + sum_ij max(0, A[i, j] - u[i] - v[j])``; whatever u and v are,
        no permutation scores more.
    scale : Tensor
        float64 ``(...)``: sum of the absolute scores taken, what ``gap`` is relative to.
    """

    permutation: Tensor
    row_duals: Tensor
    col_duals: Tensor
    objective: Tensor
    bound: Tensor
    scale: Tensor

    @property
    def gap(self) -> Tensor:
        """``(bound - objective) / scale``: 0, short of rounding, which proves optimality."""
        return relative_gap(self.bound - self.objective, self.scale)

    @property
    def max_gap(self) -> float:
        """The largest gap of any matrix (0.0 if there is none)."""
        return float(self.gap.max()) if self.gap.numel() else 0.0


@overload
def assignment(scores: Tensor, *, backend: str = ..., return_solution: Literal[False] = False) -> Tensor: ...
@overload
def assignment(
    scores: Tensor, *, backend: str = ..., return_solution: Literal[True]
) -> AssignmentSolution: ...
def assignment(
    scores: Tensor, *, backend: str = "auto", return_solution: bool = False
) -> Tensor | AssignmentSolution:
    """The permutation of largest total score, for each matrix of a batch.

    This is the transposable 1:M mask, as indices: ``sum_i scores[i, p[i]]`` is the largest of all
    permutations p, and the certificate proves it. A score of -inf is never taken, and one of +inf always;
    large finite ones are weighed exactly, however far apart they lie (:mod:`nmsolve.ops.levels`).

    Parameters
    ----------
    scores : Tensor
        ``(..., M, M)``, float64, float32, float16 or bfloat16, no NaN, any strides; higher = better.
    backend : {"auto", "triton", "cpu", "torch"}
        "cpu" is Jonker and Volgenant's algorithm (Computing 38, 1987) in Numba, in float64 whatever the
        scores are, for any M. "triton" is the block solver of the masks with one kept entry per line, in
        float32, for M up to 64. "torch" is the reference in float64, slow for large M. "auto" takes "cpu"
        for CPU tensors (if numba works, else "torch"). On a GPU it takes "triton" up to M = 64;
        larger matrices travel to the host and back, where "cpu" solves them sooner than a GPU can (without
        numba: "torch").
    return_solution : bool
        Return an :class:`AssignmentSolution`, with the duals that prove optimality.

    Returns
    -------
    Tensor or AssignmentSolution
        int64 ``(..., M)``, on the scores' device: the column of each row. The same scores give the same
        permutation on the same backend, in whatever batch they come.

    Raises
    ------
    NMSolveError
        If the scores are not square, NaN or of another dtype, or if a matrix has no permutation that takes
        every +inf and no -inf.
    BackendError
        If the backend asked for cannot run here.

    Examples
    --------
    >>> scores = torch.tensor([[4.0, 3.0], [3.0, 1.0]])
    >>> assignment(scores)
    tensor([1, 0])
    >>> solution = assignment(scores, return_solution=True)
    >>> solution.objective.item(), solution.max_gap
    (6.0, 0.0)
    >>> assignment(torch.tensor([[4.0, float("-inf")], [3.0, 1.0]]))
    tensor([0, 1])
    """
    check_scores(scores)
    if scores.shape[-1] != scores.shape[-2]:
        raise NMSolveError(f"scores: expected square matrices (..., M, M), got {describe(scores)}")
    check_backend(backend)
    if return_solution:
        return AssignmentSolution(*_solution_op(scores.detach(), backend))
    permutation: Tensor = _permutation_op(scores.detach(), backend)
    return permutation


def _runner(backend: str, scores: Tensor) -> tuple[Backend, bool]:
    """The backend, and whether it works in host memory on behalf of a GPU."""
    m = scores.shape[-1]
    row = select(backend, scores.device)
    if row.holds(m):
        return row, False
    if backend != AUTO:
        raise BackendError(
            f"backend: {row.name!r} holds matrices up to M={row.max_m} in registers, got M={m}; "
            "use 'auto' or 'torch'"
        )
    host = BACKENDS["cpu"]
    return (host, True) if host.why_not(torch.device("cpu")) is None else (REFERENCE, False)


def _solve(scores: Tensor, backend: str, want_solution: bool) -> tuple[Tensor, ...]:
    *lead, m, _ = scores.shape
    if scores.numel() == 0:
        return _blank(scores, want_solution)
    row, through_host = _runner(backend, scores)
    matrices = scores.reshape(-1, m, m)
    if through_host:
        matrices = matrices.cpu()
    found, again = _first(row, scores, matrices, want_solution)
    if again is not None and again.any():
        _solve_again(row, matrices, again, found, tuple(lead))
    return tuple(tensor.to(scores.device).view((*lead, *tensor.shape[1:])) for tensor in found)


def _first(
    row: Backend, scores: Tensor, matrices: Tensor, want_solution: bool
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """What the backend finds, and which matrices are to be solved again: with infinite scores, or coarse."""
    finite, infinite = matrices, None
    if row.assignment_finds_infinite:
        found = row.permutations.assignment(matrices, want_solution)
        if int(found[0][:, 0].min()) < 0:
            check_numbers([scores])
            finite, infinite = matrices.masked_fill(matrices.isinf(), 0), found[0][:, 0] < 0
        low = float(finite.amin())
    else:
        low, high = check_numbers([scores])[0]
        if math.isinf(low) or math.isinf(high):
            infinite = matrices.isinf().any(2).any(1)
            finite = matrices.masked_fill(matrices.isinf(), 0)
        found = row.permutations.assignment(finite, want_solution)
    if want_solution:
        parts = found if infinite is None else tuple(tensor[~infinite] for tensor in found)
        _tighten(finite if infinite is None else finite[~infinite], *parts)
        if infinite is not None:
            for tensor, part in zip(found, parts, strict=True):
                tensor[~infinite] = part
    if low >= 0:
        return found, infinite
    worked_in = torch.float64 if row.masks_float64 else torch.float32
    coarse = coarse_blocks(finite, NMPattern(1, matrices.shape[1]), worked_in).view(-1)
    return found, coarse if infinite is None else coarse | infinite


def _solve_again(
    row: Backend, matrices: Tensor, again: Tensor, found: tuple[Tensor, ...], lead: tuple[int, ...]
) -> None:
    """The solution of matrices whatever numbers they hold but NaN, in place."""
    blocks = matrices[again].double()
    first, exact = block_solvers((row if row.masks_float64 else REFERENCE).masks, 1)
    want_solution = len(found) > 1
    levels = solve_levels(blocks, 1, torch.float64, first, exact, allow_short=False, want_duals=want_solution)
    if not levels.full.all():
        k = int((~levels.full).nonzero()[0])
        place = int(again.nonzero()[k])
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), lead)) if lead else ()
        raise NMSolveError(
            f"scores: {f'matrix {where}' if lead else 'the matrix'} has no permutation that takes every inf "
            f"and no -inf{reason_of(blocks[k], NMPattern(1, len(blocks[k])))}"
        )
    found[0][again] = levels.mask.view(torch.uint8).argmax(2)
    if want_solution:
        taken = blocks.masked_fill(blocks.isinf(), 0) * levels.mask
        objective = taken.sum((1, 2))
        values = (
            levels.row_duals,
            levels.col_duals,
            objective,
            objective + levels.loss,
            taken.abs().sum((1, 2)),
        )
        for tensor, value in zip(found[1:], values, strict=True):
            tensor[again] = value


def _tighten(
    matrices: Tensor,
    permutation: Tensor,
    u: Tensor,
    v: Tensor,
    objective: Tensor,
    bound: Tensor,
    scale: Tensor,
) -> None:
    """Make the certificates good to the duals' type, in place; a permutation is a mask of a single block."""
    batch, m, _ = matrices.shape
    mask = torch.zeros(matrices.shape, dtype=torch.bool, device=matrices.device)
    mask.scatter_(2, permutation.unsqueeze(2), True)
    duals = u.view(batch, 1, 1, m), v.view(batch, 1, 1, m)
    value, least, size = (one.view(batch, 1, 1) for one in (objective, bound, scale))
    tighten(matrices, mask, duals, value, least, size, NMPattern(1, m))
    fit(matrices, mask, mask, duals, value, least, size, NMPattern(1, m))


def _blank(scores: Tensor, want_solution: bool) -> tuple[Tensor, ...]:
    """Outputs without values; all zeros for empty matrices, whose objective and bound are 0."""
    lead, lines = scores.shape[:-2], scores.shape[:-1]
    permutation = scores.new_zeros(lines, dtype=torch.int64)
    if not want_solution:
        return (permutation,)
    shapes = (lines, lines, lead, lead, lead)
    return permutation, *(scores.new_zeros(shape, dtype=torch.float64) for shape in shapes)


_permutation_op = register(
    "assignment",
    "(Tensor scores, str backend) -> Tensor",
    lambda scores, backend: _solve(scores, backend, False)[0],
    lambda scores, backend: _blank(scores, False)[0],
)
_solution_op = register(
    "assignment_solution",
    "(Tensor scores, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda scores, backend: _solve(scores, backend, True),
    lambda scores, backend: _blank(scores, True),
)
