r"""The reverse sweep through Sinkhorn's iterations: gradients of a batch of blocks in one launch.

It goes back over what :mod:`nmsolve.kernels.sinkhorn` has kept, a span of iterations at a time: the kernel
``E`` of a span is made once, from the f with which the span begins, and stays in registers. What is said
there of references, of lines of nothing, of pointers and of ``one`` holds here.
"""

import triton
import triton.language as tl
from nmsolve.kernels._tile import (
    MORE,
    Matrix,
    TileLayout,
    exp2,
    max_rows,
    pointers_to,
    row_index,
    sum_cols,
    sum_rows,
)
from nmsolve.kernels.sinkhorn import (
    INF,
    LOWEST,
    any_block,
    dealt_cols,
    load_scattered,
    load_tile,
    log_cols,
    within,
)


@triton.jit
def rows_to_load(rows, hidden, LAYOUT: tl.constexpr):
    """Row numbers for each of the lanes that share a row, which then load for themselves.

    Loaded once, a number would have to be sent to those lanes through shared memory. Lanes that are left over
    load what the last row has, and multiply it by 0. ``hidden`` is 0, see ``one``.
    """
    i = row_index(LAYOUT.ROWS_IN, LAYOUT.ROWS_OUT) + tl.zeros([1, 1, 1, 1, LAYOUT.COLS_OUT], tl.int32)
    if LAYOUT.PADDED:
        i = tl.minimum(i + hidden, rows - 1)
    return i


@triton.jit
def cols_to_load(cols, hidden, LAYOUT: tl.constexpr, RUNS: tl.constexpr):
    """Column numbers in the same way."""
    j = dealt_cols(LAYOUT.COLS_IN, LAYOUT.COLS_OUT, RUNS) + tl.zeros([1, 1, 1, LAYOUT.ROWS_OUT, 1], tl.int32)
    if LAYOUT.PADDED:
        j = tl.minimum(j + hidden, cols - 1)
    return j


@triton.jit
def inverse(base_ptr, offsets):
    """1 / x of what is loaded."""
    return 1.0 / tl.load(pointers_to(base_ptr, offsets))


@triton.jit(do_not_specialize=["one"])
def sinkhorn_backward_kernel(
    gradient_ptr,
    logits_ptr,
    row_marginals_ptr,
    col_marginals_ptr,
    row_scalings_ptr,
    col_scalings_ptr,
    made_ptr,
    spans_sum_ptr,
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
    row_marginals_stride,
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
    PADDED: tl.constexpr,
):
    """Gradient of the logits (batch, rows, cols), contiguous in ``out``'s dtype.

    Iteration t used ``R = softmax_j(K + g_{t-1})`` for f_t and ``S = softmax_i(K + f_t)`` for g_t. From the
    plan's part ``dK = Q = G * b * S_T``, ``df = Q 1``, ``dg = Q^T 1`` the sweep goes back,

        dK -= S dg,   df -= S dg (summed over j),   dK -= R df,   dg = - R^T df,   df = 0.

    In a span ``S = E u v / b`` and ``R = E u v_{t-1} / a``, so that with ``y = v dg / b`` and ``z = u df /
    a`` an iteration takes two products with E and adds ``- u y^T - z v_{t-1}^T`` to ``weight``; dK is E times
    that. The first iteration of a span takes R from the logits. What a span gives is added to ``spans_sum``
    (batch, rows, cols) float32, which may be ``out`` itself. Barriers keep the compiler from loading a tile
    before the registers of another are free.
    """
    logits = Matrix(rows, cols, batch, stride_batch, stride_row, stride_col)
    gradient = Matrix(rows, cols, batch, gradient_stride_batch, gradient_stride_row, gradient_stride_col)
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[None, None, :, None, None]
    exists = block < batch
    i = row_index(ROWS_IN, ROWS_OUT)
    RUNS: tl.constexpr = PADDED and MORE > 1  # Triton 3.6 spills for sm_100 otherwise
    j = dealt_cols(COLS_IN, COLS_OUT, RUNS)
    there = tl.minimum(block, batch - 1)
    LAYOUT: tl.constexpr = TileLayout(ROWS_IN, COLS_IN, ROWS_OUT, COLS_OUT, BLOCKS, PADDED, False, False)
    of_row, of_col = rows_to_load(rows, 0, LAYOUT), cols_to_load(cols, 0, LAYOUT, RUNS)
    spans_ptr = made_ptr + there * (1 + iterations)
    made = tl.load(spans_ptr)
    since = made
    added = exists
    df = tl.zeros([ROWS_IN, 1, BLOCKS, ROWS_OUT, COLS_OUT], tl.float32)
    dg = tl.zeros([1, COLS_IN, BLOCKS, ROWS_OUT, COLS_OUT], tl.float32)
    v = dg + 1.0
    kernel = tl.zeros([ROWS_IN, COLS_IN, BLOCKS, ROWS_OUT, COLS_OUT], tl.float32)
    weight = kernel
    t = tl.max(made) - 1
    while t >= 0:
        top = t
        joins = made == t + 1
        enters = joins | ((made > t) & (since == t + 1))
        # Of a block that made fewer iterations, what it has: dg and df are 0, and so are y and z.
        place = there * iterations + tl.minimum(t, made - 1)
        if any_block(enters) | (BLOCKS == 1):
            hidden = t * (one - 1)
            row = i * one + hidden
            of_row, of_col = rows_to_load(rows, hidden, LAYOUT), cols_to_load(cols, hidden, LAYOUT, RUNS)
            since = tl.where(enters, tl.load(spans_ptr + 1 + t, mask=enters, other=0), since)
            added = tl.where(enters, joins == 0, added)
            f = tl.load(pointers_to(row_scalings_ptr, (there * iterations + since) * rows + of_row))
            level = load_tile(logits_ptr, logits, block, row, j, -INF, PADDED)
            place_b = there * col_marginals_stride + of_col + hidden
            fresh = log_cols(level, scale, f, tl.load(pointers_to(col_marginals_ptr, place_b)))[2]
            start = tl.load(pointers_to(col_scalings_ptr, place * cols + of_col))
            start = tl.where(t > since, start, 1.0)
            if BLOCKS == 1:
                kernel = fresh
                weight = tl.zeros_like(fresh)
                v = start
            else:
                kernel = tl.where(enters, fresh, kernel)
                weight = tl.where(enters, 0.0, weight)
                v = tl.where(enters, start, v)
            if any_block(joins):
                tl.debug_barrier()
                u = tl.load(pointers_to(row_scalings_ptr, place * rows + of_row))
                u = tl.where(t > since, u, 1.0)
                part = load_tile(gradient_ptr, gradient, block, row, j, 0.0, PADDED) * u * start
                weight = tl.where(joins, part, weight)
                part *= kernel
                df = tl.where(joins, sum_rows(part), df)
                dg = tl.where(joins, sum_cols(part), dg)
        first = tl.max(tl.where(made > t, since + 1, made))
        hidden = t * (one - 1)
        of_row, of_col = rows_to_load(rows, hidden, LAYOUT), cols_to_load(cols, hidden, LAYOUT, RUNS)
        per_a = inverse(row_marginals_ptr, there * row_marginals_stride + hidden + of_row)
        per_b = inverse(col_marginals_ptr, there * col_marginals_stride + hidden + of_col)
        while t >= first:
            hidden = t * (one - 1)
            of_row, of_col = rows_to_load(rows, hidden, LAYOUT), cols_to_load(cols, hidden, LAYOUT, RUNS)
            place = there * iterations + tl.minimum(t, made - 1)
            u = tl.load(pointers_to(row_scalings_ptr, place * rows + of_row))
            earlier = place - 1
            if BLOCKS > 1:  # of a block that made one iteration, and waits for others
                earlier = tl.maximum(earlier, 0)
            before = tl.load(pointers_to(col_scalings_ptr, earlier * cols + of_col))
            before = tl.where(t - 1 > since, before, 1.0)
            y = dg * (v * per_b)
            z = (df - u * sum_rows(kernel * y)) * (u * per_a)
            dg = 0.0 - before * sum_cols(kernel * z)
            weight = weight - u * y - z * before
            v = before
            df = tl.zeros_like(df)
            t -= 1
        if (t == top) | (any_block(made == t + 1) == 0) | (BLOCKS == 1):
            hidden = t * (one - 1)
            row = i * one + hidden
            of_row, of_col = rows_to_load(rows, hidden, LAYOUT), cols_to_load(cols, hidden, LAYOUT, RUNS)
            ends = exists & (made > t) & (since == t)
            place = there * iterations + tl.minimum(t, made - 1)
            per_b = inverse(col_marginals_ptr, there * col_marginals_stride + hidden + of_col)
            y = dg * (v * per_b)
            held = sum_rows(kernel * y)
            if BLOCKS == 1:
                df -= held
                weight -= y
            else:
                goes_on = (made > t) & (since < t)
                u = tl.load(pointers_to(row_scalings_ptr, place * rows + of_row))
                u = tl.where(goes_on, u, 1.0)
                v = tl.load(pointers_to(col_scalings_ptr, tl.maximum(place - 1, 0) * cols + of_col))
                v = tl.where(goes_on & (t - 1 > since), v, 1.0)
                df -= u * held
                per_a = inverse(row_marginals_ptr, there * row_marginals_stride + hidden + of_row)
                z = tl.where(goes_on, df * (u * per_a), 0.0)
                dg = 0.0 - v * sum_cols(kernel * z)
                weight = weight - u * y - z * v
            part = kernel * weight
            if any_block(ends & added):
                inside = within(ends & added, row, rows, j, cols, PADDED)
                part += load_scattered(spans_sum_ptr, (block * rows + row) * cols + j, inside, 0.0)
            row += one - 1
            inside = within(ends, row, rows, j, cols, PADDED)
            tl.store(pointers_to(spans_sum_ptr, (block * rows + row) * cols + j), part, mask=inside)
            tl.debug_barrier()
            row += one - 1
            start = tl.load(pointers_to(col_scalings_ptr, place * cols + of_col))
            level = load_tile(logits_ptr, logits, block, row, j, -INF, PADDED)
            x = level * scale + start
            x = exp2(x - tl.maximum(max_rows(x), LOWEST))
            held = sum_rows(x)
            z = tl.where(ends & (held != 0.0), df / held, 0.0)
            x *= z
            dg = tl.where(ends, 0.0 - sum_cols(x), dg)
            row += one - 1
            inside = within(ends, row, rows, j, cols, PADDED)
            part = load_scattered(spans_sum_ptr, (block * rows + row) * cols + j, inside, 0.0) - x
            row += one - 1
            if t > 0:
                tl.store(pointers_to(spans_sum_ptr, (block * rows + row) * cols + j), part, mask=inside)
            else:
                row += one - 1
                out = (part * inverse_temperature).to(out_ptr.dtype.element_ty)
                tl.store(pointers_to(out_ptr, (block * rows + row) * cols + j), out, mask=inside)
            df = tl.zeros_like(df)
            t -= 1
