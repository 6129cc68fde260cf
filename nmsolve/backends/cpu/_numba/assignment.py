"""Optimal assignment by Jonker and Volgenant's shortest augmenting paths, eight columns to a register.

For scores A (M x M) the permutation p with the largest ``sum_i A[i, p_i]`` is found with column prices v for
which every row's own column is its best,

    A[i, p_i] - v[p_i] = max_j (A[i, j] - v[j]) = u[i].

That proves it: ``sum(u) + sum(v)`` bounds the score of every permutation and equals this one's. Below, the
*loss* of row i at column j is ``v[j] - A[i, j]``; a row wants the least.

1. Column maxima: ``v[j] = max_i A[i, j]``. A row that is the best of one or more columns gets the first.
2. Bidding: a free row takes the column of its least loss and raises its price by the margin to the second
   least; the row that held it bids next. A bid is one pass over one row.
3. Augmentation: from each row that is left, Dijkstra's search for the nearest free column.

Prices, losses and distances are float64, whatever the scores are. The result depends on the matrix alone.
Source: R. Jonker and A. Volgenant, Computing 38 (1987) 325-340.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nmsolve.backends.cpu._numba.compiled import compiled, inner
from nmsolve.backends.cpu._numba.lanes import (
    bits_of,
    count_ones,
    maximum,
    minimum,
    select,
    smallest,
    splat,
    trailing_zeros,
)
from nmsolve.backends.cpu._numba.memory import load, load_wide, store

__all__ = ["solve_assignments"]

LANES = 8

# Bids, as a multiple of the number of rows, before the search takes over: it is so cheap that bidding on, by
# ever smaller margins, costs more than it saves.
BIDS = 2


@inner
def _least_two(scores: Any, row: int, width: int, prices: Any) -> Any:
    """(least loss, second least loss, first column of the least) of the row at ``scores[row]``.

    The two are equal where more than one column has the least loss.
    """
    infinite = splat(np.inf)
    least, second, chunk = infinite, infinite, infinite
    index, one = splat(0.0), splat(1.0)
    for j in range(0, width, LANES):
        loss = load(prices, j) - load_wide(scores, row + j)
        second = minimum(second, maximum(loss, least))
        chunk = select(loss < least, index, chunk)
        least = minimum(least, loss)
        index = index + one
    value = smallest(least)
    hit = least == splat(value)
    first = smallest(select(hit, chunk, infinite))
    lane = trailing_zeros(bits_of(hit & (chunk == splat(first))))
    column = np.int64(first) * LANES + lane
    if count_ones(bits_of(hit)) > 1:
        return value, value, column
    return value, smallest(minimum(second, select(hit, infinite, least))), column


@inner
def _free_column(scores: Any, row: int, width: int, prices: Any, loss: float, vacant: Any) -> int:
    """The first free column at which the row's loss is ``loss``, or -1."""
    wanted = splat(loss)
    for j in range(0, width, LANES):
        bits = bits_of(load(prices, j) - load_wide(scores, row + j) == wanted) & vacant[j // LANES]
        if bits != 0:
            return j + trailing_zeros(bits)
    return -1


@inner
def _copy(matrix: Any, dense: Any, width: int) -> bool:
    """Copy a matrix to the front of padded rows; whether it is finite."""
    m = len(matrix)
    # Numbers minus themselves are 0 unless they are NaN or infinite.
    doubt = dense.dtype.type(0)
    for i in range(m):
        source, line = matrix[i], dense[i * width : i * width + m]
        for j in range(m):
            line[j] = source[j]
        for j in range(0, m - LANES + 1, LANES):
            score = load_wide(line, j)
            if bits_of(score - score == score - score) != (1 << LANES) - 1:
                return False
        for j in range(m - m % LANES, m):
            doubt += line[j] - line[j]
    return doubt == 0


@inner
def _column_maxima(scores: Any, m: int, width: int, prices: Any, holder: Any) -> None:
    """``prices[j] = max_i A[i, j]``, and the first row that has it."""
    for j in range(0, width, LANES):
        store(prices, j, load_wide(scores, j))
        store(holder, j, splat(0.0))
    for i in range(1, m):
        row = splat(np.float64(i))
        for j in range(0, width, LANES):
            score, best = load_wide(scores, i * width + j), load(prices, j)
            better = score > best
            store(prices, j, select(better, score, best))
            store(holder, j, select(better, row, load(holder, j)))
    for j in range(m, width):
        prices[j] = 0.0  # padding: score -inf, so the loss is inf


@inner
def _take_maxima(
    scores: Any,
    m: int,
    width: int,
    prices: Any,
    holder: Any,
    row_of: Any,
    col_of: Any,
    vacant: Any,
    free: Any,
) -> int:
    """Give rows the columns they are the best of; list the others in ``free`` and return their number.

    A row that is the best of one column only pays for it as in a bid, which leaves the column less wanted.
    """
    columns = free  # how many columns each row is the best of
    for i in range(m):
        columns[i], col_of[i] = 0, -1
    for chunk in range(width // LANES):
        vacant[chunk] = 0
    for j in range(m - 1, -1, -1):
        i = np.int64(holder[j])
        if col_of[i] >= 0:
            row_of[col_of[i]] = -1
            vacant[col_of[i] // LANES] |= 1 << (col_of[i] % LANES)
        columns[i] += 1
        col_of[i], row_of[j] = j, i
    count = 0
    for i in range(m):
        if columns[i] == 1 and m > 1:
            least, second, column = _least_two(scores, i * width, width, prices)
            if column == col_of[i]:
                prices[column] += second - least
        elif columns[i] == 0:
            free[count] = i
            count += 1
    return count


@inner
def _bid(
    scores: Any,
    width: int,
    prices: Any,
    row_of: Any,
    col_of: Any,
    vacant: Any,
    free: Any,
    count: int,
    bids: int,
) -> int:
    """Let the listed rows bid; returns how many are still free, listed again."""
    left = 0
    for k in range(count):
        i = free[k]
        while i >= 0 and bids > 0:
            bids -= 1
            least, second, column = _least_two(scores, i * width, width, prices)
            raised = prices[column] + (second - least)
            if raised > prices[column]:
                prices[column] = raised
            else:
                column = _free_column(scores, i * width, width, prices, least, vacant)
                if column < 0:
                    break
            outbid = row_of[column]
            row_of[column], col_of[i] = i, column
            vacant[column // LANES] &= ~(1 << (column % LANES))
            if outbid >= 0:
                col_of[outbid] = -1
            i = outbid
        if i >= 0:
            free[left] = i
            left += 1
    return left


@inner
def _augment(
    scores: Any,
    start: int,
    width: int,
    prices: Any,
    row_of: Any,
    col_of: Any,
    vacant: Any,
    distance: Any,
    open_prices: Any,
    origin: Any,
    settled: Any,
    settled_distance: Any,
) -> None:
    """Give row ``start`` a column by the shortest path to a free one.

    ``origin[j]`` is the row from which column j is reached. A settled column leaves the search by an infinite
    distance and an infinite price in ``open_prices``.
    """
    infinite = splat(np.inf)
    least = infinite
    row = start * width
    source = splat(np.int64(start))
    for j in range(0, width, LANES):
        price = load(prices, j)
        reached = price - load_wide(scores, row + j)
        store(open_prices, j, price)
        store(distance, j, reached)
        store(origin, j, source)
        least = minimum(least, reached)
    count, sink = 0, -1
    nearest = 0.0
    while True:
        nearest = smallest(least)
        wanted = splat(nearest)
        column = -1
        for j in range(0, width, LANES):
            bits = bits_of(load(distance, j) == wanted)
            if bits != 0:
                if bits & vacant[j // LANES] != 0:
                    sink = j + trailing_zeros(bits & vacant[j // LANES])
                    break
                if column < 0:
                    column = j + trailing_zeros(bits)
        if sink >= 0:
            break
        i = row_of[column]
        row = i * width
        settled[count], settled_distance[count] = column, nearest
        count += 1
        distance[column], open_prices[column] = np.inf, np.inf
        shift = splat(nearest - (prices[column] - np.float64(scores[row + column])))
        source = splat(i)
        least = infinite
        for j in range(0, width, LANES):
            reached = load(open_prices, j) - load_wide(scores, row + j) + shift
            known = load(distance, j)
            better = reached < known
            known = select(better, reached, known)
            store(distance, j, known)
            store(origin, j, select(better, source, load(origin, j)))
            least = minimum(least, known)
    for k in range(count):
        prices[settled[k]] += max(0.0, nearest - settled_distance[k])
    vacant[sink // LANES] &= ~(1 << (sink % LANES))
    i, column = -1, sink
    while i != start:
        i = origin[column]
        previous = col_of[i]
        row_of[column], col_of[i] = i, column
        column = previous


@inner
def _certify(
    matrix: Any, m: int, prices: Any, col_of: Any, row_duals: Any, col_duals: Any, value: Any
) -> None:
    """Duals, and ``value[:]`` = objective, bound, sum of the absolute kept scores."""
    objective, bound, scale = 0.0, 0.0, 0.0
    for j in range(m):
        col_duals[j] = prices[j]
        bound += prices[j]
    for i in range(m):
        dual = -np.inf
        for j in range(m):
            dual = max(dual, np.float64(matrix[i, j]) - prices[j])
        row_duals[i] = dual
        bound += dual
        kept = np.float64(matrix[i, col_of[i]])
        objective += kept
        scale += abs(kept)
    value[0], value[1], value[2] = objective, max(objective, bound), scale


@compiled
def solve_assignments(
    scores: Any, permutations: Any, row_duals: Any, col_duals: Any, values: Any, first: int, last: int
) -> None:
    """Solve matrices ``first .. last`` of ``scores`` (B, M, M), float32 or float64 with any strides.

    ``permutations`` (B, M) int64 receives the column of each row, or -1 first if a score is not finite. Where
    they are not empty, ``row_duals`` and ``col_duals`` (B, M) and ``values`` (B, 3: objective, bound, scale)
    float64 receive the certificate.
    """
    m = scores.shape[1]
    width = -(-m // LANES) * LANES
    dense = np.full(m * width, -np.inf, scores.dtype)
    prices, holder = np.empty(width), np.empty(width)
    distance, open_prices = np.empty(width), np.empty(width)
    origin, settled, settled_distance = np.empty(width, np.int64), np.empty(m, np.int64), np.empty(m)
    row_of, col_of, free = np.empty(width, np.int64), np.empty(m, np.int64), np.empty(m, np.int64)
    vacant = np.empty(width // LANES, np.int64)
    for b in range(first, last):
        matrix = scores[b]
        if not _copy(matrix, dense, width):
            permutations[b, 0] = -1
            continue
        _column_maxima(dense, m, width, prices, holder)
        count = _take_maxima(dense, m, width, prices, holder, row_of, col_of, vacant, free)
        count = _bid(dense, width, prices, row_of, col_of, vacant, free, count, BIDS * m)
        for k in range(count):
            _augment(
                dense,
                free[k],
                width,
                prices,
                row_of,
                col_of,
                vacant,
                distance,
                open_prices,
                origin,
                settled,
                settled_distance,
            )
        for i in range(m):
            permutations[b, i] = col_of[i]
        if len(values) > 0:
            _certify(matrix, m, prices, col_of, row_duals[b], col_duals[b], values[b])
