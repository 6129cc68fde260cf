"""The Numba backend: blocks side by side in vector registers, all cores, straight from the strided matrix."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from nmsolve import schedule
from nmsolve._cpu.exact import Request, solve_exact
from nmsolve._cpu.lanes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from nmsolve._cpu.tiles import Region
from nmsolve.blocks import BlockGrid, grid_of
from nmsolve.pattern import NMPattern
from nmsolve.solution import BlockResult

__all__ = ["exact", "why_not"]

_ENCODINGS = {
    torch.float32: FLOAT32,
    torch.bfloat16: BFLOAT16,
    torch.float16: FLOAT16,
    torch.float64: FLOAT64,
}

# Entries that one call of a kernel takes at a time: enough to hide the call, few enough to share out evenly.
_SHARE = 1 << 17


def why_not(device: torch.device) -> str | None:
    """Why this backend cannot run tensors on ``device``, or None if it can."""
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
    mask = torch.empty(scores.shape, dtype=torch.bool)
    reals, ints = _work_arrays(scores)
    work = torch.from_numpy(reals).dtype
    blocks = (len(scores), grid.block_rows, grid.block_cols)
    result = BlockResult(mask)
    if want_solution:
        result = BlockResult(
            mask,
            torch.zeros((*blocks, pattern.m), dtype=work),
            torch.zeros((*blocks, pattern.m), dtype=work),
            torch.zeros(blocks, dtype=torch.float64),
            torch.zeros(blocks, dtype=torch.float64),
        )
    started = tuple(duals.detach().to(work).contiguous() for duals in warm) if warm is not None else (None, None)
    addresses = [_address(tensor) for tensor in (*started, *result[1:])]
    for region in _regions(scores, mask, grid):
        request = Request(pattern.n, pattern.m, schedule.SWEEPS, *addresses)
        if region.rows > region.cols:
            region, request = region.flipped(), request.flipped()
        _share_out(
            lambda first, last, region=region, request=request: solve_exact(
                region, request, first, last, reals, ints
            ),
            region,
            reals,
        )
    return result


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _work_arrays(scores: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Empty arrays of the types that the kernels compute in."""
    if scores.dtype == torch.float64:
        return np.empty(0, np.float64), np.empty(0, np.int64)
    return np.empty(0, np.float32), np.empty(0, np.int32)


def _regions(scores: Tensor, mask: Tensor, grid: BlockGrid, *, single_rows: bool = False) -> Iterator[Region]:
    """The rectangles of equal blocks of ``scores``, with their place in ``mask``."""
    size = scores.element_size()
    for rows, cols, r, c in grid.regions():
        part, flags = scores[:, rows, cols], mask[:, rows, cols]
        batch, row, col = (stride * size for stride in part.stride())
        block_rows, block_cols = grid.block_slices(rows, cols)
        if len(part) == 0:
            continue
        yield Region(
            rows=r,
            cols=c,
            batch=len(part),
            grid_rows=part.shape[1] // r,
            grid_cols=part.shape[2] // c,
            encoding=_ENCODINGS[scores.dtype],
            itemsize=size,
            scores=part.data_ptr(),
            scores_batch=batch,
            scores_grid_row=row * r,
            scores_grid_col=col * c,
            scores_row=row,
            scores_col=col,
            mask=flags.data_ptr(),
            mask_batch=flags.stride(0),
            mask_grid_row=flags.stride(1) * r,
            mask_grid_col=flags.stride(2) * c,
            mask_row=flags.stride(1),
            mask_col=flags.stride(2),
            block_first=block_rows.start * grid.block_cols + block_cols.start,
            block_batch=grid.block_rows * grid.block_cols,
            block_grid_row=grid.block_cols,
            block_grid_col=1,
        )


def _share_out(kernel: Callable[[int, int], object], region: Region, reals: np.ndarray) -> None:
    """Run ``kernel(first, last)`` on all groups of the region's blocks, on as many threads as torch uses.

    Threads take shares as they get free. What a group becomes depends on nothing but its own blocks, so the
    result is the same for any number of threads.
    """
    lanes = 64 // reals.itemsize
    groups = -(-region.blocks() // lanes)
    share = max(1, _SHARE // (region.rows * region.cols * lanes))
    shares = -(-groups // share)
    turns, failures = itertools.count(), []

    def work() -> None:
        try:
            while (turn := next(turns)) < shares:
                kernel(turn * share, min(groups, (turn + 1) * share))
        except BaseException as error:
            failures.append(error)

    helpers = [threading.Thread(target=work) for _ in range(min(torch.get_num_threads(), shares) - 1)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()
    if failures:
        raise failures[0]
