r"""Tiles: batches of blocks in registers, loaded straight from a strided matrix.

A program holds ``BLOCKS`` blocks of ``M x M`` lanes (M a power of two) as one tensor of shape
``[ROWS_IN, COLS_IN, BLOCKS, ROWS_OUT, COLS_OUT]`` with ``M = ROWS_IN * ROWS_OUT = COLS_IN * COLS_OUT``. Entry
(i, j) of a block lies at ``i = ROWS_IN * row_out + row_in``, ``j = COLS_IN * col_out + col_in``. The compiler
deals the last axes to the lanes of a warp and keeps the first two in the registers of one lane, so that a
row or column reduction is ``ROWS_IN`` or ``COLS_IN`` register operations and at most three shuffles.

A vector over the rows of each block is ``[ROWS_IN, 1, BLOCKS, ROWS_OUT, 1]``, one over the columns
``[1, COLS_IN, BLOCKS, 1, COLS_OUT]``, one number per block ``[1, 1, BLOCKS, 1, 1]``; they broadcast.

Blocks smaller than the tile (M not a power of two, edges of the matrix) leave lanes over: *padding*, which
holds score -inf and is never kept. A block with more rows than columns is loaded transposed where the
``SLACK`` specialisation runs, so that R <= C there.
"""

import os
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.target_info import is_cuda

# The interpreter has no device library.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
# By what factor more entries are said to be adjacent along each axis of a tile than along the one before. The
# compiler deals the axis with most of them to the lanes first; among equals Triton before 3.7 the first axis.
MORE = tl.constexpr(1 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 2)


@triton.jit
def pointers_to(base_ptr, offsets):
    """Pointers of a tile such that its last axes are dealt to the lanes, wherever they point.

    Nothing is said to be aligned, so that what is said to be adjacent makes no access wider.
    """
    pointers = base_ptr + offsets
    if len(pointers.shape) == 5:
        pointers = tl.max_contiguous(pointers, [1, MORE, MORE**2, MORE**3, MORE**4])
        pointers = tl.multiple_of(pointers, [1, 1, 1, 1, 1])
    else:
        pointers = tl.multiple_of(tl.max_contiguous(pointers, [1, MORE]), [1, 1])
    return pointers


@triton.jit
def quotient(x, y):
    """x / y for float32 and y > 0 to about 2 units in the last place: a reciprocal and a product.

    Where the reciprocal overflows (y below 2^-126) or vanishes (above 2^126), it is infinite or 0.
    """
    return x / y if INTERPRETED else libdevice.fast_dividef(x, y)


@triton.jit
def exp2(x):
    """2^x for float32 to 2 units in the last place; below 2^-126 it is 0."""
    if INTERPRETED:
        return tl.exp2(x)
    return libdevice.exp2(x) if is_cuda() else tl.exp2(x)


@triton.jit
def log2(x):
    """The base-2 logarithm of a normal float32 to about 2^-22 or 2 units in the last place."""
    if INTERPRETED:
        return tl.log2(x)
    return libdevice.fast_log2f(x) if is_cuda() else tl.log2(x)


@triton.jit
def equal(x, y):
    """1.0 where x == y, else 0.0, for float32.

    Where the compiler is free to, it packs 32 predicates into a register and unpacks them.
    """
    NVIDIA: tl.constexpr = False if INTERPRETED else is_cuda()
    if NVIDIA:
        found = tl.inline_asm_elementwise("set.eq.f32.f32 $0, $1, $2;", "=f,f,f", [x, y], tl.float32, True, 1)
    else:
        found = (x == y).to(tl.float32)
    return found


# --- reductions ---------------------------------------------------------------------------------------------


@triton.jit
def sum_rows(x):
    """Sum along each row: a tile -> a row vector."""
    return tl.sum(tl.sum(x, 1, keep_dims=True), 4, keep_dims=True)


@triton.jit
def sum_cols(x):
    """Sum along each column: a tile -> a column vector; a row vector -> one number per block."""
    return tl.sum(tl.sum(x, 0, keep_dims=True), 3, keep_dims=True)


@triton.jit
def min_rows(x):
    """Minimum along each row."""
    return tl.min(tl.min(x, 1, keep_dims=True), 4, keep_dims=True)


@triton.jit
def min_cols(x):
    """Minimum along each column."""
    return tl.min(tl.min(x, 0, keep_dims=True), 3, keep_dims=True)


@triton.jit
def max_rows(x):
    """Maximum along each row."""
    return tl.max(tl.max(x, 1, keep_dims=True), 4, keep_dims=True)


@triton.jit
def max_cols(x):
    """Maximum along each column."""
    return tl.max(tl.max(x, 0, keep_dims=True), 3, keep_dims=True)


# --- where the blocks lie -----------------------------------------------------------------------------------


@triton.jit
def row_index(ROWS_IN: tl.constexpr, ROWS_OUT: tl.constexpr):
    """int32 row numbers inside a block, ``[ROWS_IN, 1, 1, ROWS_OUT, 1]``."""
    inner = tl.arange(0, ROWS_IN)[:, None, None, None, None]
    return inner + ROWS_IN * tl.arange(0, ROWS_OUT)[None, None, None, :, None]


@triton.jit
def col_index(COLS_IN: tl.constexpr, COLS_OUT: tl.constexpr):
    """int32 column numbers inside a block, ``[1, COLS_IN, 1, 1, COLS_OUT]``."""
    inner = tl.arange(0, COLS_IN)[None, :, None, None, None]
    return inner + COLS_IN * tl.arange(0, COLS_OUT)[None, None, None, None, :]


class TileLayout(NamedTuple):
    """How a program holds its blocks, and stores their masks: constexprs."""

    ROWS_IN: Any
    COLS_IN: Any
    ROWS_OUT: Any
    COLS_OUT: Any
    BLOCKS: Any
    PADDED: Any  # whether lanes are left over
    SLACK: Any  # whether blocks may be no squares
    PACKED: Any  # whether 4 entries of the mask are stored as one 32-bit word


class Matrix(NamedTuple):
    """Sizes of a batch of matrices, and their strides in elements."""

    rows: Any
    cols: Any
    batch: Any
    stride_batch: Any
    stride_row: Any
    stride_col: Any


class Region(NamedTuple):
    """A rectangle of blocks in each matrix: where it starts and its size, in blocks."""

    first_block_row: Any
    first_block_col: Any
    block_rows: Any
    block_cols: Any


class Part(NamedTuple):
    """What the programs of a launch cover."""

    matrix: Any  # a Matrix
    region: Any  # a Region
    grid: Any  # how many block rows and columns a whole matrix has
    shift: Any  # see :func:`locate`


class Blocks(NamedTuple):
    """Where the blocks of a program lie; one number per block unless stated otherwise."""

    index: Any  # int64: of the matrix in its batch
    block_row: Any  # int64
    block_col: Any
    live: Any  # whether the block exists: the last program has some over
    i: Any  # int32 row numbers inside a block, a row vector
    j: Any  # int32 column numbers, a column vector
    rows: Any  # int32 size R
    cols: Any  # int32 size C >= R
    tall: Any  # whether it is taller than wide, and so turned: its rows are columns of the matrix
    slack: Any  # whether R < C: a column may hold less than N
    real_row: Any  # whether a row belongs to its block, a row vector
    real_col: Any  # a column vector
    inside: Any  # whether an entry belongs to its block: a tile where PADDED, else ``live``


@triton.jit
def locate(shift, region, batch, BLOCKS: tl.constexpr):
    """The blocks of this program: (int64 batch index, block row, block column, and whether it exists).

    The programs cover the region in each of ``batch`` matrices. ``shift`` is added to the number of each
    block: minus the blocks of the programs before the region's first, or 0.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[None, None, :, None, None] + shift
    across = region.block_cols.to(tl.int64)
    down = region.block_rows.to(tl.int64)
    line = block // across
    index = line // down
    block_row = line - index * down + region.first_block_row
    block_col = block - line * across + region.first_block_col
    return index, block_row, block_col, index < batch


@triton.jit
def place_blocks(matrix, region, m, shift, zero, LAYOUT: tl.constexpr):
    """Where the blocks of this program lie, and which lanes hold real entries.

    For ``shift`` see :func:`locate`. ``zero`` is 0, and one that the compiler cannot foresee lets it forget
    the answer and ask again later: then no address occupies a register in between.
    """
    index, block_row, block_col, live = locate(zero + shift, region, matrix.batch, LAYOUT.BLOCKS)
    i = row_index(LAYOUT.ROWS_IN, LAYOUT.ROWS_OUT) + zero
    j = col_index(LAYOUT.COLS_IN, LAYOUT.COLS_OUT) + zero
    height = tl.zeros_like(block_row).to(tl.int32) + m
    width = height
    if LAYOUT.SLACK:
        height = tl.minimum(matrix.rows - block_row * m, m).to(tl.int32)
        width = tl.minimum(matrix.cols - block_col * m, m).to(tl.int32)
    rows, cols = tl.minimum(height, width), tl.maximum(height, width)
    real_row = (i < rows) & live
    real_col = (j < cols) & live
    inside = live
    if LAYOUT.PADDED:
        inside = real_row & real_col
    return Blocks(
        index, block_row, block_col, live, i, j, rows, cols, height > width, rows < cols, real_row, real_col,
        inside,
    )  # fmt: skip


@triton.jit
def targets(blocks, n):
    """How many entries each row and each column of a block keeps (with slack, a column at most)."""
    return tl.minimum(n, blocks.cols), tl.where(blocks.slack, n, tl.minimum(n, blocks.rows))


@triton.jit
def strided(blocks, i, j, m, stride_batch, stride_row, stride_col, SLACK: tl.constexpr):
    """int64 offsets of entries (i, j) of the blocks, with the strides of turned blocks exchanged."""
    along_row = tl.full((1, 1, 1, 1, 1), 0, tl.int64) + stride_col
    along_col = tl.full((1, 1, 1, 1, 1), 0, tl.int64) + stride_row
    corner = blocks.index * stride_batch + blocks.block_row * m * along_col + blocks.block_col * m * along_row
    if SLACK:
        tall = blocks.tall
        along_row, along_col = tl.where(tall, along_col, along_row), tl.where(tall, along_row, along_col)
    return (corner + i * along_col) + j * along_row


# --- scores -------------------------------------------------------------------------------------------------


@triton.jit
def widen(x):
    """float16 and bfloat16 as float32; the others as they are."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def power_of_two_scale(peak):
    """(s, 1/s), powers of two: ``peak * s`` lies in [1/2, 1) (in [1, 4) for the two largest exponents).

    Both stay normal numbers, so that multiplying by them is exact short of underflow.
    """
    if peak.dtype == tl.float64:
        exponent = (peak.to(tl.int64, bitcast=True) >> 52) & 2047
        biased = tl.minimum(tl.maximum(2045 - exponent, 1), 2045)
        scale = (biased << 52).to(tl.float64, bitcast=True)
        unscale = ((2046 - biased) << 52).to(tl.float64, bitcast=True)
    else:
        exponent = (peak.to(tl.int32, bitcast=True) >> 23) & 255
        biased = tl.minimum(tl.maximum(253 - exponent, 1), 253)
        scale = (biased << 23).to(tl.float32, bitcast=True)
        unscale = ((254 - biased) << 23).to(tl.float32, bitcast=True)
    return scale, unscale


@triton.jit
def load_scaled(scores_ptr, matrix, blocks, m, LAYOUT: tl.constexpr):
    """Scores as float32 scaled to max 1 (padding lanes -inf), and the power of two that undoes it."""
    offsets = strided(
        blocks, blocks.i, blocks.j, m, matrix.stride_batch, matrix.stride_row, matrix.stride_col, LAYOUT.SLACK
    )
    raw = widen(tl.load(pointers_to(scores_ptr, offsets), mask=blocks.inside, other=0.0))
    scale, unscale = power_of_two_scale(max_rows(max_cols(tl.abs(raw))))
    scores = (raw * scale).to(tl.float32)
    if LAYOUT.PADDED:
        scores = tl.where(blocks.inside, scores, float("-inf"))
    return scores, unscale


# --- masks --------------------------------------------------------------------------------------------------


@triton.jit
def store_mask(mask_ptr, kept, matrix, blocks, entries, m, unit, LAYOUT: tl.constexpr):
    """Store 0 or 1 for each entry to the contiguous ``(batch, rows, cols)`` mask.

    ``entries`` are the row and column numbers inside a block. ``PACKED`` says that 4 divides ``m`` and
    ``cols`` (and that a lane holds 4 or 8 columns side by side): 4 each go in one 32-bit word. ``unit`` is 1,
    given at run time: knowing that entries are adjacent, the compiler would deal the whole tile out to the
    lanes as suits this one store, and tear rows and columns apart.
    """
    i, j = entries
    value = tl.where(kept, 1, 0)
    if LAYOUT.PACKED:
        col_in = tl.arange(0, kept.shape[1])[None, :, None, None, None]
        word = (kept.shape[1] // 4) * tl.arange(0, kept.shape[4])[None, None, None, None, :]
        pitch = matrix.cols // 4
        out = strided(blocks, i, word, m, matrix.rows * pitch.to(tl.int64), pitch, unit, False)
        out -= blocks.block_col * (m - m // 4) * unit
        for k in tl.static_range(kept.shape[1] // 4):
            here = col_in // 4 == k
            words = tl.sum(tl.where(here, value << (8 * (col_in % 4)), 0), 1, keep_dims=True)
            real = blocks.inside
            if real.shape[1] > 1:  # by column: some lie beyond the block
                real = tl.max(tl.where(here & real, 1, 0), 1, keep_dims=True) > 0
            tl.store(pointers_to(mask_ptr, out + k * unit), words, mask=real)
    else:
        cols = matrix.cols.to(tl.int64)
        out = strided(blocks, i, j, m, matrix.rows * cols, matrix.cols, unit, LAYOUT.SLACK)
        tl.store(pointers_to(mask_ptr, out), value.to(tl.uint8), mask=blocks.inside)
