"""Phase 2 of the exact method: shortest augmenting paths in one block, a line of the block per register.

The start is ``S = [A - u - v > 0]``. Sources are rows that hold too few entries and columns that hold too
many, sinks the other way round; an arc leads from a row to a column through a free entry at cost
``max(0, -(A - u - v))`` and back through a kept one at cost ``max(0, A - u - v)``. After the shortest path to
the nearest sink, at distance D, ``u += min(D, distance)`` and ``v -= min(D, distance)`` keep the
complementary slackness of S, and flipping the path's entries removes one unit of imbalance.
(docs/internals/solver.md has the same update with all prices shifted by D; here lines near a source move
little and keep their digits.)

The search corrects labels in rounds instead of settling one node at a time: a round relaxes every entry of
the rows whose distance has just fallen, then of the columns, and drops what lies beyond the nearest sink
found so far. A line costs a load and a handful of instructions, with no search for the nearest node in
between. Costs are not negative even after rounding, so distances only fall and the search ends with the
shortest ones.

With fewer rows than columns one slack row of score 0 takes what the columns may leave: its entries are
counts without a limit, always free, and kept while positive. Then every line has one exact target.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nmsolve.backends.cpu._numba.compiled import inner
from nmsolve.backends.cpu._numba.lanes import (
    WIDTH,
    bits_of,
    lane_mask,
    maximum,
    minimum,
    select,
    smallest,
    splat,
    trailing_zeros,
)
from nmsolve.backends.cpu._numba.memory import gather, load, part_lanes, store
from nmsolve.backends.cpu._numba.tiles import WORD, words_for

__all__ = ["augment", "part"]


@inner
def _list_bits(bits: int, first: int, active: Any, count: int) -> int:
    """Append ``first`` + the index of every set bit to ``active``."""
    while bits != 0:
        active[count] = first + trailing_zeros(bits)
        count += 1
        bits &= bits - 1
    return count


@inner
def _chunk_bits(words: Any, line: int, stride: int, chunk: int, lanes: int) -> int:
    """The bits of chunk ``chunk`` (``lanes`` columns) of a row of the mask."""
    column = chunk * lanes
    word = np.int64(words[(column // WORD) * stride + line])
    return (word >> (column % WORD)) & ((1 << lanes) - 1)


@inner
def _flip(row: int, col: int, slack: int, kept: Any, stride: int, counts: Any, change: int) -> None:
    """Add (``change`` = 1) or remove (-1) entry (row, col); on the slack row, one unit of it."""
    if row == slack:
        counts[col] += change
        if counts[col] != (1 if change > 0 else 0):
            return
    place = (col // WORD) * stride + row
    kept[place] = kept.dtype.type(np.int64(kept[place]) ^ (1 << (col % WORD)))


@inner
def part(tile: Any, pitch: int, rows: int, cols: int, by_row: Any, by_col: Any) -> None:
    """Copy every lane's block out of the tile, row by row and column by column, rounded up to registers.

    A line is read many times: gathering it from the tile each time takes as long as fifteen loads.
    """
    lanes = WIDTH // tile.itemsize
    row_room, col_room = (rows + lanes - 1) // lanes * lanes, (cols + lanes - 1) // lanes * lanes
    for i in range(rows):
        for j in range(0, cols, lanes):
            place = (i * pitch + j) * lanes
            part_lanes(tile, place, lanes, by_row, i * col_room + j, rows * col_room)
    for j in range(cols):
        for i in range(0, rows, lanes):
            place = (i * pitch + j) * lanes
            part_lanes(tile, place, pitch * lanes, by_col, j * row_room + i, cols * row_room)


@inner
def augment(
    lane: int,
    rows: int,
    cols: int,
    row_target: int,
    col_target: int,
    u: Any,
    v: Any,
    words: Any,
    row_excess: Any,
    col_excess: Any,
    numbers: Any,
    integers: Any,
    active: Any,
    by_row: Any,
    by_col: Any,
) -> int:
    """Balance the block in ``lane``: correct its duals and its mask's words; returns the number of paths.

    ``row_excess`` and ``col_excess`` say, lane by lane, how many entries a line holds beyond its target.
    ``by_row`` and ``by_col`` hold its scores (:func:`part`), a slack row of zeros included; ``numbers``,
    ``integers`` and ``active`` are scratch.
    """
    real, integer = u.dtype.type, words.dtype.type
    lanes = WIDTH // u.itemsize
    slack = rows if rows < cols else -1
    lines = rows + 1 if rows < cols else rows
    row_chunks, col_chunks = (lines + lanes - 1) // lanes, (cols + lanes - 1) // lanes
    row_room, col_room = row_chunks * lanes, col_chunks * lanes
    per_row = words_for(cols)
    room = maximum(row_room, col_room)
    row_dual, col_dual = numbers, numbers + room
    row_label, col_label = numbers + 2 * room, numbers + 3 * room
    row_from, col_from = integers, integers + room
    row_over, col_over = integers + 2 * room, integers + 3 * room
    units, kept = integers + 4 * room, integers + 5 * room
    row_list, col_list = active, active + room

    for chunk in range(row_chunks):
        base, left = chunk * lanes * lanes + lane, rows - chunk * lanes
        store(row_dual, chunk * lanes, gather(u, base, lanes, left))
        store(row_over, chunk * lanes, gather(row_excess, base, lanes, left))
        for w in range(per_row):
            place = w * row_room + chunk * lanes
            base = (chunk * lanes * per_row + w) * lanes + lane
            store(kept, place, gather(words, base, per_row * lanes, left))
    for chunk in range(col_chunks):
        base, left = chunk * lanes * lanes + lane, cols - chunk * lanes
        store(col_dual, chunk * lanes, gather(v, base, lanes, left))
        store(col_over, chunk * lanes, gather(col_excess, base, lanes, left))
    if slack >= 0:
        over = row_target * rows - col_target * cols
        for j in range(cols):
            units[j] = 0
            if col_dual[j] == 0 and col_over[j] < 0:
                units[j] = -col_over[j]
                over -= col_over[j]
                col_over[j] = 0
                place = (j // WORD) * row_room + slack
                kept[place] = integer(np.int64(kept[place]) ^ (1 << (j % WORD)))
        row_over[slack] = over

    # Numba compiles a function anew for every constant that it is called with.
    comes, goes = integer(1), integer(-1)
    far, zero, nobody = splat(real(np.inf)), splat(real(0)), splat(integer(-1))
    balanced = splat(integer(0))
    paths = 0
    while True:
        row_count = col_count = np.int64(0)
        for place in range(0, row_room, lanes):
            short = load(row_over, place) < balanced
            store(row_label, place, select(short, zero, far))
            store(row_from, place, nobody)
            row_count = _list_bits(bits_of(short), place, row_list, row_count)
        for place in range(0, col_room, lanes):
            crowded = load(col_over, place) > balanced
            store(col_label, place, select(crowded, zero, far))
            store(col_from, place, nobody)
            col_count = _list_bits(bits_of(crowded), place, col_list, col_count)
        nearest = real(np.inf)
        while row_count + col_count > 0:
            for chunk in range(col_chunks):
                place, left = chunk * lanes, cols - chunk * lanes
                label, origin, dual = load(col_label, place), load(col_from, place), load(col_dual, place)
                everything = (1 << minimum(lanes, left)) - 1
                fell = lane_mask(0, label)
                for t in range(row_count):
                    i = row_list[t]
                    if row_label[i] < nearest:
                        scores = load(by_row, i * col_room + place)
                        reduced = (scores - splat(row_dual[i])) - dual
                        reached = splat(row_label[i]) + maximum(zero - reduced, zero)
                        free = everything
                        if i != slack:
                            free &= ~_chunk_bits(kept, i, row_room, chunk, lanes)
                        better = (reached < label) & lane_mask(free, label)
                        label = select(better, reached, label)
                        origin = select(better, splat(integer(i)), origin)
                        fell = fell | better
                store(col_label, place, label)
                store(col_from, place, origin)
                sinks = fell & (load(col_over, place) < balanced)
                if bits_of(sinks) != 0:
                    nearest = minimum(nearest, smallest(select(sinks, label, far)))
                fell = fell & (label < splat(nearest))
                col_count = _list_bits(bits_of(fell), place, col_list, col_count)
            row_count = 0
            for chunk in range(row_chunks):
                place = chunk * lanes
                label, origin, dual = load(row_label, place), load(row_from, place), load(row_dual, place)
                fell = lane_mask(0, label)
                for t in range(col_count):
                    j = col_list[t]
                    if col_label[j] < nearest:
                        scores = load(by_col, j * row_room + place)
                        reduced = (scores - dual) - splat(col_dual[j])
                        reached = splat(col_label[j]) + maximum(reduced, zero)
                        held = load(kept, (j // WORD) * row_room + place) & splat(integer(1 << (j % WORD)))
                        better = (reached < label) & (held != balanced)
                        label = select(better, reached, label)
                        origin = select(better, splat(integer(j)), origin)
                        fell = fell | better
                store(row_label, place, label)
                store(row_from, place, origin)
                sinks = fell & (load(row_over, place) > balanced)
                if bits_of(sinks) != 0:
                    nearest = minimum(nearest, smallest(select(sinks, label, far)))
                fell = fell & (label < splat(nearest))
                row_count = _list_bits(bits_of(fell), place, row_list, row_count)
            col_count = 0
        if nearest == real(np.inf):
            break

        row = col = np.int64(-1)
        reach = splat(nearest)
        for place in range(0, row_room, lanes):
            label = load(row_label, place)
            dual = load(row_dual, place)
            store(row_dual, place, dual + minimum(reach, label))
            ends = bits_of((label == reach) & (load(row_over, place) > balanced))
            if row < 0 and ends != 0:
                row = place + trailing_zeros(ends)
        for place in range(0, col_room, lanes):
            label = load(col_label, place)
            dual = load(col_dual, place)
            store(col_dual, place, dual - minimum(reach, label))
            ends = bits_of((label == reach) & (load(col_over, place) < balanced))
            if row < 0 and col < 0 and ends != 0:
                col = place + trailing_zeros(ends)
        if row >= 0:
            row_over[row] -= 1
        else:
            col_over[col] += 1
            row = np.int64(col_from[col])
            _flip(row, col, slack, kept, row_room, units, comes)
        while row_from[row] >= 0:
            col = np.int64(row_from[row])
            _flip(row, col, slack, kept, row_room, units, goes)
            row = np.int64(col_from[col])
            if row < 0:
                break
            _flip(row, col, slack, kept, row_room, units, comes)
        if row >= 0:
            row_over[row] += 1
        else:
            col_over[col] -= 1
        paths += 1

    shift = row_dual[slack] if slack >= 0 else real(0)
    for i in range(rows):
        u[i * lanes + lane] = row_dual[i] - shift
        for w in range(per_row):
            words[(i * per_row + w) * lanes + lane] = kept[w * row_room + i]
    for j in range(cols):
        moved = col_dual[j] + shift
        v[j * lanes + lane] = maximum(moved, real(0)) if slack >= 0 else moved
    return paths
