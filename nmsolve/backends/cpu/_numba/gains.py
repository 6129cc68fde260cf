r"""What groups of columns gain with any other column, where masks go by one number and gains by another.

With ``t[g, r]`` the N-th largest score of row r among the columns of group g, and ``h[g, r]`` the value of
that entry, a further column j takes its place in the rows where its score is larger:

    F[g, j] = sum_r [A[j, r] > t[g, r]] (V[j, r] - h[g, r]).

With the scores for values these are the sums of maxima of :mod:`nmsolve.backends.cpu._numba.maxima`, up to a
constant of g; the loops are theirs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nmsolve.backends.cpu._numba.compiled import compiled, inner
from nmsolve.backends.cpu._numba.lanes import WIDTH, select, splat, total
from nmsolve.backends.cpu._numba.memory import load, store

__all__ = ["BAND", "nth_largest_of", "sum_gains"]

BAND = 32
"""Groups of a problem that are worked on by one call."""

# Bytes of a column that are added up at a time.
_CHUNK = 4096


@inner
def _insert(tops: Any, worths: Any, held: int, score: Any, value: Any) -> None:
    """Puts a register of scores, and their values, among the ``held`` largest so far, which descend."""
    lanes = WIDTH // tops.itemsize
    larger = score > score
    for place in range(0, held * lanes, lanes):
        top, worth = load(tops, place), load(worths, place)
        larger = larger | (score > top)  # what was pushed down goes before what equals it
        store(tops, place, select(larger, score, top))
        store(worths, place, select(larger, value, worth))
        score, value = select(larger, top, score), select(larger, worth, value)


@compiled
def nth_largest_of(
    columns: Any, values: Any, groups: Any, n: int, out: Any, out_values: Any, first: int, last: int
) -> None:
    """``out[g]`` for groups ``first .. last``: the n-th largest of ``columns[groups[g]]``, row by row, and in
    ``out_values`` what ``values`` has there. Of equal ones the first in the group counts as larger.

    ``columns`` and ``values`` are flat ``(C, R)`` with R a multiple of the lanes, ``groups`` ``(G, k)`` with
    ``k >= n``, ``out`` and ``out_values`` flat ``(G, R)``.
    """
    lanes = WIDTH // columns.itemsize
    rows = len(out) // len(groups)
    tops, worths = np.empty(n * lanes, columns.dtype), np.empty(n * lanes, columns.dtype)
    lowest, nothing = splat(columns.dtype.type(-np.inf)), splat(columns.dtype.type(0))
    for g in range(first, last):
        for r in range(0, rows, lanes):
            for place in range(0, n * lanes, lanes):
                store(tops, place, lowest)
                store(worths, place, nothing)
            for i in range(groups.shape[1]):
                at = groups[g, i] * rows + r
                _insert(tops, worths, n, load(columns, at), load(values, at))
            store(out, g * rows + r, load(tops, (n - 1) * lanes))
            store(out_values, g * rows + r, load(worths, (n - 1) * lanes))


@inner
def _tile(t: Any, h: Any, t0: int, t1: int, a: Any, v: Any, a0: int, a1: int, count: int, sums: Any) -> None:
    """The sums of two groups with two columns each over ``count`` rows, from these places on."""
    lanes = WIDTH // t.itemsize
    none = splat(t.dtype.type(0))
    x0 = x1 = y0 = y1 = none
    for r in range(0, count, lanes):
        p, q = load(a, a0 + r), load(a, a1 + r)
        f, g = load(v, a0 + r), load(v, a1 + r)
        x, held = load(t, t0 + r), load(h, t0 + r)
        x0, x1 = x0 + select(p > x, f - held, none), x1 + select(q > x, g - held, none)
        x, held = load(t, t1 + r), load(h, t1 + r)
        y0, y1 = y0 + select(p > x, f - held, none), y1 + select(q > x, g - held, none)
    sums[0], sums[1], sums[2], sums[3] = total(x0), total(x1), total(y0), total(y1)


@compiled
def sum_gains(
    thresholds: Any, held: Any, columns: Any, values: Any, index: Any, out: Any, first: int, last: int
) -> None:
    """``out[b, g, i]``: what column ``index[b, i]`` gains in group g of problem b; see the module.

    ``thresholds`` and ``held`` are flat ``(B, G, R)``, ``columns`` and ``values`` flat ``(C, R)``, ``index``
    ``(B, J)``, ``out`` float64 ``(B, G, J)``; R is a multiple of the lanes. Parts ``first .. last`` are bands
    of a problem's groups.
    """
    batch, groups, width = out.shape
    rows = len(thresholds) // (batch * groups)
    bands = (groups + BAND - 1) // BAND
    chunk = _CHUNK // columns.itemsize
    sums = np.empty(4, np.float64)
    for part in range(first, last):
        b, band = divmod(part, bands)
        low, high = band * BAND, min(groups, (band + 1) * BAND)
        out[b, low:high] = 0.0
        for start in range(0, rows, chunk):
            count = min(chunk, rows - start)
            for j in range(0, width, 2):
                some = min(2, width - j)
                a0, a1 = index[b, j] * rows + start, index[b, j + some - 1] * rows + start
                for g in range(low, high, 2):
                    pair = min(2, high - g)
                    t0 = (b * groups + g) * rows + start
                    t1 = t0 + (pair - 1) * rows
                    _tile(thresholds, held, t0, t1, columns, values, a0, a1, count, sums)
                    for i in range(pair):
                        for k in range(some):
                            out[b, g + i, j + k] += sums[2 * i + k]
