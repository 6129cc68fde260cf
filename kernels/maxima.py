r"""What groups of columns keep with any other column: sums of maxima over the rows.

    F[b, g, j] = sum_r max(t[b, g, r], A[index[b, j], r])

is a product of matrices whose multiplication is a maximum. A lane holds ``GROUPS_IN x COLS_IN`` sums and
reads its own part of the columns, ``WORD`` rows at a time; warps that have the same sums share the rows.
Columns are read where they lie, by their numbers. Programs sum parts of the rows, few enough for float32, and
the parts are added up in float64 in their order.

``t`` is the N-th largest of a group's other columns, row by row, which a lane sorts in its registers.
"""

import triton
import triton.language as tl
from nmsolve.kernels._tile import MORE
from nmsolve.kernels.nm_groups import bitonic_sort


@triton.jit(do_not_specialize=["batch", "groups", "width", "rows", "part"])
def sum_maxima_kernel(
    thresholds_ptr,  # (B, G, R)
    columns_ptr,  # (C, R)
    index_ptr,  # (B, J) int64, contiguous
    sums_ptr,  # (parts, B, G, J) contiguous
    batch,
    groups,
    width,  # J
    rows,  # R, a multiple of 16
    part,  # rows of a part, a multiple of 16
    stride_batch,
    stride_group,
    stride_col,
    WORD: tl.constexpr,
    GROUPS_IN: tl.constexpr,
    COLS_IN: tl.constexpr,
    SHARES: tl.constexpr,  # warps that share rows; WORD * SHARES divides 16
    GROUPS_OUT: tl.constexpr,
    COLS_OUT: tl.constexpr,
    SPAN: tl.constexpr,  # rows, a multiple of 16
):
    """One program: a tile of sums over one part of the rows. ``grid = (B * tiles, parts)``."""
    across = tl.cdiv(width, COLS_IN * COLS_OUT)
    tiles = tl.cdiv(groups, GROUPS_IN * GROUPS_OUT) * across
    b = (tl.program_id(0) // tiles).to(tl.int64)
    first_group = tl.program_id(0) % tiles // across * (GROUPS_IN * GROUPS_OUT)
    first_col = tl.program_id(0) % across * (COLS_IN * COLS_OUT)
    # [WORD, GROUPS_IN, COLS_IN, SHARES, GROUPS_OUT, COLS_OUT]: the first three axes lie in a lane.
    word = tl.arange(0, WORD)[:, None, None, None, None, None]
    group_in = tl.arange(0, GROUPS_IN)[None, :, None, None, None, None]
    col_in = tl.arange(0, COLS_IN)[None, None, :, None, None, None]
    share = tl.arange(0, SHARES)[None, None, None, :, None, None]
    group_out = tl.arange(0, GROUPS_OUT)[None, None, None, None, :, None]
    col_out = tl.arange(0, COLS_OUT)[None, None, None, None, None, :]
    # Each lane has pointers of its own, also where they are another's: nothing is exchanged. Sums beyond the
    # last group or column are those of the last, and not stored.
    g = first_group + group_in * GROUPS_OUT + group_out + 0 * (share + col_out)
    j = first_col + col_in * COLS_OUT + col_out + 0 * (share + group_out)
    g = tl.minimum(g, groups - 1).to(tl.int64)
    column = tl.load(index_ptr + b * width + tl.minimum(j, width - 1))
    t_at = thresholds_ptr + (b * stride_batch + g * stride_group + word)
    a_at = columns_ptr + (column * stride_col + word)
    first = tl.multiple_of(tl.program_id(1) * part, 16)
    last = tl.minimum(first + part, rows)
    shape: tl.constexpr = (GROUPS_IN, COLS_IN, SHARES, GROUPS_OUT, COLS_OUT)
    total = tl.zeros(shape, thresholds_ptr.dtype.element_ty)
    for start in range(first, last, SPAN):
        sums = tl.zeros(shape, thresholds_ptr.dtype.element_ty)
        for row in range(start, tl.minimum(start + SPAN, last), WORD * SHARES):
            at = row + share * WORD
            t, a = tl.load(words_at(t_at, at, WORD)), tl.load(words_at(a_at, at, WORD))
            sums += tl.sum(larger(t, a), axis=0)
        total += sums
    total = tl.sum(total.to(sums_ptr.dtype.element_ty), axis=2)
    g = first_group + (
        tl.arange(0, GROUPS_IN)[:, None, None, None] * GROUPS_OUT
        + tl.arange(0, GROUPS_OUT)[None, None, :, None]
    )
    j = first_col + (
        tl.arange(0, COLS_IN)[None, :, None, None] * COLS_OUT + tl.arange(0, COLS_OUT)[None, None, None, :]
    )
    at = ((tl.program_id(1).to(tl.int64) * batch + b) * groups + g) * width + j
    tl.store(sums_ptr + at, total, mask=(g < groups) & (j < width))


@triton.jit
def words_at(pointers, rows, WORD: tl.constexpr):
    """Pointers so many rows on, dealt as the sums are: a word's rows in a lane, the last axes to lanes."""
    pointers += rows
    return tl.max_contiguous(pointers, [WORD * MORE**5, 1, MORE, MORE**2, MORE**3, MORE**4])


@triton.jit
def larger(x, y):
    """The maximum; of float64, for which GPUs have no instruction, by a comparison."""
    return tl.where(x > y, x, y) if x.dtype == tl.float64 else tl.maximum(x, y)


@triton.jit(do_not_specialize=["size"])
def add_parts_kernel(
    parts_ptr,  # (PARTS, size) contiguous
    out_ptr,  # (size,) float64
    size,
    PARTS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """The sums of all parts, in their order. ``grid = (ceil(size / ENTRIES),)``."""
    at = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    total = tl.zeros((ENTRIES,), tl.float64)
    for part in tl.static_range(PARTS):
        here = parts_ptr + part * size.to(tl.int64)
        total += tl.load(here + at, mask=at < size, other=0.0).to(tl.float64)
    tl.store(out_ptr + at, total, mask=at < size)


@triton.jit(do_not_specialize=["rows"])
def nth_largest_kernel(
    columns_ptr,  # (C, R)
    groups_ptr,  # (G, K) int64, contiguous
    out_ptr,  # (G, R) contiguous
    rows,
    stride_col,
    N: tl.constexpr,
    K: tl.constexpr,
    LOG: tl.constexpr,  # 2^LOG >= K
    ROWS: tl.constexpr,
):
    """One program: some rows of a group. ``grid = (G, ceil(R / ROWS))``."""
    g = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    x = ()
    for i in tl.static_range(1 << LOG):
        if i < K:
            column = tl.load(groups_ptr + g * K + i)
            x = x + (tl.load(columns_ptr + column * stride_col + row, mask=row < rows, other=0.0),)
        else:
            x = x + (tl.full((ROWS,), float("-inf"), columns_ptr.dtype.element_ty),)
    tl.store(out_ptr + g * rows + row, bitonic_sort(x, LOG)[N - 1], mask=row < rows)


@triton.jit(do_not_specialize=["members", "subsets", "rows"])
def sum_largest_kernel(
    columns_ptr,  # (C, R)
    members_ptr,  # (P, members) int64, contiguous
    subsets_ptr,  # (subsets, K) int64, contiguous
    out_ptr,  # (P, subsets) float64, contiguous
    members,
    subsets,
    rows,
    stride_col,
    N: tl.constexpr,
    K: tl.constexpr,
    LOG: tl.constexpr,  # 2^LOG >= K
    ROWS: tl.constexpr,
):
    """One program: the sums of the N largest of all subsets of some columns. ``grid = (P,)``."""
    p = tl.program_id(0).to(tl.int64)
    for subset in range(subsets):
        columns = ()
        for i in tl.static_range(K):
            member = tl.load(subsets_ptr + subset * K + i)
            columns = columns + (columns_ptr + tl.load(members_ptr + p * members + member) * stride_col,)
        total = tl.zeros((ROWS,), columns_ptr.dtype.element_ty)
        for start in range(0, rows, ROWS):
            row = start + tl.arange(0, ROWS)
            x = ()
            for i in tl.static_range(1 << LOG):
                if i < K:
                    x = x + (tl.load(columns[i] + row, mask=row < rows, other=0.0),)
                else:
                    x = x + (tl.full((ROWS,), float("-inf"), columns_ptr.dtype.element_ty),)
            x = bitonic_sort(x, LOG)
            for i in tl.static_range(N):
                total += x[i]
        tl.store(out_ptr + p * subsets + subset, tl.sum(total.to(tl.float64)))
