r"""Ordinary N:M masks along the last dimension: in each group of M, the N largest scores.

The N-th largest of a group is found bit by bit, on integers that sort as the scores do: t is the largest
number with ``#{k : key_k >= t} >= N``. Kept are the keys above t, then those equal to t from the left until N
are kept. A group of at most 16 is held by one lane, so that nothing is exchanged. Any layout, and any M; see
:mod:`nmsolve.kernels.nm_groups` for groups that lie one behind the other.
"""

import triton
import triton.language as tl
from nmsolve.kernels._tile import pointers_to


@triton.jit
def sortable(x, LOW: tl.constexpr):
    """Signed integers in the order of the floats; -0.0 as 0.0. The lowest ``LOW`` bits of both are zero."""
    if x.dtype == tl.float64:
        bits = tl.where(x == 0, 0.0, x).to(tl.int64, bitcast=True)
        key = bits ^ ((bits >> 63) & (0x7FFFFFFFFFFFFFFF >> LOW << LOW))
    else:
        bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & (0x7FFFFFFF >> LOW << LOW))
    return key


@triton.jit(do_not_specialize=["n", "m", "rows", "cols", "batch", "stride_batch", "stride_row", "stride_col"])
def nm_kernel(
    scores_ptr,  # (batch, rows, cols) of any strides
    mask_ptr,  # (batch, rows, cols) uint8, contiguous
    n,
    m,
    rows,
    cols,
    batch,
    stride_batch,
    stride_row,
    stride_col,
    SIZE: tl.constexpr,  # power of two, at least m
    GROUPS: tl.constexpr,
):
    """One program: ``GROUPS`` groups. ``grid = (ceil(batch * rows * ceil(cols / m) / GROUPS),)``."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[None, :]
    across = (cols.to(tl.int64) + m - 1) // m
    line = group // across
    matrix = line // rows
    row = line - matrix * rows
    place = tl.arange(0, SIZE)[:, None]
    col = (group - line * across) * m + place
    inside = (place < m) & (col < cols) & (matrix < batch)
    offsets = matrix * stride_batch + row * stride_row + col * stride_col
    raw = tl.load(pointers_to(scores_ptr, offsets), mask=inside, other=0.0)

    # bfloat16 as float32 ends in 16 zero bits.
    LOW: tl.constexpr = 16 if raw.dtype == tl.bfloat16 else 0
    if raw.dtype == tl.float64:
        key = sortable(raw, LOW)
        lowest = tl.full((1, GROUPS), -0x8000000000000000, tl.int64)
        one = tl.full((1, GROUPS), 1, tl.int64)
        BITS: tl.constexpr = 64
    else:
        key = sortable(raw.to(tl.float32), LOW)
        lowest = tl.full((1, GROUPS), -0x80000000, tl.int32)
        one = tl.full((1, GROUPS), 1, tl.int32)
        BITS: tl.constexpr = 32
    key = tl.where(inside, key, lowest)
    wanted = tl.minimum(n, tl.sum(tl.where(inside, 1, 0), 0, keep_dims=True))
    threshold = lowest
    for step in range(BITS - LOW):
        higher = threshold ^ (one << (BITS - 1 - step))
        enough = tl.sum(tl.where(key >= higher, 1, 0), 0, keep_dims=True) >= wanted
        threshold = tl.where(enough, higher, threshold)
    above = tl.where(key > threshold, 1, 0)
    equal = tl.where(key == threshold, 1, 0)
    left = wanted - tl.sum(above, 0, keep_dims=True)
    kept = above + tl.where(tl.cumsum(equal, 0) <= left, equal, 0)
    tl.store(mask_ptr + ((matrix * rows + row) * cols + col), kept.to(tl.uint8), mask=inside)
