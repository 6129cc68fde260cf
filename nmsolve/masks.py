"""The public mask functions. Arguments are validated here, once; the backends trust what they get."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from nmsolve.blocks import batched_matrices, demand, grid_of, split_blocks
from nmsolve.dispatch import Backend, select
from nmsolve.errors import NMSolveError
from nmsolve.pattern import NMPattern
from nmsolve.solution import BlockResult, BlockSolution, kept_score
from nmsolve.validation import (
    WarmStart,
    check_duals,
    check_finite,
    check_scores,
    describe,
    dual_pair,
    tsenor_options,
)

__all__ = ["check_mask", "nm_mask", "solve_blocks", "transposable_mask"]


@overload
def transposable_mask(
    scores: Tensor,
    n: int,
    m: int,
    *,
    method: str = ...,
    backend: str = ...,
    return_solution: Literal[False] = False,
    warm_start: WarmStart | None = ...,
    iterations: int | None = ...,
    tau: float | None = ...,
) -> Tensor: ...
@overload
def transposable_mask(
    scores: Tensor,
    n: int,
    m: int,
    *,
    method: str = ...,
    backend: str = ...,
    return_solution: Literal[True],
    warm_start: WarmStart | None = ...,
    iterations: int | None = ...,
    tau: float | None = ...,
) -> BlockSolution: ...
def transposable_mask(
    scores: Tensor,
    n: int,
    m: int,
    *,
    method: str = "exact",
    backend: str = "auto",
    return_solution: bool = False,
    warm_start: WarmStart | None = None,
    iterations: int | None = None,
    tau: float | None = None,
) -> Tensor | BlockSolution:
    """The N:M mask along rows and columns that keeps the most score.

    The last two dimensions are tiled into ``m x m`` blocks. Every block keeps exactly n entries in each row
    and each column; a partial block at the edge keeps at most n per line and as many entries as that allows.

    Parameters
    ----------
    scores : Tensor
        ``(..., rows, cols)``, float64, float32, float16 or bfloat16, finite, any strides; higher = keep. The
        work is done in float32, or in float64 for float64 scores off the GPU.
    n, m : int
        Kept entries per line, ``0 <= n <= m``, and block size.
    method : {"exact", "tsenor", "greedy"}
        "exact" is optimal and proves it. "tsenor" is the entropic method of arXiv 2505.23949, "greedy" takes
        entries by descending score; both fill every line.
    backend : {"auto", "triton", "cpu", "torch"}
        See :func:`nmsolve.dispatch.select`.
    return_solution : bool
        Return a :class:`~nmsolve.BlockSolution`, with duals, objective, bound and gap of every block. For the
        approximate methods the bound is the exact method's, so that the gap is the mask's true distance from
        the optimum.
    warm_start : BlockSolution or (row_duals, col_duals), optional
        Duals to start "exact" from, for instance those of the previous step of a training run. Any values
        give an optimal mask; good ones give it sooner.
    iterations : int, optional
        Dykstra iterations of "tsenor" (300).
    tau : float, optional
        Inverse temperature of "tsenor", relative to each block's largest absolute score (150).

    Returns
    -------
    Tensor or BlockSolution
        bool mask of the scores' shape on their device, True = keep; or the solution that holds it.

    Raises
    ------
    NMSolveError
        If an argument is not as described.
    BackendError
        If the backend asked for cannot run here.

    Examples
    --------
    >>> scores = torch.tensor([[4.0, 3.0], [3.0, 1.0]])
    >>> transposable_mask(scores, 1, 2)
    tensor([[False,  True],
            [ True, False]])
    >>> transposable_mask(scores, 1, 2, return_solution=True).max_gap
    0.0
    """
    pattern = NMPattern(n, m)
    check_scores(scores)
    iterations, tau = tsenor_options(method, iterations, tau)
    if warm_start is not None and method != "exact":
        raise NMSolveError(f"warm_start: only method 'exact' starts from duals, got method {method!r}")
    warm = None if warm_start is None else check_duals(warm_start, scores, pattern)
    runner = select(backend, scores.device, pattern.m)
    smallest = check_finite(scores)

    scores = scores.detach()
    if method == "exact":
        result = _exact(runner, scores, pattern, warm, return_solution)
        mask = result.mask
    else:
        mask = _approximate(runner, scores, pattern, method, iterations, tau)
        result = _exact(runner, scores, pattern, None, True) if return_solution else BlockResult(mask)
    if not return_solution:
        return mask
    if method == "exact" and smallest >= 0:
        return _solution(result, mask, result.objective, result.objective)
    return _solution(result, mask, *kept_score(scores, mask, pattern))


def solve_blocks(
    blocks: Tensor,
    n: int,
    *,
    method: str = "exact",
    backend: str = "auto",
    warm_start: WarmStart | None = None,
    iterations: int | None = None,
    tau: float | None = None,
) -> BlockSolution:
    """Transposable masks of a batch of square blocks, with their certificates.

    Parameters
    ----------
    blocks : Tensor
        ``(B, M, M)`` scores, higher = keep; dtypes as in :func:`transposable_mask`.
    n : int
        Kept entries per row and column, ``0 <= n <= M``. With n = 1 a mask is a permutation matrix.
    method, backend, warm_start, iterations, tau
        As in :func:`transposable_mask`; duals to start from are ``(B, M)``.

    Returns
    -------
    BlockSolution
        Mask ``(B, M, M)``, duals ``(B, M)``, objective and bound ``(B,)``.

    Raises
    ------
    NMSolveError
        If an argument is not as described.
    BackendError
        If the backend asked for cannot run here.

    Examples
    --------
    >>> solution = solve_blocks(torch.tensor([[[4.0, 3.0], [3.0, 1.0]]]), 1)
    >>> solution.objective, solution.bound
    (tensor([6.], dtype=torch.float64), tensor([6.], dtype=torch.float64))
    """
    if not isinstance(blocks, Tensor) or blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2]:
        raise NMSolveError(f"blocks: expected a tensor of shape (B, M, M), got {describe(blocks)}")
    if blocks.shape[1] == 0:
        raise NMSolveError(f"blocks: expected blocks of at least 1 x 1, got {describe(blocks)}")
    if warm_start is not None:
        u, v = dual_pair(warm_start)
        if u.ndim != 2 or v.ndim != 2:
            raise NMSolveError(f"warm_start: expected duals (B, M), got {describe(u)} and {describe(v)}")
        warm_start = (u[:, None, None], v[:, None, None])
    solution = transposable_mask(
        blocks,
        n,
        blocks.shape[1],
        method=method,
        backend=backend,
        return_solution=True,
        warm_start=warm_start,
        iterations=iterations,
        tau=tau,
    )
    return BlockSolution(
        solution.mask,
        solution.row_duals[:, 0, 0],
        solution.col_duals[:, 0, 0],
        solution.objective[:, 0, 0],
        solution.bound[:, 0, 0],
        solution.scale[:, 0, 0],
    )


def nm_mask(scores: Tensor, n: int, m: int, dim: int = -1, *, backend: str = "auto") -> Tensor:
    """The ordinary N:M mask: the n largest scores of every m consecutive ones along a dimension.

    Parameters
    ----------
    scores : Tensor
        One or more dimensions, dtypes as in :func:`transposable_mask`; higher = keep.
    n, m : int
        Kept entries and group size. A last group that is smaller keeps ``min(n, its size)``.
    dim : int
        The dimension along which groups lie; for a linear layer's ``(out, in)`` weight -1 is the input.
    backend : {"auto", "triton", "cpu", "torch"}
        All give the same mask: ties go to the lowest index.

    Returns
    -------
    Tensor
        bool, shape and device of the scores, True = keep.

    Raises
    ------
    NMSolveError
        If an argument is not as described.
    BackendError
        If the backend asked for cannot run here.

    Examples
    --------
    >>> nm_mask(torch.tensor([0.1, 0.9, 0.5, 0.5]), 2, 4)
    tensor([False,  True,  True, False])
    """
    pattern = NMPattern(n, m)
    check_scores(scores, rank=1)
    if not isinstance(dim, int) or not -scores.ndim <= dim < scores.ndim:
        raise NMSolveError(f"dim: expected an integer in [-{scores.ndim}, {scores.ndim}), got {dim!r}")
    runner = select(backend, scores.device, pattern.m)
    check_finite(scores)
    if scores.numel() == 0:
        return torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    lines = torch.atleast_2d(scores.detach().movedim(dim, -1))
    parts = [runner.ordinary(part, pattern) for (part,) in batched_matrices(lines)]
    return _joined(parts, lines.shape[:-2]).view(scores.movedim(dim, -1).shape).movedim(-1, dim)


def check_mask(mask: Tensor, n: int, m: int, *, transposable: bool = True, dim: int = -1) -> None:
    """Raise unless a mask is N:M, naming the first line that is not.

    Parameters
    ----------
    mask : Tensor
        bool, True = keep; ``(..., rows, cols)`` if transposable.
    n, m : int
        The pattern it should have.
    transposable : bool
        Whether the rows and columns of every ``m x m`` block must hold n, or only the groups along ``dim``.
        Partial blocks and groups must hold as many as :func:`transposable_mask` and :func:`nm_mask` keep.
    dim : int
        The dimension of the groups of an ordinary mask.

    Raises
    ------
    NMSolveError
        If the mask is not as described; the message has the block, the row or column, and its count.

    Examples
    --------
    >>> check_mask(torch.eye(4, dtype=torch.bool), 1, 2)
    >>> check_mask(torch.ones(2, 2, dtype=torch.bool), 1, 2)
    Traceback (most recent call last):
    nmsolve.errors.NMSolveError: mask: block (0, 0), row 0 keeps 2 of 2 entries, expected 1 (pattern 1:2)
    """
    pattern = NMPattern(n, m)
    rank = 2 if transposable else 1
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim < rank:
        raise NMSolveError(
            f"mask: expected a bool tensor of at least {rank} dimensions, got {describe(mask)}"
        )
    if transposable:
        _check_transposable(mask, pattern)
        return
    if not isinstance(dim, int) or not -mask.ndim <= dim < mask.ndim:
        raise NMSolveError(f"dim: expected an integer in [-{mask.ndim}, {mask.ndim}), got {dim!r}")
    lines = mask.movedim(dim, -1)
    size = lines.shape[-1]
    full = size // pattern.m * pattern.m
    for start, stop, width in ((0, full, pattern.m), (full, size, size - full)):
        if stop == start:
            continue
        held = lines[..., start:stop].unflatten(-1, (-1, width)).sum(-1, dtype=torch.int32)
        count = min(pattern.n, width)
        wrong = (held != count).nonzero()
        if len(wrong):
            *line, group = at = wrong[0].tolist()
            raise NMSolveError(
                f"mask: line {tuple(line)}, group {start // pattern.m + group} along dim {dim} keeps "
                f"{int(held[tuple(at)])} of {width} entries, expected {count} (pattern {pattern})"
            )


def _check_transposable(mask: Tensor, pattern: NMPattern) -> None:
    """Counts of every block's rows and columns, region by region of equal block shape."""
    grid = grid_of(mask, pattern)
    for rows, cols, r, c in grid.regions():
        blocks = split_blocks(mask[..., rows, cols], r, c)
        need = demand(r, c, pattern.n)
        origin = (rows.start // pattern.m, cols.start // pattern.m)
        for name, dim, count, at_most in (
            ("row", -1, need.row, r > c),
            ("column", -2, need.col, r < c),
        ):
            held = blocks.sum(dim, dtype=torch.int32)
            wrong = held > count if at_most else held != count
            if wrong.any():
                *batch, i, j, line = at = wrong.nonzero()[0].tolist()
                block = (*batch, origin[0] + i, origin[1] + j)
                raise NMSolveError(
                    f"mask: block {block}, {name} {line} keeps {int(held[tuple(at)])} of "
                    f"{blocks.shape[dim]} entries, expected {'at most ' if at_most else ''}{count} "
                    f"(pattern {pattern})"
                )


# --- running a backend on leading dimensions ----------------------------------------------------------------


def _joined(parts: list[Tensor], lead: torch.Size) -> Tensor:
    """The parts of :func:`batched_matrices` as one tensor with the leading dimensions back."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole.view(*lead, *whole.shape[1:])


def _exact(
    runner: Backend,
    scores: Tensor,
    pattern: NMPattern,
    warm: tuple[Tensor, Tensor] | None,
    want_solution: bool,
) -> BlockResult:
    if scores.numel() == 0:
        return _empty_result(scores, pattern, want_solution)
    parts = [
        runner.exact(part, pattern, warm=(duals[0], duals[1]) if duals else None, want_solution=want_solution)
        for part, *duals in batched_matrices(scores, *(warm or ()))
    ]
    fields = zip(*(part if want_solution else part[:1] for part in parts), strict=True)
    return BlockResult(*(_joined(list(field), scores.shape[:-2]) for field in fields))


def _solution(
    result: BlockResult, mask: Tensor, objective: Tensor | None, scale: Tensor | None
) -> BlockSolution:
    """``mask`` with the duals and bound of a result that was asked to carry a solution."""
    _, u, v, _, bound = result
    assert u is not None
    assert v is not None
    assert bound is not None
    assert objective is not None
    assert scale is not None
    return BlockSolution(mask, u, v, objective, bound, scale)


def _approximate(
    runner: Backend, scores: Tensor, pattern: NMPattern, method: str, iterations: int, tau: float
) -> Tensor:
    if scores.numel() == 0:
        return _empty_result(scores, pattern, False).mask
    parts = []
    for (part,) in batched_matrices(scores):
        if method == "greedy":
            parts.append(runner.greedy(part, pattern))
        else:
            parts.append(runner.tsenor(part, pattern, iterations=iterations, tau=tau))
    return _joined(parts, scores.shape[:-2])


def _empty_result(scores: Tensor, pattern: NMPattern, want_solution: bool) -> BlockResult:
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    if not want_solution:
        return BlockResult(mask)
    grid = grid_of(scores, pattern)
    blocks = (*scores.shape[:-2], grid.block_rows, grid.block_cols)
    duals = torch.zeros(
        *blocks, pattern.m, dtype=torch.promote_types(scores.dtype, torch.float32), device=scores.device
    )
    zeros = torch.zeros(blocks, dtype=torch.float64, device=scores.device)
    return BlockResult(mask, duals, duals.clone(), zeros, zeros.clone())
