r"""Dual ascent: approximate prices of a block's rows and columns.

Alternates Newton steps on u and v for ``S = clip(tau (A - u - v) + 1/2, 0, 1)``, the problem regularised by a
box, raising tau until few entries are fractional, see docs/internals/solver.md. All sweeps but the last only
have to come near, and on NVIDIA GPUs are made with pairs of float16 (:func:`paired_sweep`); elsewhere, and
in partial blocks, with float32 (:func:`plain_sweep`).
"""

from typing import NamedTuple

import triton
import triton.language as tl
from nmsolve.kernels import _pairs
from nmsolve.kernels._tile import INTERPRETED, equal, quotient, sum_cols, sum_rows
from triton.language.target_info import is_cuda

SPREAD = tl.constexpr(6.0)  # 6 sum s (1 - s) is the number of fractional entries, on average
SMALLEST_TAU = tl.constexpr(2.0**-12)  # twice its reciprocal is still a float16


class AscentSchedule(NamedTuple):
    """The constants of the ascent, which nmsolve/backends/ascent_schedule.py explains."""

    SWEEPS: int
    FRACTION_START: float
    FRACTION_END: float
    GROWTH_MIN: float
    GROWTH_MAX: float
    STEP_LIMIT: float
    CURVATURE: float
    DAMPING: float
    LAST_DAMPING: float
    WINSOR: float
    TAU_START: float
    DEVIATION_FLOOR: float


@triton.jit
def clip(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def to_pairs(reduced, per_unit):
    """A - u - v in a unit of its own, as pairs of float16."""
    even, odd = _pairs.split_cols(reduced)
    return _pairs.pair(even * per_unit, odd * per_unit)


@triton.jit
def paired_sweep(state, tau, unit, targets, SCHEDULE: tl.constexpr):
    """A sweep with pairs of float16: (left, u, v, moved, the columns' spread).

    ``left`` is A - u - v in ``unit`` s, and so is 1 / tau. An entry near its threshold is small there, and so
    precise; the others are clipped. Steps are had as ``t = clip(step / (2 STEP_LIMIT) + 1/2, 0, 1)``, which
    costs no instruction but the one that multiplies; ``moved`` sums by how much u and v then are too high.
    """
    left, u, v, moved = state
    row_target, col_target = targets
    ROWS_OUT: tl.constexpr = left.shape[3]
    COLS_OUT: tl.constexpr = left.shape[4]
    WIDTH: tl.constexpr = 2.0 * SCHEDULE.STEP_LIMIT
    zero = tl.zeros_like(unit)
    half = tl.full((1, 1, 1, 1, 1), _pairs.HALF, tl.int32)
    minus_half = tl.full((1, 1, 1, 1, 1), _pairs.MINUS_HALF, tl.int32)
    curvature = _pairs.pair(zero + SCHEDULE.CURVATURE * WIDTH, zero + SCHEDULE.CURVATURE * WIDTH)
    damping = _pairs.pair(zero + SCHEDULE.DAMPING * WIDTH, zero + SCHEDULE.DAMPING * WIDTH)
    # Each lane takes its share of the target off its sum, which then is small where it is rounded.
    row_share = row_target * (-0.5 / COLS_OUT)
    row_share = _pairs.pair(row_share, row_share)
    share_even, share_odd = _pairs.split_cols(col_target * (-1.0 / ROWS_OUT) + tl.zeros_like(v))
    col_share = _pairs.pair(share_even, share_odd)

    width = WIDTH * _pairs.reciprocal(tau)
    taus, widths = _pairs.pair(tau, tau), _pairs.pair(0.0 - width, 0.0 - width)
    width *= unit
    moved += 0.5 * width

    s = _pairs.multiply_add_clipped(left, taus, half)
    total = _pairs.add(_pairs.sum_of(s, 1), row_share)
    spread = _pairs.sum_of(_pairs.less_square(s), 1)
    both = _pairs.sum_of(_pairs.fold(total, spread), 4)
    slope = _pairs.high_of(both) * (SCHEDULE.CURVATURE * WIDTH) + SCHEDULE.DAMPING * WIDTH
    step = clip(_pairs.low_of(both) * _pairs.reciprocal(slope) + 0.5)
    u += step * width
    left = _pairs.multiply_add(_pairs.add(_pairs.pair(step, step), minus_half), widths, left)

    s = _pairs.multiply_add_clipped(left, taus, half)
    total = _pairs.sum_of(_pairs.add(_pairs.sum_of(s, 0), col_share), 3)
    spread = _pairs.sum_of(_pairs.sum_of(_pairs.less_square(s), 0), 3)
    slopes = _pairs.multiply_add(spread, curvature, damping)
    even = clip(_pairs.low_of(total) * _pairs.reciprocal(_pairs.low_of(slopes)) + 0.5)
    odd = clip(_pairs.high_of(total) * _pairs.reciprocal(_pairs.high_of(slopes)) + 0.5)
    v += _pairs.join_cols(even, odd) * width
    left = _pairs.multiply_add(_pairs.add(_pairs.pair(even, odd), minus_half), widths, left)

    spread = _pairs.sum_of(spread, 1)
    return left, u, v, moved, tl.sum(_pairs.low_of(spread) + _pairs.high_of(spread), 4, keep_dims=True)


@triton.jit
def held(scores, u, v, tau):
    return clip((scores - v) * tau + (0.5 - tau * u))


@triton.jit
def clipped_step(surplus, slope, SCHEDULE: tl.constexpr):
    """A Newton step in units of 1 / tau."""
    step = quotient(surplus, slope)
    return tl.minimum(tl.maximum(step, -SCHEDULE.STEP_LIMIT), SCHEDULE.STEP_LIMIT)


@triton.jit
def plain_sweep(scores, blocks, state, tau, unit, targets, SLACK: tl.constexpr, SCHEDULE: tl.constexpr):
    """A sweep with float32, as :func:`paired_sweep` is one with pairs; ``left``, ``moved`` are not used."""
    left, u, v, moved = state
    row_target, col_target = targets
    tau = quotient(tau, unit)
    inverse = quotient(1.0, tau)
    s = held(scores, u, v, tau)
    total = sum_rows(s)
    slope = (total - sum_rows(s * s)) * SCHEDULE.CURVATURE + SCHEDULE.DAMPING
    u += clipped_step(total - row_target, slope, SCHEDULE) * inverse

    s = held(scores, u, v, tau)
    total = sum_cols(s)
    spread = total - sum_cols(s * s)
    slope = spread * SCHEDULE.CURVATURE + SCHEDULE.DAMPING
    v += clipped_step(total - col_target, slope, SCHEDULE) * inverse
    if SLACK:
        v = tl.where(blocks.slack, tl.maximum(v, 0.0), v)
    return left, u, v, moved, sum_rows(spread)


@triton.jit
def last_sweep(scores, blocks, duals, tau, targets, SLACK: tl.constexpr, SCHEDULE: tl.constexpr):
    """The sweep that leaves few lines with a wrong count: its steps count what is fractional."""
    u, v = duals
    row_target, col_target = targets
    inverse = quotient(1.0, tau)
    s = (scores - v) * tau + (0.5 - tau * u)
    clipped = clip(s)
    slope = sum_rows(equal(s, clipped)) + SCHEDULE.LAST_DAMPING
    u += clipped_step(sum_rows(clipped) - row_target, slope, SCHEDULE) * inverse

    s = (scores - u) * tau + (0.5 - tau * v)
    clipped = clip(s)
    slope = sum_cols(equal(s, clipped)) + SCHEDULE.LAST_DAMPING
    v += clipped_step(sum_cols(clipped) - col_target, slope, SCHEDULE) * inverse
    if SLACK:
        v = tl.where(blocks.slack, tl.maximum(v, 0.0), v)
    return u, v


@triton.jit
def dual_ascent(
    scores,
    blocks,
    row_target,
    col_target,
    PADDED: tl.constexpr,
    SLACK: tl.constexpr,
    SCHEDULE: tl.constexpr,
):
    """Approximate duals (u, v) of a tile. The targets are float32; SCHEDULE is a :class:`AscentSchedule`."""
    rows, cols = blocks.rows.to(tl.float32), blocks.cols.to(tl.float32)
    entries = rows * cols
    if PADDED:
        mean = sum_rows(sum_cols(tl.where(blocks.inside, scores, 0.0))) / entries
        deviation = sum_rows(sum_cols(tl.where(blocks.inside, tl.abs(scores - mean), 0.0))) / entries
    else:
        mean = sum_rows(sum_cols(scores)) / entries
        deviation = sum_rows(sum_cols(tl.abs(scores - mean))) / entries
    deviation = tl.maximum(deviation, SCHEDULE.DEVIATION_FLOOR)
    reach = SCHEDULE.WINSOR * deviation
    clipped = tl.minimum(tl.maximum(scores, mean - reach), mean + reach)
    if PADDED:
        clipped = tl.where(blocks.inside, clipped, 0.0)
    u = sum_rows(clipped) / cols
    v = sum_cols(clipped) / rows - sum_cols(u) / rows

    # A power of two; tau is kept in its reciprocal.
    unit = (deviation.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    tau = SCHEDULE.TAU_START * quotient(unit, deviation)

    PAIRED: tl.constexpr = False if SLACK else (True if INTERPRETED else is_cuda())
    targets = row_target, col_target
    left = to_pairs((scores - u) - v, 1.0 / unit) if PAIRED else tau
    moved = tl.zeros_like(unit)
    goal = SCHEDULE.FRACTION_START * cols
    shrink = tl.exp2(tl.log2(SCHEDULE.FRACTION_END / goal) / (SCHEDULE.SWEEPS - 1))
    goal *= cols / SPREAD
    for _ in range(SCHEDULE.SWEEPS - 1):
        state = left, u, v, moved
        left, u, v, moved, spread = (
            paired_sweep(state, tau, unit, targets, SCHEDULE)
            if PAIRED
            else plain_sweep(scores, blocks, state, tau, unit, targets, SLACK, SCHEDULE)
        )
        goal *= shrink
        growth = tl.minimum(tl.maximum(quotient(spread, goal), SCHEDULE.GROWTH_MIN), SCHEDULE.GROWTH_MAX)
        tau = tl.maximum(tau * growth, SMALLEST_TAU)
    u, v, tau = u - moved, v - moved, quotient(tau, unit)
    return last_sweep(scores, blocks, (u, v), tau, targets, SLACK, SCHEDULE)
