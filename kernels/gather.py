r"""Reordering of columns, alone or behind RMS normalisation.

    y[i, j] = x[i, p_j]                                                 (NORM off)
    y[i, j] = x[i, p_j] * w[p_j] / sqrt(mean_k x[i, k]^2 + eps)         (NORM on)

A program writes ``ROWS x COLS`` consecutive outputs; its reads stay inside ROWS rows, which the cache holds.
The permutation is read once for all of them.
"""

import triton
import triton.language as tl
from nmsolve.kernels._tile import pointers_to


@triton.jit
def inverse_rms(row_ptr, live, cols, stride_col, eps, ROWS: tl.constexpr, COLS: tl.constexpr):
    """``1 / sqrt(mean(x^2) + eps)`` of the rows that start at ``row_ptr``, ``[ROWS, 1]`` float32."""
    total = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, cols, COLS):
        k = (start + tl.arange(0, COLS)).to(tl.int64)[None, :]
        x = tl.load(row_ptr + k * stride_col, mask=live & (k < cols), other=0.0).to(tl.float32)
        total += x * x
    return 1.0 / tl.sqrt(tl.sum(total, 1, keep_dims=True) / cols + eps)


@triton.jit
def permute_columns_kernel(
    x_ptr,
    permutation_ptr,
    weight_ptr,
    out_ptr,
    rows,
    cols,
    stride_row,
    stride_col,
    eps,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """``out`` (rows, cols) contiguous; ``x`` any strides; ``permutation`` (cols,) int64; ``weight`` (cols,).

    Programs run over columns along axis 1; with NORM one program writes all columns of its rows.
    """
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    live = row < rows
    first = tl.program_id(1) * COLS
    last = first + COLS
    if NORM:
        scale = inverse_rms(x_ptr + row * stride_row, live, cols, stride_col, eps, ROWS, COLS)
        last = cols
    for start in range(first, last, COLS):
        j = (start + tl.arange(0, COLS))[None, :]
        source = tl.load(permutation_ptr + j, mask=j < cols, other=0)
        inside = live & (j < cols)
        x = tl.load(pointers_to(x_ptr, row * stride_row + source * stride_col), mask=inside)
        if NORM:
            weight = tl.load(weight_ptr + source, mask=j < cols, other=0.0).to(tl.float32)
            x = (x.to(tl.float32) * scale * weight).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * cols + j, x, mask=inside)
