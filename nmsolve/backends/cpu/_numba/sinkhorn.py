r"""Sinkhorn's iteration and its reverse sweep, one block at a time.

The plan is ``exp(K + f + g)`` with ``K = logits / temperature``. Its exponentials are taken once, at
reference scalings, as a kernel ``E = exp(K + f_ref + g_ref)``; an iteration is then two products with E,

    u = a / (E v),    v = b / (E^T u),        f = f_ref + log u,   g = g_ref + log v.

The first kernel has ``f_ref = -max_j K``, ``g_ref = 0``. When a factor leaves ``exp(+-LIMIT)``, the iteration
is made in the log domain instead, from ``K + g``, and its result is the new reference (Schmitzer, SIAM J.
Sci. Comput. 41, 2019). E is then scaled to sum to b along every column, and each row has an entry of at least
about ``a_i min(b) / (C sum(a))``, in the first kernel 1: nothing over- or underflows that matters, and what
has underflowed stays negligible within the limit. A column of which all has underflowed is beyond it.

Logits of -inf are entries that stay 0. A line of nothing else sums to exactly 0, which no other line does;
its scaling is 1 and nothing divides by its sum.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from nmsolve.backends.cpu._numba.compiled import compiled, inner

__all__ = ["backward", "forward"]

# Largest |log| of a factor relative to the reference.
LIMIT = 20.0

# No NaN or infinity flag: a block with NaN logits must give NaN, and one with -inf zeros.
_FAST = {"reassoc", "contract", "nsz"}

_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_LOG2_E = np.float32(1.4426950408889634)
# Minimax coefficients of (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2 (Cephes, expf).
_EXP = tuple(
    np.float32(c)
    for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
)


def exponential(x: Any) -> Any:
    """exp(x); for float32, 0 where x is below -87, and x above 88 counts as 88."""
    raise NotImplementedError


@overload(exponential, inline="never")
def _exponential(x: Any) -> Any:
    if x == types.float32:
        high, low, inverse = _LN2_HIGH, _LN2_LOW, _LOG2_E
        c5, c4, c3, c2, c1, c0 = _EXP

        def single(x: Any) -> Any:
            held = min(max(x, np.float32(-87.0)), np.float32(88.0))
            n = np.floor(held * inverse + np.float32(0.5))
            r = (held - n * high) - n * low
            p = ((((c5 * r + c4) * r + c3) * r + c2) * r + c1) * r + c0
            power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
            value = (p * r * r + r + np.float32(1.0)) * power
            return value if x >= np.float32(-87.0) else np.float32(0.0)

        return single

    def double(x: Any) -> Any:
        return math.exp(x)

    return double


@inner(fastmath=_FAST)
def _load(matrix: Any, temperature: float, level: Any) -> bool:
    """``level = matrix / temperature``; whether it is sound, without NaN and +inf."""
    rows, cols = matrix.shape
    scale = level.dtype.type(temperature)
    sound = True
    for i in range(rows):
        source, line = matrix[i], level[i]
        for j in range(cols):
            line[j] = source[j] / scale
        for j in range(cols):
            sound &= line[j] < np.inf
    return sound


@inner(fastmath=_FAST)
def _first_kernel(level: Any, f: Any, kernel: Any, sums: Any) -> bool:
    """``exp(level + f)`` with 1 as the largest entry of a row; whether there is something in every column."""
    rows, cols = level.shape
    for j in range(cols):
        sums[j] = 0
    for i in range(rows):
        line, out = level[i], kernel[i]
        peak = line[0]
        for j in range(1, cols):
            peak = line[j] if line[j] > peak else peak
        f[i] = -peak if peak > -np.inf else level.dtype.type(0)
        shift = f[i]
        for j in range(cols):
            out[j] = exponential(line[j] + shift)
        for j in range(cols):
            sums[j] += out[j]
    least = sums[0]
    for j in range(1, cols):
        least = min(least, sums[j])
    return least > 0


@inner(fastmath=_FAST)
def _log_step(level: Any, a: Any, b: Any, f: Any, g: Any, kernel: Any, sums: Any) -> None:
    """One iteration from g in the log domain: new f, g, and the kernel ``exp(level + f + g)``."""
    rows, cols = level.shape
    real = level.dtype.type
    for i in range(rows):
        line, scratch = level[i], kernel[i]
        for j in range(cols):
            scratch[j] = line[j] + g[j]
        peak = scratch[0]
        for j in range(1, cols):
            peak = scratch[j] if scratch[j] > peak else peak
        if peak == -np.inf:
            f[i] = real(0)
            continue
        total = real(0)
        for j in range(cols):
            total += exponential(scratch[j] - peak)
        f[i] = math.log(a[i]) - peak - math.log(total)
    for j in range(cols):
        g[j] = real(-np.inf)
        sums[j] = real(0)
    for i in range(rows):
        line, shift = level[i], f[i]
        for j in range(cols):
            x = line[j] + shift
            g[j] = x if x > g[j] else g[j]
    for j in range(cols):
        g[j] = g[j] if g[j] > -np.inf else real(0)
    for i in range(rows):
        line, out, shift = level[i], kernel[i], f[i]
        for j in range(cols):
            x = exponential(line[j] + shift - g[j])
            out[j] = x
            sums[j] += x
    for j in range(cols):
        if sums[j] > 0:
            g[j] = math.log(b[j]) - g[j] - math.log(sums[j])
            sums[j] = b[j] / sums[j]
    for i in range(rows):
        out = kernel[i]
        for j in range(cols):
            out[j] *= sums[j]


@inner(fastmath=_FAST)
def _scale_step(kernel: Any, a: Any, b: Any, u: Any, v: Any, new_u: Any, new_v: Any) -> Any:
    """``new_u = a / (E v)``, ``new_v = b / (E^T new_u)``: (largest error of a row sum so far, is it safe)."""
    rows, cols = kernel.shape
    real = kernel.dtype.type
    error, low, high = real(0), real(1), real(1)
    new_v[:] = real(0)
    for i in range(rows):
        line = kernel[i]
        total = real(0)
        for j in range(cols):
            total += line[j] * v[j]
        error = max(error, abs(u[i] * total - a[i]))
        factor = a[i] / total if total > 0 else real(1)
        new_u[i] = factor
        low, high = min(low, factor), max(high, factor)
        for j in range(cols):
            new_v[j] += line[j] * factor
    for j in range(cols):
        factor = b[j] / new_v[j] if new_v[j] > 0 else real(1)
        new_v[j] = factor
        low, high = min(low, factor), max(high, factor)
    return error, low > math.exp(-LIMIT) and high < math.exp(LIMIT)


@partial(compiled, fastmath=_FAST)
def forward(
    logits: Any,
    row_marginals: Any,
    col_marginals: Any,
    temperature: float,
    iterations: int,
    tolerance: float,
    plan: Any,
    row_scalings: Any,
    col_scalings: Any,
    made: Any,
    first: int,
    last: int,
) -> None:
    """Blocks ``first .. last``; see ``sinkhorn_forward`` of the reference for the arguments."""
    _, rows, cols = logits.shape
    real = plan.dtype.type
    keep = row_scalings.shape[1] > 0
    level, kernel = np.empty((rows, cols), plan.dtype), np.empty((rows, cols), plan.dtype)
    f, g, sums = np.empty(rows, plan.dtype), np.empty(cols, plan.dtype), np.empty(cols, plan.dtype)
    u, v = np.empty(rows, plan.dtype), np.empty(cols, plan.dtype)
    new_u, new_v = np.empty(rows, plan.dtype), np.empty(cols, plan.dtype)
    for block in range(first, last):
        sound = _load(logits[block], temperature, level)
        a, b = row_marginals[block], col_marginals[block]
        g[:] = real(0)
        u[:] = real(1)
        v[:] = real(1)
        done = 0
        whole = sound and _first_kernel(level, f, kernel, sums)
        while done < iterations and sound:
            error, safe = _scale_step(kernel, a, b, u, v, new_u, new_v)
            if done == 0:
                safe = safe and whole
            elif error <= tolerance:
                break
            if safe:
                u, new_u, v, new_v = new_u, u, new_v, v
            else:
                for j in range(cols):
                    g[j] += math.log(v[j])
                _log_step(level, a, b, f, g, kernel, sums)
                u[:] = real(1)
                v[:] = real(1)
            if keep:
                for i in range(rows):
                    row_scalings[block, done, i] = f[i] + math.log(u[i])
                for j in range(cols):
                    col_scalings[block, done, j] = g[j] + math.log(v[j])
            done += 1
        made[block, 0] = done
        for i in range(rows):
            out, line, factor = plan[block, i], kernel[i], u[i]
            for j in range(cols):
                out[j] = line[j] * factor * v[j] if sound else real(np.nan)


@inner(fastmath=_FAST)
def _far(reference: Any, values: Any, both_ways: bool) -> bool:
    """Whether a value is further than LIMIT from its reference (above it, or both ways)."""
    for k in range(len(reference)):
        apart = values[k] - reference[k]
        if apart > LIMIT or (both_ways and apart < -LIMIT):
            return True
    return False


@inner(fastmath=_FAST)
def _start_gradient(
    gradient: Any, kernel: Any, u: Any, sums: Any, b: Any, total: Any, df: Any, dg: Any, weight: Any
) -> None:
    """The plan's part: ``total = gradient * plan``, df and dg its sums along rows and columns."""
    rows, cols = kernel.shape
    for j in range(cols):
        weight[j] = b[j] / sums[j] if sums[j] > 0 else sums[j]
        dg[j] = 0
    for i in range(rows):
        line, out, source, factor = kernel[i], total[i], gradient[i], u[i]
        row_total = kernel.dtype.type(0)
        for j in range(cols):
            out[j] = source[j] * (line[j] * factor * weight[j])
        for j in range(cols):
            dg[j] += out[j]
            row_total += out[j]
        df[i] = row_total


@inner(fastmath=_FAST)
def _reverse_step(kernel: Any, u: Any, v: Any, df: Any, dg: Any, sums: Any, y: Any, total: Any) -> None:
    """One iteration back: df and dg go from (f_t, g_t) to (f_{t-1}, g_{t-1}); ``total`` gathers dK."""
    rows, cols = kernel.shape
    real = kernel.dtype.type
    for j in range(cols):
        y[j] = dg[j] / sums[j] if sums[j] > 0 else sums[j]
        dg[j] = 0
    for i in range(rows):
        line, out, factor = kernel[i], total[i], u[i]
        inner, norm = real(0), real(0)
        for j in range(cols):
            inner += line[j] * y[j]
            norm += line[j] * v[j]
        z = (df[i] - factor * inner) / norm if norm > 0 else norm
        df[i] = 0
        for j in range(cols):
            dg[j] -= line[j] * z
        for j in range(cols):
            out[j] -= line[j] * (factor * y[j] + z * v[j])
    for j in range(cols):
        dg[j] *= v[j]


@partial(compiled, fastmath=_FAST)
def backward(
    gradient: Any,
    logits: Any,
    col_marginals: Any,
    row_scalings: Any,
    col_scalings: Any,
    made: Any,
    temperature: float,
    out: Any,
    first: int,
    last: int,
) -> None:
    """Blocks ``first .. last``; see ``sinkhorn_backward`` of the reference for the mathematics.

    With ``u = exp(f_t - f_ref)`` and ``v = exp(g_{t-1} - g_ref)`` the softmaxes are ``S = E u / (E^T u)`` and
    ``R = E v / (E v)``: two passes over the kernel per iteration, no exponentials of its size.
    """
    _, rows, cols = logits.shape
    real = out.dtype.type
    level, kernel = np.empty((rows, cols), out.dtype), np.empty((rows, cols), out.dtype)
    total = np.empty((rows, cols), out.dtype)
    u, v, df = np.empty(rows, out.dtype), np.empty(cols, out.dtype), np.empty(rows, out.dtype)
    dg, sums, y = np.empty(cols, out.dtype), np.empty(cols, out.dtype), np.empty(cols, out.dtype)
    start = np.zeros(cols, out.dtype)
    for block in range(first, last):
        sound = _load(logits[block], temperature, level)
        newest = made[block, 0] - 1
        f_ref, g_ref = row_scalings[block, newest], col_scalings[block, newest]
        for t in range(newest, -1, -1):
            f, g = row_scalings[block, t], col_scalings[block, t]
            before = col_scalings[block, t - 1] if t > 0 else start
            if t == newest or _far(f_ref, f, True) or _far(g_ref, g, True) or _far(g_ref, before, False):
                f_ref, g_ref = f, g
                for i in range(rows):
                    line, source, shift = kernel[i], level[i], f[i]
                    for j in range(cols):
                        line[j] = exponential(source[j] + shift + g[j])
            sums[:] = real(0)
            for j in range(cols):
                v[j] = exponential(before[j] - g_ref[j])
            for i in range(rows):
                line = kernel[i]
                factor = exponential(f[i] - f_ref[i])
                u[i] = factor
                for j in range(cols):
                    sums[j] += line[j] * factor
            if t == newest:
                _start_gradient(gradient[block], kernel, u, sums, col_marginals[block], total, df, dg, y)
            _reverse_step(kernel, u, v, df, dg, sums, y, total)
        scale = real(1.0 / temperature)
        for i in range(rows):
            result, line = out[block, i], total[i]
            for j in range(cols):
                result[j] = line[j] * scale if sound else real(np.nan)
