"""Method "tsenor" (arXiv 2505.23949): Dykstra's projections in float64 lanes, then the greedy of its plan.

With K = exp(tau A / max|A|) the plan before the clip stays K times a matrix of rank one,
``P_ij = K_ij x_i y_j``, and ``S = min(P, 1)``. An iteration scales S's rows to their target,
``x_i *= a / sum_j S_ij``, then the columns of the scaled plan; x and y are the whole state. The rows of K are
divided by their largest entry first, which x absorbs. The greedy goes by the order of P, which also ranks the
entries that S holds at 1.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nmsolve.backends.cpu._numba.ascent import normalise
from nmsolve.backends.cpu._numba.compiled import compiled, inner
from nmsolve.backends.cpu._numba.lanes import WIDTH, maximum, minimum, splat
from nmsolve.backends.cpu._numba.memory import load, store
from nmsolve.backends.cpu._numba.rounding import complete, put_in_order, row_major, take
from nmsolve.backends.cpu._numba.scratch import buffer, retyped, scratch, still_needed
from nmsolve.backends.cpu._numba.tiles import Region, load_tile, place_lanes, words_for, write_flags

__all__ = ["solve_tsenor"]

# Smaller exponents than this are raised to it: their entries stay far below any that could be kept, and no
# line's sum vanishes.
LOWEST_EXPONENT = -650.0
TINY = 1e-300


@inner
def _kernel(tile: Any, pitch: int, rows: int, cols: int, tau: float, plan: Any) -> None:
    """``plan = exp(tau (A - row maximum) / max|A|)``."""
    lanes = WIDTH // tile.itemsize
    for lane in range(lanes):
        peak = 0.0
        for i in range(rows):
            for j in range(cols):
                peak = maximum(peak, abs(tile[(i * pitch + j) * lanes + lane]))
        factor = tau / peak if peak > 0 else 0.0
        for i in range(rows):
            top = -np.inf
            for j in range(cols):
                top = maximum(top, tile[(i * pitch + j) * lanes + lane])
            for j in range(cols):
                place = (i * pitch + j) * lanes + lane
                plan[place] = math.exp(maximum(factor * (tile[place] - top), LOWEST_EXPONENT))


@inner
def _project(
    plan: Any,
    pitch: int,
    rows: int,
    cols: int,
    row_target: int,
    col_target: int,
    iterations: int,
    x: Any,
    y: Any,
    sums: Any,
) -> None:
    """Run Dykstra's iterations on the scalings; the first one does not clip."""
    real = plan.dtype.type
    lanes = WIDTH // plan.itemsize
    zero, one, tiny = splat(real(0)), splat(real(1)), splat(real(TINY))
    row_goal, col_goal = splat(real(row_target)), splat(real(col_target))
    for i in range(rows):
        store(x, i * lanes, one)
    for j in range(cols):
        store(y, j * lanes, one)
    for iteration in range(iterations):
        cap = one if iteration > 0 else splat(real(np.inf))
        for j in range(cols):
            store(sums, j * lanes, zero)
        for i in range(rows):
            scale, place = load(x, i * lanes), i * pitch * lanes
            even, odd = zero, zero
            for j in range(0, cols - 1, 2):
                a, b = load(plan, place + j * lanes), load(plan, place + (j + 1) * lanes)
                even = even + minimum(a * load(y, j * lanes) * scale, cap)
                odd = odd + minimum(b * load(y, (j + 1) * lanes) * scale, cap)
            if cols % 2 == 1:
                last = (cols - 1) * lanes
                even = even + minimum(load(plan, place + last) * load(y, last) * scale, cap)
            change = row_goal / maximum(even + odd, tiny)
            for j in range(cols):
                s = minimum(load(plan, place + j * lanes) * load(y, j * lanes) * scale, cap)
                store(sums, j * lanes, load(sums, j * lanes) + s * change)
            store(x, i * lanes, scale * change)
        for j in range(cols):
            change = col_goal / maximum(load(sums, j * lanes), tiny)
            if rows < cols:
                change = minimum(change, one)
            store(y, j * lanes, load(y, j * lanes) * change)


@compiled
def solve_tsenor(
    region: Region, n: int, iterations: int, tau: float, flipped: bool, first: int, last: int
) -> None:
    """Groups ``first .. last`` of a region by projections, greedy and completion."""
    lanes = WIDTH // 8
    rows, cols = region.rows, region.cols
    row_target = minimum(n, cols)
    col_target = row_target if rows == cols else n
    pitch, per_row = cols + 1, words_for(cols)
    size = rows * cols
    registers = 2 * rows * pitch + rows + 2 * cols + 2 * size + rows * per_row
    memory = buffer(registers * WIDTH + (2 * size + rows + cols + 3 * lanes) * 8)
    tile = scratch(memory, 0.0)
    plan = tile + rows * pitch * lanes
    x = plan + rows * pitch * lanes
    y = x + rows * lanes
    sums = y + cols * lanes
    keys = sums + cols * lanes
    order = retyped(keys + size * lanes, np.int64(0))
    words = order + size * lanes
    row_of = words + rows * per_row * lanes
    col_of = row_of + size
    held = col_of + size
    places = held + rows + cols
    row_major(rows, cols, flipped, row_of, col_of)
    for group in range(first, last):
        used = place_lanes(region, group * lanes, lanes, places)
        load_tile(region, places, tile, pitch)
        normalise(tile, pitch, rows, cols)
        _kernel(tile, pitch, rows, cols, tau, plan)
        _project(plan, pitch, rows, cols, row_target, col_target, iterations, x, y, sums)
        for i in range(rows):
            scale = load(x, i * lanes)
            for j in range(cols):
                place = (i * pitch + j) * lanes
                store(plan, place, load(plan, place) * load(y, j * lanes) * scale)
        put_in_order(plan, pitch, size, row_of, col_of, keys, order)
        for lane in range(used):
            take(order, lane, rows, cols, row_of, col_of, n, per_row, held, words)
            complete(tile, pitch, lane, rows, cols, n, per_row, held, words)
            for i in range(rows):
                place, address = i * per_row * lanes + lane, places[lanes + lane] + i * region.mask_row
                write_flags(words, place, lanes, cols, address, region.mask_col)
    still_needed(memory)
