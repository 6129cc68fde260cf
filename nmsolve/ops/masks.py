"""The public mask functions. Arguments are validated here, once; the backends trust what they get."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from nmsolve.backends.dispatch import check_backend
from nmsolve.errors import NMSolveError
from nmsolve.ops import mask_operators
from nmsolve.ops.distributed import agree_over_mesh, from_shards, on_shards, shard_of, sharding_of
from nmsolve.ops.validation import (
    WarmStart,
    check_dim,
    check_duals,
    check_flag,
    check_scores,
    describe,
    dual_pair,
    mask_violation,
    tsenor_options,
)
from nmsolve.pattern import NMPattern, PatternLike
from nmsolve.solution import BlockSolution

__all__ = ["check_mask", "nm_mask", "solve_blocks", "transposable_mask", "transposable_masks"]

# The dimensions that a transposable mask's blocks tile.
_TILED = (-2, -1)


@overload
def transposable_mask(
    scores: Tensor,
    n: int | PatternLike,
    m: int | None = ...,
    *,
    method: str = ...,
    backend: str = ...,
    return_solution: Literal[False] = False,
    warm_start: WarmStart | None = ...,
    iterations: int | None = ...,
    tau: float | None = ...,
    allow_short: bool = ...,
) -> Tensor: ...
@overload
def transposable_mask(
    scores: Tensor,
    n: int | PatternLike,
    m: int | None = ...,
    *,
    method: str = ...,
    backend: str = ...,
    return_solution: Literal[True],
    warm_start: WarmStart | None = ...,
    iterations: int | None = ...,
    tau: float | None = ...,
    allow_short: bool = ...,
) -> BlockSolution: ...
def transposable_mask(
    scores: Tensor,
    n: int | PatternLike,
    m: int | None = None,
    *,
    method: str = "exact",
    backend: str = "auto",
    return_solution: bool = False,
    warm_start: WarmStart | None = None,
    iterations: int | None = None,
    tau: float | None = None,
    allow_short: bool = False,
) -> Tensor | BlockSolution:
    """The N:M mask along rows and columns that keeps the most score.

    The last two dimensions are tiled into ``m x m`` blocks. Every block keeps exactly n entries in each row
    and each column; a partial block at the edge keeps at most n per line and as many entries as that allows.

    Parameters
    ----------
    scores : Tensor
        ``(..., rows, cols)``, float64, float32, float16 or bfloat16, any strides; higher = keep. -inf is
        never kept and +inf always; NaN is an error. The work is done in float32, or in float64 for float64
        scores off the GPU, and once more in float64 in blocks with infinite scores, or with ones that are too
        far apart, as where large negative scores stand for what had better not be kept.
        A DTensor, whose shards must consist of whole blocks, gives DTensors with its placements, without
        communication. Scores may be negative: what is kept is still the largest *sum* of exactly n entries
        in each line, so a mask of weights wants their magnitudes, ``weight.abs()``; with signs it drops the
        large negative ones.
    n, m : int
        Kept entries per line, ``0 <= n <= m``, and block size; or n alone, the pattern in one piece:
        ``"8:16"``, ``(8, 16)`` or an :class:`~nmsolve.NMPattern`.
    method : {"exact", "tsenor", "greedy"}
        "exact" is optimal and proves it. "tsenor" is the entropic method of arXiv 2505.23949, "greedy" takes
        entries by descending score; both fill every line.
    backend : {"auto", "triton", "cpu", "torch"}
        See :func:`nmsolve.backends.dispatch.select`.
    return_solution : bool
        Return a :class:`~nmsolve.BlockSolution`, with duals, objective, bound and gap of every block. For the
        approximate methods the bound is the exact method's, so that the gap is the mask's true distance from
        the optimum.
    warm_start : BlockSolution or (row_duals, col_duals), optional
        Duals to start "exact" from, for instance those of the previous step of a training run. Any values
        give an optimal mask. It saves time where scores hardly changed and ``return_solution`` is wanted
        anyway; where only masks are, what the duals cost is more than they save (docs/benchmarks.md).
    iterations : int, optional
        Dykstra iterations of "tsenor" (300).
    tau : float, optional
        Inverse temperature of "tsenor", relative to each block's largest absolute score (150).
    allow_short : bool
        Whether a block whose infinite scores leave no mask of the pattern gets a short one, with at most n in
        each line: as many +inf as these can hold, among such masks one with as many entries as there can be,
        none of them -inf, and among these one with the most score. By default it is an error.

    Returns
    -------
    Tensor or BlockSolution
        bool mask of the scores' shape on their device, True = keep; or the solution that holds it.

    Raises
    ------
    NMSolveError
        If an argument is not as described, or infinite scores leave a block no mask of the pattern; the
        message names the first one.
    BackendError
        If the backend asked for cannot run here.

    Examples
    --------
    >>> scores = torch.tensor([[4.0, 3.0], [3.0, 1.0]])
    >>> transposable_mask(scores, 1, 2)
    tensor([[False,  True],
            [ True, False]])
    >>> scores[0, 1] = -torch.inf
    >>> transposable_mask(scores, 1, 2)
    tensor([[ True, False],
            [False,  True]])
    >>> scores[0, 0] = -torch.inf
    >>> transposable_mask(scores, 1, 2, allow_short=True)
    tensor([[False, False],
            [ True, False]])
    >>> transposable_mask(scores, 1, 2, return_solution=True, allow_short=True).max_gap
    0.0
    """
    pattern = NMPattern.of(n, m)
    check_scores(scores)
    check_backend(backend)
    check_flag("allow_short", allow_short)
    iterations, tau = tsenor_options(method, iterations, tau)
    if warm_start is not None and method != "exact":
        raise NMSolveError(f"warm_start: only method 'exact' starts from duals, got method {method!r}")
    sharding = sharding_of(scores, pattern.m, _TILED)
    u = v = None
    if warm_start is not None:
        u, v = (shard_of(duals) for duals in check_duals(warm_start, scores, pattern, sharding))
    options = (pattern.n, pattern.m, method, backend, iterations, tau, allow_short)
    if not return_solution:
        mask = on_shards(mask_operators.transposable_mask, [sharding], shard_of(scores), u, v, *options)
        return from_shards(sharding, [mask], [scores.shape])[0]
    parts = on_shards(mask_operators.transposable_solution, [sharding], shard_of(scores), u, v, *options)
    return BlockSolution(
        *from_shards(sharding, parts, mask_operators.solution_shapes(scores.shape, pattern.m))
    )


@overload
def transposable_masks(
    scores: Sequence[Tensor],
    n: int | PatternLike,
    m: int | None = ...,
    *,
    method: str = ...,
    backend: str = ...,
    return_solution: Literal[False] = False,
    allow_short: bool = ...,
) -> list[Tensor]: ...
@overload
def transposable_masks(
    scores: Sequence[Tensor],
    n: int | PatternLike,
    m: int | None = ...,
    *,
    method: str = ...,
    backend: str = ...,
    return_solution: Literal[True],
    allow_short: bool = ...,
) -> list[BlockSolution]: ...
def transposable_masks(
    scores: Sequence[Tensor],
    n: int | PatternLike,
    m: int | None = None,
    *,
    method: str = "exact",
    backend: str = "auto",
    return_solution: bool = False,
    allow_short: bool = False,
) -> list[Tensor] | list[BlockSolution]:
    """The transposable masks of several tensors, such as all layers of a model or all experts of a layer.

    Each is the mask that :func:`transposable_mask` gives. On a GPU the exact method takes one launch for all
    tensors of a dtype and device, which pays for many small ones. Everything is checked before any work.

    Parameters
    ----------
    scores : list or tuple of Tensor
        Each ``(..., rows, cols)``, of any size, dtype and device that :func:`transposable_mask` takes.
    n, m, method, backend, return_solution, allow_short
        As in :func:`transposable_mask`, for all tensors; "auto" chooses a backend for each.

    Returns
    -------
    list of Tensor or list of BlockSolution
        One per tensor, in their order.

    Raises
    ------
    NMSolveError
        If an argument is not as described, or a block has no mask of the pattern; the message says which
        tensor, such as ``scores[3]``.
    BackendError
        If the backend asked for cannot run one of them here.

    Examples
    --------
    >>> masks = transposable_masks([torch.rand(8, 16), torch.rand(3, 4, 4)], 2, 4)
    >>> [mask.float().mean().item() for mask in masks]
    [0.5, 0.5]
    """
    pattern = NMPattern.of(n, m)
    if not isinstance(scores, (list, tuple)):
        raise NMSolveError(f"scores: expected a list or tuple of tensors, got {describe(scores)}")
    for i, matrix in enumerate(scores):
        check_scores(matrix, name=f"scores[{i}]")
    check_backend(backend)
    check_flag("allow_short", allow_short)
    options = (pattern.n, pattern.m, method, backend, *tsenor_options(method, None, None), allow_short)
    shardings = [sharding_of(matrix, pattern.m, _TILED, f"scores[{i}]") for i, matrix in enumerate(scores)]
    if not scores:
        return []
    matrices = [shard_of(matrix) for matrix in scores]
    if not return_solution:
        masks = on_shards(mask_operators.transposable_masks, shardings, matrices, *options)
        return [
            from_shards(sharding, [mask], [matrix.shape])[0]
            for sharding, mask, matrix in zip(shardings, masks, scores, strict=True)
        ]
    parts = on_shards(mask_operators.transposable_solutions, shardings, matrices, *options)
    solutions = []
    for i, (sharding, matrix) in enumerate(zip(shardings, scores, strict=True)):
        shapes = mask_operators.solution_shapes(matrix.shape, pattern.m)
        own = parts[i * len(shapes) : (i + 1) * len(shapes)]
        solutions.append(BlockSolution(*from_shards(sharding, own, shapes)))
    return solutions


def solve_blocks(
    blocks: Tensor,
    n: int | PatternLike,
    *,
    method: str = "exact",
    backend: str = "auto",
    warm_start: WarmStart | None = None,
    iterations: int | None = None,
    tau: float | None = None,
    allow_short: bool = False,
) -> BlockSolution:
    """Transposable masks of a batch of square blocks, with their certificates.

    Parameters
    ----------
    blocks : Tensor
        ``(B, M, M)`` scores, higher = keep; dtypes as in :func:`transposable_mask`.
    n : int
        Kept entries per row and column, ``0 <= n <= M``; a pattern such as ``"8:16"`` has to be that of the
        blocks. With n = 1 a mask is a permutation matrix.
    method, backend, warm_start, iterations, tau, allow_short
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
        allow_short=allow_short,
    )
    assert solution.resolved is not None
    return BlockSolution(
        solution.mask,
        solution.row_duals[:, 0, 0],
        solution.col_duals[:, 0, 0],
        solution.objective[:, 0, 0],
        solution.bound[:, 0, 0],
        solution.scale[:, 0, 0],
        solution.resolved[:, 0, 0],
    )


def nm_mask(
    scores: Tensor,
    n: int | PatternLike,
    m: int | None = None,
    dim: int = -1,
    *,
    backend: str = "auto",
    allow_short: bool = False,
) -> Tensor:
    """The ordinary N:M mask: the n largest scores of every m consecutive ones along a dimension.

    Parameters
    ----------
    scores : Tensor
        One or more dimensions, dtypes as in :func:`transposable_mask`; higher = keep. Scores may be negative:
        the n largest are kept, not those of largest magnitude, which a mask of weights wants
        (``weight.abs()``). The shards of a DTensor must consist of whole groups.
    n, m : int
        Kept entries and group size, or the pattern in one piece, as in :func:`transposable_mask`. A last
        group that is smaller keeps ``min(n, its size)``.
    dim : int
        The dimension along which groups lie; for a linear layer's ``(out, in)`` weight -1 is the input.
    backend : {"auto", "triton", "cpu", "torch"}
        All give the same mask: ties go to the lowest index.
    allow_short : bool
        Whether a group with fewer than n scores other than -inf keeps these, and one with more than n of +inf
        the first n of those. By default it is an error.

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
    >>> nm_mask(torch.tensor([0.1, -torch.inf, 0.5, torch.inf]), 2, 4)
    tensor([False, False,  True,  True])
    """
    pattern = NMPattern.of(n, m)
    check_scores(scores, rank=1)
    dim = check_dim(dim, scores)
    check_backend(backend)
    check_flag("allow_short", allow_short)
    sharding = sharding_of(scores, pattern.m, [dim])
    options = (pattern.n, pattern.m, dim, backend, allow_short)
    mask = on_shards(mask_operators.nm_mask, [sharding], shard_of(scores), *options)
    return from_shards(sharding, [mask], [scores.shape], inner=dim)[0]


def check_mask(
    mask: Tensor, n: int | PatternLike, m: int | None = None, *, transposable: bool = True, dim: int = -1
) -> None:
    """Raise unless a mask is N:M, naming the first line that is not.

    Parameters
    ----------
    mask : Tensor
        bool, True = keep; ``(..., rows, cols)`` if transposable.
    n, m : int
        The pattern it should have, or in one piece, as in :func:`transposable_mask`.
    transposable : bool
        Whether the rows and columns of every ``m x m`` block must hold n, or only the groups along ``dim``.
        Partial blocks and groups must hold as many as :func:`transposable_mask` and :func:`nm_mask` keep.
    dim : int
        The dimension of the groups of an ordinary mask.

    Raises
    ------
    NMSolveError
        If the mask is not as described; the message has the block, the row or column, and its count. Of a
        DTensor, every process has to check its shard, and all raise the same error.

    Examples
    --------
    >>> check_mask(torch.eye(2, dtype=torch.bool), 1, 2)
    >>> check_mask(torch.ones(2, 2, dtype=torch.bool), 1, 2)
    Traceback (most recent call last):
    nmsolve.errors.NMSolveError: mask: block (0, 0), row 0 keeps 2 of 2 entries, expected 1 (pattern 1:2)
    """
    pattern = NMPattern.of(n, m)
    rank = 2 if transposable else 1
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim < rank:
        raise NMSolveError(
            f"mask: expected a bool tensor of at least {rank} dimensions, got {describe(mask)}"
        )
    dim = -1 if transposable else check_dim(dim, mask)
    sharding = sharding_of(mask, pattern.m, _TILED if transposable else [dim], "mask")
    violation = mask_violation(shard_of(mask), pattern, None if transposable else dim)
    if sharding is not None:
        if violation is not None:
            violation += f", {sharding.place}"
        violation = agree_over_mesh(sharding, violation)
    if violation is not None:
        raise NMSolveError(f"mask: {violation}")
