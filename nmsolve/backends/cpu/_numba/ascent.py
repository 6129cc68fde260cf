"""Phase 1 of the exact method: dual ascent, one block of scores in each lane.

With ``s_ij = clip(tau (A_ij - u_i - v_j) + 1/2, 0, 1)`` a sweep takes a damped Newton step on every row dual
and then on every column dual,

    u_i += clip((sum_j s_ij - rows' target) / slope_i, +-STEP_LIMIT) / tau,
    slope_i = CURVATURE sum_j s_ij (1 - s_ij) + DAMPING,

and steers tau so that the number of fractional entries follows the schedule
(nmsolve/backends/ascent_schedule.py); the slopes of the last sweep count them. A row's step and its share of
the column sums are computed while the row is in the first-level cache, four rows at a time: an entry costs
six instructions per half-sweep and register.
"""

from __future__ import annotations

from typing import Any

from nmsolve.backends import ascent_schedule
from nmsolve.backends.cpu._numba.compiled import inner
from nmsolve.backends.cpu._numba.lanes import (
    WIDTH,
    absolute,
    add_squares,
    count_equal,
    four,
    maximum,
    minimum,
    multiply_add,
    power_of_two_scale,
    splat,
    sum_of_four,
)
from nmsolve.backends.cpu._numba.memory import load, load_four, store, store_four

__all__ = ["ascend", "normalise", "start"]

FRACTION_START, FRACTION_END = ascent_schedule.FRACTION_START, ascent_schedule.FRACTION_END
GROWTH_MIN, GROWTH_MAX = ascent_schedule.GROWTH_MIN, ascent_schedule.GROWTH_MAX
STEP_LIMIT, CURVATURE = ascent_schedule.STEP_LIMIT, ascent_schedule.CURVATURE
DAMPING, LAST_DAMPING = ascent_schedule.DAMPING, ascent_schedule.LAST_DAMPING
SPREAD = 6.0  # of s (1 - s) in all are as many as there are fractional entries, on average
WINSOR, TAU_START, DEVIATION_FLOOR = (
    ascent_schedule.WINSOR,
    ascent_schedule.TAU_START,
    ascent_schedule.DEVIATION_FLOOR,
)


@inner
def normalise(tile: Any, pitch: int, rows: int, cols: int) -> Any:
    """Scale every block by the power of two that brings max|A| into [0.5, 1); returns the scales."""
    lanes = WIDTH // tile.itemsize
    largest = splat(tile.dtype.type(0))
    for i in range(rows):
        for j in range(cols):
            largest = maximum(largest, absolute(load(tile, (i * pitch + j) * lanes)))
    scale = power_of_two_scale(largest)
    for i in range(rows):
        for j in range(cols):
            place = (i * pitch + j) * lanes
            store(tile, place, load(tile, place) * scale)
    return scale


@inner
def start(tile: Any, pitch: int, rows: int, cols: int, u: Any, v: Any) -> Any:
    """First duals, the line means of the scores clipped around their mean; returns the first tau."""
    real = tile.dtype.type
    lanes = WIDTH // tile.itemsize
    zero = splat(real(0))
    total = zero
    for i in range(rows):
        line = zero
        for j in range(cols):
            line = line + load(tile, (i * pitch + j) * lanes)
        total = total + line
    mean = total * splat(real(1 / (rows * cols)))
    total = zero
    for i in range(rows):
        line = zero
        for j in range(cols):
            line = line + absolute(load(tile, (i * pitch + j) * lanes) - mean)
        total = total + line
    deviation = maximum(total * splat(real(1 / (rows * cols))), splat(real(DEVIATION_FLOOR)))
    low, high = mean - splat(real(WINSOR)) * deviation, mean + splat(real(WINSOR)) * deviation
    for j in range(cols):
        store(v, j * lanes, zero)
    total = zero
    for i in range(rows):
        line = zero
        for j in range(cols):
            clipped = minimum(maximum(load(tile, (i * pitch + j) * lanes), low), high)
            line = line + clipped
            store(v, j * lanes, load(v, j * lanes) + clipped)
        total = total + line
        store(u, i * lanes, line * splat(real(1 / cols)))
    mean = total * splat(real(1 / (rows * cols)))
    for j in range(cols):
        start_v = load(v, j * lanes) * splat(real(1 / rows)) - mean
        store(v, j * lanes, maximum(start_v, zero) if rows < cols else start_v)
    return splat(real(TAU_START)) / deviation


@inner
def _step(surplus: Any, slope: Any, like: Any) -> Any:
    """A line's damped Newton step, in units of 1 / tau."""
    real = like.dtype.type
    limit = splat(real(STEP_LIMIT))
    step = surplus / slope
    return minimum(maximum(step, splat(real(0)) - limit), limit)


@inner(forceinline=True)
def _one_more(s: Any, held: Any, count: Any, last: bool) -> Any:
    """What the slopes follow from: the sum of the squares of s, clipped; last, how many need no clipping."""
    return count_equal(s, held, count) if last else add_squares(held, count)


@inner(forceinline=True)
def _slope(total: Any, count: Any, last: bool, like: Any) -> Any:
    """The slopes of lines whose clipped s sum to ``total``."""
    real = like.dtype.type
    if last:
        return count + splat(real(LAST_DAMPING))
    return multiply_add(splat(real(CURVATURE)), total - count, splat(real(DAMPING)))


@inner(forceinline=True)
def _four_rows(
    tile: Any,
    pitch: int,
    row: int,
    cols: int,
    target: Any,
    tau: Any,
    inverse: Any,
    u: Any,
    scaled_v: Any,
    sums: Any,
    counts: Any,
    last: bool,
) -> None:
    """Move the duals of four rows and add the rows, at the new duals, to the columns' sums and counts."""
    real = tile.dtype.type
    lanes = WIDTH // tile.itemsize
    zero, one, half = splat(real(0)), splat(real(1)), splat(real(0.5))
    place, step = row * pitch * lanes, pitch * lanes
    dual = load_four(u, row * lanes, lanes)
    base = half - tau * dual
    total = count = four(zero)
    for j in range(0, cols * lanes, lanes):
        s = multiply_add(tau, load_four(tile, place + j, step), base - load(scaled_v, j))
        held = minimum(maximum(s, zero), one)
        total = total + held
        count = _one_more(s, held, count, last)
    change = _step(total - target, _slope(total, count, last, tile), tile)
    dual = multiply_add(change, inverse, dual)
    store_four(u, row * lanes, lanes, dual)
    base = half - tau * dual
    for j in range(0, cols * lanes, lanes):
        s = multiply_add(tau, load_four(tile, place + j, step), base - load(scaled_v, j))
        held = minimum(maximum(s, zero), one)
        store(sums, j, load(sums, j) + sum_of_four(held))
        store(counts, j, _one_more(s, held, load(counts, j), last))


@inner(forceinline=True)
def _sweep(
    tile: Any,
    pitch: int,
    rows: int,
    cols: int,
    row_goal: Any,
    col_goal: Any,
    tau: Any,
    u: Any,
    v: Any,
    sums: Any,
    counts: Any,
    last: bool,
) -> Any:
    """Move all duals; returns the sum over the columns of ``total`` less ``count``, of :func:`_slope`."""
    real = tile.dtype.type
    lanes = WIDTH // tile.itemsize
    zero, one = splat(real(0)), splat(real(1))
    inverse = one / tau
    for j in range(0, cols * lanes, lanes):
        store(sums, j, zero)
        store(counts, j, zero)
        store(sums, cols * lanes + j, tau * load(v, j))
    scaled_v = sums + cols * lanes
    for row in range(0, rows, 4):
        _four_rows(tile, pitch, row, cols, row_goal, tau, inverse, u, scaled_v, sums, counts, last)
    difference = zero
    for j in range(0, cols * lanes, lanes):
        held, count = load(sums, j), load(counts, j)
        step = _step(held - col_goal, _slope(held, count, last, tile), tile)
        dual = multiply_add(step, inverse, load(v, j))
        store(v, j, maximum(dual, zero) if rows < cols else dual)
        difference = difference + (held - count)
    return difference


@inner
def ascend(
    tile: Any,
    pitch: int,
    rows: int,
    cols: int,
    row_target: int,
    col_target: int,
    tau: Any,
    sweeps: int,
    u: Any,
    v: Any,
    sums: Any,
    counts: Any,
) -> None:
    """Run the sweeps from the duals in ``u`` and ``v``; the tile's rows are padded to a multiple of four.

    A padding row's scores are so low that nothing of it is ever held: it moves no column.
    """
    real = tile.dtype.type
    row_goal, col_goal = splat(real(row_target)), splat(real(col_target))
    wanted = FRACTION_START * cols
    fall = (FRACTION_END / wanted) ** (1 / maximum(1, sweeps - 1))
    # Numba compiles a sweep once, for any bool, and LLVM twice, for these.
    early, last = bool(0), bool(1)
    for _ in range(sweeps - 1):
        spread = _sweep(tile, pitch, rows, cols, row_goal, col_goal, tau, u, v, sums, counts, early)
        wanted *= fall
        growth = spread * splat(real(SPREAD / (cols * wanted)))
        tau = tau * minimum(maximum(growth, splat(real(GROWTH_MIN))), splat(real(GROWTH_MAX)))
    _sweep(tile, pitch, rows, cols, row_goal, col_goal, tau, u, v, sums, counts, last)
