r"""The columns that a strip keeps of a group: exchanges, then branch and bound.

A program holds a block in its registers.

What is searched for, and the bounds, are those of :mod:`nmsolve.backends.torch.strips`. Columns come in the
order of what they are worth, so that lists of columns are lists of ranks, and the search goes through them
depth first: for each depth, a word has the columns that may still come next.

Gains are sums of float32, and only they are taken over the whole block. A choice is left out where they say
that it is worse by more than their rounding, ``margin``; what a choice keeps is summed in float64.
"""

import triton
import triton.language as tl
from nmsolve.kernels._tile import pointers_to

# What is within rounding of the best choice so far is not searched for: as in the reference.
_ROUNDING = tl.constexpr(1e-13)


@triton.jit
def picked(vector, lanes, index):
    """The number of a vector at an index."""
    return tl.sum(tl.where(lanes == index, vector, 0), 0)


@triton.jit
def floor_of(best):
    """What a choice has to keep more than."""
    return best + _ROUNDING * tl.abs(best)


@triton.jit
def kept_by(block_ptr, taken, count, n, v, ROWS: tl.constexpr):
    """What a block keeps of the first ``count`` columns of a list, and each row's n-th largest of those.

    float64 and float32 ``[ROWS]``; the second has no meaning where there are fewer than n columns.
    """
    LISTED: tl.constexpr = taken.shape[0]
    lanes = tl.arange(0, LISTED)
    rows = tl.arange(0, ROWS)
    inside = rows < v
    held = (lanes < count)[None, :]
    at = pointers_to(block_ptr, rows[:, None] + taken[None, :] * v)
    scores = tl.load(at, mask=inside[:, None] & held, other=0.0)
    rank = tl.zeros((ROWS, LISTED), tl.int32)
    for other in tl.static_range(LISTED):
        listed = other < count
        at = block_ptr + picked(taken, lanes, other) * v + rows
        column = tl.load(at, mask=inside & listed, other=0.0)[:, None]
        before = (column > scores) | ((column == scores) & (other < lanes)[None, :])
        rank += tl.where(before & listed, 1, 0)
    kept = tl.sum(tl.sum(tl.where(held & (rank < n), scores, 0.0), 1), 0)
    least = tl.sum(tl.where(held & (rank == n - 1), scores, 0.0), 1).to(tl.float32)
    return kept, least


@triton.jit
def gains_of(block, least):
    """What each column adds to what rows keep whose n-th largest is ``least``: float32 ``[COLUMNS]``."""
    return tl.sum(tl.maximum(block - least[:, None], 0.0), 0)


@triton.jit
def exchanged(block_ptr, block, taken, best, n, k, m, v):
    """One column exchanged for another while any exchange is better, the best one first."""
    ROWS: tl.constexpr = block.shape[0]
    COLUMNS: tl.constexpr = block.shape[1]
    lanes = tl.arange(0, taken.shape[0])
    columns = tl.arange(0, COLUMNS)
    going = 1
    while going != 0:
        most = floor_of(best)
        trial = taken
        last = picked(taken, lanes, k - 1)
        of_last = tl.sum(tl.where(columns[:, None] == tl.where(lanes < k, taken, -1)[None, :], 1, 0), 1)
        free = (of_last == 0) & (columns < m)
        for out in range(k):
            rest = tl.where(lanes == out, last, taken)
            kept, least = kept_by(block_ptr, rest, k - 1, n, v, ROWS)
            gains = tl.where(free, gains_of(block, least), -1.0)
            gain = tl.max(gains, 0)
            value = kept + gain
            if value > most:
                most = value
                into = tl.min(tl.where(gains == gain, columns, COLUMNS), 0)
                trial = tl.where(lanes == out, into, taken)
        # The sum anew: that of the gains is rounded.
        kept = kept_by(block_ptr, trial, k, n, v, ROWS)[0]
        going = 0
        if kept > floor_of(best):
            best = kept
            taken = trial
            going = 1
    return taken, best


@triton.jit(do_not_specialize=["n", "m", "v", "k", "limit"])
def strips_kernel(
    columns_ptr,  # (batch, m, v) float64, contiguous; each block's columns by descending worth
    sums_ptr,  # (batch, m + 1) float64: sums of the first c_j for the prices u
    base_ptr,  # (batch) float64: n times the sum of u
    margin_ptr,  # (batch) float64: what float32 sums may be wrong by
    chosen_ptr,  # (batch, k) int64
    done_ptr,  # (batch) int8: whether the search came to its end
    n,
    m,
    v,
    k,
    limit,  # passes over a column; below 0 there is no search
    ROWS: tl.constexpr,  # powers of two, at least v, m and k
    COLUMNS: tl.constexpr,
    LISTED: tl.constexpr,
):
    """One program: one block. ``grid = (batch,)``."""
    program = tl.program_id(0).to(tl.int64)
    block_ptr = columns_ptr + program * m * v
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    lanes = tl.arange(0, LISTED)
    real = columns < m
    at = pointers_to(block_ptr, columns[None, :] * v + rows[:, None])
    block = tl.load(at, mask=real[None, :] & (rows < v)[:, None], other=0.0).to(tl.float32)
    before_ptr = sums_ptr + program * (m + 1)
    before = tl.load(before_ptr + columns, mask=real, other=0.0)
    worth = tl.load(before_ptr + 1 + columns, mask=real, other=0.0) - before
    base = tl.load(base_ptr + program)
    margin = tl.load(margin_ptr + program)

    taken = tl.where(lanes < k, lanes, 0)
    best = kept_by(block_ptr, taken, k, n, v, ROWS)[0]
    chosen, best = exchanged(block_ptr, block, taken, best, n, k, m, v)

    one = tl.full((COLUMNS,), 1, tl.int64)
    open_ = tl.zeros((LISTED,), tl.int64)  # for each depth, the columns that may come next
    depth = 0  # columns taken
    enter = 1  # whether a choice is new, or one that the search comes back to
    passes = tl.zeros((), tl.int64)
    taken = tl.zeros((LISTED,), tl.int32)
    while (depth >= 0) & (passes <= limit):
        if enter != 0:
            least_rank = tl.where(depth > 0, picked(taken, lanes, depth - 1), -1)
            later = (columns > least_rank) & real
            lowest = floor_of(best)
            if depth < n:
                # By the prices: a column, and those that follow it as the most that can.
                held = (lanes < depth)[None, :] & (taken[None, :] == columns[:, None])
                last = columns + (k - depth)
                later &= last <= m
                reach = tl.load(before_ptr + last, mask=later, other=0.0) - before
                reach += base + tl.sum(tl.sum(tl.where(held, worth[:, None], 0.0), 1), 0)
                passes += 1
            else:
                kept, least = kept_by(block_ptr, taken, depth, n, v, ROWS)
                gains = tl.where(later, gains_of(block, least), 0.0)
                reach = kept + margin + gains
                rest = gains
                for _ in range(depth + 1, k):
                    most = tl.max(rest, 0)
                    reach += most
                    first = tl.min(tl.where(rest == most, columns, COLUMNS), 0)
                    rest = tl.where(columns == first, 0.0, rest)
                passes += m
            word = tl.sum(tl.where(later & (reach > lowest), one << columns, 0), 0)
            open_ = tl.where(lanes == depth, word, open_)
            enter = 0
        word = picked(open_, lanes, depth)
        if word == 0:
            depth -= 1
        else:
            bit = word & -word
            open_ = tl.where(lanes == depth, word ^ bit, open_)
            taken = tl.where(lanes == depth, tl.sum(tl.where((one << columns) == bit, columns, 0), 0), taken)
            if depth + 1 == k:
                kept = kept_by(block_ptr, taken, k, n, v, ROWS)[0]
                passes += 1
                if kept > floor_of(best):
                    best = kept
                    chosen = taken
            else:
                depth += 1
                enter = 1
    tl.store(chosen_ptr + program * k + lanes, chosen.to(tl.int64), mask=lanes < k)
    tl.store(done_ptr + program, (depth < 0).to(tl.int8))
