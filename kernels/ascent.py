r"""Dual ascent: approximate prices of a block's rows and columns.

Alternates Newton steps on u and v for ``S = clip(tau (A - u - v) + 1/2, 0, 1)``, the problem regularised by a
box, raising tau until few entries are fractional, see docs/internals/solver.md.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from nmsolve.kernels._tile import sum_cols, sum_rows


class AscentSchedule(NamedTuple):
    """The constants of the ascent, which nmsolve/backends/ascent_schedule.py explains."""

    SWEEPS: int
    FRACTION_START: float
    FRACTION_END: float
    FRACTION_FLOOR: float
    GROWTH_MIN: float
    GROWTH_MAX: float
    STEP_LIMIT: float
    DAMPING: float
    WINSOR: float
    TAU_START: float
    DEVIATION_FLOOR: float


@triton.jit
def newton_step(total, fractional, target, tau, SCHEDULE: tl.constexpr):
    """``clip((total - target) / (fractional + DAMPING), +-STEP_LIMIT) / tau``."""
    step = (total - target) / (fractional + SCHEDULE.DAMPING)
    return tl.minimum(tl.maximum(step, -SCHEDULE.STEP_LIMIT), SCHEDULE.STEP_LIMIT) / tau


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
    tau = SCHEDULE.TAU_START / deviation

    goal = SCHEDULE.FRACTION_START * cols
    shrink = tl.exp2(tl.log2(SCHEDULE.FRACTION_END / goal) / (SCHEDULE.SWEEPS - 1))
    for sweep in range(SCHEDULE.SWEEPS):
        s = (scores - v) * tau + (0.5 - tau * u)
        clipped = tl.minimum(tl.maximum(s, 0.0), 1.0)
        row_fractional = sum_rows((s == clipped).to(tl.float32))
        u += newton_step(sum_rows(clipped), row_fractional, row_target, tau, SCHEDULE)

        s = (scores - u) * tau + (0.5 - tau * v)
        clipped = tl.minimum(tl.maximum(s, 0.0), 1.0)
        col_fractional = sum_cols((s == clipped).to(tl.float32))
        v += newton_step(sum_cols(clipped), col_fractional, col_target, tau, SCHEDULE)
        if SLACK:
            v = tl.where(blocks.slack, tl.maximum(v, 0.0), v)

        lines = (sum_cols(row_fractional) + sum_rows(col_fractional)) / (rows + cols)
        goal = tl.where(sweep < SCHEDULE.SWEEPS - 1, goal * shrink, goal)
        growth = tl.maximum(lines, SCHEDULE.FRACTION_FLOOR) / goal
        tau *= tl.minimum(tl.maximum(growth, SCHEDULE.GROWTH_MIN), SCHEDULE.GROWTH_MAX)
    return u, v
