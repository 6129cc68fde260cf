"""The Numba backend: blocks side by side in vector registers, all cores, straight from the strided matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from numba import config
from torch import Tensor

from nmsolve.backends import ascent_schedule
from nmsolve.backends.cpu._numba.dykstra import solve_tsenor
from nmsolve.backends.cpu._numba.exact import Certificate, Request, solve_exact
from nmsolve.backends.cpu._numba.groups import SIZES, Rows, solve_groups
from nmsolve.backends.cpu._numba.lanes import WIDTH
from nmsolve.backends.cpu._numba.memory import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from nmsolve.backends.cpu._numba.ordinary import solve_ordinary
from nmsolve.backends.cpu._numba.rounding import solve_greedy
from nmsolve.backends.cpu._numba.threads import share_out
from nmsolve.backends.cpu._numba.tiles import Region
from nmsolve.blocks import grid_of
from nmsolve.pattern import NMPattern
from nmsolve.solution import BlockResult

__all__ = ["exact", "greedy", "ordinary", "tsenor", "why_not"]

_ROW = 1 << 15
"""Entries of a contiguous tensor that are taken for a row of groups."""

_ENCODINGS = {
    torch.float32: FLOAT32,
    torch.bfloat16: BFLOAT16,
    torch.float16: FLOAT16,
    torch.float64: FLOAT64,
}


def why_not(device: torch.device) -> str | None:
    """Why this backend cannot run tensors on ``device``, or None if it can."""
    if config.DISABLE_JIT:
        return "Numba has been told not to compile (NUMBA_DISABLE_JIT)"
    return None if device.type == "cpu" else f"it runs on CPUs, and the tensor is on {device}"


def exact(
    scores: Tensor,
    pattern: NMPattern,
    *,
    warm: tuple[Tensor, Tensor] | None = None,
    want_solution: bool = False,
) -> BlockResult:
    """Optimal masks of ``(batch, rows, cols)`` scores; duals, objective and bound when asked.

    ``warm`` are row and column duals ``(batch, GR, GC, M)`` to start from instead of the ascent's.
    """
    grid = grid_of(scores, pattern)
    mask = _empty_mask(scores)
    reals, ints = _work_arrays(scores)
    work = torch.from_numpy(reals).dtype
    blocks = (len(scores), grid.block_rows, grid.block_cols)
    result, certificate = BlockResult(mask), None
    if want_solution:
        made = [torch.from_numpy(np.zeros((*blocks, pattern.m), reals.dtype)) for _ in range(2)]
        made += [torch.from_numpy(np.zeros(blocks)) for _ in range(2)]
        result = BlockResult(mask, *made)
        certificate = Certificate(*(tensor.data_ptr() for tensor in made))
    given = (None, None) if warm is None else tuple(duals.detach().to(work).contiguous() for duals in warm)
    starts = [0 if duals is None else duals.data_ptr() for duals in given]
    for region in _regions(scores, mask, pattern.m, pattern.m):
        upright, flipped = _upright(region)
        request, wanted = Request(pattern.n, pattern.m, ascent_schedule.SWEEPS, *starts), certificate
        if flipped:
            request, wanted = request.flipped(), wanted and wanted.flipped()
        _solve(partial(solve_exact, upright, request, wanted, reals, ints), region, reals.itemsize)
    return result


def greedy(scores: Tensor, pattern: NMPattern) -> Tensor:
    """Masks by descending score, completed to the full count."""
    mask = _empty_mask(scores)
    reals, ints = _work_arrays(scores)
    for region in _regions(scores, mask, pattern.m, pattern.m):
        upright, flipped = _upright(region)
        _solve(partial(solve_greedy, upright, pattern.n, flipped, reals, ints), region, reals.itemsize)
    return mask


def tsenor(scores: Tensor, pattern: NMPattern, *, iterations: int, tau: float) -> Tensor:
    """Masks by entropic transport, greedy rounding and completion (arXiv 2505.23949), in float64."""
    mask = _empty_mask(scores)
    for region in _regions(scores, mask, pattern.m, pattern.m):
        upright, flipped = _upright(region)
        _solve(partial(solve_tsenor, upright, pattern.n, iterations, float(tau), flipped), region, 8)
    return mask


def ordinary(scores: Tensor, pattern: NMPattern) -> Tensor:
    """Plain N:M along the last dimension: the N largest of each group of M, ties to the lowest index."""
    mask = _empty_mask(scores)
    solved = 0
    if pattern.m in SIZES and scores.stride(-1) == 1:
        solved = scores.shape[-1] // pattern.m * pattern.m
        like, group = np.empty(0, f"i{scores.element_size()}"), (0,) * pattern.m
        for rows in _rows_of_groups(scores[..., :solved], mask):
            kernel = partial(solve_groups, rows, pattern.n, group, like)
            share_out(kernel, rows.number, rows.length, torch.get_num_threads())
    reals, ints = _work_arrays(scores)
    for region in _regions(scores[..., solved:], mask[..., solved:], 1, pattern.m):
        _solve(partial(solve_ordinary, region, pattern.n, reals, ints), region, reals.itemsize)
    return mask


def _empty_mask(scores: Tensor) -> Tensor:
    """A mask to be filled in. NumPy asks for large pages, which are soon touched for the first time."""
    return torch.from_numpy(np.empty(scores.shape, np.bool_))


def _rows_of_groups(scores: Tensor, mask: Tensor) -> Iterator[Rows]:
    """The rows of scores that are whole groups; a contiguous tensor is cut up whatever its rows are."""
    size = scores.element_size()
    if scores.numel() == 0:
        return
    if scores.is_contiguous() and scores.shape == mask.shape:
        length = min(_ROW, scores.numel())
        count = -(-scores.numel() // length)
        rest = scores.numel() - (count - 1) * length
        yield Rows(count, length, rest, scores.data_ptr(), length * size, mask.data_ptr(), length)
        return
    for matrix, flags in zip(scores, mask, strict=True):
        length, step = matrix.shape[1], matrix.stride(0) * size
        places = (matrix.data_ptr(), step, flags.data_ptr(), flags.stride(0))
        yield Rows(len(matrix), length, length, *places)


def _work_arrays(scores: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Empty arrays of the types that the kernels compute in."""
    if scores.dtype == torch.float64:
        return np.empty(0, np.float64), np.empty(0, np.int64)
    return np.empty(0, np.float32), np.empty(0, np.int32)


def _upright(region: Region) -> tuple[Region, bool]:
    """The region with no more rows than columns to a block, and whether it had to be flipped for that."""
    flipped = region.rows > region.cols
    return (region.flipped() if flipped else region), flipped


def _spans(size: int, m: int) -> Iterator[tuple[int, int, int, int]]:
    """Whole groups of ``m``, then the partial one: (start, group size, number of groups, first group)."""
    whole = size // m
    if whole:
        yield 0, m, whole, 0
    if size % m:
        yield whole * m, size % m, 1, whole


def _regions(scores: Tensor, mask: Tensor, block_rows: int, block_cols: int) -> Iterator[Region]:
    """The rectangles of equal blocks of ``(batch, rows, cols)`` scores, with their place in ``mask``.

    Lanes run along the dimension in which the scores lie closest together.
    """
    size = scores.element_size()
    batch, row, col = (stride * size for stride in scores.stride())
    mask_batch, mask_row, mask_col = mask.stride()
    grid_rows, grid_cols = -(-scores.shape[1] // block_rows), -(-scores.shape[2] // block_cols)
    if scores.numel() == 0:
        return
    for top, rows, down, first_row in _spans(scores.shape[1], block_rows):
        for left, cols, across, first_col in _spans(scores.shape[2], block_cols):
            region = Region(
                rows=rows,
                cols=cols,
                batch=scores.shape[0],
                grid_rows=down,
                grid_cols=across,
                encoding=_ENCODINGS[scores.dtype],
                itemsize=size,
                scores=scores.data_ptr() + top * row + left * col,
                scores_batch=batch,
                scores_grid_row=rows * row,
                scores_grid_col=cols * col,
                scores_row=row,
                scores_col=col,
                mask=mask.data_ptr() + top * mask_row + left * mask_col,
                mask_batch=mask_batch,
                mask_grid_row=rows * mask_row,
                mask_grid_col=cols * mask_col,
                mask_row=mask_row,
                mask_col=mask_col,
                block_first=first_row * grid_cols + first_col,
                block_batch=grid_rows * grid_cols,
                block_grid_row=grid_cols,
                block_grid_col=1,
            )
            yield region.walked_down() if row < col else region


def _solve(kernel: Callable[[int, int], object], region: Region, itemsize: int) -> None:
    """Run ``kernel(first, last)`` over the region's groups of as many blocks as lanes, on torch's threads."""
    lanes = WIDTH // itemsize
    groups = -(-region.blocks() // lanes)
    share_out(kernel, groups, region.rows * region.cols * lanes, torch.get_num_threads())
