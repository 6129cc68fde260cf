"""The greedy: a total order of a block's entries, taken from the top, then the missing entries filled in.

The order comes from Batcher's odd-even merge network, which sorts one block per lane with the same
instructions in all of them: score descending, ties by the lowest row-major index. Taking is sequential as
published, one block after another, without a branch per entry.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nmsolve.backends.cpu._numba.ascent import normalise
from nmsolve.backends.cpu._numba.compiled import compiled, inner
from nmsolve.backends.cpu._numba.lanes import WIDTH, maximum, minimum, select, splat, trailing_zeros
from nmsolve.backends.cpu._numba.memory import load, store
from nmsolve.backends.cpu._numba.scratch import buffer, retyped, scratch, still_needed
from nmsolve.backends.cpu._numba.tiles import (
    WORD,
    Region,
    load_tile,
    place_lanes,
    words_for,
    write_flags,
)

__all__ = ["complete", "put_in_order", "row_major", "solve_greedy", "take"]


@inner
def row_major(rows: int, cols: int, flipped: bool, row_of: Any, col_of: Any) -> None:
    """Row and column of each entry of a block in row-major order, seen transposed if ``flipped``."""
    for i in range(rows):
        for j in range(cols):
            index = j * rows + i if flipped else i * cols + j
            row_of[index] = i
            col_of[index] = j


@inner
def put_in_order(tile: Any, pitch: int, size: int, row_of: Any, col_of: Any, keys: Any, order: Any) -> None:
    """Fill ``order`` with the numbers of a block's ``size`` entries, lane by lane, from the best score on."""
    integer = order.dtype.type
    lanes = WIDTH // tile.itemsize
    for e in range(size):
        store(keys, e * lanes, load(tile, (row_of[e] * pitch + col_of[e]) * lanes))
        store(order, e * lanes, splat(integer(e)))
    none = splat(integer(0))
    run = 1
    while run < size:
        gap = run
        while gap >= 1:
            for first in range(gap % run, size - gap, 2 * gap):
                for low in range(first, minimum(first + gap, size - gap)):
                    high = low + gap
                    if (low ^ high) < 2 * run:
                        a, b = load(keys, low * lanes), load(keys, high * lanes)
                        p, q = load(order, low * lanes), load(order, high * lanes)
                        behind = (a < b) | ((a == b) & (p > q))
                        change = select(behind, p ^ q, none)
                        store(keys, low * lanes, maximum(a, b))
                        store(keys, high * lanes, minimum(a, b))
                        store(order, low * lanes, p ^ change)
                        store(order, high * lanes, q ^ change)
            gap //= 2
        run *= 2


@inner
def take(
    order: Any,
    lane: int,
    rows: int,
    cols: int,
    row_of: Any,
    col_of: Any,
    n: int,
    per_row: int,
    held: Any,
    words: Any,
) -> None:
    """Take entries in order while their row and column hold fewer than ``n``.

    ``held`` becomes the counts of the rows, then of the columns.
    """
    lanes = WIDTH // order.itemsize
    for line in range(rows + cols):
        held[line] = 0
    for i in range(rows * per_row):
        words[i * lanes + lane] = 0
    for place in range(lane, rows * cols * lanes, lanes):
        e = order[place]
        i, j = row_of[e], col_of[e]
        taken = np.int64(held[i] < n) & np.int64(held[rows + j] < n)
        held[i] += taken
        held[rows + j] += taken
        word = (i * per_row + j // WORD) * lanes + lane
        words[word] |= words.dtype.type(taken << (j % WORD))


@inner
def _toggle(words: Any, per_row: int, lanes: int, lane: int, i: int, j: int) -> None:
    words[(i * per_row + j // WORD) * lanes + lane] ^= words.dtype.type(1 << (j % WORD))


@inner
def _free_room(words: Any, per_row: int, lanes: int, lane: int, i: int, j: int, n: int, held: Any) -> bool:
    """Whether entry (i, j) is free and its column has room; the columns' counts start at ``held[0]``."""
    word = np.int64(words[(i * per_row + j // WORD) * lanes + lane])
    return held[j] < n and (word >> (j % WORD)) & 1 == 0


@inner
def complete(
    tile: Any, pitch: int, lane: int, rows: int, cols: int, n: int, per_row: int, held: Any, words: Any
) -> None:
    """Fill every row to its target, one best move per missing entry.

    For the first short row i a move either keeps a free entry (i, j) of a column with room, or shifts a kept
    entry: (k, l) leaves, (i, l) and (k, j) come, for a column j with room. The move with the largest change
    of the kept score is made even where it loses; there always is one.
    """
    lanes = WIDTH // tile.itemsize
    target = minimum(n, cols)
    lowest = tile.dtype.type(-np.inf)
    in_col = held + rows
    for i in range(rows):
        line = i * pitch * lanes + lane
        while held[i] < target:
            gain = lowest
            k = left = came = np.int64(-1)
            first, last = cols, np.int64(0)
            for j in range(cols):
                if in_col[j] < n:
                    first, last = minimum(first, j), j + 1
                    score = tile[line + j * lanes]
                    if score > gain and _free_room(words, per_row, lanes, lane, i, j, n, in_col):
                        gain, came = score, j
            for row in range(rows):
                other = row * pitch * lanes + lane
                room, best = np.int64(-1), lowest
                for j in range(first, last):
                    score = tile[other + j * lanes]
                    if score > best and _free_room(words, per_row, lanes, lane, row, j, n, in_col):
                        room, best = j, score
                if room < 0:
                    continue
                for w in range(per_row):
                    mine = np.int64(words[(i * per_row + w) * lanes + lane])
                    movable = np.int64(words[(row * per_row + w) * lanes + lane]) & ~mine & 0xFFFFFFFF
                    while movable != 0:
                        j = w * WORD + trailing_zeros(movable)
                        movable &= movable - 1
                        change = (tile[line + j * lanes] - tile[other + j * lanes]) + best
                        if change > gain:
                            gain, k, left, came = change, row, j, room
            if k < 0:
                _toggle(words, per_row, lanes, lane, i, came)
            else:
                _toggle(words, per_row, lanes, lane, k, left)
                _toggle(words, per_row, lanes, lane, i, left)
                _toggle(words, per_row, lanes, lane, k, came)
            held[i] += 1
            in_col[came] += 1


@compiled
def solve_greedy(region: Region, n: int, flipped: bool, reals: Any, ints: Any, first: int, last: int) -> None:
    """Groups ``first .. last`` of a region by the greedy; a ``flipped`` region is seen transposed."""
    real, integer = reals.dtype.type, ints.dtype.type
    lanes = WIDTH // reals.itemsize
    rows, cols = region.rows, region.cols
    pitch, per_row = cols + 1, words_for(cols)
    size = rows * cols
    memory = buffer(
        (rows * pitch + 2 * size + rows * per_row) * WIDTH + (2 * size + rows + cols + 3 * lanes) * 8
    )
    tile = scratch(memory, real(0))
    keys = tile + rows * pitch * lanes
    order = retyped(keys + size * lanes, integer(0))
    words = order + size * lanes
    row_of = retyped(words + rows * per_row * lanes, np.int64(0))
    col_of = row_of + size
    held = col_of + size
    places = held + rows + cols
    row_major(rows, cols, flipped, row_of, col_of)
    for group in range(first, last):
        used = place_lanes(region, group * lanes, lanes, places)
        load_tile(region, places, tile, pitch)
        put_in_order(tile, pitch, size, row_of, col_of, keys, order)
        normalise(tile, pitch, rows, cols)
        for lane in range(used):
            take(order, lane, rows, cols, row_of, col_of, n, per_row, held, words)
            complete(tile, pitch, lane, rows, cols, n, per_row, held, words)
            for i in range(rows):
                place, address = i * per_row * lanes + lane, places[lanes + lane] + i * region.mask_row
                write_flags(words, place, lanes, cols, address, region.mask_col)
    still_needed(memory)
