r"""Exact transposable N:M masks: dual ascent, then shortest augmenting paths, in one launch.

Per block, scores A of shape (R, C), R <= C (the launcher's SLACK specialisation turns taller blocks):

    max <S, A>   s.t.   S 1 = a,   S^T 1 = b  (R == C)  or  <= b  (R < C),   0 <= S <= 1
    min a sum(u) + b sum(v) + sum_ij max(0, A_ij - u_i - v_j)        (v >= 0 where R < C)

Phase 1 alternates Newton steps on u and v for ``S = clip(tau (A - u - v) + 1/2, 0, 1)``, raising tau until few
entries are fractional. Phase 2 starts from ``S = [A - u - v > 0]`` and moves one unit of imbalance per search
along a shortest path (Bellman-Ford: a column and a row reduction per sweep), see docs/solver.md.

The second phase keeps one float per entry, the *signed reduced score* X = A - u - v: its sign bit says
whether the entry is free (set) or kept, its magnitude is the cost of the entry's arc. Complementary
slackness makes the two agree; rounding is clamped to zero, hence a free entry may hold -0.0.
"""

import triton
import triton.language as tl

from nmsolve.kernels._tile import (
    col_index,
    load_scaled,
    locate,
    max_cols,
    max_rows,
    min_cols,
    min_rows,
    row_index,
    sum_cols,
    sum_rows,
    widen,
)

INF = tl.constexpr(float("inf"))
NONE = tl.constexpr(1 << 20)  # larger than any node number


@triton.jit
def newton_step(total, fractional, target, tau, DAMPING: tl.constexpr, STEP_LIMIT: tl.constexpr):
    """``clip((total - target) / (fractional + DAMPING), +-STEP_LIMIT) / tau``."""
    step = (total - target) / (fractional + DAMPING)
    return tl.minimum(tl.maximum(step, -STEP_LIMIT), STEP_LIMIT) / tau


@triton.jit
def dual_ascent(
    scores,
    inside,
    row_target,
    col_target,
    rows,
    cols,
    slack,
    PADDED: tl.constexpr,
    SLACK: tl.constexpr,
    SWEEPS: tl.constexpr,
    FRACTION_START: tl.constexpr,
    FRACTION_END: tl.constexpr,
    FRACTION_FLOOR: tl.constexpr,
    GROWTH_MIN: tl.constexpr,
    GROWTH_MAX: tl.constexpr,
    STEP_LIMIT: tl.constexpr,
    DAMPING: tl.constexpr,
    WINSOR: tl.constexpr,
    TAU_START: tl.constexpr,
    DEVIATION_FLOOR: tl.constexpr,
):
    """Approximate duals (u, v) of a tile; rows, cols: float32 numbers of real lines per block."""
    entries = rows * cols
    if PADDED:
        mean = sum_rows(sum_cols(tl.where(inside, scores, 0.0))) / entries
        deviation = sum_rows(sum_cols(tl.where(inside, tl.abs(scores - mean), 0.0))) / entries
    else:
        mean = sum_rows(sum_cols(scores)) / entries
        deviation = sum_rows(sum_cols(tl.abs(scores - mean))) / entries
    deviation = tl.maximum(deviation, DEVIATION_FLOOR)
    reach = WINSOR * deviation
    clipped = tl.minimum(tl.maximum(scores, mean - reach), mean + reach)
    if PADDED:
        clipped = tl.where(inside, clipped, 0.0)
    u = sum_rows(clipped) / cols
    v = sum_cols(clipped) / rows - sum_cols(u) / rows
    tau = TAU_START / deviation

    goal = FRACTION_START * cols
    shrink = tl.exp2(tl.log2(FRACTION_END / goal) / (SWEEPS - 1))
    for sweep in range(SWEEPS):
        y = tau * ((scores - v) - u)
        row_fractional = sum_rows(tl.where(tl.abs(y) < 0.5, 1.0, 0.0))
        total = sum_rows(tl.minimum(tl.maximum(y + 0.5, 0.0), 1.0))
        u += newton_step(total, row_fractional, row_target, tau, DAMPING, STEP_LIMIT)

        y = tau * ((scores - u) - v)
        col_fractional = sum_cols(tl.where(tl.abs(y) < 0.5, 1.0, 0.0))
        total = sum_cols(tl.minimum(tl.maximum(y + 0.5, 0.0), 1.0))
        v += newton_step(total, col_fractional, col_target, tau, DAMPING, STEP_LIMIT)
        if SLACK:
            v = tl.where(slack, tl.maximum(v, 0.0), v)

        lines = (sum_cols(row_fractional) + sum_rows(col_fractional)) / (rows + cols)
        goal = tl.where(sweep < SWEEPS - 1, goal * shrink, goal)
        growth = tl.maximum(lines, FRACTION_FLOOR) / goal
        tau *= tl.minimum(tl.maximum(growth, GROWTH_MIN), GROWTH_MAX)
    return u, v


@triton.jit
def signed_cost(reduced, kept):
    """The magnitude of the reduced score, clamped to the side that ``kept`` allows, with that sign."""
    cost = tl.maximum(tl.where(kept, reduced, 0.0 - reduced), 0.0).to(tl.int32, bitcast=True)
    return ((cost & 0x7FFFFFFF) | tl.where(kept, 0, -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def is_free(signed):
    """Whether the sign bit is set (which -0.0 < 0 would not tell)."""
    return signed.to(tl.int32, bitcast=True) < 0


@triton.jit
def augment(
    scores,
    u,
    v,
    row_target,
    col_target,
    live,
    real_col,
    slack,
    slack_target,
    M: tl.constexpr,
    SLACK: tl.constexpr,
):
    """Optimal duals and signed reduced scores from any duals: (u, v, signed).

    Node numbers: column j is j, row i is i, and the slack row of a partial block is row M. ``spare`` counts
    the slack row's entries: free without limit (cost u_s + v_j), kept while positive (cost 0).
    """
    ROWS_IN: tl.constexpr = u.shape[0]
    ROWS_OUT: tl.constexpr = u.shape[3]
    COLS_IN: tl.constexpr = v.shape[1]
    COLS_OUT: tl.constexpr = v.shape[4]
    i = row_index(ROWS_IN, ROWS_OUT)
    j = col_index(COLS_IN, COLS_OUT)

    reduced = (scores - u) - v
    kept = reduced > 0
    signed = signed_cost(reduced, kept)
    held = tl.where(kept, 1, 0)
    row_need = tl.where(live, row_target - sum_rows(held), 0)  # > 0: too few
    col_need = tl.where(live, col_target - sum_cols(held), 0)
    if SLACK:
        spare = tl.where((v == 0) & slack, tl.maximum(col_need, 0), 0)
        col_need -= spare
        slack_need = slack_target - sum_rows(spare)
        slack_dual = tl.zeros_like(slack_need).to(tl.float32)
    units = sum_cols(tl.maximum(row_need, 0)) + sum_rows(tl.maximum(0 - col_need, 0))
    if SLACK:
        units += tl.maximum(slack_need, 0)

    for _ in range(0, tl.max(units)):
        row_dist = tl.where(row_need > 0, 0.0, INF)
        col_dist = tl.where(col_need < 0, 0.0, INF)
        row_from = tl.full(row_need.shape, -1, tl.int32)
        col_from = tl.full(col_need.shape, -1, tl.int32)
        if SLACK:
            slack_dist = tl.where(slack_need > 0, 0.0, INF)
            slack_from = tl.full(slack_need.shape, -1, tl.int32)
            slack_cost = tl.where(slack & real_col, tl.maximum(slack_dual + v, 0.0), INF)
        nearest = tl.full(units.shape, INF, tl.float32)
        searching = units > 0
        go = True
        while go:
            free = is_free(signed)
            length = tl.where(free, row_dist + tl.abs(signed), INF)
            best = min_cols(length)
            via = min_cols(tl.where(length == best, i, NONE))
            if SLACK:
                length = slack_dist + slack_cost
                via = tl.where(length < best, M, via)
                best = tl.minimum(length, best)
            better = (best < col_dist) & searching
            col_dist = tl.where(better, best, col_dist)
            col_from = tl.where(better, via, col_from)

            length = tl.where(free, INF, col_dist + tl.abs(signed))
            best = min_rows(length)
            via = min_rows(tl.where(length == best, j, NONE))
            better = (best < row_dist) & searching
            row_dist = tl.where(better, best, row_dist)
            row_from = tl.where(better, via, row_from)

            nearest = tl.minimum(
                min_rows(tl.where(col_need > 0, col_dist, INF)),
                min_cols(tl.where(row_need < 0, row_dist, INF)),
            )
            if SLACK:
                length = tl.where(spare > 0, col_dist, INF)
                best = min_rows(length)
                via = min_rows(tl.where(length == best, j, NONE))
                slack_better = (best < slack_dist) & searching
                slack_dist = tl.where(slack_better, best, slack_dist)
                slack_from = tl.where(slack_better, via, slack_from)
                nearest = tl.minimum(nearest, tl.where(slack_need < 0, slack_dist, INF))
            moved = max_cols(tl.where(better & (row_dist < nearest), 1, 0))
            if SLACK:
                moved = tl.maximum(moved, tl.where(slack_better & (slack_dist < nearest), 1, 0))
            searching = searching & (moved > 0)
            go = tl.max(tl.where(searching, 1, 0)) > 0

        # Prices. Inactive blocks have infinite distances everywhere.
        row_gain = tl.where(row_dist < nearest, nearest - row_dist, 0.0)
        col_gain = tl.where(col_dist < nearest, nearest - col_dist, 0.0)
        u -= row_gain
        v += col_gain
        if SLACK:
            slack_dual -= tl.where(slack_dist < nearest, nearest - slack_dist, 0.0)

        # The path, from the nearest sink (the first column, else row, else the slack row) to its source.
        reached = nearest < INF
        at_col = min_rows(tl.where((col_need > 0) & (col_dist == nearest) & reached, j, NONE))
        at_row = min_cols(tl.where((row_need < 0) & (row_dist == nearest) & reached, i, NONE))
        if SLACK:
            at_row = tl.where(
                (at_row == NONE) & (slack_need < 0) & (slack_dist == nearest) & reached, M, at_row
            )
        at_row = tl.where((at_col < NONE) | (at_row == NONE), -1, at_row)
        at_col = tl.where(at_col == NONE, -1, at_col)
        col_need -= tl.where(j == at_col, 1, 0)
        row_need += tl.where(i == at_row, 1, 0)
        row_entry = tl.full(row_need.shape, -1, tl.int32)  # the column whose kept entry in this row is freed
        col_entry = tl.full(col_need.shape, -1, tl.int32)  # the row whose free entry in this column is kept
        if SLACK:
            slack_need += tl.where(at_row == M, 1, 0)
            slack_entry = tl.full(slack_need.shape, -1, tl.int32)
        walk = True
        while walk:
            on = j == at_col
            col_need += tl.where(on & (col_from < 0), 1, 0)
            col_entry = tl.where(on, col_from, col_entry)
            at_row = tl.maximum(at_row, max_rows(tl.where(on, col_from, -1)))
            on = i == at_row
            row_need -= tl.where(on & (row_from < 0), 1, 0)
            row_entry = tl.where(on, row_from, row_entry)
            at_col = max_cols(tl.where(on, row_from, -1))
            if SLACK:
                on = at_row == M
                slack_need -= tl.where(on & (slack_from < 0), 1, 0)
                slack_entry = tl.where(on, slack_from, slack_entry)
                at_col = tl.where(on, slack_from, at_col)
            at_row = tl.full(slack_target.shape, -1, tl.int32)
            walk = tl.max(at_col) >= 0
        if SLACK:
            spare += tl.where(col_entry == M, 1, 0) - tl.where(j == slack_entry, 1, 0)

        flip = (col_entry == i) | (row_entry == j)
        kept = is_free(signed) == flip
        signed = signed_cost((signed + row_gain) - col_gain, kept)
        units = tl.maximum(units - 1, 0)

    if SLACK:
        u -= slack_dual
        v = tl.where(slack, tl.maximum(v + slack_dual, 0.0), v)
    return u, v, signed


@triton.jit(
    do_not_specialize=[
        "n", "m", "rows", "cols", "batch", "stride_batch", "stride_row", "stride_col", "first_block_row",
        "first_block_col", "block_rows", "block_cols", "grid_rows", "grid_cols",
    ],
)  # fmt: skip
def exact_kernel(
    scores_ptr,  # (batch, rows, cols) of any strides
    mask_ptr,  # (batch, rows, cols) uint8, contiguous
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
    ROWS_IN: tl.constexpr,
    COLS_IN: tl.constexpr,
    ROWS_OUT: tl.constexpr,
    COLS_OUT: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
    SLACK: tl.constexpr,
    WARM: tl.constexpr,
    SOLUTION: tl.constexpr,
    SWEEPS: tl.constexpr,
    FRACTION_START: tl.constexpr,
    FRACTION_END: tl.constexpr,
    FRACTION_FLOOR: tl.constexpr,
    GROWTH_MIN: tl.constexpr,
    GROWTH_MAX: tl.constexpr,
    STEP_LIMIT: tl.constexpr,
    DAMPING: tl.constexpr,
    WINSOR: tl.constexpr,
    TAU_START: tl.constexpr,
    DEVIATION_FLOOR: tl.constexpr,
):
    """One program: ``BLOCKS`` blocks from scores to mask. ``grid = (ceil(blocks / BLOCKS),)``."""
    M: tl.constexpr = ROWS_IN * ROWS_OUT
    matrix, block_row, block_col, live = locate(
        first_block_row, first_block_col, block_rows, block_cols, batch, BLOCKS
    )
    i = row_index(ROWS_IN, ROWS_OUT)
    j = col_index(COLS_IN, COLS_OUT)
    row_stride = stride_row.to(tl.int64)
    col_stride = stride_col.to(tl.int64)
    corner = block_row * m * row_stride + block_col * m * col_stride + matrix * stride_batch.to(tl.int64)
    out_corner = (matrix * rows + block_row * m) * cols.to(tl.int64) + block_col * m
    row_out = cols.to(tl.int64)
    col_out = tl.full((1, 1, 1, 1, 1), 1, tl.int64)
    rows_here = tl.full((1, 1, BLOCKS, 1, 1), 0, tl.int32) + m
    cols_here = rows_here
    if SLACK:
        rows_here = tl.minimum(rows - block_row * m, m).to(tl.int32)
        cols_here = tl.minimum(cols - block_col * m, m).to(tl.int32)
        tall = rows_here > cols_here
        rows_here, cols_here = tl.minimum(rows_here, cols_here), tl.maximum(rows_here, cols_here)
        row_stride, col_stride = (
            tl.where(tall, col_stride, row_stride),
            tl.where(tall, row_stride, col_stride),
        )
        row_out, col_out = tl.where(tall, col_out, row_out), tl.where(tall, row_out, col_out)
    slack = rows_here < cols_here
    real_row = (i < rows_here) & live
    real_col = (j < cols_here) & live
    inside = live
    if PADDED:
        inside = real_row & real_col
    pointers = scores_ptr + (corner + i * row_stride + j * col_stride)
    scores, unscale = load_scaled(pointers, inside, PADDED)

    row_each = tl.minimum(n, cols_here)
    col_each = tl.where(slack, n, tl.minimum(n, rows_here))
    row_target = tl.where(real_row, row_each, 0) if PADDED else row_each
    col_target = tl.where(real_col, col_each, 0) if PADDED else col_each
    slack_target = tl.where(slack & live, col_each * cols_here - row_each * rows_here, 0)

    block = (matrix * grid_rows + block_row) * grid_cols + block_col
    row_lines = block * m + i
    col_lines = block * m + j
    if WARM:
        warm_u_ptr = warm_row_ptr + row_lines
        warm_v_ptr = warm_col_ptr + col_lines
        if SLACK:
            warm_u_ptr = tl.where(tall, warm_col_ptr + row_lines, warm_u_ptr)
            warm_v_ptr = tl.where(tall, warm_row_ptr + col_lines, warm_v_ptr)
        u = (tl.load(warm_u_ptr, mask=real_row, other=0.0) / unscale).to(tl.float32)
        v = (tl.load(warm_v_ptr, mask=real_col, other=0.0) / unscale).to(tl.float32)
        if SLACK:
            v = tl.where(slack, tl.maximum(v, 0.0), v)
    else:
        u, v = dual_ascent(
            scores, inside, row_target.to(tl.float32), col_target.to(tl.float32), rows_here.to(tl.float32),
            cols_here.to(tl.float32), slack, PADDED, SLACK, SWEEPS, FRACTION_START, FRACTION_END,
            FRACTION_FLOOR, GROWTH_MIN, GROWTH_MAX, STEP_LIMIT, DAMPING, WINSOR, TAU_START, DEVIATION_FLOOR,
        )  # fmt: skip
    u, v, signed = augment(
        scores, u, v, row_target, col_target, live, real_col, slack, slack_target, M, SLACK
    )

    kept = is_free(signed) == 0
    tl.store(
        mask_ptr + (out_corner + i * row_out + j * col_out), tl.where(kept, 1, 0).to(tl.uint8), mask=inside
    )
    if SOLUTION:
        # Duals as the caller gets them; objective and bound follow from those and the original scores.
        u = u.to(unscale.dtype) * unscale
        v = v.to(unscale.dtype) * unscale
        u_ptr = row_duals_ptr + row_lines
        v_ptr = col_duals_ptr + col_lines
        if SLACK:
            u_ptr = tl.where(tall, col_duals_ptr + row_lines, u_ptr)
            v_ptr = tl.where(tall, row_duals_ptr + col_lines, v_ptr)
        if PADDED:
            u = tl.where(real_row, u, 0.0)
            v = tl.where(real_col, v, 0.0)
        tl.store(u_ptr, u, mask=live & (i < m))
        tl.store(v_ptr, v, mask=live & (j < m))
        original = widen(tl.load(pointers, mask=inside, other=0.0)).to(tl.float64)
        objective = sum_rows(sum_cols(tl.where(kept, original, 0.0)))
        surplus = tl.maximum((original - u.to(tl.float64)) - v.to(tl.float64), 0.0)
        if PADDED:
            surplus = tl.where(inside, surplus, 0.0)
        bound = sum_rows(sum_cols(surplus))
        bound += sum_cols(u.to(tl.float64)) * row_each + sum_rows(v.to(tl.float64)) * col_each
        tl.store(objective_ptr + block, objective, mask=live)
        tl.store(bound_ptr + block, bound, mask=live)
