r"""Approximate transposable N:M masks: entropic transport (optional), greedy rounding, completion.

The plan of arXiv 2505.23949 (TSENOR) is the limit of Dykstra's projections of exp(t A), t = tau / max|A|:
scale the rows of S to sum N, then the columns, then clip, ``S <- min(S Q, 1)``, where Q keeps what was
clipped off.
``P = S Q`` is only ever scaled, so with row and column vectors x and y

    P = 2^(L + x_i + y_j),   L = t A / ln 2,   S = min(P, 1),
    r_i = N / sum_j S_ij,    c_j = N / sum_i r_i S_ij,    x += log2 r,   y += log2 c.

Within REFRESH iterations x and y are held as factors of a fixed ``E = 2^(L + x + y)``: no exponential is
taken.

Greedy takes entries by falling L + x + y (or A), ties by row-major index, while their lines have room.
An entry that is the first of its row and of its column among those still available is taken by the sequential
order too, so all such entries are taken at once (locally dominant entries; Khan et al., SISC 2016).

Completion fills short rows one unit at a time by the move of largest gain: keep a free entry (i, j'), or keep
(i, j') and (i', j) and free (i', j'), where column j' or j has room.
"""

import triton
import triton.language as tl
from nmsolve.kernels._tile import (
    col_index,
    extent,
    load_scaled,
    locate,
    max_cols,
    max_rows,
    min_cols,
    min_rows,
    row_index,
    store_mask,
    strided,
    sum_cols,
    sum_rows,
)

INF = tl.constexpr(float("inf"))
NONE = tl.constexpr(1 << 20)  # larger than any index
REFRESH = tl.constexpr(8)
FACTOR_MAX = tl.constexpr(2.0**60)  # bounds on what the factors become before they are refreshed
FACTOR_MIN = tl.constexpr(2.0**-60)
SUM_MIN = tl.constexpr(2.0**-120)  # a line whose sum underflows catches up in the next iterations
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def dykstra(scores, inside, real_row, row_target, col_target, slack, iterations, tau):
    """log2 of the plan's unclipped entries: it orders those that the plan holds at 1 as well."""
    peak = max_rows(max_cols(tl.where(inside, tl.abs(scores), 0.0)))
    level = scores * (tau * LOG2_E / tl.where(peak > 0, peak, 1.0))
    x = tl.where(real_row, 0.0 - max_rows(level), 0.0)
    y = tl.zeros_like(max_cols(level))
    for start in range(0, iterations, REFRESH):
        kernel = tl.exp2(tl.minimum((level + x) + y, 60.0))
        row_factor = tl.full(x.shape, 1.0, tl.float32)
        col_factor = tl.full(y.shape, 1.0, tl.float32)
        for _ in range(tl.minimum(iterations - start, REFRESH)):
            plan = tl.minimum(kernel * row_factor * col_factor, 1.0)
            row_scale = row_target / tl.maximum(sum_rows(plan), SUM_MIN)
            col_scale = col_target / tl.maximum(sum_cols(plan * row_scale), SUM_MIN)
            col_scale = tl.where(slack, tl.minimum(col_scale, 1.0), col_scale)
            row_factor = tl.minimum(tl.maximum(row_factor * row_scale, FACTOR_MIN), FACTOR_MAX)
            col_factor = tl.minimum(tl.maximum(col_factor * col_scale, FACTOR_MIN), FACTOR_MAX)
        x += tl.log2(row_factor)
        y += tl.log2(col_factor)
    return (level + x) + y


@triton.jit
def take_greedily(order, n):
    """int32 tile of 0 and 1: entries by falling order (-inf: never) while their lines hold fewer than n."""
    i = row_index(order.shape[0], order.shape[3])
    j = col_index(order.shape[1], order.shape[4])
    kept = tl.zeros_like(order).to(tl.int32)
    go = True
    while go:
        first_col = min_rows(tl.where(order == max_rows(order), j, NONE))
        first_row = min_cols(tl.where(order == max_cols(order), i, NONE))
        take = (first_col == j) & (first_row == i) & (order > -INF)
        kept = tl.where(take, 1, kept)
        room = (sum_rows(kept) < n) & (sum_cols(kept) < n)
        order = tl.where(take | (room == 0), -INF, order)
        go = tl.max(max_rows(max_cols(tl.where(take, 1, 0)))) > 0
    return kept


@triton.jit
def complete(scores, kept, row_target, n, M: tl.constexpr):
    """``kept`` with every row filled to its target; columns hold at most n."""
    i = row_index(scores.shape[0], scores.shape[3])
    j = col_index(scores.shape[1], scores.shape[4])
    short = min_cols(tl.where(sum_rows(kept) < row_target, i, NONE))
    go = tl.min(short) < NONE
    while go:
        here = i == short
        score_here = max_cols(tl.where(here, scores, -INF))
        free_here = sum_cols(tl.where(here, 1 - kept, 0)) > 0
        room = sum_cols(kept) < n
        direct = tl.where(free_here & room, score_here, -INF)
        direct_gain = max_rows(direct)
        direct_col = min_rows(tl.where(direct == direct_gain, j, NONE))

        other = tl.where((kept == 0) & room, scores, -INF)
        other_gain = max_rows(other)
        other_col = min_rows(tl.where(other == other_gain, j, NONE))
        move = tl.where((kept > 0) & free_here, (score_here - scores) + other_gain, -INF)
        swap_gain = max_rows(max_cols(move))
        entry = min_rows(min_cols(tl.where(move == swap_gain, i * M + j, NONE)))
        swap = (swap_gain > direct_gain) & (short < NONE)
        swap_row = tl.where(swap, entry // M, -1)
        swap_col = tl.where(swap, entry % M, -1)

        come = here & (j == tl.where(swap, swap_col, direct_col))
        come = come | ((i == swap_row) & (j == other_col))
        kept = tl.where(come, 1, tl.where((i == swap_row) & (j == swap_col), 0, kept))
        short = min_cols(tl.where(sum_rows(kept) < row_target, i, NONE))
        go = tl.min(short) < NONE
    return kept


@triton.jit(
    do_not_specialize=[
        "n", "m", "rows", "cols", "batch", "stride_batch", "stride_row", "stride_col", "first_block_row",
        "first_block_col", "block_rows", "block_cols", "unit", "iterations", "tau",
    ],
)  # fmt: skip
def dykstra_kernel(
    scores_ptr,  # (batch, rows, cols) of any strides
    mask_ptr,  # (batch, rows, cols) uint8, contiguous; where PACKED seen as int32
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
    unit,  # 1
    iterations,  # used where TRANSPORT
    tau,
    ROWS_IN: tl.constexpr,
    COLS_IN: tl.constexpr,
    ROWS_OUT: tl.constexpr,
    COLS_OUT: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
    SLACK: tl.constexpr,
    PACKED: tl.constexpr,
    TRANSPORT: tl.constexpr,
):
    """One program: ``BLOCKS`` blocks from scores to mask. ``grid = (ceil(blocks / BLOCKS),)``."""
    M: tl.constexpr = ROWS_IN * ROWS_OUT
    place = locate(0, first_block_row, first_block_col, block_rows, block_cols, batch, BLOCKS)
    live = place[3]
    i, j = row_index(ROWS_IN, ROWS_OUT), col_index(COLS_IN, COLS_OUT)
    rows_here, cols_here, tall = extent(place, rows, cols, m, SLACK)
    slack = rows_here < cols_here
    real_row = (i < rows_here) & live
    real_col = (j < cols_here) & live
    inside = live
    if PADDED:
        inside = real_row & real_col
    offsets = strided(place, i, j, tall, m, stride_batch, stride_row, stride_col, SLACK)
    scores, _ = load_scaled(scores_ptr + offsets, inside, PADDED)

    row_target = tl.where(real_row, tl.minimum(n, cols_here), 0)
    if TRANSPORT:
        col_target = tl.where(real_col, tl.where(slack, n, tl.minimum(n, rows_here)), 0)
        order = dykstra(
            scores,
            inside,
            real_row,
            row_target.to(tl.float32),
            col_target.to(tl.float32),
            slack,
            iterations,
            tau,
        )
    else:
        order = scores
    kept = complete(scores, take_greedily(order, n), row_target, n, M)
    store_mask(mask_ptr, kept > 0, place, i, j, inside, tall, rows, cols, m, unit, PACKED, SLACK)
