r"""Shortest augmenting paths: from any duals to an optimal mask and its duals.

Starts from ``S = [A - u - v > 0]`` and moves one unit of imbalance per search along a shortest path
(Bellman-Ford: a column and a row reduction per sweep), see docs/internals/solver.md.

It keeps one float per entry, its *arc* (see :func:`to_arcs`): the cost of flipping the entry, |A - u - v|
clamped to the side that complementary slackness allows, times 2^-40, with bit 30 set if the entry is free. A
set bit 30 makes a float at least 2, more than any path is long, so that ``column distance + arc`` is the
length of a step from a column to a row where the entry is kept and "unreachable" where it is free; with the
bit toggled, the same holds for the steps from rows to columns.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from nmsolve.kernels._tile import (
    col_index,
    equal,
    max_cols,
    max_rows,
    min_cols,
    min_rows,
    row_index,
    sum_cols,
    sum_rows,
)

INF = tl.constexpr(float("inf"))
NONE = tl.constexpr(1 << 20)  # larger than any node number
CROWDED = tl.constexpr(2)  # units of imbalance above which ties are settled in bulk

UNIT = tl.constexpr(2.0**-40)  # of arcs and distances, relative to the scaled scores
PER_UNIT = tl.constexpr(2.0**40)
FREE = tl.constexpr(1 << 30)
UNREACHED = tl.constexpr(2.0)  # the smallest float with bit 30 set
TIGHT_FREE = tl.constexpr(2.0)  # the arc of a free entry of cost 0
PADDING = tl.constexpr(2.0**127)  # a free entry of cost 1/2: longer than any path, and never reaches a sink


class Targets(NamedTuple):
    """How many entries each line is to keep: a row vector, a column vector, one number per block."""

    rows: Any
    cols: Any
    slack: Any  # of the slack row; 0 in full blocks


@triton.jit
def to_arcs(reduced, kept):
    """The arcs of entries with reduced scores A - u - v (unit: 2^-40 of the block's scale)."""
    cost = tl.maximum(tl.where(kept, reduced, 0.0 - reduced), 0.0).to(tl.int32, bitcast=True)
    return ((cost & 0x3FFFFFFF) | tl.where(kept, 0, FREE)).to(tl.float32, bitcast=True)


@triton.jit
def toggled(arcs, bit=FREE):
    """The arcs seen from the rows: unreachable where the entry is kept."""
    return (arcs.to(tl.int32, bitcast=True) ^ bit).to(tl.float32, bitcast=True)


@triton.jit
def is_free(arcs):
    return arcs >= UNREACHED


@triton.jit
def first_of(found, AXIS: tl.constexpr):
    """Index of the first 1.0 among 0.0 along an axis that lies in registers (there is one).

    The entries' powers of two are added up, a multiply-add each: the sum's exponent tells.
    """
    COUNT: tl.constexpr = found.shape[AXIS]
    place = tl.arange(0, COUNT)
    place = place[:, None, None, None, None] if AXIS == 0 else place[None, :, None, None, None]
    weight = ((126 - place + COUNT) << 23).to(tl.float32, bitcast=True)
    total = tl.sum(found * weight, AXIS, keep_dims=True)
    return 126 - (total.to(tl.int32, bitcast=True) >> 23) + COUNT


@triton.jit
def nearest_of(length, node, AXIS: tl.constexpr):
    """The shortest steps along an axis of lanes, and of steps of that length the lowest node.

    One minimum after the other: to carry a node along takes three more instructions for each shuffle.
    """
    shortest = tl.min(length, AXIS, keep_dims=True)
    return shortest, tl.min(tl.where(length == shortest, node, NONE), AXIS, keep_dims=True)


@triton.jit
def shortest_to_cols(row_dist, arcs, bit):
    """For each column the length of the shortest step from a row, and the first such row."""
    length = row_dist + toggled(arcs, bit)
    best = tl.min(length, 0, keep_dims=True)
    via = first_of(equal(length, best), 0)
    via += arcs.shape[0] * tl.arange(0, arcs.shape[3])[None, None, None, :, None]
    return nearest_of(best, via, 3)


@triton.jit
def shortest_to_rows(col_dist, arcs):
    """For each row the length of the shortest step from a column, and the first such column."""
    length = col_dist + arcs
    best = tl.min(length, 1, keep_dims=True)
    via = first_of(equal(length, best), 1)
    via += arcs.shape[1] * tl.arange(0, arcs.shape[4])[None, None, None, None, :]
    return nearest_of(best, via, 4)


@triton.jit
def flip_tight(arcs, row_need, col_need, M: tl.constexpr):
    """Flip tight entries (cost 0) between lines that are both short or both over: many units at once.

    Every row proposes the first such entry cyclically after its own number, every column accepts the first
    row that proposes to it. No price changes, and what is left is for the path search. Blocks with many
    ties, constant ones above all, would otherwise need a search for each unit.
    """
    i = row_index(arcs.shape[0], arcs.shape[3])
    j = col_index(arcs.shape[1], arcs.shape[4])
    row_side = tl.where(row_need > 0, TIGHT_FREE, tl.where(row_need < 0, 0.0, INF))
    col_side = tl.where(col_need > 0, TIGHT_FREE, tl.where(col_need < 0, 0.0, INF))
    turn = tl.where((arcs == row_side) & (arcs == col_side), (j - i) & (M - 1), M)
    proposed = min_rows(turn)
    rival = tl.where((turn == proposed) & (turn < M), i, M)
    accepted = min_cols(rival)
    flip = (rival == accepted) & (rival < M)
    change = tl.where(flip, tl.where(is_free(arcs), 1, -1), 0)
    row_need -= sum_rows(change)
    col_need -= sum_cols(change)
    return tl.where(flip, toggled(arcs), arcs), row_need, col_need


@triton.jit
def augment(scores, u, v, blocks, targets, LAYOUT: tl.constexpr):
    """Optimal duals and a mask from any duals: (u, v, arcs, units), units being the imbalance left: 0.

    Node numbers: column j is j, row i is i, and the slack row of a partial block is row M. ``spare`` counts
    the slack row's entries: free without limit (cost u_s + v_j), kept while positive (cost 0).
    """
    PADDED: tl.constexpr = LAYOUT.PADDED
    SLACK: tl.constexpr = LAYOUT.SLACK
    M: tl.constexpr = LAYOUT.ROWS_IN * LAYOUT.ROWS_OUT
    i = row_index(scores.shape[0], scores.shape[3])
    j = col_index(scores.shape[1], scores.shape[4])

    reduced = (scores - u) - v
    kept = reduced > 0
    arcs = to_arcs(reduced * UNIT, kept)
    if PADDED:
        arcs = tl.where(blocks.inside, arcs, PADDING)
    held = tl.where(kept, 1, 0)
    row_need = tl.where(blocks.live, targets.rows - sum_rows(held), 0)  # > 0: too few
    col_need = tl.where(blocks.live, targets.cols - sum_cols(held), 0)
    if SLACK:
        spare = tl.where((v == 0) & blocks.slack, tl.maximum(col_need, 0), 0)
        col_need -= spare
        slack_need = targets.slack - sum_rows(spare)
        slack_dual = tl.zeros_like(slack_need).to(tl.float32)
    units = sum_cols(tl.maximum(row_need, 0)) + sum_rows(tl.maximum(0 - col_need, 0))
    if SLACK:
        units += tl.maximum(slack_need, 0)

    busy = tl.max(units) > 0
    while busy:
        if tl.max(units) > CROWDED:
            arcs, row_need, col_need = flip_tight(arcs, row_need, col_need, M)
            left = sum_cols(tl.maximum(row_need, 0)) + sum_rows(tl.maximum(0 - col_need, 0))
            if SLACK:
                left += tl.maximum(slack_need, 0)
            # Where scores are not finite a search may find no path: rounds are counted, so that they end.
            units = tl.minimum(units, left)

        row_dist = tl.where(row_need > 0, 0.0, UNREACHED)
        col_dist = tl.where(col_need < 0, 0.0, UNREACHED)
        row_from = tl.full(row_need.shape, -1, tl.int32)
        col_from = tl.full(col_need.shape, -1, tl.int32)
        if SLACK:
            slack_dist = tl.where(slack_need > 0, 0.0, UNREACHED)
            slack_from = tl.full(slack_need.shape, -1, tl.int32)
            slack_arc = tl.where(
                blocks.slack & blocks.real_col, tl.maximum(slack_dual + v, 0.0) * UNIT, UNREACHED
            )
        nearest = tl.full(units.shape, UNREACHED, tl.float32)
        searching = units > 0
        sweeps = tl.full((1, 1, 1, 1, 1), 0, tl.int32)
        go = True
        while go:
            # The shift gives 0. Without it the compiler takes the toggled arcs out of the loop, and runs out
            # of registers for them.
            best, via = shortest_to_cols(row_dist, arcs, (sweeps >> 24) + FREE)
            sweeps += 1
            if SLACK:
                length = slack_dist + slack_arc
                via = tl.where(length < best, M, via)
                best = tl.minimum(length, best)
            better = (best < col_dist) & searching
            col_dist = tl.where(better, best, col_dist)
            col_from = tl.where(better, via, col_from)

            best, via = shortest_to_rows(col_dist, arcs)
            better = (best < row_dist) & searching
            row_dist = tl.where(better, best, row_dist)
            row_from = tl.where(better, via, row_from)

            nearest = tl.minimum(
                min_rows(tl.where(col_need > 0, col_dist, UNREACHED)),
                min_cols(tl.where(row_need < 0, row_dist, UNREACHED)),
            )
            if SLACK:
                length = tl.where(spare > 0, col_dist, UNREACHED)
                best = min_rows(length)
                via = min_rows(tl.where(length == best, j, NONE))
                slack_better = (best < slack_dist) & searching
                slack_dist = tl.where(slack_better, best, slack_dist)
                slack_from = tl.where(slack_better, via, slack_from)
                nearest = tl.minimum(nearest, tl.where(slack_need < 0, slack_dist, UNREACHED))
            # What lies beyond the nearest sink changes nothing.
            moved = max_cols(tl.where(better & (row_dist < nearest), 1, 0))
            if SLACK:
                moved = tl.maximum(moved, tl.where(slack_better & (slack_dist < nearest), 1, 0))
            searching = searching & (moved > 0)
            go = tl.max(tl.where(searching, 1, 0)) > 0

        # Prices. Blocks that are done have no node that was reached.
        row_gain = tl.where(row_dist < nearest, nearest - row_dist, 0.0)
        col_gain = tl.where(col_dist < nearest, nearest - col_dist, 0.0)
        u -= row_gain * PER_UNIT
        v += col_gain * PER_UNIT
        if SLACK:
            slack_dual -= tl.where(slack_dist < nearest, nearest - slack_dist, 0.0) * PER_UNIT

        # The path, from the nearest sink (the first column, else row, else the slack row) to its source.
        reached = nearest < UNREACHED
        at_col = min_rows(tl.where((col_need > 0) & (col_dist == nearest) & reached, j, NONE))
        at_row = min_cols(tl.where((row_need < 0) & (row_dist == nearest) & reached, i, NONE))
        if SLACK:
            at_slack = (at_row == NONE) & (slack_need < 0) & (slack_dist == nearest) & reached
            at_row = tl.where(at_slack, M, at_row)
        at_row = tl.where((at_col < NONE) | (at_row == NONE), -1, at_row)
        at_col = tl.where(at_col == NONE, -1, at_col)
        col_need -= tl.where(j == at_col, 1, 0)
        row_need += tl.where(i == at_row, 1, 0)
        row_entry = tl.full(row_need.shape, -1, tl.int32)  # the column whose kept entry in this row is freed
        col_entry = tl.full(col_need.shape, -1, tl.int32)  # the row whose free entry in this column is kept
        if SLACK:
            slack_need += tl.where(at_row == M, 1, 0)
            slack_entry = tl.full(slack_need.shape, -1, tl.int32)
        walk = True
        while walk:
            on = j == at_col
            col_need += tl.where(on & (col_from < 0), 1, 0)
            col_entry = tl.where(on, col_from, col_entry)
            at_row = tl.maximum(at_row, max_rows(tl.where(on, col_from, -1)))
            on = i == at_row
            row_need -= tl.where(on & (row_from < 0), 1, 0)
            row_entry = tl.where(on, row_from, row_entry)
            at_col = max_cols(tl.where(on, row_from, -1))
            if SLACK:
                on = at_row == M
                slack_need -= tl.where(on & (slack_from < 0), 1, 0)
                slack_entry = tl.where(on, slack_from, slack_entry)
                at_col = tl.where(on, slack_from, at_col)
            at_row = tl.full(units.shape, -1, tl.int32)
            walk = tl.max(at_col) >= 0
        if SLACK:
            spare += tl.where(col_entry == M, 1, 0) - tl.where(j == slack_entry, 1, 0)

        free = is_free(arcs)
        cost = tl.where(free, toggled(arcs), arcs)
        reduced = (tl.where(free, 0.0 - cost, cost) + row_gain) - col_gain
        arcs = to_arcs(reduced, free == ((col_entry == i) | (row_entry == j)))
        units = tl.maximum(units - 1, 0)
        busy = tl.max(units) > 0

    if SLACK:
        u -= slack_dual
        v = tl.where(blocks.slack, tl.maximum(v + slack_dual, 0.0), v)
    return u, v, arcs, units
