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

What is kept of an iteration are its factors, relative to the reference that it was made with: they say all
that the reverse sweep needs to know of the sums, ``E v = a / u`` and ``E^T u = b / v``. An iteration in the
log domain keeps its reference instead. Its kernel's columns sum to b up to the rounding of ``K + f + g``, for
which there is one factor more, ``b / (E^T 1)``; the sweep makes it again, with the kernel.

Rows of a kernel are made of whole registers, and their number is a multiple of ``_ROWS``, which an iteration
takes together: small blocks wait for additions across a register and for divisions, one after the other.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from nmsolve.backends.cpu._numba.compiled import compiled, inner
from nmsolve.backends.cpu._numba.lanes import (
    WIDTH,
    bits_of,
    maximum,
    minimum,
    multiply_add,
    select,
    smallest,
    splat,
    total,
)
from nmsolve.backends.cpu._numba.memory import load, store
from nmsolve.backends.cpu._numba.scratch import buffer, scratch, scratch_at, still_needed

__all__ = ["backward_double", "backward_single", "forward_double", "forward_single"]

# Largest |log| of a factor relative to the reference.
LIMIT = 20.0
_LEAST, _MOST = math.exp(-LIMIT), math.exp(LIMIT)

# Rows that an iteration takes together.
_ROWS = 4

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


@inner
def _up(count: int, step: int) -> int:
    return (count + step - 1) // step * step


@inner
def _fill(to: Any, count: int, value: Any) -> None:
    for k in range(count):
        to[k] = value


@inner(fastmath=_FAST)
def _copy_or_fill(to: Any, count: int, source: Any, given: bool, value: Any) -> None:
    if given:
        for k in range(count):
            to[k] = source[k]
    else:
        _fill(to, count, value)


@inner(fastmath=_FAST)
def _level(logits: Any, scale: Any, cols: int, width: int, to: Any) -> None:
    """A row of ``logits / temperature``, filled up with -inf."""
    for j in range(cols):
        to[j] = logits[j] / scale
    for j in range(cols, width):
        to[j] = -np.inf


@inner
def _peak(line: Any, width: int) -> Any:
    lanes = WIDTH // line.itemsize
    peak = load(line, 0)
    for k in range(lanes, width, lanes):
        peak = maximum(peak, load(line, k))
    return -smallest(splat(line.dtype.type(0)) - peak)


@inner(fastmath=_FAST)
def _exponentials(line: Any, width: int, shift: Any) -> None:
    for j in range(width):
        line[j] = exponential(line[j] + shift)


@inner
def _add(line: Any, width: int, sums: Any) -> None:
    for k in range(0, width, WIDTH // line.itemsize):
        store(sums, k, load(sums, k) + load(line, k))


@inner
def _first_kernel(
    logits: Any, scale: Any, rows: int, cols: int, width: int, kernel: Any, sums: Any
) -> tuple[bool, bool]:
    """``exp(K + f)`` with 1 as the largest entry of a row.

    Whether the logits are sound, without NaN and +inf, and whether there is something in every column.
    """
    lanes = WIDTH // kernel.itemsize
    real = kernel.dtype.type
    endless = splat(real(np.inf))
    sound = endless > splat(real(0))
    _fill(sums, width, real(0))
    for i in range(rows):
        line = kernel + i * width
        _level(logits + i * cols, scale, cols, width, line)
        for k in range(0, width, lanes):
            sound = sound & (load(line, k) < endless)
        peak = _peak(line, width)
        _exponentials(line, width, -peak if peak > -np.inf else real(0))
        _add(line, width, sums)
    whole = True
    for j in range(cols):
        whole &= sums[j] > 0
    return bits_of(sound) == (1 << lanes) - 1, whole


@inner(fastmath=_FAST)
def _kernel_at(
    logits: Any, scale: Any, rows: int, cols: int, width: int, f: Any, g: Any, kernel: Any, sums: Any
) -> None:
    """``exp(K + f + g)``, and the sums of its columns."""
    _fill(sums, width, kernel.dtype.type(0))
    for i in range(rows):
        line = kernel + i * width
        _level(logits + i * cols, scale, cols, width, line)
        shift = f[i]
        for j in range(cols):
            line[j] = line[j] + shift + g[j]
        _exponentials(line, width, kernel.dtype.type(0))
        _add(line, width, sums)


@inner(fastmath=_FAST)
def _log_step(
    logits: Any, scale: Any, rows: int, cols: int, width: int,
    a: Any, b: Any, f: Any, g: Any, kernel: Any, v: Any, sums: Any,
) -> None:  # fmt: skip
    """One iteration from g in the log domain: new f and g, the kernel there and what its columns lack."""
    real = kernel.dtype.type
    for i in range(rows):
        line = kernel + i * width
        _level(logits + i * cols, scale, cols, width, line)
        for j in range(cols):
            line[j] = line[j] + g[j]
        peak = _peak(line, width)
        if peak == -np.inf:
            f[i] = real(0)
            continue
        amount = real(0)
        for j in range(cols):
            amount += exponential(line[j] - peak)
        f[i] = math.log(a[i]) - peak - math.log(amount)
    _fill(g, cols, real(-np.inf))
    for i in range(rows):
        line, shift = kernel + i * width, f[i]
        _level(logits + i * cols, scale, cols, width, line)
        for j in range(cols):
            line[j] = line[j] + shift
        for j in range(cols):
            g[j] = line[j] if line[j] > g[j] else g[j]
    _fill(sums, cols, real(0))
    for j in range(cols):
        g[j] = g[j] if g[j] > -np.inf else real(0)
    for i in range(rows):
        line = kernel + i * width
        for j in range(cols):
            sums[j] += exponential(line[j] - g[j])
    for j in range(cols):
        g[j] = math.log(b[j]) - g[j] - math.log(sums[j]) if sums[j] > 0 else g[j]
    _kernel_at(logits, scale, rows, cols, width, f, g, kernel, sums)
    _quotients(b, sums, width, v)


@inner
def _quotients(b: Any, sums: Any, width: int, to: Any) -> Any:
    """``to = b / sums``, 1 where the sum is 0: (lanes of the smallest, of the largest), with 1 among them."""
    lanes = WIDTH // b.itemsize
    zero, one = splat(b.dtype.type(0)), splat(b.dtype.type(1))
    low, high = one, one
    for k in range(0, width, lanes):
        held = load(sums, k)
        factor = select(held > zero, load(b, k) / held, one)
        store(to, k, factor)
        low, high = minimum(low, factor), maximum(high, factor)
    return low, high


@inner
def _scale_step(
    kernel: Any, rows: int, width: int, a: Any, b: Any, u: Any, v: Any, new_u: Any, new_v: Any, look: bool
) -> Any:
    """``new_u = a / (E v)``, ``new_v = b / (E^T new_u)``: (largest error of a row sum so far, is it safe).

    The error is 0 unless it is to ``look``.
    """
    lanes = WIDTH // kernel.itemsize
    real = kernel.dtype.type
    zero, one = real(0), real(1)
    error = zero
    _fill(new_v, width, zero)
    for i in range(0, rows, _ROWS):
        e0 = kernel + i * width
        e1, e2, e3 = e0 + width, e0 + 2 * width, e0 + 3 * width
        t0 = t1 = t2 = t3 = splat(zero)
        for k in range(0, width, lanes):
            y = load(v, k)
            t0, t1 = multiply_add(load(e0, k), y, t0), multiply_add(load(e1, k), y, t1)
            t2, t3 = multiply_add(load(e2, k), y, t2), multiply_add(load(e3, k), y, t3)
        s0, s1, s2, s3 = total(t0), total(t1), total(t2), total(t3)
        if look:
            error = max(error, abs(u[i] * s0 - a[i]), abs(u[i + 1] * s1 - a[i + 1]))
            error = max(error, abs(u[i + 2] * s2 - a[i + 2]), abs(u[i + 3] * s3 - a[i + 3]))
        f0, f1 = a[i] / s0 if s0 > 0 else one, a[i + 1] / s1 if s1 > 0 else one
        f2, f3 = a[i + 2] / s2 if s2 > 0 else one, a[i + 3] / s3 if s3 > 0 else one
        new_u[i], new_u[i + 1], new_u[i + 2], new_u[i + 3] = f0, f1, f2, f3
        t0, t1, t2, t3 = splat(f0), splat(f1), splat(f2), splat(f3)
        for k in range(0, width, lanes):
            x = multiply_add(load(e0, k), t0, load(new_v, k))
            y = multiply_add(load(e2, k), t2, load(e3, k) * t3)
            store(new_v, k, multiply_add(load(e1, k), t1, x) + y)
    low, high = _quotients(b, new_v, width, new_v)
    for k in range(0, rows, lanes):
        factor = load(new_u, k)
        low, high = minimum(low, factor), maximum(high, factor)
    beyond = (low <= splat(real(_LEAST))) | (high >= splat(real(_MOST)))
    return error, bits_of(beyond) == 0


@inner(fastmath=_FAST)
def _forward(
    logits: Any, row_marginals: Any, col_marginals: Any, given: bool, temperature: float, iterations: int,
    tolerance: float, plan: Any, kept_u: Any, kept_v: Any, made: Any, keep: bool,
    rows: int, cols: int, first: int, last: int, memory: Any,
) -> None:  # fmt: skip
    """Blocks ``first .. last``; marginals are 1 and R / C unless given."""
    real = plan.dtype.type
    lanes = WIDTH // plan.itemsize
    scale = real(temperature)
    width, height, lines = _up(cols, lanes), _up(rows, _ROWS), _up(rows, lanes)
    kernel = memory
    sums = kernel + height * width
    g, b, v, new_v = sums + width, sums + 2 * width, sums + 3 * width, sums + 4 * width
    f = sums + 5 * width
    a, u, new_u = f + lines, f + 2 * lines, f + 3 * lines
    _fill(kernel + rows * width, (height - rows) * width, real(0))
    for line, count, size in ((a, rows, lines), (b, cols, width)):
        _fill(line + count, size - count, real(0))
    _fill(new_u, lines, real(1))
    for block in range(first, last):
        source = logits + block * rows * cols
        _copy_or_fill(a, rows, row_marginals + block * rows, given, real(1))
        _copy_or_fill(b, cols, col_marginals + block * cols, given, real(rows / cols))
        _fill(g, cols, real(0))
        _fill(u, lines, real(1))
        _fill(v, width, real(1))
        sound, whole = _first_kernel(source, scale, rows, cols, width, kernel, sums)
        done = 0
        marks = made + block * (1 + iterations)
        while done < iterations and sound:
            error, safe = _scale_step(kernel, height, width, a, b, u, v, new_u, new_v, tolerance >= 0)
            if done == 0:
                safe = safe and whole
            elif error <= tolerance:
                break
            if safe:
                u, new_u, v, new_v = new_u, u, new_v, v
            else:
                for j in range(cols):
                    g[j] += math.log(v[j])
                _log_step(source, scale, rows, cols, width, a, b, f, g, kernel, v, sums)
                _fill(u, lines, real(1))
            if keep:
                place = block * iterations + done
                of_rows, of_cols = (u, v) if safe else (f, g)
                _copy_or_fill(kept_u + place * rows, rows, of_rows, True, real(0))
                _copy_or_fill(kept_v + place * cols, cols, of_cols, True, real(0))
                marks[1 + done] = np.int32(not safe)
            done += 1
        if keep:
            marks[0] = np.int32(done)
            for t in range(done, iterations):
                marks[1 + t] = np.int32(0)
        out = plan + block * rows * cols
        for i in range(rows):
            line, factor = kernel + i * width, u[i]
            if sound:
                for j in range(cols):
                    out[i * cols + j] = line[j] * factor * v[j]
            else:
                _fill(out + i * cols, cols, real(np.nan))


@inner
def _start_gradient(
    gradient: Any,
    kernel: Any,
    rows: int,
    cols: int,
    width: int,
    u: Any,
    v: Any,
    gathered: Any,
    df: Any,
    dg: Any,
) -> None:
    """The plan's part: ``gathered = gradient * plan``, df and dg its sums along rows and columns."""
    lanes = WIDTH // kernel.itemsize
    real = kernel.dtype.type
    _fill(dg, width, real(0))
    for i in range(rows):
        line, out = kernel + i * width, gathered + i * width
        _copy_or_fill(out, cols, gradient + i * cols, True, real(0))
        _fill(out + cols, width - cols, real(0))
        amount, factor = splat(real(0)), splat(u[i])
        for k in range(0, width, lanes):
            part = load(out, k) * (load(line, k) * factor * load(v, k))
            store(out, k, part)
            store(dg, k, load(dg, k) + part)
            amount = amount + part
        df[i] = total(amount)


@inner
def _reverse_step(
    kernel: Any, rows: int, width: int, a: Any, u: Any, v: Any, known: bool,
    df: Any, dg: Any, y: Any, gathered: Any,
) -> None:  # fmt: skip
    """One iteration back: df and dg go from (f_t, g_t) to (f_{t-1}, g_{t-1}); ``gathered`` gathers dK.

    u are the factors of the rows, v those of the columns before, y is ``dg / (E^T u)``. The sums ``E v`` are
    known as ``a / u`` if the iteration was made with this kernel.
    """
    lanes = WIDTH // kernel.itemsize
    real = kernel.dtype.type
    zero = splat(real(0))
    _fill(dg, width, real(0))
    for i in range(0, rows, 2):
        e0, out0 = kernel + i * width, gathered + i * width
        e1, out1 = e0 + width, out0 + width
        s0 = s1 = zero
        for k in range(0, width, lanes):
            x = load(y, k)
            s0, s1 = multiply_add(load(e0, k), x, s0), multiply_add(load(e1, k), x, s1)
        u0, u1 = u[i], u[i + 1]
        z0, z1 = df[i] - u0 * total(s0), df[i + 1] - u1 * total(s1)
        if known:
            z0, z1 = z0 * u0 / a[i], z1 * u1 / a[i + 1]
        else:
            s0 = s1 = zero
            for k in range(0, width, lanes):
                x = load(v, k)
                s0, s1 = multiply_add(load(e0, k), x, s0), multiply_add(load(e1, k), x, s1)
            n0, n1 = total(s0), total(s1)
            z0, z1 = z0 / n0 if n0 > 0 else n0, z1 / n1 if n1 > 0 else n1
        df[i] = df[i + 1] = real(0)
        p0, p1, q0, q1 = splat(-u0), splat(-u1), splat(-z0), splat(-z1)
        for k in range(0, width, lanes):
            x, w, c0, c1 = load(y, k), load(v, k), load(e0, k), load(e1, k)
            store(dg, k, multiply_add(c1, q1, multiply_add(c0, q0, load(dg, k))))
            store(out0, k, multiply_add(c0, multiply_add(x, p0, w * q0), load(out0, k)))
            store(out1, k, multiply_add(c1, multiply_add(x, p1, w * q1), load(out1, k)))
    for k in range(0, width, lanes):
        store(dg, k, load(dg, k) * load(v, k))


@inner
def _newest_mark(marks: Any, t: int) -> int:
    """The last iteration up to t that was made in the log domain, or -1."""
    while t >= 0 and marks[1 + t] == 0:
        t -= 1
    return t


@inner(fastmath=_FAST)
def _before(kept_v: Any, marks: Any, t: int, cols: int, g: Any, to: Any) -> None:
    """``exp(g_{t-1} - g)``, of scalings that have another reference."""
    since = _newest_mark(marks, t - 1)
    for j in range(cols):
        apart = kept_v[since * cols + j] if since >= 0 else to.dtype.type(0)
        if t > 0 and since < t - 1:
            apart += math.log(kept_v[(t - 1) * cols + j])
        to[j] = exponential(apart - g[j])


@inner(fastmath=_FAST)
def _backward(
    gradient: Any, logits: Any, row_marginals: Any, col_marginals: Any, given: bool, kept_u: Any, kept_v: Any,
    made: Any, temperature: float, iterations: int, out: Any,
    rows: int, cols: int, first: int, last: int, memory: Any,
) -> None:  # fmt: skip
    """Blocks ``first .. last``; see ``sinkhorn_backward`` of the reference for the mathematics.

    The softmaxes are ``S = E u_t / (E^T u_t)`` and ``R = E v_{t-1} / (E v_{t-1})``: a pass over the kernel
    per iteration, and no exponentials but one of each entry for every reference.
    """
    real = out.dtype.type
    lanes = WIDTH // out.itemsize
    scale, inverse = real(temperature), real(1.0 / temperature)
    width, height, lines = _up(cols, lanes), _up(rows, _ROWS), _up(rows, lanes)
    kernel = memory
    gathered = kernel + height * width
    sums = gathered + height * width
    b, v, before = sums + width, sums + 2 * width, sums + 3 * width
    dg, y, start = sums + 4 * width, sums + 5 * width, sums + 6 * width
    a, u, df = start + width, start + width + lines, start + width + 2 * lines
    for line in (kernel, gathered):
        _fill(line + rows * width, (height - rows) * width, real(0))
    for line in (b, v, before):
        _fill(line + cols, width - cols, real(1))
    for line in (a, u):
        _fill(line + rows, lines - rows, real(1))
    _fill(df, lines, real(0))
    for block in range(first, last):
        source = logits + block * rows * cols
        result = out + block * rows * cols
        marks = made + block * (1 + iterations)
        block_u, block_v = kept_u + block * iterations * rows, kept_v + block * iterations * cols
        _copy_or_fill(a, rows, row_marginals + block * rows, given, real(1))
        _copy_or_fill(b, cols, col_marginals + block * cols, given, real(rows / cols))
        newest = marks[0] - 1
        since = newest + 1
        for t in range(newest, -1, -1):
            if t < since:
                since = _newest_mark(marks, t)
                if since < 0:
                    _first_kernel(source, scale, rows, cols, width, kernel, sums)
                    _fill(start, width, real(1))
                else:
                    f, g = block_u + since * rows, block_v + since * cols
                    _kernel_at(source, scale, rows, cols, width, f, g, kernel, sums)
                    _quotients(b, sums, width, start)
            at_reference = t == since
            _copy_or_fill(u, rows, block_u + t * rows, not at_reference, real(1))
            _copy_or_fill(v, cols, start if at_reference else block_v + t * cols, True, real(1))
            if t == newest:
                _start_gradient(
                    gradient + block * rows * cols, kernel, rows, cols, width, u, v, gathered, df, dg
                )
            for j in range(width):
                y[j] = dg[j] * v[j] / b[j]
            if at_reference:
                _before(block_v, marks, t, cols, block_v + t * cols, before)
            else:
                last_v = start if t - 1 == since else block_v + (t - 1) * cols
                _copy_or_fill(before, cols, last_v, True, real(1))
            _reverse_step(kernel, height, width, a, u, before, not at_reference, df, dg, y, gathered)
        for i in range(rows):
            line = gathered + i * width
            if newest >= 0:
                for j in range(cols):
                    result[i * cols + j] = line[j] * inverse
            else:
                _fill(result + i * cols, cols, real(np.nan))


@inner
def _needed(rows: int, cols: int, lanes: int, kernels: int) -> int:
    """Numbers that a call works on: kernels, and lines of rows and columns."""
    width, height, lines = _up(cols, lanes), _up(rows, _ROWS), _up(rows, lanes)
    return kernels * height * width + 7 * width + 4 * lines


def _entries(real: Any) -> tuple[Any, Any]:
    """``forward`` and ``backward`` of logits of the type ``real``, which take addresses."""
    lanes = WIDTH // np.dtype(real).itemsize

    @partial(compiled, fastmath=_FAST)
    def forward(
        logits: int, row_marginals: int, col_marginals: int, temperature: float, iterations: int,
        tolerance: float, plan: int, kept_u: int, kept_v: int, made: int, rows: int, cols: int,
        first: int, last: int,
    ) -> None:  # fmt: skip
        """Plans of blocks ``first .. last`` of contiguous logits ``(B, rows, cols)``.

        Marginals are contiguous; without their addresses (0) they are 1 and R / C. ``kept_u`` ``(B,
        iterations, rows)``, ``kept_v`` and ``made`` ``(B, 1 + iterations)``, in int32, may be 0, too.
        """
        zero = real(0)
        memory = buffer(_needed(rows, cols, lanes, 1) * WIDTH // lanes)
        _forward(
            scratch_at(logits, zero), scratch_at(row_marginals, zero), scratch_at(col_marginals, zero),
            row_marginals != 0, temperature, iterations, tolerance, scratch_at(plan, zero),
            scratch_at(kept_u, zero), scratch_at(kept_v, zero), scratch_at(made, np.int32(0)), made != 0,
            rows, cols, first, last, scratch(memory, zero),
        )  # fmt: skip
        still_needed(memory)

    @partial(compiled, fastmath=_FAST)
    def backward(
        gradient: int, logits: int, row_marginals: int, col_marginals: int, kept_u: int, kept_v: int,
        made: int, temperature: float, iterations: int, out: int, rows: int, cols: int, first: int, last: int,
    ) -> None:  # fmt: skip
        """Gradients of blocks ``first .. last``, from what ``forward`` kept."""
        zero = real(0)
        memory = buffer(_needed(rows, cols, lanes, 2) * WIDTH // lanes)
        _backward(
            scratch_at(gradient, zero), scratch_at(logits, zero), scratch_at(row_marginals, zero),
            scratch_at(col_marginals, zero), row_marginals != 0, scratch_at(kept_u, zero),
            scratch_at(kept_v, zero), scratch_at(made, np.int32(0)), temperature, iterations,
            scratch_at(out, zero), rows, cols, first, last, scratch(memory, zero),
        )  # fmt: skip
        still_needed(memory)

    return forward, backward


forward_single, backward_single = _entries(np.float32)
forward_double, backward_double = _entries(np.float64)
