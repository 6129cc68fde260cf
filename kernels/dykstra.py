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
    Matrix,
    Region,
    TileLayout,
    col_index,
    load_scaled,
    max_cols,
    max_rows,
    min_cols,
    min_rows,
    place_blocks,
    quotient,
    row_index,
    store_mask,
    sum_cols,
    sum_rows,
    targets,
)

INF = tl.constexpr(float("inf"))
NONE = tl.constexpr(1 << 20)  # larger than any index
DROP = tl.constexpr(2.0**100)  # larger than any difference of orders
REFRESH = tl.constexpr(20)
FACTOR_MAX = tl.constexpr(2.0**60)  # bounds on what the factors become before they are refreshed
FACTOR_MIN = tl.constexpr(2.0**-60)
SUM_MIN = tl.constexpr(2.0**-120)  # a line whose sum underflows catches up in the next iterations
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def dykstra(
    scores,
    blocks,
    row_target,
    col_target,
    iterations,
    tau,
    PADDED: tl.constexpr,
    SLACK: tl.constexpr,
):
    """log2 of the plan's unclipped entries: it orders those that the plan holds at 1 as well."""
    peak = max_rows(max_cols(tl.where(blocks.inside, tl.abs(scores), 0.0) if PADDED else tl.abs(scores)))
    rate = tau * LOG2_E / tl.where(peak > 0, peak, 1.0)
    x = 0.0 - max_rows(scores) * rate
    if PADDED:
        x = tl.where(blocks.real_row, x, 0.0)
    y = tl.zeros_like(max_cols(scores))
    for start in range(0, iterations, REFRESH):
        kernel = tl.exp2(tl.minimum((scores * rate + x) + y, 60.0))
        row_factor = tl.full(x.shape, 1.0, tl.float32)
        col_factor = tl.full(y.shape, 1.0, tl.float32)
        for _ in range(tl.minimum(iterations - start, REFRESH)):
            plan = tl.minimum(tl.maximum((kernel * row_factor) * col_factor, 0.0), 1.0)
            row_scale = quotient(row_target, tl.maximum(sum_rows(plan), SUM_MIN))
            col_scale = quotient(col_target, tl.maximum(sum_cols(plan * row_scale), SUM_MIN))
            if SLACK:
                col_scale = tl.where(blocks.slack, tl.minimum(col_scale, 1.0), col_scale)
            row_factor = tl.minimum(row_factor * row_scale, FACTOR_MAX)
            col_factor = tl.minimum(col_factor * col_scale, FACTOR_MAX)
        x += tl.log2(tl.maximum(row_factor, FACTOR_MIN))
        y += tl.log2(tl.maximum(col_factor, FACTOR_MIN))
    return (scores * rate + x) + y


@triton.jit
def first_of_tied(order, row_best, col_best):
    """1.0 for the entries that are the first among the largest of their row and of their column, 0.0 else."""
    i = row_index(order.shape[0], order.shape[3])
    j = col_index(order.shape[1], order.shape[4])
    first_col = min_rows(tl.where(order == row_best, j, NONE))
    first_row = min_cols(tl.where(order == col_best, i, NONE))
    return tl.where((first_row == i) & (first_col == j) & (order == col_best), 1.0, 0.0)


@triton.jit
def take_greedily(order, n):
    """Entries by falling order (-inf: never) while their lines hold fewer than n, and 0 per block.

    They come as int32 numbers, of a bit for each entry of a row that is in one lane. What is not available
    any more is lowered by DROP, which infinity would not be: it is cut off before. Sums of 0.0 and 1.0 occupy
    no predicates, of which the hardware has seven.
    """
    order = tl.minimum(order, DROP / 4)
    weight = (1 << tl.arange(0, order.shape[1])[None, :, None, None, None]).to(tl.float32)
    row_room = tl.zeros_like(max_rows(order)) + n
    col_room = tl.zeros_like(max_cols(order)) + n
    bits = tl.zeros_like(tl.max(order, 1, keep_dims=True))  # of the entries kept of a row in one lane
    taken = tl.zeros_like(max_cols(row_room))
    go = True
    while go:
        row_best = max_rows(order)
        row_best = tl.where(row_best > -DROP / 2, row_best, INF)
        col_best = max_cols(order)
        take = tl.where((order == row_best) & (order == col_best), 1.0, 0.0)
        row_taken = sum_rows(take)
        col_taken = sum_cols(take)
        if tl.max(tl.maximum(max_cols(row_taken), max_rows(col_taken))) > 1:
            take = first_of_tied(order, row_best, col_best)
            row_taken = sum_rows(take)
            col_taken = sum_cols(take)
        bits += tl.sum(take * weight, 1, keep_dims=True)
        row_room -= row_taken
        col_room -= col_taken
        order -= take * DROP
        order -= tl.where(row_room > 0, 0.0, DROP)
        order -= tl.where(col_room > 0, 0.0, DROP)
        taken = sum_cols(row_taken)
        go = tl.max(taken) > 0
    return bits.to(tl.int32), taken.to(tl.int32)


@triton.jit
def unpacked(bits, zero, COLS_IN: tl.constexpr):
    """The tile of true and false that numbers of :func:`take_greedily` stand for."""
    return ((bits >> (tl.arange(0, COLS_IN)[None, :, None, None, None] + zero)) & 1) > 0


@triton.jit
def first_row_of(found, i):
    """Per block the number of the first true row; NONE if there is none."""
    return min_cols(tl.where(found, i, NONE))


@triton.jit
def first_col_of(found, j):
    return min_rows(tl.where(found, j, NONE))


@triton.jit
def complete(scores, kept, row_target, n):
    """``kept`` with every row filled to its target, and 0 per block; columns hold at most n.

    ``gain`` is an entry's score where it is free and ``loss`` where it is kept; they are -inf and inf else.
    A row of a tile is picked by adding -inf to the others: no predicates.
    """
    i = row_index(scores.shape[0], scores.shape[3])
    j = col_index(scores.shape[1], scores.shape[4])
    gain = tl.where(kept, -INF, scores)
    loss = tl.where(kept, scores, INF)
    row_count = sum_rows(tl.where(kept, 1, 0))
    col_count = sum_cols(tl.where(kept, 1, 0))
    short = first_row_of(row_count < row_target, i)
    go = tl.min(short) < NONE
    while go:
        full = tl.where(col_count < n, 0.0, -INF)
        here = max_cols(gain + tl.where(i == short, 0.0, -INF))
        direct_gain = max_rows(here + full)
        other_gain = max_rows(gain + full)
        swap = max_rows(here - loss) + other_gain
        swap_gain = max_cols(swap)

        swaps = (swap_gain > direct_gain) & (short < NONE)
        swap_row = tl.where(swaps, first_row_of(swap == swap_gain, i), -1)
        row = tl.where(i == swap_row, 0.0, -INF)
        there = max_cols(gain + row) + full
        swap_here = here - min_cols(loss - row)
        leave = tl.where(swaps, first_col_of(swap_here == max_rows(swap_here), j), -1)
        enter = tl.where(swaps, first_col_of(there == max_rows(there), j), -1)
        direct = first_col_of((here + full) == direct_gain, j)
        come = tl.where(swaps, leave, tl.where(short < NONE, direct, -1))

        flip = tl.where(i == short, 1.0, 0.0) * tl.where(j == come, 1.0, 0.0)
        flip += tl.where(i == swap_row, 1.0, 0.0) * tl.where((j == leave) | (j == enter), 1.0, 0.0)
        free = tl.where(flip > 0, loss, gain)
        loss = tl.where(flip > 0, gain, loss)
        gain = tl.where(free < INF, free, -INF)
        loss = tl.where(loss > -INF, loss, INF)
        row_count += tl.where(i == short, 1, 0)
        col_count += tl.where(j == tl.where(swaps, enter, come), 1, 0)
        short = first_row_of(row_count < row_target, i)
        go = tl.min(short) < NONE
    return loss < INF, short - NONE


@triton.jit
def load_blocks(scores_ptr, n, m, matrix, region, zero, LAYOUT: tl.constexpr):
    """The blocks, their scores, what undoes the scaling, row and column targets. ``zero`` is 0."""
    blocks = place_blocks(matrix, region, m, 0, zero, LAYOUT)
    scores, unscale = load_scaled(scores_ptr, matrix, blocks, m, LAYOUT)
    row_target, col_target = targets(blocks, n)
    if LAYOUT.PADDED:
        row_target = tl.where(blocks.real_row, row_target, 0)
        col_target = tl.where(blocks.real_col, col_target, 0)
    return blocks, scores, unscale, row_target, col_target


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
    matrix = Matrix(rows, cols, batch, stride_batch, stride_row, stride_col)
    region = Region(first_block_row, first_block_col, block_rows, block_cols)
    LAYOUT: tl.constexpr = TileLayout(ROWS_IN, COLS_IN, ROWS_OUT, COLS_OUT, BLOCKS, PADDED, SLACK, PACKED)
    blocks, scores, _, row_target, col_target = load_blocks(scores_ptr, n, m, matrix, region, 0, LAYOUT)
    order = scores
    if TRANSPORT:
        order = dykstra(
            scores,
            blocks,
            row_target.to(tl.float32),
            col_target.to(tl.float32),
            iterations,
            tau,
            PADDED,
            SLACK,
        )
    bits, spent = take_greedily(order, n)
    # The scores are loaded anew (spent is 0, which the compiler does not know): neither they nor an address
    # occupy registers until here.
    blocks, scores, unscale, row_target, _ = load_blocks(scores_ptr, n, m, matrix, region, spent, LAYOUT)
    kept, spent = complete(scores, unpacked(bits, tl.where(unscale > 0, 0, 1), COLS_IN), row_target, n)
    if TRANSPORT:  # where they are found once more, lest an address waits for the end of completion
        blocks = place_blocks(matrix, region, m, 0, spent, LAYOUT)
    # blocks.i and blocks.j would be alive beside these, which complete uses.
    entries = row_index(ROWS_IN, ROWS_OUT), col_index(COLS_IN, COLS_OUT)
    store_mask(mask_ptr, kept, matrix, blocks, entries, m, unit, LAYOUT)
