r"""Sinkhorn's iteration: all that a batch of blocks makes in one launch, and what its gradient will need.

With ``K = logits / temperature`` the plan is ``exp(K + f + g)``. Iteration t sets f so that the rows sum to
a, then g so that the columns sum to b. Exponentials are taken once, at reference scalings, into a kernel ``E
= exp(K + f_ref + g_ref)`` that stays in registers; an iteration is two products with it,

    u = a / (E v),    v = b / (E^T u),        f = f_ref + log u,   g = g_ref + log v.

A block whose factors leave ``2^+-LIMIT`` makes the iteration in the log domain instead, from ``K + g``,
which gives it new references (Schmitzer, SIAM J. Sci. Comput. 41, 2019). Other blocks of the program make
the same ``E`` again, from the f that they had, so that a block's result does not depend on its neighbours
and no second tile is held. Scalings are base-2 logarithms.

Factors are not looked at in every iteration. The map from log v to log u and back is no expansion in the
largest norm, so that no step is larger than the one before: factors that lie e octaves from 1 and have moved
by d stay within LIMIT for ``(LIMIT - e) / d`` more iterations, which are *quiet*.

What the gradient (:mod:`nmsolve.kernels.sinkhorn_gradient`) needs of iteration t are its factors u and v, or,
where it was made in the log domain, f and the g that it started from: with those, both of its softmaxes can
be made again, and with f the kernel that holds from there on, a *span* of iterations.

Logits of -inf are entries that stay 0, and so are the lanes that a block leaves over. A line of nothing else
sums to exactly 0, which no other line does; its scaling is 1. In the linear domain the lanes add to every sum
of such a block a number that no other sum is changed by, and that is what the line has for a marginal. NaN
equals nothing, so that a sum of NaN is no sum of 0.

Columns are dealt to the lanes in turn, not in runs as in _tile (see :func:`dealt_cols`).

Pointers say that they have no contiguity, lest the compiler deal the first axes of a tile over lanes (see
_tile). The argument ``one`` is 1, which the compiler is not told: indices multiplied by it hide their
contiguity too, and addresses that depend on the iteration t through ``t * (one - 1)`` are worked out where
they are needed, not kept in registers over the loop.
"""

import triton
import triton.language as tl
from nmsolve.kernels._tile import (
    Matrix,
    col_index,
    exp2,
    log2,
    max_cols,
    max_rows,
    min_cols,
    min_rows,
    pointers_to,
    quotient,
    row_index,
    sum_cols,
    sum_rows,
)

LIMIT = tl.constexpr(30.0)
INF = tl.constexpr(float("inf"))
# The lowest number: subtracting it, not -inf, from -inf is no NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# So much of a marginal vanishes in its sum, though the sum be 2^LIMIT less and up to 2^5 lanes add it.
NOTHING = tl.constexpr(2.0**-64)
# The least normal number.
SMALL = tl.constexpr(2.0**-126)
# Iterations for which a block that moves no more is quiet.
FOREVER = tl.constexpr(1 << 30)


@triton.jit
def load_scattered(base_ptr, offsets, mask, default):
    """Load in the layout of the computation."""
    return tl.load(pointers_to(base_ptr, offsets), mask=mask, other=default)


@triton.jit
def dealt_cols(COLS_IN: tl.constexpr, COLS_OUT: tl.constexpr, RUNS: tl.constexpr):
    """int32 column numbers, ``[1, COLS_IN, 1, 1, COLS_OUT]``: neighbours are held by neighbouring lanes.

    So each access of a warp to a row is one to adjacent entries, which matters to the stores most: of those
    that follow each other memory joins none. With RUNS each lane holds neighbours.
    """
    inner = tl.arange(0, COLS_IN)[None, :, None, None, None]
    outer = tl.arange(0, COLS_OUT)[None, None, None, None, :]
    return inner + COLS_IN * outer if RUNS else COLS_OUT * inner + outer


@triton.jit
def within(exists, i, rows, j, cols, PADDED: tl.constexpr):
    """Which entries (i, j) of a tile belong to a block: all of those that exist, unless lanes are PADDED."""
    inside = exists
    if PADDED:
        inside = exists & (i < rows) & (j < cols)
    return inside


@triton.jit
def load_tile(base_ptr, matrix, block, i, j, default, PADDED: tl.constexpr):
    """Entries (i, j) of the blocks as float32, ``default`` where there are none."""
    inside = within(block < matrix.batch, i, matrix.rows, j, matrix.cols, PADDED)
    rows = base_ptr + block * matrix.stride_batch + i.to(tl.int64) * matrix.stride_row
    return load_scattered(rows, j.to(tl.int64) * matrix.stride_col, inside, default).to(tl.float32)


@triton.jit
def any_block(condition):
    """Whether it holds for one of the program's blocks."""
    return tl.max(condition.to(tl.int32)) > 0


@triton.jit
def log_rows(logits, scale, scale_again, g, a):
    """The row scalings f for which ``exp2(K + f + g)`` has row sums a, and which rows hold nothing.

    A row of -inf has f = 0. Of others there is always something to sum. ``K = scale logits``; the second
    scale is the same number, unknown to the compiler, lest it keep a second tile.
    """
    peak = tl.maximum(max_rows(tl.fma(logits, scale, g)), LOWEST)
    total = sum_rows(exp2(tl.fma(logits, scale_again, g) - peak))
    empty = total == 0.0
    return tl.where(empty, 0.0, log2(quotient(a, total)) - peak), empty


@triton.jit
def log_cols(logits, scale, f, b):
    """For columns the same as :func:`log_rows`, and the matrix ``exp2(K + f + g)``."""
    x = tl.fma(logits, scale, f)
    peak = tl.maximum(max_cols(x), LOWEST)
    x = exp2(x - peak)
    total = sum_cols(x)
    empty = total == 0.0
    factor = tl.where(empty, 0.0, quotient(b, total))
    return tl.where(empty, 0.0, log2(factor) - peak), empty, x * factor


@triton.jit
def least_beside(marginal, any_empty):
    """What each lane of a line adds to its sum, so that those of nothing have one: 0 if there are none.

    ``marginal`` is the least of those of other lines.
    """
    return tl.where(any_empty > 0, tl.maximum(marginal * NOTHING, SMALL), 0.0)


@triton.jit
def sum_rows_and(products, least):
    """Sums along each row, and ``least`` for each lane of it: fused with a product it costs nothing."""
    return sum_rows(tl.where(col_index(products.shape[1], 1) == 0, products + least, products))


@triton.jit
def sum_cols_and(products, least):
    """Sums along each column in the same way."""
    return sum_cols(tl.where(row_index(products.shape[0], 1) == 0, products + least, products))


@triton.jit
def row_error(u, held, a, live_row):
    """How far the furthest row sum of a block is from its marginal."""
    return max_cols(tl.where(live_row, tl.abs(u * held - a), 0.0))


@triton.jit
def furthest(of_row, of_col):
    """Of the factor of both vectors that is furthest from 1, how many octaves; one number per block."""
    high = tl.maximum(max_cols(of_row), max_rows(of_col))
    low = tl.minimum(min_cols(of_row), min_rows(of_col))
    return log2(tl.maximum(high, quotient(1.0, low)))


@triton.jit(do_not_specialize=["one"])
def sinkhorn_forward_kernel(
    logits_ptr,
    row_marginals_ptr,
    col_marginals_ptr,
    plan_ptr,
    row_scalings_ptr,
    col_scalings_ptr,
    made_ptr,
    batch,
    rows,
    cols,
    stride_batch,
    stride_row,
    stride_col,
    row_marginals_stride,
    col_marginals_stride,
    scale,
    iterations,
    tolerance,
    one,
    KEEP: tl.constexpr,
    TOLERANCE: tl.constexpr,
    ROWS_IN: tl.constexpr,
    COLS_IN: tl.constexpr,
    ROWS_OUT: tl.constexpr,
    COLS_OUT: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """``plan`` (batch, rows, cols) float32 of logits with any strides; ``scale`` is log2(e) / temperature.

    With KEEP what the gradient needs of each iteration goes to (batch, iterations, rows or cols), and
    ``made`` is (batch, 1 + iterations) int32: how many a block made, and at the last of each span the first
    of it. Without, ``made`` is (batch, 1). With TOLERANCE a block stops once all its row sums are within
    ``tolerance``. PADDED says that lanes are left over.
    """
    logits = Matrix(rows, cols, batch, stride_batch, stride_row, stride_col)
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[None, None, :, None, None]
    exists = block < batch
    i = row_index(ROWS_IN, ROWS_OUT)
    j = dealt_cols(COLS_IN, COLS_OUT, RUNS=False)
    live_row, live_col = exists, exists
    if PADDED:
        live_row, live_col = exists & (i < rows), exists & (j < cols)
    a = load_scattered(row_marginals_ptr, block * row_marginals_stride + i, live_row, 1.0)
    b = load_scattered(col_marginals_ptr, block * col_marginals_stride + j, live_col, 1.0)

    f, g = tl.zeros_like(a), tl.zeros_like(b)
    u = f + 1.0
    v = g + 1.0
    wanted = a
    least_a, least_b = tl.zeros([1, 1, BLOCKS, 1, 1], tl.float32), tl.zeros([1, 1, BLOCKS, 1, 1], tl.float32)
    kernel = tl.zeros([ROWS_IN, COLS_IN, BLOCKS, ROWS_OUT, COLS_OUT], tl.float32)
    going = exists
    made = tl.where(exists, 0, 0)
    since = made
    spans_ptr = made_ptr + block * (1 + (iterations if KEEP else 0))
    t = one - 1  # not 0, lest the compiler make the first iteration twice, before the loop and in it
    go = True
    while go:
        reset = going
        quiet = 0
        new_u, new_v = u, v
        if t > 0:
            held = sum_rows_and(kernel * v, least_a)
            new_u = quotient(a, held)
            new_v = quotient(b, sum_cols_and(kernel * new_u, least_b))
            if TOLERANCE:
                going = going & (row_error(u, held, wanted, live_row) > tolerance)
            octaves = furthest(new_u, new_v)
            moved = furthest(quotient(new_u, u), quotient(new_v, v))
            safe = octaves < LIMIT
            # Half an octave for rounding. A block that is gone never needs a look.
            left = quotient(tl.maximum(0.0 - (octaves + 0.5 - LIMIT), 0.0), tl.maximum(moved, 1e-6))
            left = tl.where(safe, left, 0.0).to(tl.int32)
            quiet = tl.min(tl.where(going, left, FOREVER))
            reset = going & (safe == 0)
            step = going & safe
            new_u, new_v = tl.where(step, new_u, u), tl.where(step, new_v, v)
        to_keep, of_start = new_u, new_v
        if any_block(reset):
            row = i * one + t * (one - 1)
            level = load_tile(logits_ptr, logits, block, row, j, -INF, PADDED)
            start = g + log2(v)
            of_row, empty_row = log_rows(level, scale, scale * one, start, a)
            f = of_row if BLOCKS == 1 else tl.where(reset, of_row, f)
            g, empty_col, kernel = log_cols(level, scale, f, b)
            least_a = least_beside(min_cols(tl.where(empty_row, 1.0, a)), max_cols(empty_row.to(tl.int32)))
            least_b = least_beside(min_rows(tl.where(empty_col, 1.0, b)), max_rows(empty_col.to(tl.int32)))
            a = tl.where(empty_row, least_a * COLS_OUT, a)
            b = tl.where(empty_col, least_b * ROWS_OUT, b)
            to_keep, of_start = tl.where(reset, f, new_u), tl.where(reset, start, new_v)
            new_u, new_v = tl.where(reset, 1.0, new_u), tl.where(reset, 1.0, new_v)
            if KEEP:
                tl.store(spans_ptr + t, since, mask=tl.where(t > 0, reset, False))
                since = tl.where(reset, t, since)
        u, v = new_u, new_v
        if KEEP:
            place = block * iterations + t
            tl.store(pointers_to(row_scalings_ptr, place * rows + i), to_keep, mask=live_row & going)
            tl.store(pointers_to(col_scalings_ptr, place * cols + j), of_start, mask=live_col & going)
        if TOLERANCE:
            made += going.to(tl.int32)
        t += 1
        left = tl.minimum(quiet, iterations - t)
        go = left > 0
        if TOLERANCE:
            go = go & any_block(going)
        while go:
            held = sum_rows_and(kernel * v, least_a)
            new_u = quotient(a, held)
            new_v = quotient(b, sum_cols_and(kernel * new_u, least_b))
            if TOLERANCE:
                going = going & (row_error(u, held, wanted, live_row) > tolerance)
                new_u, new_v = tl.where(going, new_u, u), tl.where(going, new_v, v)
                made += going.to(tl.int32)
            u, v = new_u, new_v
            if KEEP:
                place = block * iterations + t
                tl.store(pointers_to(row_scalings_ptr, place * rows + i), u, mask=live_row & going)
                tl.store(pointers_to(col_scalings_ptr, place * cols + j), v, mask=live_col & going)
            t += 1
            left -= 1
            go = left > 0
            if TOLERANCE:
                go = go & any_block(going)
        go = t < iterations
        if TOLERANCE:
            go = go & any_block(going)
    if not TOLERANCE:
        made = tl.where(exists, iterations, 0)
    row = i * one + t * (one - 1)
    tl.store(pointers_to(plan_ptr, (block * rows + row) * cols + j), kernel * u * v, mask=live_row & live_col)
    tl.store(spans_ptr, made, mask=exists)
    if KEEP:
        tl.store(spans_ptr + made, since, mask=exists)
