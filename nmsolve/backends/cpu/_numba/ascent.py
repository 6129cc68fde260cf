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
    maximum,
    minimum,
    multiply_add,
    power_of_two_scale,
    select,
    splat,
)
from nmsolve.backends.cpu._numba.memory import load, store

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


@inner
def _one_more_fractional(s: Any, held: Any, count: Any, one: Any) -> Any:
    return select(held == s, count + one, count)


@inner
def _one_more_square(s: Any, held: Any, squares: Any, one: Any) -> Any:
    return multiply_add(held, held, squares)


@inner
def _slope_of_fractional(total: Any, count: Any, like: Any) -> Any:
    return count + splat(like.dtype.type(LAST_DAMPING))


@inner
def _slope_of_squares(total: Any, squares: Any, like: Any) -> Any:
    real = like.dtype.type
    return multiply_add(splat(real(CURVATURE)), total - squares, splat(real(DAMPING)))


def _sweep_of(one_more: Any, slope_of: Any) -> Any:
    """A sweep whose steps have the slopes that ``slope_of`` finds from what ``one_more`` has summed."""

    @inner
    def four_rows(
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
    ) -> None:
        """Move the duals of four rows and add the rows, at the new duals, to the columns' sums and counts."""
        real = tile.dtype.type
        lanes = WIDTH // tile.itemsize
        zero, one, half = splat(real(0)), splat(real(1)), splat(real(0.5))
        u0, u1 = load(u, row * lanes), load(u, (row + 1) * lanes)
        u2, u3 = load(u, (row + 2) * lanes), load(u, (row + 3) * lanes)
        b0, b1, b2, b3 = half - tau * u0, half - tau * u1, half - tau * u2, half - tau * u3
        r0, r1, r2, r3 = zero, zero, zero, zero
        c0, c1, c2, c3 = zero, zero, zero, zero
        p0 = row * pitch * lanes
        p1, p2, p3 = p0 + pitch * lanes, p0 + 2 * pitch * lanes, p0 + 3 * pitch * lanes
        for j in range(0, cols * lanes, lanes):
            v = load(scaled_v, j)
            s0 = multiply_add(tau, load(tile, p0 + j), b0 - v)
            s1 = multiply_add(tau, load(tile, p1 + j), b1 - v)
            s2 = multiply_add(tau, load(tile, p2 + j), b2 - v)
            s3 = multiply_add(tau, load(tile, p3 + j), b3 - v)
            q0, q1 = minimum(maximum(s0, zero), one), minimum(maximum(s1, zero), one)
            q2, q3 = minimum(maximum(s2, zero), one), minimum(maximum(s3, zero), one)
            r0, r1, r2, r3 = r0 + q0, r1 + q1, r2 + q2, r3 + q3
            c0, c1 = one_more(s0, q0, c0, one), one_more(s1, q1, c1, one)
            c2, c3 = one_more(s2, q2, c2, one), one_more(s3, q3, c3, one)
        d0 = _step(r0 - target, slope_of(r0, c0, tile), tile)
        d1 = _step(r1 - target, slope_of(r1, c1, tile), tile)
        d2 = _step(r2 - target, slope_of(r2, c2, tile), tile)
        d3 = _step(r3 - target, slope_of(r3, c3, tile), tile)
        u0, u1 = multiply_add(d0, inverse, u0), multiply_add(d1, inverse, u1)
        u2, u3 = multiply_add(d2, inverse, u2), multiply_add(d3, inverse, u3)
        store(u, row * lanes, u0)
        store(u, (row + 1) * lanes, u1)
        store(u, (row + 2) * lanes, u2)
        store(u, (row + 3) * lanes, u3)
        b0, b1, b2, b3 = half - tau * u0, half - tau * u1, half - tau * u2, half - tau * u3
        for j in range(0, cols * lanes, lanes):
            v = load(scaled_v, j)
            s0 = multiply_add(tau, load(tile, p0 + j), b0 - v)
            s1 = multiply_add(tau, load(tile, p1 + j), b1 - v)
            s2 = multiply_add(tau, load(tile, p2 + j), b2 - v)
            s3 = multiply_add(tau, load(tile, p3 + j), b3 - v)
            q0, q1 = minimum(maximum(s0, zero), one), minimum(maximum(s1, zero), one)
            q2, q3 = minimum(maximum(s2, zero), one), minimum(maximum(s3, zero), one)
            store(sums, j, load(sums, j) + ((q0 + q1) + (q2 + q3)))
            count = one_more(s1, q1, one_more(s0, q0, load(counts, j), one), one)
            store(counts, j, one_more(s3, q3, one_more(s2, q2, count, one), one))

    @inner
    def sweep(
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
    ) -> Any:
        """Move all duals; returns the columns' sum of what is summed less what ``one_more`` has summed."""
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
            four_rows(tile, pitch, row, cols, row_goal, tau, inverse, u, scaled_v, sums, counts)
        difference = zero
        for j in range(0, cols * lanes, lanes):
            held, count = load(sums, j), load(counts, j)
            step = _step(held - col_goal, slope_of(held, count, tile), tile)
            dual = multiply_add(step, inverse, load(v, j))
            store(v, j, maximum(dual, zero) if rows < cols else dual)
            difference = difference + (held - count)
        return difference

    return sweep


_sweep = _sweep_of(_one_more_square, _slope_of_squares)
_last_sweep = _sweep_of(_one_more_fractional, _slope_of_fractional)


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
    fall = (FRACTION_END / wanted) ** (1 / max(1, sweeps - 1))
    for _ in range(sweeps - 1):
        spread = _sweep(tile, pitch, rows, cols, row_goal, col_goal, tau, u, v, sums, counts)
        wanted *= fall
        growth = spread * splat(real(SPREAD / (cols * wanted)))
        tau = tau * minimum(maximum(growth, splat(real(GROWTH_MIN))), splat(real(GROWTH_MAX)))
    _last_sweep(tile, pitch, rows, cols, row_goal, col_goal, tau, u, v, sums, counts)
