r"""What groups of columns keep with any other column: sums of maxima over the rows.

With ``t[g, r]`` the N-th largest score of row r among the columns of group g, a further column j keeps

    F[g, j] = sum_r max(t[g, r], A[j, r])

up to a constant of g. Columns lie one behind the other, so that an order of them is a list of numbers and
nothing is moved. The inner loop is a product of matrices whose multiplication is a maximum: two by three sums
stay in registers, a few columns in the first cache. A chunk's sums are made in the type of the scores, and
added up in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nmsolve.backends.cpu._numba.compiled import compiled, inner
from nmsolve.backends.cpu._numba.lanes import WIDTH, maximum, minimum, splat, total
from nmsolve.backends.cpu._numba.memory import load, store

__all__ = ["BAND", "nth_largest", "sum_largest", "sum_maxima"]

BAND = 32
"""Groups of a problem that are worked on by one call."""

# Bytes of a column that are added up at a time, and columns that stay in the first cache.
_CHUNK = 4096
_KEPT = 6


@inner
def _insert(tops: Any, held: int, value: Any) -> Any:
    """Puts a register among the ``held`` largest so far, which descend; what falls out."""
    lanes = WIDTH // tops.itemsize
    for place in range(0, held * lanes, lanes):
        top = load(tops, place)
        store(tops, place, maximum(top, value))
        value = minimum(top, value)
    return value


@compiled
def nth_largest(columns: Any, groups: Any, n: int, out: Any, first: int, last: int) -> None:
    """``out[g]`` for groups ``first .. last``: the n-th largest of ``columns[groups[g]]``, row by row.

    ``columns`` is flat ``(C, R)`` with R a multiple of the lanes, ``groups`` ``(G, k)`` with ``k >= n``, and
    ``out`` flat ``(G, R)``.
    """
    lanes = WIDTH // columns.itemsize
    rows = len(out) // len(groups)
    tops = np.empty(n * lanes, columns.dtype)
    for g in range(first, last):
        for r in range(0, rows, lanes):
            for i in range(n):
                value = load(columns, groups[g, i] * rows + r)
                store(tops, i * lanes, _insert(tops, i, value))
            for i in range(n, groups.shape[1]):
                _insert(tops, n, load(columns, groups[g, i] * rows + r))
            store(out, g * rows + r, load(tops, (n - 1) * lanes))


@inner
def _tile(t: Any, t0: int, t1: int, a: Any, a0: int, a1: int, a2: int, count: int, sums: Any) -> None:
    """The sums of two groups with three columns each over ``count`` rows, from these places on."""
    lanes = WIDTH // t.itemsize
    x0 = x1 = x2 = y0 = y1 = y2 = splat(t.dtype.type(0))
    for r in range(0, count, lanes):
        x, y = load(t, t0 + r), load(t, t1 + r)
        p, q, w = load(a, a0 + r), load(a, a1 + r), load(a, a2 + r)
        x0, y0 = x0 + maximum(x, p), y0 + maximum(y, p)
        x1, y1 = x1 + maximum(x, q), y1 + maximum(y, q)
        x2, y2 = x2 + maximum(x, w), y2 + maximum(y, w)
    sums[0], sums[1], sums[2] = total(x0), total(x1), total(x2)
    sums[3], sums[4], sums[5] = total(y0), total(y1), total(y2)


@compiled
def sum_maxima(thresholds: Any, columns: Any, index: Any, out: Any, first: int, last: int) -> None:
    """``out[b, g, i]``: the sum over rows of the maxima of ``thresholds[b, g]`` and column ``index[b, i]``.

    ``thresholds`` is flat ``(B, G, R)``, ``columns`` flat ``(C, R)``, ``index`` ``(B, J)``, ``out`` float64
    ``(B, G, J)``; R is a multiple of the lanes. Parts ``first .. last`` are bands of a problem's groups.
    """
    batch, groups, width = out.shape
    rows = len(thresholds) // (batch * groups)
    bands = (groups + BAND - 1) // BAND
    chunk = _CHUNK // columns.itemsize
    sums = np.empty(6, np.float64)
    for part in range(first, last):
        b, band = divmod(part, bands)
        low, high = band * BAND, min(groups, (band + 1) * BAND)
        out[b, low:high] = 0.0
        for start in range(0, rows, chunk):
            count = min(chunk, rows - start)
            for left in range(0, width, _KEPT):
                for g in range(low, high, 2):
                    pair = min(2, high - g)
                    t0 = (b * groups + g) * rows + start
                    for j in range(left, min(left + _KEPT, width), 3):
                        some = min(3, width - j)
                        a0, a1, a2 = index[b, j], index[b, j + some // 2], index[b, j + some - 1]
                        if some == 2:
                            a1 = a2
                        _tile(
                            thresholds, t0, t0 + (pair - 1) * rows, columns,
                            a0 * rows + start, a1 * rows + start, a2 * rows + start, count, sums,
                        )  # fmt: skip
                        for i in range(pair):
                            for k in range(some):
                                out[b, g + i, j + k] += sums[3 * i + k]


@compiled
def sum_largest(
    columns: Any, members: Any, subsets: Any, n: int, rows: int, out: Any, first: int, last: int
) -> None:
    """``out[p, k]``: the sum over rows of the n largest of ``columns[members[p, subsets[k]]]``.

    ``columns`` is flat ``(C, R)`` with R = rows a multiple of the lanes, ``members`` ``(P, k)``, ``subsets``
    ``(K, m)`` with ``m >= n``, ``out`` float64 ``(P, K)``.
    """
    lanes = WIDTH // columns.itemsize
    count, m = subsets.shape
    chunk = _CHUNK // columns.itemsize
    here = np.empty(members.shape[1] * lanes, columns.dtype)
    tops, sums = np.empty(n * lanes, columns.dtype), np.empty(count * lanes, columns.dtype)
    for p in range(first, last):
        out[p] = 0.0
        for start in range(0, rows, chunk):
            sums[:] = 0
            for r in range(start, min(start + chunk, rows), lanes):
                for i in range(members.shape[1]):
                    store(here, i * lanes, load(columns, members[p, i] * rows + r))
                for k in range(count):
                    value = load(here, subsets[k, 0] * lanes)
                    store(tops, 0, value)
                    for i in range(1, n):
                        store(tops, i * lanes, _insert(tops, i, load(here, subsets[k, i] * lanes)))
                    for i in range(n, m):
                        _insert(tops, n, load(here, subsets[k, i] * lanes))
                    value = load(sums, k * lanes)
                    for i in range(n):
                        value = value + load(tops, i * lanes)
                    store(sums, k * lanes, value)
            for k in range(count):
                out[p, k] += total(load(sums, k * lanes))
