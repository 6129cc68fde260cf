r"""Sinkhorn's iteration and its reverse sweep: every iteration of a batch of blocks in one launch.

With ``K = logits / temperature`` the plan is ``exp(K + f + g)``. Iteration t sets f so that the rows sum to
a, then g so that the columns sum to b. Exponentials are taken once, at reference scalings, into a kernel ``E
= exp(K + f_ref + g_ref)`` that stays in registers; an iteration is two products with it,

    u = a / (E v),    v = b / (E^T u),        f = f_ref + log u,   g = g_ref + log v.

A block whose factors leave ``2^+-LIMIT`` makes the iteration in the log domain instead, from ``K + g``,
which gives it new references (Schmitzer, SIAM J. Sci. Comput. 41, 2019). Other blocks of the program keep
theirs, so that a block's result does not depend on its neighbours. Scalings are held and stored as base-2
logarithms.

Logits of -inf are entries that stay 0, and so are the lanes that a block leaves over. A line of nothing else
sums to exactly 0, which no other line does; its scaling is 1 and nothing divides by its sum. NaN equals
nothing, so that a sum of NaN is no sum of 0.

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


@triton.jit
def load_scattered(base_ptr, offsets, mask, default):
    """Load in the layout of the computation."""
    return tl.load(pointers_to(base_ptr, offsets), mask=mask, other=default)


@triton.jit
def load_tile(base_ptr, matrix, block, i, j, default):
    """Entries (i, j) of the blocks as float32, ``default`` where there are none."""
    inside = (block < matrix.batch) & (i < matrix.rows) & (j < matrix.cols)
    rows = base_ptr + block * matrix.stride_batch + i.to(tl.int64) * matrix.stride_row
    return load_scattered(rows, j.to(tl.int64) * matrix.stride_col, inside, default).to(tl.float32)


@triton.jit
def log_rows(level, g, a):
    """The row scalings f for which ``exp2(level + f + g)`` has row sums a; 0 for rows of -inf."""
    x = level + g
    peak = tl.maximum(max_rows(x), LOWEST)
    total = sum_rows(tl.exp2(x - peak))
    return tl.where(total == 0.0, 0.0, tl.log2(a) - peak - tl.log2(total))


@triton.jit
def log_cols(level, f, b):
    """The column scalings g for which ``exp2(level + f + g)`` has column sums b, and that matrix."""
    x = level + f
    peak = tl.maximum(max_cols(x), LOWEST)
    x = tl.exp2(x - peak)
    total = sum_cols(x)
    empty = total == 0.0
    g = tl.where(empty, 0.0, tl.log2(b) - peak - tl.log2(total))
    return g, x * tl.where(empty, 0.0, b / total)


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
    RELOAD: tl.constexpr,
):
    """``plan`` (batch, rows, cols) float32 of logits with any strides; ``scale`` is log2(e) / temperature.

    With KEEP the scalings after each iteration go to (batch, iterations, rows or cols); ``made`` (batch,)
    int32 counts them. With TOLERANCE a block stops once all its row sums are within ``tolerance``. RELOAD
    reads the logits twice in an iteration of the log domain, where registers are short.
    """
    logits = Matrix(rows, cols, batch, stride_batch, stride_row, stride_col)
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[None, None, :, None, None]
    exists = block < batch
    i = row_index(ROWS_IN, ROWS_OUT)
    j = col_index(COLS_IN, COLS_OUT)
    live_row = exists & (i < rows)
    live_col = exists & (j < cols)
    a = load_scattered(row_marginals_ptr, block * row_marginals_stride + i, live_row, 1.0)
    b = load_scattered(col_marginals_ptr, block * col_marginals_stride + j, live_col, 1.0)

    f = tl.zeros_like(a)
    g = tl.zeros_like(b)
    u = f + 1.0
    v = g + 1.0
    kernel = tl.zeros([ROWS_IN, COLS_IN, BLOCKS, ROWS_OUT, COLS_OUT], tl.float32)
    going = exists
    made = tl.where(exists, 0, 0)
    t = 0
    go = True
    while go:
        total = sum_rows(kernel * v)
        if TOLERANCE:
            error = max_cols(tl.where(live_row, tl.abs(u * total - a), 0.0))
            going = going & tl.where(t > 0, error > tolerance, True)
        new_u = tl.where(total == 0.0, 1.0, quotient(a, total))
        total = sum_cols(kernel * new_u)
        new_v = tl.where(total == 0.0, 1.0, quotient(b, total))
        low = tl.minimum(min_cols(new_u), min_rows(new_v))
        high = tl.maximum(max_cols(new_u), max_rows(new_v))
        safe = (t > 0) & (low > 1.0 / (1 << 30)) & (high < 1 << 30)
        reset = going & (safe == 0)
        step = going & safe
        u = tl.where(step, new_u, u)
        v = tl.where(step, new_v, v)
        if tl.max(reset.to(tl.int32)) > 0:
            row = i * one + t * (one - 1)
            col = j * one + t * (one - 1)
            level = load_tile(logits_ptr, logits, block, row, col, -INF)
            level *= scale
            new_f = log_rows(level, g + tl.log2(v), a)
            if RELOAD:
                row += one - 1
                level = load_tile(logits_ptr, logits, block, row, col, -INF)
                level *= scale
            new_g, fresh = log_cols(level, new_f, b)
            kernel = fresh if BLOCKS == 1 else tl.where(reset, fresh, kernel)
            f = tl.where(reset, new_f, f)
            g = tl.where(reset, new_g, g)
            u = tl.where(reset, 1.0, u)
            v = tl.where(reset, 1.0, v)
        if KEEP:
            place = block * iterations + t
            tl.store(pointers_to(row_scalings_ptr, place * rows + i), f + tl.log2(u), mask=live_row & going)
            tl.store(pointers_to(col_scalings_ptr, place * cols + j), g + tl.log2(v), mask=live_col & going)
        made += going.to(tl.int32)
        t += 1
        go = t < iterations
        if TOLERANCE:
            go = go & (tl.max(going.to(tl.int32)) > 0)
    tl.store(pointers_to(plan_ptr, (block * rows + i) * cols + j), kernel * u * v, mask=live_row & live_col)
    tl.store(made_ptr + block, made, mask=exists)


@triton.jit(do_not_specialize=["one"])
def sinkhorn_backward_kernel(
    gradient_ptr,
    logits_ptr,
    col_marginals_ptr,
    row_scalings_ptr,
    col_scalings_ptr,
    made_ptr,
    out_ptr,
    batch,
    rows,
    cols,
    gradient_stride_batch,
    gradient_stride_row,
    gradient_stride_col,
    stride_batch,
    stride_row,
    stride_col,
    col_marginals_stride,
    scale,
    inverse_temperature,
    iterations,
    one,
    ROWS_IN: tl.constexpr,
    COLS_IN: tl.constexpr,
    ROWS_OUT: tl.constexpr,
    COLS_OUT: tl.constexpr,
    BLOCKS: tl.constexpr,
    RELOAD: tl.constexpr,
):
    """Gradient of the logits (batch, rows, cols), contiguous in ``out``'s dtype.

    Iteration t used ``R = softmax_j(K + g_{t-1})`` for f_t and ``S = softmax_i(K + f_t)`` for g_t. From the
    plan's part ``dK = Q = G * b * S_T``, ``df = Q 1``, ``dg = Q^T 1`` the sweep goes back,

        dK -= S dg,   df -= S dg (summed over j),   dK -= R df,   dg = - R^T df,   df = 0.

    With ``E = exp(K + f_t + g_t)`` and ``v = exp(g_{t-1} - g_t)``, S is E with its columns scaled to sum to 1
    and R is E v with its rows scaled so. RELOAD reads K again in every iteration, where
    registers are short.
    """
    logits = Matrix(rows, cols, batch, stride_batch, stride_row, stride_col)
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[None, None, :, None, None]
    exists = block < batch
    i = row_index(ROWS_IN, ROWS_OUT)
    j = col_index(COLS_IN, COLS_OUT)
    live_row = exists & (i < rows)
    live_col = exists & (j < cols)
    b = load_scattered(col_marginals_ptr, block * col_marginals_stride + j, live_col, 1.0)
    made = tl.load(made_ptr + block, mask=exists, other=0)
    level = load_tile(logits_ptr, logits, block, i, j, -INF)
    level *= scale
    gradient = Matrix(rows, cols, batch, gradient_stride_batch, gradient_stride_row, gradient_stride_col)
    total = load_tile(gradient_ptr, gradient, block, i, j, 0.0)

    place = block * iterations + made - 1
    f = load_scattered(row_scalings_ptr, place * rows + i, live_row, 0.0)
    g = load_scattered(col_scalings_ptr, place * cols + j, live_col, 0.0)
    kernel = tl.exp2((level + f) + g)
    held = sum_cols(kernel)
    total *= kernel * tl.where(held == 0.0, 0.0, b / held)
    df_plan = sum_rows(total)
    dg_plan = sum_cols(total)
    dg = tl.zeros_like(dg_plan)
    last = tl.max(made)
    for back in range(last):
        t = last - 1 - back
        row_mask = live_row & (t < made)
        col_mask = live_col & (t < made)
        place = block * iterations + t
        f = load_scattered(row_scalings_ptr, place * rows + i, row_mask, -INF)
        g = load_scattered(col_scalings_ptr, place * cols + j, col_mask, 0.0)
        later = tl.where(t > 0, col_mask, False)
        before = load_scattered(col_scalings_ptr, (place - 1) * cols + j, later, 0.0)
        if RELOAD:
            row = i + t * (one - 1)
            col = j + t * (one - 1)
            level = load_tile(logits_ptr, logits, block, row, col, -INF)
            level *= scale
        kernel = tl.exp2((level + f) + g)
        v = tl.exp2(before - g)
        newest = t == made - 1
        df = tl.where(newest, df_plan, 0.0)
        dg = tl.where(newest, dg_plan, dg)
        of_col = sum_cols(kernel)
        of_row = sum_rows(kernel * v)
        y = quotient(dg, tl.where(of_col == 0.0, 1.0, of_col))
        z = quotient(df - sum_rows(kernel * y), tl.where(of_row == 0.0, 1.0, of_row))
        dg = 0.0 - v * sum_cols(kernel * z)
        total -= kernel * (y + z * v)
    out = (total * inverse_temperature).to(out_ptr.dtype.element_ty)
    tl.store(pointers_to(out_ptr, (block * rows + i) * cols + j), out, mask=live_row & live_col)
