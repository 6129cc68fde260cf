"""The exact method on a region: 64 bytes of blocks side by side from load to store.

What bounds it: the ascent, by the throughput of the vector units. Its two inner loops (:mod:`.ascent`) are
six arithmetic instructions per entry, half-sweep and register, with all operands in the first-level cache
for the four rows at hand; memory bandwidth and the divisions hide behind them. The augmenting paths come
second, and their share grows with M: there are more of them, and each looks at more lines. They wait for
latency, one line's labels after another's. More sweeps would save paths and cost about as much, which is why
the time hardly depends on their number around ``schedule.SWEEPS``. Ties cost most: lines tied at their
threshold stay unbalanced however good the duals are, and only paths can settle them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from nmsolve.backends.ascent_schedule import WARM_LIMIT
from nmsolve.backends.cpu._numba.ascent import ascend, normalise, start
from nmsolve.backends.cpu._numba.augment import augment, part
from nmsolve.backends.cpu._numba.compiled import compiled, inner
from nmsolve.backends.cpu._numba.lanes import WIDTH, bits_of, lane_mask, maximum, minimum, select, splat
from nmsolve.backends.cpu._numba.memory import load, load_wide, peek, poke, store
from nmsolve.backends.cpu._numba.scratch import buffer, retyped, scratch, still_needed
from nmsolve.backends.cpu._numba.tiles import (
    WORD,
    Region,
    load_tile,
    place_lanes,
    words_for,
    write_flags,
)

__all__ = ["Certificate", "Request", "solve_exact"]


class Request(NamedTuple):
    """What is asked of a region, and the addresses of duals to start from, 0 where none are given."""

    n: int
    m: int
    sweeps: int
    warm_row_duals: int
    warm_col_duals: int

    def flipped(self) -> Request:
        """The same request with rows and columns exchanged."""
        return self._replace(warm_row_duals=self.warm_col_duals, warm_col_duals=self.warm_row_duals)


class Certificate(NamedTuple):
    """Where to write what proves the masks: duals, and the objective and bound that follow from them."""

    row_duals: int
    col_duals: int
    objective: int
    bound: int

    def flipped(self) -> Certificate:
        """The same places with rows and columns exchanged."""
        return self._replace(row_duals=self.col_duals, col_duals=self.row_duals)


@inner
def _read_duals(address: int, m: int, lines: int, places: Any, scale: Any, duals: Any) -> None:
    """Read the lanes' warm duals of one side, in the tile's scale and within ``WARM_LIMIT``."""
    lanes = WIDTH // duals.itemsize
    like = duals.dtype.type(0)
    low, high = splat(duals.dtype.type(-WARM_LIMIT)), splat(duals.dtype.type(WARM_LIMIT))
    for i in range(lines):
        for k in range(lanes):
            duals[i * lanes + k] = peek(address + (places[2 * lanes + k] * m + i) * duals.itemsize, like)
        store(duals, i * lanes, minimum(maximum(load(duals, i * lanes) * scale, low), high))


@inner
def _extreme_duals(tile: Any, pitch: int, rows: int, cols: int, keep_all: bool, u: Any, v: Any) -> None:
    """The duals of a block that keeps all of every row (its smallest score) or none (its largest)."""
    lanes = WIDTH // tile.itemsize
    for i in range(rows):
        dual = load(tile, i * pitch * lanes)
        for j in range(1, cols):
            score = load(tile, (i * pitch + j) * lanes)
            dual = minimum(dual, score) if keep_all else maximum(dual, score)
        store(u, i * lanes, dual)
    for j in range(cols):
        store(v, j * lanes, splat(tile.dtype.type(0)))


@inner
def _anchor(lines: int, u: Any, v: Any) -> None:
    """Shift the prices of square blocks so that the lowest column's is 0.

    ``u + t``, ``v - t`` prices every entry alike; the smaller the prices, the finer they are in floats.
    """
    lanes = WIDTH // u.itemsize
    lowest = load(v, 0)
    for j in range(1, lines):
        lowest = minimum(lowest, load(v, j * lanes))
    for i in range(lines):
        store(u, i * lanes, load(u, i * lanes) + lowest)
        store(v, i * lanes, load(v, i * lanes) - lowest)


@inner
def _round(
    tile: Any,
    pitch: int,
    rows: int,
    cols: int,
    row_target: int,
    col_target: int,
    u: Any,
    v: Any,
    words: Any,
    row_excess: Any,
    col_excess: Any,
) -> int:
    """``S = [A - u - v > 0]`` as words, and what its lines hold beyond their targets.

    Returns the lanes whose block is not balanced yet, as bits.
    """
    real, integer = tile.dtype.type, words.dtype.type
    lanes = WIDTH // tile.itemsize
    per_row = words_for(cols)
    none, unit, zero = splat(integer(0)), splat(integer(1)), splat(real(0))
    row_goal, col_goal = splat(integer(row_target)), splat(integer(col_target))
    wrong = lane_mask(0, zero)
    for j in range(cols):
        store(col_excess, j * lanes, none - col_goal)
    for i in range(rows):
        dual = load(u, i * lanes)
        held = none - row_goal
        for w in range(per_row):
            word, bit = none, unit
            for j in range(w * WORD, minimum(cols, (w + 1) * WORD)):
                score = load(tile, (i * pitch + j) * lanes)
                positive = ((score - dual) - load(v, j * lanes)) > zero
                word = select(positive, word | bit, word)
                bit = bit + bit
                held = select(positive, held + unit, held)
                count = load(col_excess, j * lanes)
                store(col_excess, j * lanes, select(positive, count + unit, count))
            store(words, (i * per_row + w) * lanes, word)
        store(row_excess, i * lanes, held)
        wrong = wrong | (held != none)
    for j in range(cols):
        over = load(col_excess, j * lanes)
        if rows < cols:
            loose = (over < none) & (load(v, j * lanes) > zero)
            wrong = wrong | (over > none) | loose
        else:
            wrong = wrong | (over != none)
    return bits_of(wrong)


@inner
def _in_own_scale(lines: int, scales: Any, duals: Any) -> None:
    """Bring the lanes' duals of one side from the tile's scale to that of the scores."""
    lanes = WIDTH // duals.itemsize
    inverse = splat(duals.dtype.type(1)) / load(scales, 0)
    for i in range(lines):
        store(duals, i * lanes, load(duals, i * lanes) * inverse)


@inner
def _write_duals(address: int, m: int, lines: int, block: int, lane: int, duals: Any) -> None:
    lanes = WIDTH // duals.itemsize
    for i in range(lines):
        poke(address + (block * m + i) * duals.itemsize, duals[i * lanes + lane])


@inner
def _raise_price(
    row: int,
    cols: int,
    row_target: int,
    tile: Any,
    pitch: int,
    lane: int,
    factor: float,
    excess: float,
    paid: float,
    u: Any,
    v: Any,
) -> float:
    """What a row pays over its price, once that is raised by the excess where the bound gains by it.

    Rounding has left free entries above their price; with N far below M they would cost more than that.
    """
    lanes = WIDTH // tile.itemsize
    price = np.float64(u[row * lanes + lane])
    raised = tile.dtype.type(price + excess)
    if np.float64(raised) < price + excess:
        raised = np.nextafter(raised, tile.dtype.type(np.inf))
    less = 0.0
    for j in range(cols):
        score = np.float64(tile[(row * pitch + j) * lanes + lane]) * factor
        less += maximum(0.0, score - np.float64(raised) - np.float64(v[j * lanes + lane]))
    if row_target * (np.float64(raised) - price) + less < paid:
        u[row * lanes + lane] = raised
        return less
    return paid


@inner
def _certify(
    rows: int,
    cols: int,
    row_target: int,
    col_target: int,
    first: int,
    tile: Any,
    pitch: int,
    scales: Any,
    u: Any,
    v: Any,
    words: Any,
    sums: Any,
) -> None:
    """Objective and bound of lanes ``first .. first + 8``, to ``sums[0]`` and ``sums[8]``, in float64.

    The duals are in the scores' own scale; where a row's price had better be raised, it is.
    """
    lanes = WIDTH // tile.itemsize
    per_row = words_for(cols)
    zero, none = splat(0.0), splat(np.int64(0))
    # The inverse is that of the work type: duals and scores are scaled alike.
    for k in range(8):
        sums[k] = np.float64(tile.dtype.type(1) / scales[first + k])
    factor = load_wide(sums, 0)
    sum_u, sum_v, objective, surplus = zero, zero, zero, zero
    for j in range(cols):
        sum_v = sum_v + load_wide(v, j * lanes + first)
    for i in range(rows):
        price = load_wide(u, i * lanes + first)
        excess, paid = zero, zero
        for w in range(per_row):
            word = load_wide(words, (i * per_row + w) * lanes + first)
            bit = splat(np.int64(1))
            for j in range(w * WORD, minimum(cols, (w + 1) * WORD)):
                score = load_wide(tile, (i * pitch + j) * lanes + first) * factor
                over = maximum(zero, score - price - load_wide(v, j * lanes + first))
                kept = (word & bit) != none
                bit = bit + bit
                objective = select(kept, objective + score, objective)
                excess = select(kept, excess, maximum(excess, over))
                paid = paid + over
        wrong = bits_of(excess > zero)
        if wrong != 0:
            store(sums, 8, excess)
            store(sums, 16, paid)
            for k in range(8):
                if (wrong >> k) & 1:
                    sums[16 + k] = _raise_price(
                        i, cols, row_target, tile, pitch, first + k, sums[k], sums[8 + k], sums[16 + k], u, v
                    )
            paid = load_wide(sums, 16)
        sum_u = sum_u + load_wide(u, i * lanes + first)
        surplus = surplus + paid
    bound = splat(np.float64(row_target)) * sum_u + splat(np.float64(col_target)) * sum_v + surplus
    store(sums, 0, objective)
    store(sums, 8, bound)


@inner
def _write_certificates(
    region: Region,
    m: int,
    certificate: Certificate,
    places: Any,
    used: int,
    tile: Any,
    pitch: int,
    row_target: int,
    col_target: int,
    scales: Any,
    u: Any,
    v: Any,
    words: Any,
    sums: Any,
) -> None:
    """Duals of the lanes in the scores' own scale, and the objective and bound that follow from them."""
    rows, cols = region.rows, region.cols
    lanes = WIDTH // tile.itemsize
    _in_own_scale(rows, scales, u)
    _in_own_scale(cols, scales, v)
    for first in range(0, lanes, 8):
        _certify(rows, cols, row_target, col_target, first, tile, pitch, scales, u, v, words, sums)
        for lane in range(first, minimum(used, first + 8)):
            block = places[2 * lanes + lane]
            poke(certificate.objective + block * 8, sums[lane - first])
            poke(certificate.bound + block * 8, sums[8 + lane - first])
    for lane in range(used):
        block = places[2 * lanes + lane]
        _write_duals(certificate.row_duals, m, rows, block, lane, u)
        _write_duals(certificate.col_duals, m, cols, block, lane, v)


@compiled
def solve_exact(
    region: Region,
    request: Request,
    certificate: Certificate | None,
    reals: Any,
    ints: Any,
    first: int,
    last: int,
) -> int:
    """Solve groups ``first .. last`` of as many blocks as there are lanes; returns the number of paths.

    ``reals`` and ``ints`` are empty arrays of the work type and of the integer type of its width. Without a
    certificate nothing is compiled that would write one.
    """
    real, integer = reals.dtype.type, ints.dtype.type
    lanes = WIDTH // reals.itemsize
    rows, cols = region.rows, region.cols
    row_target, col_target = minimum(request.n, cols), request.n
    if rows == cols:
        col_target = row_target
    pitch = cols + 1
    padded = (rows + 3) // 4 * 4
    per_row = words_for(cols)
    room = (maximum(rows + 1, cols) + lanes - 1) // lanes * lanes
    lines = rows + 1 if rows < cols else rows
    # Rows that are not there are read, and ignored, when the tile is parted.
    tile_size = maximum(padded, room) * pitch * lanes
    row_room, col_room = (lines + lanes - 1) // lanes * lanes, (cols + lanes - 1) // lanes * lanes
    parts = lanes * room * maximum(lines, cols)
    room_reals = tile_size + (padded + 4 * cols + 1) * lanes + 4 * room + 2 * parts
    room_ints = (rows + cols + rows * per_row) * lanes + (5 + per_row) * room
    memory = buffer((room_reals + room_ints) * reals.itemsize + (2 * room + 3 * lanes + 24) * 8)
    tile = scratch(memory, real(0))
    u = tile + tile_size
    v = u + padded * lanes
    sums = v + cols * lanes
    counts = sums + 2 * cols * lanes
    scales = counts + cols * lanes
    numbers = scales + lanes
    by_row = numbers + 4 * room
    by_col = by_row + parts
    words = retyped(tile + room_reals, integer(0))
    row_excess = words + rows * per_row * lanes
    col_excess = row_excess + rows * lanes
    integers = col_excess + cols * lanes
    active = retyped(words + room_ints, np.int64(0))
    places = active + 2 * room
    certified = retyped(places + 3 * lanes, 0.0)
    trivial = row_target == 0 or row_target == cols
    paths = 0
    for group in range(first, last):
        used = place_lanes(region, group * lanes, lanes, places)
        load_tile(region, places, tile, pitch)
        scale = normalise(tile, pitch, rows, cols)
        store(scales, 0, scale)
        if trivial:
            _extreme_duals(tile, pitch, rows, cols, row_target > 0, u, v)
        elif request.warm_row_duals != 0:
            _read_duals(request.warm_row_duals, request.m, rows, places, scale, u)
            _read_duals(request.warm_col_duals, request.m, cols, places, scale, v)
            if rows < cols:
                for j in range(cols):
                    store(v, j * lanes, maximum(load(v, j * lanes), splat(real(0))))
        else:
            tau = start(tile, pitch, rows, cols, u, v)
            for i in range(rows, padded):
                store(u, i * lanes, splat(real(0)))
                for j in range(cols):
                    store(tile, (i * pitch + j) * lanes, splat(real(-1e30)))
            ascend(tile, pitch, rows, cols, row_target, col_target, tau, request.sweeps, u, v, sums, counts)
        if trivial:
            fill = splat(integer(-1 if row_target > 0 else 0))
            for i in range(rows * per_row):
                store(words, i * lanes, fill)
        else:
            if rows == cols:
                _anchor(rows, u, v)
            wrong = _round(
                tile, pitch, rows, cols, row_target, col_target, u, v, words, row_excess, col_excess
            )
            wrong &= (1 << used) - 1
            if wrong != 0 and rows < cols:
                for j in range(cols):
                    store(tile, (rows * pitch + j) * lanes, splat(real(0)))
            if wrong != 0:
                part(tile, pitch, lines, cols, by_row, by_col)
            for lane in range(used):
                if (wrong >> lane) & 1:
                    paths += augment(
                        lane,
                        rows,
                        cols,
                        row_target,
                        col_target,
                        u,
                        v,
                        words,
                        row_excess,
                        col_excess,
                        numbers,
                        integers,
                        active,
                        by_row + lane * lines * col_room,
                        by_col + lane * cols * row_room,
                    )
        for lane in range(used):
            for i in range(rows):
                place, address = i * per_row * lanes + lane, places[lanes + lane] + i * region.mask_row
                write_flags(words, place, lanes, cols, address, region.mask_col)
        if certificate is not None:
            _write_certificates(
                region,
                request.m,
                certificate,
                places,
                used,
                tile,
                pitch,
                row_target,
                col_target,
                scales,
                u,
                v,
                words,
                certified,
            )
    still_needed(memory)
    return paths
