"""Exact transposable N:4 masks by meeting in the middle: one lane looks at every mask of its block.

Two rows leave the other two no choice in how many entries each column still needs. So the best of all masks
is the best sum of (the best two upper rows that use each column as often as stated) and (the best two lower
rows that use it as often as is left): for 2:4, 90 masks in 19 such splits of 36 + 36 pairs of rows; for 1:4,
24 masks in 6. 3:4 is 1:4 with what is left out. A mask is a number of 16 bits, entry (i, j) is bit 4 i + j.

No duals come out of this: where they are asked for, :mod:`nmsolve.kernels.exact` solves the blocks.
"""

import triton
import triton.language as tl
from nmsolve.kernels._tile import Matrix, Region, locate, power_of_two_scale, widen


@triton.jit
def better(score, mask, other_score, other_mask):
    """The higher of two scores with its mask, the first where they are equal."""
    return tl.maximum(score, other_score), tl.where(other_score > score, other_mask, mask)


@triton.jit
def pick(row, COLUMNS: tl.constexpr):
    """The sum of a row's scores in one or two columns, given as bits."""
    LOW: tl.constexpr = COLUMNS & -COLUMNS
    HIGH: tl.constexpr = COLUMNS - LOW
    total = row[LOW // 2 - LOW // 8]
    if HIGH:
        total += row[HIGH // 2 - HIGH // 8]
    return total


@triton.jit
def either_way(upper, lower, FIRST: tl.constexpr, SECOND: tl.constexpr, SHIFT: tl.constexpr):
    """The better of keeping FIRST in the upper and SECOND in the lower of two rows, and the reverse."""
    return better(
        pick(upper, FIRST) + pick(lower, SECOND),
        (FIRST | SECOND << 4) << SHIFT,
        pick(upper, SECOND) + pick(lower, FIRST),
        (SECOND | FIRST << 4) << SHIFT,
    )


@triton.jit
def one_each(rows, best, ABOVE: tl.constexpr, LOW: tl.constexpr, LEFT_LOW: tl.constexpr):
    """The better of ``best`` and the 1:4 masks whose upper two rows use the two columns ABOVE.

    LOW is the lower of these columns, LEFT_LOW the lower of the two that are left.
    """
    upper = either_way(rows[0], rows[1], LOW, ABOVE - LOW, 0)
    lower = either_way(rows[2], rows[3], LEFT_LOW, 15 - ABOVE - LEFT_LOW, 8)
    return better(best[0], best[1], upper[0] + lower[0], upper[1] | lower[1])


@triton.jit
def best_one(rows):
    """The best 1:4 mask of four rows of four scores: (score, mask)."""
    best = tl.full(rows[0][0].shape, float("-inf"), tl.float32), tl.zeros_like(rows[0][0]).to(tl.int32)
    for first in tl.static_range(4):
        for second in tl.static_range(4):
            if first < second:
                best = one_each(
                    rows,
                    best,
                    1 << first | 1 << second,
                    1 << first,
                    (15 - (1 << first) - (1 << second)) & ((1 << first) + (1 << second) - 15),
                )
    return best


@triton.jit
def each_once(upper, lower, SHIFT: tl.constexpr):
    """The best way for two rows to use every column once: (score, mask)."""
    best = either_way(upper, lower, 3, 12, SHIFT)
    more = either_way(upper, lower, 5, 10, SHIFT)
    best = better(best[0], best[1], more[0], more[1])
    more = either_way(upper, lower, 6, 9, SHIFT)
    return better(best[0], best[1], more[0], more[1])


@triton.jit
def both_twice(rows, best, PAIR: tl.constexpr):
    """The better of ``best`` and the 2:4 mask whose upper rows both keep PAIR, the lower rows the others."""
    score = (pick(rows[0], PAIR) + pick(rows[1], PAIR)) + (
        pick(rows[2], 15 - PAIR) + pick(rows[3], 15 - PAIR)
    )
    return better(best[0], best[1], score, PAIR * 0x11 | (15 - PAIR) * 0x1100)


@triton.jit
def one_twice(rows, best, UPPER: tl.constexpr, LOWER: tl.constexpr, LOW: tl.constexpr):
    """The better of ``best`` and the 2:4 masks whose upper rows use column UPPER twice, the lower rows LOWER.

    Both use each of the other two columns once; LOW is the lower of those.
    """
    HIGH: tl.constexpr = 15 - UPPER - LOWER - LOW
    upper = either_way(rows[0], rows[1], UPPER | LOW, UPPER | HIGH, 0)
    lower = either_way(rows[2], rows[3], LOWER | LOW, LOWER | HIGH, 8)
    return better(best[0], best[1], upper[0] + lower[0], upper[1] | lower[1])


@triton.jit
def best_two(rows):
    """The best 2:4 mask of four rows of four scores: (score, mask)."""
    upper = each_once(rows[0], rows[1], 0)
    lower = each_once(rows[2], rows[3], 8)
    best = upper[0] + lower[0], upper[1] | lower[1]
    for first in tl.static_range(4):
        for second in tl.static_range(4):
            if first < second:
                best = both_twice(rows, best, 1 << first | 1 << second)
            if first != second:
                best = one_twice(
                    rows,
                    best,
                    1 << first,
                    1 << second,
                    (15 - (1 << first) - (1 << second)) & ((1 << first) + (1 << second) - 15),
                )
    return best


@triton.jit
def load_row(pointer, stride, live):
    return (
        widen(tl.load(pointer, mask=live, other=0.0)),
        widen(tl.load(pointer + stride, mask=live, other=0.0)),
        widen(tl.load(pointer + 2 * stride, mask=live, other=0.0)),
        widen(tl.load(pointer + 3 * stride, mask=live, other=0.0)),
    )


@triton.jit
def peak_of(row):
    return tl.maximum(tl.maximum(tl.abs(row[0]), tl.abs(row[1])), tl.maximum(tl.abs(row[2]), tl.abs(row[3])))


@triton.jit
def scaled(row, scale):
    return (
        (row[0] * scale).to(tl.float32),
        (row[1] * scale).to(tl.float32),
        (row[2] * scale).to(tl.float32),
        (row[3] * scale).to(tl.float32),
    )


@triton.jit
def exhaust_blocks(
    scores_ptr, mask_ptr, matrix, region, shift, N: tl.constexpr, BLOCKS: tl.constexpr, PACKED: tl.constexpr
):
    """Solve and store full 4 x 4 blocks; ``matrix``, ``region`` and ``shift`` are as in ``solve_blocks``."""
    index, block_row, block_col, live = locate(shift, region, matrix.batch, BLOCKS)
    down = tl.full((1, 1, 1, 1, 1), 0, tl.int64) + matrix.stride_row
    right = matrix.stride_col
    corner = index * matrix.stride_batch + 4 * (block_row * down + block_col * right) + scores_ptr
    a = load_row(corner, right, live)
    b = load_row(corner + down, right, live)
    c = load_row(corner + 2 * down, right, live)
    d = load_row(corner + 3 * down, right, live)
    peak = tl.maximum(tl.maximum(peak_of(a), peak_of(b)), tl.maximum(peak_of(c), peak_of(d)))
    scale, _ = power_of_two_scale(peak)
    if N == 3:
        scale = 0.0 - scale
    four = scaled(a, scale), scaled(b, scale), scaled(c, scale), scaled(d, scale)
    if N == 2:
        _, mask = best_two(four)
    else:
        _, mask = best_one(four)
    if N == 3:
        mask = 0xFFFF - mask

    line = (index * matrix.rows + 4 * block_row) * matrix.cols + 4 * block_col
    for row in tl.static_range(4):
        bits = (mask >> (4 * row)) & 15
        if PACKED:
            # Bit j goes to byte j: four shifted copies, of each the lowest bit.
            word = (bits * 0x00204081) & 0x01010101
            tl.store(mask_ptr + (line + row * matrix.cols) // 4, word, mask=live)
        else:
            for col in tl.static_range(4):
                entry = ((bits >> col) & 1).to(tl.uint8)
                tl.store(mask_ptr + line + row * matrix.cols + col, entry, mask=live)


@triton.jit(
    do_not_specialize=[
        "rows", "cols", "batch", "stride_batch", "stride_row", "stride_col", "first_block_row",
        "first_block_col", "block_rows", "block_cols",
    ],
)  # fmt: skip
def exhaustive_kernel(
    scores_ptr,  # (batch, rows, cols) of any strides
    mask_ptr,  # (batch, rows, cols) uint8, contiguous; where PACKED (4 divides cols) seen as int32
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
    N: tl.constexpr,
    BLOCKS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """One program: ``BLOCKS`` full blocks from scores to mask. ``grid = (ceil(blocks / BLOCKS),)``."""
    matrix = Matrix(rows, cols, batch, stride_batch, stride_row, stride_col)
    region = Region(first_block_row, first_block_col, block_rows, block_cols)
    exhaust_blocks(scores_ptr, mask_ptr, matrix, region, 0, N, BLOCKS, PACKED)
