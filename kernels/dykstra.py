r"""Approximate transposable N:M masks: entropic transport (optional), greedy rounding, completion.

The plan of arXiv 2505.23949 (TSENOR) is the limit of Dykstra's projections of exp(t A), t = tau / max|A|:
scale the rows of S to sum N, then the columns, then clip, ``S <- min(S Q, 1)``, where Q keeps what was
clipped off.
``P = S Q`` is only ever scaled, so with row and column vectors x and y

    P = 2^(L + x_i + y_j),   L = t A / ln 2,   S = min(P, 1),
    r_i = N / sum_j S_ij,    c_j = N / sum_i r_i S_ij,    x += log2 r,   y += log2 c.

Within REFRESH iterations x and y are held as factors of a fixed ``E = 2^(L + x + y)``: no exponential is
taken.

Greedy takes entries by falling L + x + y (or A), ties by row-major index, while their lines have room. The
mask is found by deferred acceptance (Gale and Shapley, 1962): rows offer entries, the first ones first and
never more than N that stand, and columns refuse what comes after N others. As rows and columns agree about
the order, only the greedy mask is one at which this ends (docs/internals/solver.md).

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
    exp2,
    load_scaled,
    log2,
    max_cols,
    max_rows,
    min_cols,
    min_rows,
    place_blocks,
    power_of_two_scale,
    quotient,
    row_index,
    store_mask,
    sum_cols,
    sum_rows,
    targets,
)

INF = tl.constexpr(float("inf"))
NONE = tl.constexpr(1 << 20)  # larger than any index
TIE = tl.constexpr(1 << 11)  # larger than the lines that all lanes of a program hold
ONE = tl.constexpr(0x3F800000)  # the bits of 1.0
REFRESH = tl.constexpr(20)
FACTOR_MAX = tl.constexpr(2.0**60)  # bounds on what the factors become before they are refreshed
FACTOR_MIN = tl.constexpr(2.0**-60)
FACTOR_PART = tl.constexpr(2.0**-54)  # of a factor, added to a sum: M / FACTOR_PART bounds the next factor
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
    level = scores * rate
    x = 0.0 - max_rows(scores) * rate
    if PADDED:
        x = tl.where(blocks.real_row, x, 0.0)
    y = tl.zeros_like(max_cols(scores))
    for start in range(0, iterations, REFRESH):
        kernel = exp2(tl.minimum((level + x) + y, 60.0))
        row_factor = tl.full(x.shape, 1.0, tl.float32)
        col_factor = tl.full(y.shape, 1.0, tl.float32)
        for _ in range(tl.minimum(iterations - start, REFRESH)):
            plan = tl.minimum(tl.maximum((kernel * row_factor) * col_factor, 0.0), 1.0)
            if PADDED:
                row_scale = quotient(row_target, tl.maximum(sum_rows(plan), SUM_MIN))
                col_scale = quotient(col_target, tl.maximum(sum_cols(plan * row_scale), SUM_MIN))
                if SLACK:
                    col_scale = tl.where(blocks.slack, tl.minimum(col_scale, 1.0), col_scale)
                row_factor = tl.minimum(row_factor * row_scale, FACTOR_MAX)
                col_factor = tl.minimum(col_factor * col_scale, FACTOR_MAX)
            else:
                row_scale = quotient(row_target, sum_rows(plan) + row_factor * FACTOR_PART)
                col_sum = sum_cols(plan * row_scale)
                row_factor *= row_scale
                col_factor = quotient(col_factor * col_target, col_sum + col_factor * FACTOR_PART)
        x += log2(tl.maximum(row_factor, FACTOR_MIN))
        y += log2(tl.maximum(col_factor, FACTOR_MIN))
    return (level + x) + y


@triton.jit
def reached_by_few(order, n, lower, upper):
    """Per row a value of at least -1 that at most n entries reach, by bisection; INF where none was found.

    It lies between ``lower`` and ``upper``.
    """
    low = tl.maximum(min_rows(order), lower)
    high = tl.minimum(max_rows(order), upper)
    few = tl.full(high.shape, INF, tl.float32)
    M: tl.constexpr = order.shape[1] * order.shape[4]
    for _ in range(1 + (M > 4) + (M > 8) + (M > 16) + (M > 32)):
        middle = 0.5 * (low + high)
        fits = sum_rows(tl.where(order >= middle, 1.0, 0.0)) <= n
        few = tl.where(fits, middle, few)
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle)
    return tl.maximum(few, -1.0)


@triton.jit
def keys_of(order, DISTINCT: tl.constexpr):
    """Positive int32 in the order of float32 in (-1, 1), small enough for floats to double; 0 for -inf.

    With ``DISTINCT`` the last 7 bits tell the entries of a line apart, the first one being the largest.
    """
    bits = (order + 0.0).to(tl.int32, bitcast=True)  # of -0.0 those of 0.0
    sign = bits >> 31
    keys = tl.minimum(tl.maximum((bits ^ (sign & 0x7FFFFFFF)) - sign, -ONE), ONE - 1) + ONE
    if DISTINCT:
        i = row_index(order.shape[0], order.shape[3])
        j = col_index(order.shape[1], order.shape[4])
        keys = tl.where(keys > 0, (keys & -128) + (127 - i - j), 0)
    return keys


@triton.jit
def first_of_tied(moves):
    """``moves`` with the first one of a row's offers and the last one of a column's refusals."""
    i = row_index(moves.shape[0], moves.shape[3]).to(tl.float32)
    j = col_index(moves.shape[1], moves.shape[4]).to(tl.float32)
    offer = tl.maximum(moves - 1, 0.0)
    refusal = moves - 2 * offer
    first_col = min_rows(j - 128 * offer)
    last_row = max_cols(i + 128 * refusal)
    offer *= tl.where(first_col == j - 128, 1.0, 0.0)
    return 2 * offer + refusal * tl.where(last_row == i + 128, 1.0, 0.0)


@triton.jit
def take_greedily(order, n, lower, upper, DISTINCT: tl.constexpr):
    """Entries by falling order (-inf: never) while their lines hold fewer than n, and 0.

    They come as int32 numbers, of a bit for each entry of a row that is in one lane. ``order`` is in (-1, 1);
    ``DISTINCT`` rounds it. For ``lower`` and ``upper`` see :func:`reached_by_few`.

    ``state`` is an entry's key, with the sign bit set once it is offered, and 0 once it is refused. So the
    largest int32 number of a row is what it offers next, and the least one of a column what it refuses next.
    A round does both at once; moves are 2 for an offer and 1 for a refusal. Factors and sums of such numbers
    occupy no predicates, of which the hardware has seven.
    """
    held = tl.where(order >= reached_by_few(order, n, lower, upper), 1.0, 0.0)
    keys = keys_of(order, DISTINCT).to(tl.float32, bitcast=True)
    state = (keys - 2 * held * keys).to(tl.int32, bitcast=True)
    row_held = sum_rows(held)
    col_held = sum_cols(held)
    found = tl.full((), 1, tl.int32)
    while found > 0:
        worst = min_cols(state)
        over = tl.where(col_held > n, 1.0, 0.0)
        # What comes after all that a full column holds need not be offered.
        least = tl.where(col_held >= n, (worst & 0x7FFFFFFF).to(tl.float32, bitcast=True), 0.0)
        worst = tl.where(over > 0, worst.to(tl.float32, bitcast=True), INF)
        tile = state.to(tl.float32, bitcast=True)
        refused = tl.where(tile == worst, 1.0, 0.0)
        tile *= tl.where(tl.abs(tile) >= least, 1.0, 0.0)
        best = max_rows(tile.to(tl.int32, bitcast=True))
        short = tl.where((row_held < n) & (best > 0), 1.0, 0.0)
        best = tl.where(short > 0, best.to(tl.float32, bitcast=True), INF)
        moves = 2 * tl.where(tile == best, 1.0, 0.0) + refused
        row_moves = sum_rows(moves)
        col_moves = sum_cols(moves)
        # How many lines move; and TIE times how many moves there are above one for each, which are ties.
        lines = tl.sum(short, 0, keep_dims=True) + tl.sum(over, 1, keep_dims=True)
        if DISTINCT:
            found = tl.max(lines.to(tl.int32))
        else:
            excess = tl.sum(row_moves - 2 * short, 0, keep_dims=True) * moves.shape[3]
            excess -= tl.sum(over, 1, keep_dims=True) * moves.shape[4]
            found = tl.sum(lines.to(tl.int32) + TIE * excess.to(tl.int32))
            if found >= TIE:
                moves = first_of_tied(moves)
                row_moves = sum_rows(moves)
                col_moves = sum_cols(moves)
        row_held += 3 * short - row_moves
        col_held += 0.5 * (col_moves - 3 * over)
        state = (tile - moves * tile).to(tl.int32, bitcast=True)
    weight = (1 << tl.arange(0, order.shape[1])[None, :, None, None, None]).to(tl.float32)
    bits = tl.sum(tl.where(state < 0, weight, 0.0), 1, keep_dims=True)
    return bits.to(tl.int32), found


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
    blocks, scores, unscale, row_target, col_target = load_blocks(scores_ptr, n, m, matrix, region, 0, LAYOUT)
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
        peak = max_rows(max_cols(tl.where(blocks.inside, tl.abs(order), 0.0) if PADDED else tl.abs(order)))
        scale, _ = power_of_two_scale(peak)
        order *= scale
        lower, upper = -4 * scale, 2 * scale
    else:
        lower, upper = -1.0, 1.0
        order = scores * tl.where(
            unscale < (2.0**1022 if unscale.dtype == tl.float64 else 2.0**126), 1.0, 0.25
        )
    bits, spent = take_greedily(order, n, lower, upper, TRANSPORT)
    # The scores are loaded anew (spent is 0, which the compiler does not know): neither they nor an address
    # occupy registers until here.
    blocks, scores, unscale, row_target, _ = load_blocks(scores_ptr, n, m, matrix, region, spent, LAYOUT)
    kept, spent = complete(scores, unpacked(bits, tl.where(unscale > 0, 0, 1), COLS_IN), row_target, n)
    if TRANSPORT:  # where they are found once more, lest an address waits for the end of completion
        blocks = place_blocks(matrix, region, m, 0, spent, LAYOUT)
    # blocks.i and blocks.j would be alive beside these, which complete uses.
    entries = row_index(ROWS_IN, ROWS_OUT), col_index(COLS_IN, COLS_OUT)
    store_mask(mask_ptr, kept, matrix, blocks, entries, m, unit, LAYOUT)
