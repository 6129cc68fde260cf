"""The columns that a strip keeps of a group, by branch and bound.

A block is V rows of a strip by M columns of a group. Of K columns S that all its rows share, each row keeps
its N largest scores:

    f(S) = sum_r (the N largest of A[r, S]).

Three facts make the search short. Let ``t[r]`` be the N-th largest score of row r in S.

*Adding a column* j to N or more of them gains ``g_j = sum_r max(0, A[r, j] - t[r])``: one pass over a column.
As t only rises, gains only fall, so that k columns more are worth no more than the k largest gains now.

*Prices* u of the rows bound every choice, of any columns (Lagrange's relaxation of "a row keeps N"):

    f(S) <= N sum(u) + sum_{j in S} c_j,    c_j = sum_r max(0, A[r, j] - u[r]),

so that ``D(u) = N sum(u) + the K largest c_j`` bounds the best. The prices of an even choice do for the
search; where it ends early, subgradients with Polyak's step lower D(u).

*A good choice to beat*: the K largest c_j, and then exchanges of one column for another while any is better.

The first N columns are taken in the order of c, with the bound of the prices, and the others in the order of
their gains, with the bound of the gains. All sums are float64. The result depends on the block alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nmsolve.backends.cpu._numba.compiled import compiled, inner

__all__ = ["search_columns"]

# Sums may be reordered, so that they are made in vector registers.
_SUMS = {"reassoc", "nsz", "contract"}

# What is within rounding of the best choice so far is not searched for.
_ROUNDING = 1e-13

# Steps that lower D(u) where the search ended early, for each column of a group.
_STEPS = 8


@inner(fastmath=_SUMS)
def _gain(column: Any, least: Any) -> float:
    """``sum_r max(0, A[r, j] - t[r])``."""
    total = 0.0
    for r in range(len(column)):
        total += max(column[r] - least[r], 0.0)
    return total


@inner(fastmath=_SUMS)
def _total(values: Any) -> float:
    total = 0.0
    for value in values:
        total += value
    return total


@inner
def _take(column: Any, before: Any, after: Any) -> None:
    """The largest scores of the rows, in descending order ``(N, V)``, with one column more."""
    for r in range(len(column)):
        value = column[r]
        for i in range(len(before)):
            top = before[i, r]
            after[i, r] = max(top, value)
            value = min(top, value)


@inner
def _copy(source: Any, target: Any, count: int) -> None:
    """``target[:count] = source[:count]``; NumPy's way brings the formatting of its errors with it."""
    for i in range(count):
        target[i] = source[i]


@inner
def _order(values: Any, index: Any, count: int) -> None:
    """Sorts ``index[:count]`` by descending value; ties stay in their order."""
    for i in range(1, count):
        held = index[i]
        j = i - 1
        while j >= 0 and values[index[j]] < values[held]:
            index[j + 1] = index[j]
            j -= 1
        index[j + 1] = held


@inner
def _kept(columns: Any, chosen: Any, tops: Any) -> float:
    """f(S); ``tops`` are two ``(N, V)``, and hold the rows' largest scores of S in the first."""
    tops[0] = -np.inf
    for j in chosen:
        _take(columns[j], tops[0], tops[0])
    total = 0.0
    for i in range(tops.shape[1]):
        total += _total(tops[0, i])
    return total


@inner
def _exchange(columns: Any, chosen: Any, tops: Any, used: Any) -> float:
    """Exchanges one column for another while any is better; f(S) of the last."""
    k, m = len(chosen), len(columns)
    n = tops.shape[1]
    best = _kept(columns, chosen, tops)
    while True:
        out, into, found = -1, -1, best + _ROUNDING * abs(best)
        used[:] = False
        for j in chosen:
            used[j] = True
        for i in range(k):
            tops[0] = -np.inf
            for other in range(k):
                if other != i:
                    _take(columns[chosen[other]], tops[0], tops[0])
            rest = 0.0
            for line in range(n):
                rest += _total(tops[0, line])
            for j in range(m):
                if not used[j]:
                    value = rest + _gain(columns[j], tops[0, n - 1])
                    if value > found:
                        out, into, found = i, j, value
        if out < 0:
            return best
        chosen[out] = into
        # The sum anew: differences of large scores do not add up.
        value = _kept(columns, chosen, tops)
        if value <= best:
            return best
        best = value


@inner
def _first_prices(columns: Any, place: int, tops: Any, prices: Any) -> None:
    """The mean of each row's scores number ``place`` and ``place + 1``; ``tops`` is ``(place + 1, V)``."""
    tops[:] = -np.inf
    for column in columns:
        _take(column, tops, tops)
    for r in range(len(prices)):
        prices[r] = 0.5 * tops[place - 1, r] + 0.5 * tops[place, r]


@inner
def _lowered(columns: Any, n: int, k: int, best: float, prices: Any, worth: Any, order: Any) -> float:
    """D(u), lowered from the prices u that are there; changes all but the columns."""
    m, v = columns.shape
    trial, short = prices.copy(), np.empty(v)
    bound, factor, waited = np.inf, 1.0, 0
    for _ in range(_STEPS * m):
        value = n * _total(trial)
        for j in range(m):
            worth[j] = _gain(columns[j], trial)
            order[j] = j
        _order(worth, order, m)
        for i in range(k):
            value += worth[order[i]]
        if value < bound:
            bound, waited = value, 0
            _copy(trial, prices, v)
        else:
            waited += 1
            if waited == 4:
                # Back to the best prices with half the step.
                factor, waited = factor / 2, 0
                _copy(prices, trial, v)
                continue
        if bound <= best + _ROUNDING * abs(best):
            break
        short[:] = n
        for i in range(k):
            column = columns[order[i]]
            for r in range(v):
                short[r] -= 1.0 if column[r] > trial[r] else 0.0
        size = 0.0
        for r in range(v):
            size += short[r] * short[r]
        if size == 0.0:
            break
        length = factor * (value - best) / size
        for r in range(v):
            trial[r] -= length * short[r]
    return bound


@compiled
def search_columns(blocks: Any, n: int, limit: int, chosen: Any, bounds: Any, first: int, last: int) -> None:
    """``chosen`` ``(B, K)``, ascending, of the blocks ``(B, M, V)`` numbered ``first`` to ``last``.

    ``0 < n < K < M``. ``bounds`` ``(B,)`` is -inf where the choice is proven to be the best, and else what
    the best keeps at most. The search of a block ends after ``limit`` passes over columns; 0 is exchanges
    alone.
    """
    _, m, v = blocks.shape
    k = chosen.shape[1]
    # Of an even choice a row would keep this many, each with a weight of K / M.
    even = min(m - 1, max(1, n * m // k))
    many = np.empty((even + 1, v))
    tops = np.empty((k + 1, n, v))
    prices, worth = np.empty(v), np.empty(m)
    order = np.empty(m, np.int64)
    picked = np.empty(k, np.int64)
    path = np.empty(k, np.int64)
    used = np.empty(m, np.bool_)
    # For each depth of the search: candidates that are left, in order; where it is; what is kept so far.
    left = np.empty((k + 1, m), np.int64)
    count = np.empty(k + 1, np.int64)
    place = np.empty(k + 1, np.int64)
    gains = np.empty((k + 1, m))
    kept = np.empty(k + 1)
    paid = np.empty(k + 1)
    for block in range(first, last):
        columns, best_set = blocks[block], chosen[block]

        # A choice to beat.
        for j in range(m):
            worth[j] = _total(columns[j])
            order[j] = j
        _order(worth, order, m)
        _copy(order, best_set, k)
        best = _exchange(columns, best_set, tops, used)

        # Prices, and the choice that they make.
        _first_prices(columns, even, many, prices)
        for j in range(m):
            worth[j] = _gain(columns[j], prices)
            order[j] = j
        _order(worth, order, m)
        _copy(order, picked, k)
        value = _exchange(columns, picked, tops, used)
        if value > best:
            best = value
            _copy(picked, best_set, k)

        # The search. A depth below n takes columns in the order of c, the others in that of their gains.
        passes = 0 if limit else 1
        depth = 0
        _copy(order, left[0], m)
        count[0], place[0] = m, 0
        tops[0] = -np.inf
        kept[0] = 0.0
        paid[0] = n * _total(prices)
        while depth >= 0 and passes <= limit:
            need = k - depth
            at = place[depth]
            floor = best + _ROUNDING * abs(best)
            if at + need > count[depth]:
                depth -= 1
                continue
            reach = paid[depth] if depth < n else kept[depth]
            for i in range(at, at + need):
                j = left[depth, i]
                reach += worth[j] if depth < n else gains[depth, j]
            if reach <= floor:
                depth -= 1
                continue
            if need == 1:
                # The first candidate is the best one.
                path[depth] = left[depth, at]
                value = _kept(columns, path, tops[depth:])
                if value > best:
                    best = value
                    _copy(path, best_set, k)
                depth -= 1
                continue
            j = left[depth, at]
            path[depth] = j
            place[depth] = at + 1
            _take(columns[j], tops[depth], tops[depth + 1])
            rest = count[depth] - at - 1
            _copy(left[depth, at + 1 :], left[depth + 1], rest)
            count[depth + 1], place[depth + 1] = rest, 0
            paid[depth + 1] = paid[depth] + worth[j]
            passes += 1
            depth += 1
            if depth >= n:
                if depth == n:
                    kept[depth] = 0.0
                    for i in range(n):
                        kept[depth] += _total(tops[depth, i])
                else:
                    kept[depth] = kept[depth - 1] + gains[depth - 1, j]
                for i in range(rest):
                    other = left[depth, i]
                    gains[depth, other] = _gain(columns[other], tops[depth, n - 1])
                passes += rest
                _order(gains[depth], left[depth], rest)
        used[:] = False
        for j in best_set:
            used[j] = True
        i = 0
        for j in range(m):
            if used[j]:
                best_set[i] = j
                i += 1
        bounds[block] = -np.inf
        # Sums of scores that cancel prove no more than their rounding allows.
        error = 0.0
        for r in range(v):
            largest = 0.0
            for j in range(m):
                largest = max(largest, abs(columns[j, r]))
            error += largest
        error *= 2.0**-50 * (k + 2)
        if error > 1e-12 * abs(best):
            bounds[block] = best + error
        if depth >= 0:
            bound = _lowered(columns, n, k, best, prices, worth, order)
            if bound > best + _ROUNDING * abs(best):
                bounds[block] = bound
