r"""What blocks with a transposable mask keep with any other column, by exchanges between their rows.

:func:`nmsolve.backends.shared.exchange_values` has the mathematics. A lane holds a block; blocks of one group
of columns lie one behind the other, and so do the values of one subset of rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nmsolve.backends.cpu._numba.compiled import compiled, inner
from nmsolve.backends.cpu._numba.lanes import WIDTH, maximum, select, splat, total
from nmsolve.backends.cpu._numba.memory import load, store
from nmsolve.backends.cpu._numba.scratch import buffer, scratch, still_needed

__all__ = ["BAND", "exchange_values", "subset_sums", "sum_best"]

BAND = 8
"""Groups of a problem that are worked on by one call."""

# Blocks that are added up at a time, in bytes of one value.
_CHUNK = 512

# More than any path of exchanges gains, and far from the largest float32.
_FAR = 1e30


@inner
def _paths(x: Any, kept: Any, lines: Any, slot: int, m: int, place: int, blocks: int, out: Any) -> None:
    """``D`` of :func:`exchange_values` for a register of blocks, entry (i, k) at ``(i m + k) lanes``."""
    lanes = WIDTH // x.itemsize
    half, far = splat(x.dtype.type(0.5)), splat(x.dtype.type(-_FAR))
    zero = splat(x.dtype.type(0))
    for i in range(m * m):
        store(out, i * lanes, far)
    for c in range(m):
        if c == slot:
            continue
        first = lines[c] * m * blocks + place
        for i in range(m):
            held = load(kept, first + i * blocks) > half
            loses = select(held, zero - load(x, first + i * blocks), far)
            for k in range(m):
                free = load(kept, first + k * blocks) < half
                gains = select(free, load(x, first + k * blocks), far)
                at = (i * m + k) * lanes
                store(out, at, maximum(load(out, at), loses + gains))
    for i in range(m):
        store(out, (i * m + i) * lanes, zero)
    for via in range(m):
        for i in range(m):
            start = load(out, (i * m + via) * lanes)
            for k in range(m):
                at = (i * m + k) * lanes
                store(out, at, maximum(load(out, at), start + load(out, (via * m + k) * lanes)))


@compiled
def exchange_values(
    x: Any, kept: Any, groups: Any, slot: int, steps: Any, out: Any, first: int, last: int
) -> None:
    """``out[g, k, b]`` for groups ``first .. last``; see :func:`nmsolve.backends.shared.exchange_values`.

    ``x`` and ``kept`` are flat ``(C, m, B)`` with B a multiple of the lanes, ``groups`` ``(G, m)``, ``out``
    ``(G, K, B)``. ``steps`` are ``(T, 4)``: with one row more (its number last), the subset of the third
    number becomes that of the second, of as many rows as the first says and one.
    """
    lanes = WIDTH // x.itemsize
    m, (subsets, blocks) = groups.shape[1], out.shape[1:]
    n = steps[-1, 0] + 1
    most = steps[:, 1].max() + 1
    flat = out.reshape(-1)
    memory = buffer((m * m + m * n + 2 * most) * WIDTH)
    paths = scratch(memory, x.dtype.type(0))
    ends = paths + m * m * lanes
    sums = ends + m * n * lanes
    half, zero, unit = splat(x.dtype.type(0.5)), splat(x.dtype.type(0)), splat(x.dtype.type(1))
    far = splat(x.dtype.type(-_FAR * 64))
    for g in range(first, last):
        for place in range(0, blocks, lanes):
            _paths(x, kept, groups[g], slot, m, place, blocks, paths)
            for i in range(m * n):
                store(ends, i * lanes, zero)
            rank = zero
            for k in range(m):
                held = load(kept, (groups[g, slot] * m + k) * blocks + place) > half
                for q in range(n):
                    hit = held & (rank == splat(x.dtype.type(q)))
                    for i in range(m):
                        at = (i * n + q) * lanes
                        store(ends, at, select(hit, load(paths, (i * m + k) * lanes), load(ends, at)))
                rank = rank + select(held, unit, zero)
            for t in range(len(steps)):
                q, target, parent, row = steps[t, 0], steps[t, 1], steps[t, 2], steps[t, 3]
                value = load(ends, (row * n + q) * lanes)
                if q > 0:
                    value = value + load(sums, ((q - 1) % 2 * most + parent) * lanes)
                at = (q % 2 * most + target) * lanes
                if t == 0 or steps[t - 1, 1] != target or steps[t - 1, 0] != q:
                    store(sums, at, far)
                store(sums, at, maximum(load(sums, at), value))
            for k in range(subsets):
                store(flat, (g * subsets + k) * blocks + place, load(sums, ((n - 1) % 2 * most + k) * lanes))
    still_needed(memory)


@compiled
def subset_sums(x: Any, index: Any, subsets: Any, out: Any, first: int, last: int) -> None:
    """``out[j, k, b]`` for columns ``first .. last``: the sum of a column's rows in subset k of block b.

    ``x`` is flat ``(C, m, B)``, ``index`` the place where each column begins, ``subsets`` ``(K, n)``, ``out``
    ``(J, K, B)``.
    """
    lanes = WIDTH // x.itemsize
    count, blocks = out.shape[1:]
    flat = out.reshape(-1)
    for j in range(first, last):
        start = index[j]
        for k in range(count):
            for place in range(0, blocks, lanes):
                value = load(x, start + subsets[k, 0] * blocks + place)
                for i in range(1, subsets.shape[1]):
                    value = value + load(x, start + subsets[k, i] * blocks + place)
                store(flat, (j * count + k) * blocks + place, value)


@inner
def _tile(
    v: Any, v0: int, v1: int, a: Any, a0: int, a1: int, subsets: int, blocks: int, count: int, sums: Any
) -> None:
    """The sums of two groups with two columns over ``count`` blocks, from these places on."""
    lanes = WIDTH // v.itemsize
    s00 = s01 = s10 = s11 = splat(v.dtype.type(0))
    for place in range(0, count, lanes):
        x, y, p, q = load(v, v0 + place), load(v, v1 + place), load(a, a0 + place), load(a, a1 + place)
        b00, b01, b10, b11 = x + p, x + q, y + p, y + q
        for at in range(place + blocks, place + subsets * blocks, blocks):
            x, y, p, q = load(v, v0 + at), load(v, v1 + at), load(a, a0 + at), load(a, a1 + at)
            b00, b01 = maximum(b00, x + p), maximum(b01, x + q)
            b10, b11 = maximum(b10, y + p), maximum(b11, y + q)
        s00, s01, s10, s11 = s00 + b00, s01 + b01, s10 + b10, s11 + b11
    sums[0], sums[1], sums[2], sums[3] = total(s00), total(s01), total(s10), total(s11)


@compiled
def sum_best(values: Any, moved: Any, out: Any, first: int, last: int) -> None:
    """``out[g, j] = sum_b max_k (values[g, k, b] + moved[j, k, b])``, float64 ``(G, J)``.

    ``values`` is ``(G, K, B)``, ``moved`` ``(J, K, B)``, B a multiple of the lanes. Parts ``first .. last``
    are bands of groups.
    """
    groups, subsets, blocks = values.shape
    width = len(moved)
    v, a = values.reshape(-1), moved.reshape(-1)
    chunk = _CHUNK // values.itemsize
    size = subsets * blocks
    sums = np.empty(4, np.float64)
    for band in range(first, last):
        low, high = band * BAND, min(groups, (band + 1) * BAND)
        out[low:high] = 0.0
        for start in range(0, blocks, chunk):
            count = min(chunk, blocks - start)
            for j in range(0, width, 2):
                across = min(2, width - j)
                a0, a1 = j * size + start, (j + across - 1) * size + start
                for g in range(low, high, 2):
                    down = min(2, high - g)
                    v0, v1 = g * size + start, (g + down - 1) * size + start
                    _tile(v, v0, v1, a, a0, a1, subsets, blocks, count, sums)
                    for i in range(down):
                        for k in range(across):
                            out[g + i, j + k] += sums[2 * i + k]
