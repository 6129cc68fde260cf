r"""Exact transposable N:M masks: dual ascent, then shortest augmenting paths, in one launch.

Per block, scores A of shape (R, C), R <= C (the launcher's SLACK specialisation turns taller blocks):

    max <S, A>   s.t.   S 1 = a,   S^T 1 = b  (R == C)  or  <= b  (R < C),   0 <= S <= 1
    min a sum(u) + b sum(v) + sum_ij max(0, A_ij - u_i - v_j)        (v >= 0 where R < C)

:mod:`nmsolve.kernels.ascent` finds approximate duals, :mod:`nmsolve.kernels.paths` a mask and the duals that
prove it optimal.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from nmsolve.kernels._tile import (
    Matrix,
    Part,
    Region,
    TileLayout,
    load_scaled,
    max_cols,
    max_rows,
    place_blocks,
    pointers_to,
    store_mask,
    strided,
    sum_cols,
    sum_rows,
    targets,
    widen,
)
from nmsolve.kernels.ascent import dual_ascent
from nmsolve.kernels.paths import Targets, augment, is_free

WARM_LIMIT = tl.constexpr(4.0)  # duals to start from are clamped to this, relative to the scaled scores


class Duals(NamedTuple):
    """Where duals lie: ``(batch, grid_rows, grid_cols, m)`` each, contiguous."""

    row_ptr: Any
    col_ptr: Any
    unit: Any  # 1, given at run time: see :func:`store_mask`


class Found(NamedTuple):
    """What the search found for the blocks of a program."""

    u: Any  # duals of the scaled scores, a row vector
    v: Any  # a column vector
    arcs: Any  # a tile: see :mod:`nmsolve.kernels.paths`
    unscale: Any  # what undoes the scaling, one number per block
    spent: Any  # the imbalance left, one number per block: 0, which the compiler does not know


class Outputs(NamedTuple):
    """Where the results go; without SOLUTION the mask alone."""

    mask_ptr: Any
    row_duals_ptr: Any
    col_duals_ptr: Any
    objective_ptr: Any
    bound_ptr: Any
    unit: Any  # 1, given at run time: see :func:`store_mask`


@triton.jit
def block_number(blocks, grid):
    """The blocks' places in ``(batch, grid_rows, grid_cols)`` results."""
    return (blocks.index * grid[0] + blocks.block_row) * grid[1] + blocks.block_col


@triton.jit
def load_duals(row_ptr, col_ptr, lines, real, tall, SLACK: tl.constexpr):
    """Duals of a tile's rows from ``row_ptr``, of turned blocks from ``col_ptr`` (columns: exchanged)."""
    duals = tl.load(pointers_to(row_ptr, lines), mask=real & (tall == 0), other=0.0)
    if SLACK:
        duals += tl.load(pointers_to(col_ptr, lines), mask=real & tall, other=0.0)
    return duals


@triton.jit
def store_duals(row_ptr, col_ptr, lines, duals, mask, tall, SLACK: tl.constexpr):
    """The counterpart of :func:`load_duals`."""
    tl.store(pointers_to(row_ptr, lines), duals, mask=mask & (tall == 0))
    if SLACK:
        tl.store(pointers_to(col_ptr, lines), duals, mask=mask & tall)


@triton.jit
def solve_blocks(
    scores_ptr, warm, n, m, part, LAYOUT: tl.constexpr, WARM: tl.constexpr, SCHEDULE: tl.constexpr
):
    """What is found for the blocks of this program, from the duals ``warm`` on where WARM."""
    PADDED: tl.constexpr = LAYOUT.PADDED
    SLACK: tl.constexpr = LAYOUT.SLACK
    blocks = place_blocks(part.matrix, part.region, m, part.shift, 0, LAYOUT)
    scores, unscale = load_scaled(scores_ptr, part.matrix, blocks, m, LAYOUT)
    row_each, col_each = targets(blocks, n)
    row_target = tl.where(blocks.real_row, row_each, 0) if PADDED else row_each
    col_target = tl.where(blocks.real_col, col_each, 0) if PADDED else col_each
    surplus = col_each * blocks.cols - row_each * blocks.rows
    slack_target = tl.where(blocks.slack & blocks.live, surplus, 0)

    if WARM:
        # Loaded for the whole tile, all equal along a line: a vector would bring a layout of its own along.
        everywhere = tl.zeros_like(scores).to(tl.int32)
        first = block_number(blocks, part.grid) * m
        row_lines = first + (blocks.i + everywhere) * warm.unit
        col_lines = first + (blocks.j + everywhere) * warm.unit
        real_row, real_col, tall = blocks.real_row, blocks.real_col, blocks.tall
        u = max_rows(load_duals(warm.row_ptr, warm.col_ptr, row_lines, real_row, tall, SLACK)) / unscale
        v = max_cols(load_duals(warm.col_ptr, warm.row_ptr, col_lines, real_col, tall, SLACK)) / unscale
        u = tl.minimum(tl.maximum(u, -WARM_LIMIT), WARM_LIMIT).to(tl.float32)
        v = tl.minimum(tl.maximum(v, -WARM_LIMIT), WARM_LIMIT).to(tl.float32)
        if SLACK:
            v = tl.where(blocks.slack, tl.maximum(v, 0.0), v)
    else:
        u, v = dual_ascent(
            scores, blocks, row_target.to(tl.float32), col_target.to(tl.float32), PADDED, SLACK, SCHEDULE
        )
    u, v, arcs, spent = augment(scores, u, v, blocks, Targets(row_target, col_target, slack_target), LAYOUT)
    return Found(u, v, arcs, unscale, spent)


@triton.jit
def store_blocks(scores_ptr, outputs, found, n, m, part, LAYOUT: tl.constexpr, SOLUTION: tl.constexpr):
    """Store the mask that :func:`solve_blocks` found, and where SOLUTION the duals, objective and bound."""
    PADDED: tl.constexpr = LAYOUT.PADDED
    SLACK: tl.constexpr = LAYOUT.SLACK
    ROWS_IN: tl.constexpr = LAYOUT.ROWS_IN
    matrix, unit, unscale = part.matrix, outputs.unit, found.unscale
    # Where everything lies is worked out anew: spent is 0, which the compiler does not know.
    blocks = place_blocks(matrix, part.region, m, part.shift, found.spent, LAYOUT)
    kept = is_free(found.arcs) == 0
    i, j, live, tall = blocks.i, blocks.j, blocks.live, blocks.tall
    store_mask(outputs.mask_ptr, kept, matrix, blocks, (i, j), m, unit, LAYOUT)

    if SOLUTION:
        # Duals as the caller gets them.
        u = found.u.to(unscale.dtype) * unscale
        v = found.v.to(unscale.dtype) * unscale
        if PADDED:
            u = tl.where(blocks.real_row, u, 0.0)
            v = tl.where(blocks.real_col, v, 0.0)
        first = block_number(blocks, part.grid) * m
        row_duals_ptr, col_duals_ptr = outputs.row_duals_ptr, outputs.col_duals_ptr
        store_duals(row_duals_ptr, col_duals_ptr, first + i * unit, u, live & (i < m), tall, SLACK)
        store_duals(col_duals_ptr, row_duals_ptr, first + j * unit, v, live & (j < m), tall, SLACK)

        # Objective and bound follow from those and the original scores, in float64. To spare registers the
        # mask is packed to a bit per row and the scores are read again, a row of each lane at a time.
        row_in = tl.arange(0, ROWS_IN)[:, None, None, None, None]
        bits = tl.sum(tl.where(kept, 1, 0) << row_in, 0, keep_dims=True)
        u = u.to(tl.float64)
        v = v.to(tl.float64)
        row_each, col_each = targets(blocks, n)
        bound = sum_cols(u) * row_each + sum_rows(v) * col_each
        objective = tl.zeros_like(bound)
        for r in range(ROWS_IN):
            row = ROWS_IN * tl.arange(0, LAYOUT.ROWS_OUT)[None, None, None, :, None] + r
            here = live
            if PADDED:
                here = (row < blocks.rows) & blocks.real_col
            again = strided(
                blocks, row, j, m, matrix.stride_batch, matrix.stride_row, matrix.stride_col, SLACK
            )
            original = widen(tl.load(pointers_to(scores_ptr, again), mask=here, other=0.0)).to(tl.float64)
            row_u = tl.sum(tl.where(row_in == r, u, 0.0), 0, keep_dims=True)
            surplus = tl.maximum((original - row_u) - v, 0.0)
            if PADDED:
                surplus = tl.where(here, surplus, 0.0)
            objective += sum_rows(sum_cols(tl.where(((bits >> r) & 1) > 0, original, 0.0)))
            bound += sum_rows(sum_cols(surplus))
        number = block_number(blocks, part.grid)
        tl.store(outputs.objective_ptr + number, objective, mask=live)
        tl.store(outputs.bound_ptr + number, bound, mask=live)


@triton.jit(
    do_not_specialize=[
        "n", "m", "rows", "cols", "batch", "stride_batch", "stride_row", "stride_col", "first_block_row",
        "first_block_col", "block_rows", "block_cols", "grid_rows", "grid_cols", "unit",
    ],
)  # fmt: skip
def exact_kernel(
    scores_ptr,  # (batch, rows, cols) of any strides
    mask_ptr,  # (batch, rows, cols) uint8, contiguous; where PACKED seen as int32
    row_duals_ptr,  # (batch, grid_rows, grid_cols, m) float32 or float64, contiguous; used where SOLUTION
    col_duals_ptr,
    objective_ptr,  # (batch, grid_rows, grid_cols) float64
    bound_ptr,
    warm_row_ptr,  # like row_duals; used where WARM
    warm_col_ptr,
    n,
    m,
    rows,
    cols,
    batch,
    stride_batch,
    stride_row,
    stride_col,
    first_block_row,  # this launch's rectangle of blocks
    first_block_col,
    block_rows,
    block_cols,
    grid_rows,  # blocks of the whole matrix
    grid_cols,
    unit,  # 1
    ROWS_IN: tl.constexpr,
    COLS_IN: tl.constexpr,
    ROWS_OUT: tl.constexpr,
    COLS_OUT: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
    SLACK: tl.constexpr,
    PACKED: tl.constexpr,
    WARM: tl.constexpr,
    SOLUTION: tl.constexpr,
    SCHEDULE: tl.constexpr,
):
    """One program: ``BLOCKS`` blocks from scores to mask. ``grid = (ceil(blocks / BLOCKS),)``."""
    matrix = Matrix(rows, cols, batch, stride_batch, stride_row, stride_col)
    region = Region(first_block_row, first_block_col, block_rows, block_cols)
    part = Part(matrix, region, (grid_rows, grid_cols), 0)
    LAYOUT: tl.constexpr = TileLayout(ROWS_IN, COLS_IN, ROWS_OUT, COLS_OUT, BLOCKS, PADDED, SLACK, PACKED)
    warm = Duals(warm_row_ptr, warm_col_ptr, unit)
    found = solve_blocks(scores_ptr, warm, n, m, part, LAYOUT, WARM, SCHEDULE)
    outputs = Outputs(mask_ptr, row_duals_ptr, col_duals_ptr, objective_ptr, bound_ptr, unit)
    store_blocks(scores_ptr, outputs, found, n, m, part, LAYOUT, SOLUTION)
