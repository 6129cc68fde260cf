r"""Exact transposable N:M masks: dual ascent, then shortest augmenting paths, in one launch.

Per block, scores A of shape (R, C), R <= C (the launcher's SLACK specialisation turns taller blocks):

    max <S, A>   s.t.   S 1 = a,   S^T 1 = b  (R == C)  or  <= b  (R < C),   0 <= S <= 1
    min a sum(u) + b sum(v) + sum_ij max(0, A_ij - u_i - v_j)        (v >= 0 where R < C)

Phase 1 alternates Newton steps on u and v for ``S = clip(tau (A - u - v) + 1/2, 0, 1)``, raising tau until
few entries are fractional. Phase 2 starts from ``S = [A - u - v > 0]`` and moves one unit of imbalance per
search along a shortest path (Bellman-Ford: a column and a row reduction per sweep), see docs/solver.md.

The second phase keeps one float per entry, its *arc* (see :func:`to_arcs`): the cost of flipping the entry,
|A - u - v| clamped to the side that complementary slackness allows, times 2^-40, with bit 30 set if the entry
is free. A set bit 30 makes a float at least 2, more than any path is long, so that ``column distance + arc``
is the length of a step from a column to a row where the entry is kept and "unreachable" where it is free;
with the bit toggled, the same holds for the steps from rows to columns.
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
    widen,
)

INF = tl.constexpr(float("inf"))
NONE = tl.constexpr(1 << 20)  # larger than any node number
CROWDED = tl.constexpr(2)  # units of imbalance above which ties are settled in bulk

UNIT = tl.constexpr(2.0**-40)  # of arcs and distances, relative to the scaled scores
PER_UNIT = tl.constexpr(2.0**40)
FREE = tl.constexpr(1 << 30)
UNREACHED = tl.constexpr(2.0)  # the smallest float with bit 30 set
TIGHT_FREE = tl.constexpr(2.0)  # the arc of a free entry of cost 0
PADDING = tl.constexpr(2.0**127)  # a free entry of cost 1/2: longer than any path, and never reaches a sink
WARM_LIMIT = tl.constexpr(4.0)  # duals to start from are clamped to this, relative to the scaled scores


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
        s = (scores - v) * tau + (0.5 - tau * u)
        clipped = tl.minimum(tl.maximum(s, 0.0), 1.0)
        row_fractional = sum_rows((s == clipped).to(tl.float32))
        u += newton_step(sum_rows(clipped), row_fractional, row_target, tau, DAMPING, STEP_LIMIT)

        s = (scores - u) * tau + (0.5 - tau * v)
        clipped = tl.minimum(tl.maximum(s, 0.0), 1.0)
        col_fractional = sum_cols((s == clipped).to(tl.float32))
        v += newton_step(sum_cols(clipped), col_fractional, col_target, tau, DAMPING, STEP_LIMIT)
        if SLACK:
            v = tl.where(slack, tl.maximum(v, 0.0), v)

        lines = (sum_cols(row_fractional) + sum_rows(col_fractional)) / (rows + cols)
        goal = tl.where(sweep < SWEEPS - 1, goal * shrink, goal)
        growth = tl.maximum(lines, FRACTION_FLOOR) / goal
        tau *= tl.minimum(tl.maximum(growth, GROWTH_MIN), GROWTH_MAX)
    return u, v


@triton.jit
def to_arcs(reduced, kept):
    """The arcs of entries with reduced scores A - u - v (unit: 2^-40 of the block's scale)."""
    cost = tl.maximum(tl.where(kept, reduced, 0.0 - reduced), 0.0).to(tl.int32, bitcast=True)
    return ((cost & 0x3FFFFFFF) | tl.where(kept, 0, FREE)).to(tl.float32, bitcast=True)


@triton.jit
def toggled(arcs, bit=FREE):
    """The arcs seen from the rows: unreachable where the entry is kept."""
    return (arcs.to(tl.int32, bitcast=True) ^ bit).to(tl.float32, bitcast=True)


@triton.jit
def is_free(arcs):
    return arcs >= UNREACHED


@triton.jit
def nearer(length, node, other_length, other_node):
    """The shorter of two steps, at the same length the one from the lower node."""
    other = (other_length < length) | ((other_length == length) & (other_node < node))
    return tl.where(other, other_length, length), tl.where(other, other_node, node)


@triton.jit
def first_of(found, AXIS: tl.constexpr):
    """Index of the first true entry along an axis that lies in registers (some entry is true).

    The entries' powers of two are added up: the sum's exponent tells. That is a comparison to 1.0 or 0.0 and
    a multiply-add per entry, and occupies no predicate.
    """
    COUNT: tl.constexpr = found.shape[AXIS]
    place = tl.arange(0, COUNT)
    place = place[:, None, None, None, None] if AXIS == 0 else place[None, :, None, None, None]
    weight = ((126 - place + COUNT) << 23).to(tl.float32, bitcast=True)
    total = tl.sum(found.to(tl.float32) * weight, AXIS, keep_dims=True)
    return 126 - (total.to(tl.int32, bitcast=True) >> 23) + COUNT


@triton.jit
def shortest_to_cols(row_dist, arcs, bit):
    """For each column the length of the shortest step from a row, and that row."""
    length = row_dist + toggled(arcs, bit)
    best = tl.min(length, 0, keep_dims=True)
    via = first_of(length == best, 0)
    via += arcs.shape[0] * tl.arange(0, arcs.shape[3])[None, None, None, :, None]
    return tl.reduce((best, via), 3, nearer, keep_dims=True)


@triton.jit
def shortest_to_rows(col_dist, arcs):
    """For each row the length of the shortest step from a column, and that column."""
    length = col_dist + arcs
    best = tl.min(length, 1, keep_dims=True)
    via = first_of(length == best, 1)
    via += arcs.shape[1] * tl.arange(0, arcs.shape[4])[None, None, None, None, :]
    return tl.reduce((best, via), 4, nearer, keep_dims=True)


@triton.jit
def flip_tight(arcs, row_need, col_need, M: tl.constexpr):
    """Flip tight entries (cost 0) between lines that are both short or both over: many units at once.

    Every row proposes the first such entry cyclically after its own number, every column accepts the first
    row that proposes to it. No price changes, and what is left is for the path search. Blocks with many
    ties, constant ones above all, would otherwise need a search for each unit.
    """
    i = row_index(arcs.shape[0], arcs.shape[3])
    j = col_index(arcs.shape[1], arcs.shape[4])
    row_side = tl.where(row_need > 0, TIGHT_FREE, tl.where(row_need < 0, 0.0, INF))
    col_side = tl.where(col_need > 0, TIGHT_FREE, tl.where(col_need < 0, 0.0, INF))
    turn = tl.where((arcs == row_side) & (arcs == col_side), (j - i) & (M - 1), M)
    proposed = min_rows(turn)
    rival = tl.where((turn == proposed) & (turn < M), i, M)
    accepted = min_cols(rival)
    flip = (rival == accepted) & (rival < M)
    change = tl.where(flip, tl.where(is_free(arcs), 1, -1), 0)
    row_need -= sum_rows(change)
    col_need -= sum_cols(change)
    return tl.where(flip, toggled(arcs), arcs), row_need, col_need


@triton.jit
def augment(
    scores,
    u,
    v,
    row_target,
    col_target,
    live,
    inside,
    real_col,
    slack,
    slack_target,
    M: tl.constexpr,
    PADDED: tl.constexpr,
    SLACK: tl.constexpr,
):
    """Optimal duals and a mask from any duals: (u, v, arcs, units), units being the imbalance left: 0.

    Node numbers: column j is j, row i is i, and the slack row of a partial block is row M. ``spare`` counts
    the slack row's entries: free without limit (cost u_s + v_j), kept while positive (cost 0).
    """
    i = row_index(scores.shape[0], scores.shape[3])
    j = col_index(scores.shape[1], scores.shape[4])

    reduced = (scores - u) - v
    kept = reduced > 0
    arcs = to_arcs(reduced * UNIT, kept)
    if PADDED:
        arcs = tl.where(inside, arcs, PADDING)
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

    busy = tl.max(units) > 0
    while busy:
        if tl.max(units) > CROWDED:
            arcs, row_need, col_need = flip_tight(arcs, row_need, col_need, M)
            units = sum_cols(tl.maximum(row_need, 0)) + sum_rows(tl.maximum(0 - col_need, 0))
            if SLACK:
                units += tl.maximum(slack_need, 0)

        row_dist = tl.where(row_need > 0, 0.0, UNREACHED)
        col_dist = tl.where(col_need < 0, 0.0, UNREACHED)
        row_from = tl.full(row_need.shape, -1, tl.int32)
        col_from = tl.full(col_need.shape, -1, tl.int32)
        if SLACK:
            slack_dist = tl.where(slack_need > 0, 0.0, UNREACHED)
            slack_from = tl.full(slack_need.shape, -1, tl.int32)
            slack_arc = tl.where(slack & real_col, tl.maximum(slack_dual + v, 0.0) * UNIT, UNREACHED)
        nearest = tl.full(units.shape, UNREACHED, tl.float32)
        searching = units > 0
        sweeps = tl.full((1, 1, 1, 1, 1), 0, tl.int32)
        go = True
        while go:
            # The shift gives 0. Without it the compiler takes the toggled arcs out of the loop, and runs out
            # of registers for them.
            best, via = shortest_to_cols(row_dist, arcs, (sweeps >> 24) + FREE)
            sweeps += 1
            if SLACK:
                length = slack_dist + slack_arc
                via = tl.where(length < best, M, via)
                best = tl.minimum(length, best)
            better = (best < col_dist) & searching
            col_dist = tl.where(better, best, col_dist)
            col_from = tl.where(better, via, col_from)

            best, via = shortest_to_rows(col_dist, arcs)
            better = (best < row_dist) & searching
            row_dist = tl.where(better, best, row_dist)
            row_from = tl.where(better, via, row_from)

            nearest = tl.minimum(
                min_rows(tl.where(col_need > 0, col_dist, UNREACHED)),
                min_cols(tl.where(row_need < 0, row_dist, UNREACHED)),
            )
            if SLACK:
                length = tl.where(spare > 0, col_dist, UNREACHED)
                best = min_rows(length)
                via = min_rows(tl.where(length == best, j, NONE))
                slack_better = (best < slack_dist) & searching
                slack_dist = tl.where(slack_better, best, slack_dist)
                slack_from = tl.where(slack_better, via, slack_from)
                nearest = tl.minimum(nearest, tl.where(slack_need < 0, slack_dist, UNREACHED))
            # What lies beyond the nearest sink changes nothing.
            moved = max_cols(tl.where(better & (row_dist < nearest), 1, 0))
            if SLACK:
                moved = tl.maximum(moved, tl.where(slack_better & (slack_dist < nearest), 1, 0))
            searching = searching & (moved > 0)
            go = tl.max(tl.where(searching, 1, 0)) > 0

        # Prices. Blocks that are done have no node that was reached.
        row_gain = tl.where(row_dist < nearest, nearest - row_dist, 0.0)
        col_gain = tl.where(col_dist < nearest, nearest - col_dist, 0.0)
        u -= row_gain * PER_UNIT
        v += col_gain * PER_UNIT
        if SLACK:
            slack_dual -= tl.where(slack_dist < nearest, nearest - slack_dist, 0.0) * PER_UNIT

        # The path, from the nearest sink (the first column, else row, else the slack row) to its source.
        reached = nearest < UNREACHED
        at_col = min_rows(tl.where((col_need > 0) & (col_dist == nearest) & reached, j, NONE))
        at_row = min_cols(tl.where((row_need < 0) & (row_dist == nearest) & reached, i, NONE))
        if SLACK:
            at_slack = (at_row == NONE) & (slack_need < 0) & (slack_dist == nearest) & reached
            at_row = tl.where(at_slack, M, at_row)
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
            at_row = tl.full(units.shape, -1, tl.int32)
            walk = tl.max(at_col) >= 0
        if SLACK:
            spare += tl.where(col_entry == M, 1, 0) - tl.where(j == slack_entry, 1, 0)

        free = is_free(arcs)
        cost = tl.where(free, toggled(arcs), arcs)
        reduced = (tl.where(free, 0.0 - cost, cost) + row_gain) - col_gain
        arcs = to_arcs(reduced, free == ((col_entry == i) | (row_entry == j)))
        units = tl.maximum(units - 1, 0)
        busy = tl.max(units) > 0

    if SLACK:
        u -= slack_dual
        v = tl.where(slack, tl.maximum(v + slack_dual, 0.0), v)
    return u, v, arcs, units


@triton.jit
def load_duals(row_ptr, col_ptr, lines, real, tall, SLACK: tl.constexpr):
    """Duals of a tile's rows from ``row_ptr``, of turned blocks from ``col_ptr`` (columns: exchanged)."""
    duals = tl.load(row_ptr + lines, mask=real & (tall == 0), other=0.0)
    if SLACK:
        duals += tl.load(col_ptr + lines, mask=real & tall, other=0.0)
    return duals


@triton.jit
def store_duals(row_ptr, col_ptr, lines, duals, mask, tall, SLACK: tl.constexpr):
    """The counterpart of :func:`load_duals`."""
    tl.store(row_ptr + lines, duals, mask=mask & (tall == 0))
    if SLACK:
        tl.store(col_ptr + lines, duals, mask=mask & tall)


@triton.jit
def solve_blocks(
    scores_ptr,
    warm_row_ptr,
    warm_col_ptr,
    n,
    m,
    matrix,
    region,
    shift,
    unit,
    ROWS_IN: tl.constexpr,
    COLS_IN: tl.constexpr,
    ROWS_OUT: tl.constexpr,
    COLS_OUT: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
    SLACK: tl.constexpr,
    WARM: tl.constexpr,
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
    """Duals, arcs, what undoes the scaling, and the imbalance left (0), of the blocks of this program.

    ``matrix`` and ``region`` are the kernel's arguments ``rows`` to ``stride_col`` and ``first_block_row`` to
    ``grid_cols``; for ``shift`` see :func:`locate`.
    """
    M: tl.constexpr = ROWS_IN * ROWS_OUT
    rows, cols, batch, stride_batch, stride_row, stride_col = matrix
    first_block_row, first_block_col, block_rows, block_cols, grid_rows, grid_cols = region
    place = locate(shift, first_block_row, first_block_col, block_rows, block_cols, batch, BLOCKS)
    index, block_row, block_col, live = place
    i, j = row_index(ROWS_IN, ROWS_OUT), col_index(COLS_IN, COLS_OUT)
    rows_here, cols_here, tall = extent(place, rows, cols, m, SLACK)
    slack = rows_here < cols_here
    real_row = (i < rows_here) & live
    real_col = (j < cols_here) & live
    inside = live
    if PADDED:
        inside = real_row & real_col
    offsets = strided(place, i, j, tall, m, stride_batch, stride_row, stride_col, SLACK)
    scores, unscale = load_scaled(scores_ptr + offsets, inside, PADDED)

    row_each = tl.minimum(n, cols_here)
    col_each = tl.where(slack, n, tl.minimum(n, rows_here))
    row_target = tl.where(real_row, row_each, 0) if PADDED else row_each
    col_target = tl.where(real_col, col_each, 0) if PADDED else col_each
    slack_target = tl.where(slack & live, col_each * cols_here - row_each * rows_here, 0)

    if WARM:
        block = (index * grid_rows + block_row) * grid_cols + block_col
        # Loaded for the whole tile, all equal along a line: a vector would bring a layout of its own along.
        everywhere = tl.zeros_like(scores).to(tl.int32)
        row_lines = block * m + (i + everywhere) * unit
        col_lines = block * m + (j + everywhere) * unit
        u = max_rows(load_duals(warm_row_ptr, warm_col_ptr, row_lines, real_row, tall, SLACK)) / unscale
        v = max_cols(load_duals(warm_col_ptr, warm_row_ptr, col_lines, real_col, tall, SLACK)) / unscale
        u = tl.minimum(tl.maximum(u, -WARM_LIMIT), WARM_LIMIT).to(tl.float32)
        v = tl.minimum(tl.maximum(v, -WARM_LIMIT), WARM_LIMIT).to(tl.float32)
        if SLACK:
            v = tl.where(slack, tl.maximum(v, 0.0), v)
    else:
        u, v = dual_ascent(
            scores, inside, row_target.to(tl.float32), col_target.to(tl.float32), rows_here.to(tl.float32),
            cols_here.to(tl.float32), slack, PADDED, SLACK, SWEEPS, FRACTION_START, FRACTION_END,
            FRACTION_FLOOR, GROWTH_MIN, GROWTH_MAX, STEP_LIMIT, DAMPING, WINSOR, TAU_START, DEVIATION_FLOOR,
        )  # fmt: skip
    u, v, arcs, spent = augment(
        scores, u, v, row_target, col_target, live, inside, real_col, slack, slack_target, M, PADDED, SLACK
    )
    return u, v, arcs, unscale, spent


@triton.jit
def store_blocks(
    scores_ptr,
    mask_ptr,
    row_duals_ptr,
    col_duals_ptr,
    objective_ptr,
    bound_ptr,
    u,
    v,
    arcs,
    unscale,
    spent,
    n,
    m,
    matrix,
    region,
    shift,
    unit,
    ROWS_IN: tl.constexpr,
    COLS_IN: tl.constexpr,
    ROWS_OUT: tl.constexpr,
    COLS_OUT: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
    SLACK: tl.constexpr,
    PACKED: tl.constexpr,
    SOLUTION: tl.constexpr,
):
    """Store the mask that :func:`solve_blocks` found, and where SOLUTION the duals, objective and bound."""
    rows, cols, batch, stride_batch, stride_row, stride_col = matrix
    first_block_row, first_block_col, block_rows, block_cols, grid_rows, grid_cols = region
    # Where everything lies is worked out anew (spent is 0, which the compiler does not know), so that no
    # address occupies a register during the search.
    place = locate(spent + shift, first_block_row, first_block_col, block_rows, block_cols, batch, BLOCKS)
    index, block_row, block_col, live = place
    i, j = row_index(ROWS_IN, ROWS_OUT) + spent, col_index(COLS_IN, COLS_OUT) + spent
    rows_here, cols_here, tall = extent(place, rows, cols, m, SLACK)
    real_row = (i < rows_here) & live
    real_col = (j < cols_here) & live
    inside = live
    if PADDED:
        inside = real_row & real_col
    kept = is_free(arcs) == 0
    store_mask(mask_ptr, kept, place, i, j, inside, tall, rows, cols, m, unit, PACKED, SLACK)

    if SOLUTION:
        # Duals as the caller gets them.
        u = u.to(unscale.dtype) * unscale
        v = v.to(unscale.dtype) * unscale
        if PADDED:
            u = tl.where(real_row, u, 0.0)
            v = tl.where(real_col, v, 0.0)
        block = (index * grid_rows + block_row) * grid_cols + block_col
        store_duals(row_duals_ptr, col_duals_ptr, block * m + i * unit, u, live & (i < m), tall, SLACK)
        store_duals(col_duals_ptr, row_duals_ptr, block * m + j * unit, v, live & (j < m), tall, SLACK)

        # Objective and bound follow from those and the original scores, in float64. To spare registers the
        # mask is packed to a bit per row and the scores are read again, a row of each lane at a time.
        row_in = tl.arange(0, ROWS_IN)[:, None, None, None, None]
        bits = tl.sum(tl.where(kept, 1, 0) << row_in, 0, keep_dims=True)
        u = u.to(tl.float64)
        v = v.to(tl.float64)
        slack = rows_here < cols_here
        row_each = tl.minimum(n, cols_here)
        col_each = tl.where(slack, n, tl.minimum(n, rows_here))
        bound = sum_cols(u) * row_each + sum_rows(v) * col_each
        objective = tl.zeros_like(bound)
        for r in range(ROWS_IN):
            row = ROWS_IN * tl.arange(0, ROWS_OUT)[None, None, None, :, None] + r
            here = live
            if PADDED:
                here = (row < rows_here) & real_col
            again = strided(place, row, j, tall, m, stride_batch, stride_row, stride_col, SLACK)
            original = widen(tl.load(scores_ptr + again, mask=here, other=0.0)).to(tl.float64)
            row_u = tl.sum(tl.where(row_in == r, u, 0.0), 0, keep_dims=True)
            surplus = tl.maximum((original - row_u) - v, 0.0)
            if PADDED:
                surplus = tl.where(here, surplus, 0.0)
            objective += sum_rows(sum_cols(tl.where(((bits >> r) & 1) > 0, original, 0.0)))
            bound += sum_rows(sum_cols(surplus))
        tl.store(objective_ptr + block, objective, mask=live)
        tl.store(bound_ptr + block, bound, mask=live)


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
    matrix = rows, cols, batch, stride_batch, stride_row, stride_col
    region = first_block_row, first_block_col, block_rows, block_cols, grid_rows, grid_cols
    u, v, arcs, unscale, spent = solve_blocks(
        scores_ptr, warm_row_ptr, warm_col_ptr, n, m, matrix, region, 0, unit, ROWS_IN, COLS_IN, ROWS_OUT,
        COLS_OUT, BLOCKS, PADDED, SLACK, WARM, SWEEPS, FRACTION_START, FRACTION_END, FRACTION_FLOOR,
        GROWTH_MIN, GROWTH_MAX, STEP_LIMIT, DAMPING, WINSOR, TAU_START, DEVIATION_FLOOR,
    )  # fmt: skip
    store_blocks(
        scores_ptr, mask_ptr, row_duals_ptr, col_duals_ptr, objective_ptr, bound_ptr, u, v, arcs, unscale,
        spent, n, m, matrix, region, 0, unit, ROWS_IN, COLS_IN, ROWS_OUT, COLS_OUT, BLOCKS, PADDED, SLACK,
        PACKED, SOLUTION,
    )  # fmt: skip
