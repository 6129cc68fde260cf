"""What the arithmetic instructions of PTX compute, on arrays with one value per thread.

Every function takes and gives arrays of the instruction's own type; ``u32`` and its like are NumPy's types.
The oracles of tests/emulator/test_arithmetic.py are integers and fractions.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
s8, s16, s32, s64 = np.int8, np.int16, np.int32, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64

Array = np.ndarray

TYPES: dict[str, type] = {
    "u8": u8, "u16": u16, "u32": u32, "u64": u64, "s8": s8, "s16": s16, "s32": s32, "s64": s64,
    "f16": f16, "f32": f32, "f64": f64, "pred": np.bool_,
}  # fmt: skip
"""Type of PTX -> type of NumPy; bits of no type (``.b32``) are taken as unsigned."""

UNSIGNED: dict[int, type] = {1: u8, 2: u16, 4: u32, 8: u64}
"""Bytes -> the unsigned type of that size."""


# --- floating point -----------------------------------------------------------------------------------------


def ftz(x: Array) -> Array:
    """``.ftz``: subnormal numbers of float32 become zeros of the same sign."""
    small = np.abs(x) < f32(2.0**-126)
    return np.where(small, np.copysign(f32(0), x), x) if small.any() else x


def fma32(a: Array, b: Array, c: Array) -> Array:
    """``a b + c`` rounded once.

    The product of two float32 is exact in float64. Rounding the sum twice is wrong only where the first
    rounding makes a tie of the second or the result is subnormal: there the sum is rounded to odd first.
    """
    product, c = np.multiply(a, b, dtype=f64), c.astype(f64)
    total = product + c
    ties = (total.view(s64) & 0x1FFFFFFF) == 0x10000000
    subnormal = (np.abs(total) < 2.0**-125) & (total != 0)
    if ties.any() or subnormal.any():
        total = _odd_sum(product, c)
    return total.astype(f32)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """``a b + c`` rounded once, after Boldo and Melquiond (IEEE Transactions on Computers 57, 2008).

    Where exponents are extreme, and the error terms of the method not exact, as fractions one by one.
    """
    high, low = _two_product(a, b)
    top, rest = _two_sum(c, low)
    upper, lower = _two_sum(high, top)
    result = upper + _odd_sum(rest, lower)
    large = np.maximum(np.maximum(np.abs(a), np.abs(b)), np.abs(c)) > 2.0**500
    small = ((np.abs(high) < 2.0**-900) & (a != 0) & (b != 0)) | (high == 0)
    for k in np.flatnonzero(large | small | ~np.isfinite(result)):
        result[k] = _fma_of_fractions(float(a[k]), float(b[k]), float(c[k]))
    return result


def _fma_of_fractions(a: float, b: float, c: float) -> float:
    if a == 0 or b == 0 or not np.isfinite([a, b, c]).all():
        return float(f64(a) * f64(b) + f64(c))
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        return a * b + c  # the sign of a zero
    try:
        return float(exact)
    except OverflowError:
        return float(np.copysign(np.inf, 1.0 if exact > 0 else -1.0))


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded sum and its error."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded product and its error, by Dekker's splitting."""
    product = a * b
    wide_a, wide_b = a * 134217729.0, b * 134217729.0
    a_high, b_high = wide_a - (wide_a - a), wide_b - (wide_b - b)
    a_low, b_low = a - a_high, b - b_high
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _odd_sum(a: Array, b: Array) -> Array:
    """``a + b`` in float64, rounded to odd: an inexact result has its last bit set."""
    total, error = _two_sum(a, b)
    even = (error != 0) & ((total.view(s64) & 1) == 0) & np.isfinite(total)
    step = np.where((error > 0) == (total > 0), 1, -1).astype(s64)
    return np.where(even, (total.view(s64) + step).view(f64), total)


def _odd_single(x: Array) -> Array:
    """float64 as float32, rounded to odd: rounded once more, to a half type, it is rounded once."""
    near = x.astype(f32)
    wide = near.astype(f64)
    bits = near.view(u32) - (np.abs(wide) > np.abs(x)).astype(u32)  # towards zero
    odd = np.where((wide != x) & np.isfinite(x), bits | u32(1), bits)
    return np.where(np.isnan(x) | (wide == x), near, odd.view(f32))


def fma_half(a: Array, b: Array, c: Array, kind: str) -> Array:
    """``a b + c`` of f16 or bf16 bits rounded once, as bits; every NaN becomes the canonical one."""
    wide, narrow = (from_f16, to_f16) if kind == "f16" else (from_bf16, to_bf16)
    x, y, z = (wide(operand).astype(f64) for operand in (a, b, c))
    rounded = narrow(_odd_single(_odd_sum(x * y, z)))
    return np.where(np.isnan(x * y + z), u16(0x7FFF), rounded)


def arithmetic_half(how: str, a: Array, b: Array, kind: str) -> Array:
    """The sum, difference or product of f16 or bf16 bits."""
    one = np.full_like(a, 0x3C00 if kind == "f16" else 0x3F80)
    sign = u16(0x8000)
    if how == "mul":
        return fma_half(a, b, np.full_like(a, sign), kind)  # -0, which changes no product
    return fma_half(b ^ sign if how == "sub" else b, one, a, kind)


def clipped_half(bits: Array, kind: str) -> Array:
    """f16 or bf16 bits clipped to [0, 1]; NaN becomes 0."""
    wide, one = (from_f16, 0x3C00) if kind == "f16" else (from_bf16, 0x3F80)
    value = wide(bits)
    return np.where(value > 0, np.where(value >= 1, u16(one), bits), u16(0))


def both_halves(function: Callable[..., Array], *operands: Array) -> Array:
    """A function of 16 bits on both halves of 32."""
    low = function(*((operand & u32(0xFFFF)).astype(u16) for operand in operands))
    high = function(*((operand >> u32(16)).astype(u16) for operand in operands))
    return low.astype(u32) | (high.astype(u32) << u32(16))


def fmax(a: Array, b: Array) -> Array:
    """``max``: the number where the other is NaN; +0 is larger than -0."""
    result = np.fmax(a, b)
    if not result.all():
        bits = UNSIGNED[result.itemsize]
        result = np.where((a == 0) & (b == 0), (a.view(bits) & b.view(bits)).view(result.dtype), result)
    return result


def fmin(a: Array, b: Array) -> Array:
    """``min``: the number where the other is NaN; -0 is smaller than +0."""
    result = np.fmin(a, b)
    if not result.all():
        bits = UNSIGNED[result.itemsize]
        result = np.where((a == 0) & (b == 0), (a.view(bits) | b.view(bits)).view(result.dtype), result)
    return result


class Noise:
    """Whether the approximate instructions err by as much as NVIDIA's documentation allows."""

    on = False


def _approximate(exact: Array, ulps: int) -> Array:
    """``exact`` (float64) as float32; with :class:`Noise` up to ``ulps`` units in the last place beside it.

    The error is a function of the exact value: lanes that hold copies agree, as they do on a GPU.
    """
    result = exact.astype(f32)
    if not Noise.on:
        return result
    moved = np.isfinite(result) & (np.abs(result) > 2.0**-120)
    mixed = (np.asarray(exact, f64).view(u64) * u64(0x9E3779B97F4A7C15)) >> u64(40)
    step = ((mixed % u64(2 * ulps + 1)).astype(s64) - ulps).astype(s32)
    return np.where(moved, (result.view(s32) + step).view(f32), result)


def ex2_approx_ftz(x: Array) -> Array:
    return ftz(_approximate(np.exp2(ftz(x).astype(f64)), 2))


def ex2_approx(x: Array) -> Array:
    return _approximate(np.exp2(x.astype(f64)), 2)


def lg2_approx(x: Array) -> Array:
    return _approximate(np.log2(x.astype(f64)), 1)


def lg2_approx_ftz(x: Array) -> Array:
    return lg2_approx(ftz(x))


def rcp_approx(x: Array) -> Array:
    return _approximate(1.0 / x.astype(f64), 1)


def rcp_approx_ftz(x: Array) -> Array:
    return ftz(rcp_approx(ftz(x)))


def rsqrt_approx(x: Array) -> Array:
    return _approximate(1.0 / np.sqrt(x.astype(f64)), 2)


def rsqrt_approx_ftz(x: Array) -> Array:
    return rsqrt_approx(ftz(x))


def sqrt_approx(x: Array) -> Array:
    return _approximate(np.sqrt(x.astype(f64)), 1)


def sqrt_approx_ftz(x: Array) -> Array:
    return ftz(sqrt_approx(ftz(x)))


def div_full(a: Array, b: Array) -> Array:
    return _approximate(a.astype(f64) / b.astype(f64), 2)


def div_full_ftz(a: Array, b: Array) -> Array:
    return ftz(div_full(ftz(a), ftz(b)))


def div_approx(a: Array, b: Array) -> Array:
    """A reciprocal and a product: where the reciprocal of ``b`` underflows 0, or NaN for infinite ``a``."""
    result = _approximate(a.astype(f64) / b.astype(f64), 2)
    large = (np.abs(b) > f32(2.0**126)) & np.isfinite(b)
    return np.where(large, np.where(np.isinf(a), f32(np.nan), np.copysign(f32(0), result)), result)


def div_approx_ftz(a: Array, b: Array) -> Array:
    return ftz(div_approx(ftz(a), ftz(b)))


# --- conversions --------------------------------------------------------------------------------------------


def to_int(x: Array, kind: type) -> Array:
    """``cvt.rzi``: towards zero; what does not fit becomes the nearest that does, NaN becomes 0."""
    limits = np.iinfo(kind)
    whole = np.trunc(x.astype(f64))
    whole = np.where(np.isnan(whole), 0, whole)
    top = whole >= float(limits.max)
    inside: Array = np.clip(np.where(top, 0, whole), float(limits.min), float(limits.max)).astype(kind)
    return np.where(top, kind(limits.max), inside)


def from_bf16(x: Array) -> Array:
    return (x.astype(u32) << u32(16)).view(f32)


def to_bf16(x: Array) -> Array:
    """float32 to bfloat16 (its bits), ties to even; every NaN becomes the canonical one."""
    bits = x.view(u32)
    rounded = (bits + (((bits >> u32(16)) & u32(1)) + u32(0x7FFF))) >> u32(16)
    return np.where(np.isnan(x), u16(0x7FFF), rounded.astype(u16))


def from_f16(x: Array) -> Array:
    """float16 numbers of their bits."""
    return x.astype(u16).view(f16)


def to_f16(x: Array) -> Array:
    """float32 to float16 (its bits), ties to even."""
    return x.astype(f16).view(u16)


# --- integers and bits --------------------------------------------------------------------------------------


def shift(x: Array, amount: Array, left: bool) -> Array:
    """``shl`` and ``shr``: the amount is unsigned, and one past the width shifts everything out."""
    bits = x.itemsize * 8
    short = np.minimum(amount.astype(s64), bits - 1).astype(x.dtype)
    if x.dtype.kind == "i" and not left:
        return x >> short
    return np.where(amount < bits, x << short if left else x >> short, x.dtype.type(0))


def bfe(x: Array, position: Array, length: Array) -> Array:
    """``bfe``: ``length`` bits from ``position`` on; signed types extend the field's last bit.

    Bits past the top are the top bit of a signed number, and 0 of an unsigned one.
    """
    bits = x.itemsize * 8
    position, length = position.astype(s64) & 255, np.minimum(length.astype(s64) & 255, bits)
    above = (bits - length).astype(u32)
    if x.dtype.kind == "u":
        return shift(shift(shift(x, position, left=False), above, left=True), above, left=False)
    unsigned = UNSIGNED[x.itemsize]
    raised = shift(shift(x, position, left=False).view(unsigned), above, left=True).view(x.dtype)
    return np.where(length == 0, x.dtype.type(0), shift(raised, above, left=False))


def bfi(a: Array, b: Array, position: Array, length: Array) -> Array:
    """``bfi.b32``: the low ``length`` bits of ``a`` in ``b`` from ``position`` on."""
    position, length = (np.minimum(x.astype(u64) & u64(255), u64(32)) for x in (position, length))
    mask = ((((u64(1) << length) - u64(1)) << position) & u64(0xFFFFFFFF)).astype(u32)
    return (((a.astype(u64) << position) & u64(0xFFFFFFFF)).astype(u32) & mask) | (b & ~mask)


def prmt(a: Array, b: Array, selector: Array) -> Array:
    """``prmt.b32``: four bytes of the eight of ``a`` and ``b``; bit 3 of a selector repeats a byte's sign."""
    both = a.astype(u64) | (b.astype(u64) << u64(32))
    result = np.zeros_like(a)
    for k in range(4):
        choice = (selector >> u32(4 * k)) & u32(15)
        byte = ((both >> (u64(8) * (choice & u32(7)).astype(u64))) & u64(255)).astype(u32)
        byte = np.where(choice & u32(8), np.where(byte & u32(128), u32(255), u32(0)), byte)
        result |= byte << u32(8 * k)
    return result


def popc(x: Array) -> Array:
    return np.bitwise_count(x).astype(u32)


def clz(x: Array) -> Array:
    """Zeros above the highest bit that is set, of 32 bits."""
    return (32 - np.frexp(x.astype(f64))[1]).astype(u32)


def mul_hi(a: Array, b: Array) -> Array:
    """The upper 32 bits of the product of 32-bit integers."""
    wide = s64 if a.dtype.kind == "i" else u64
    return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)


def div_trunc(a: Array, b: Array) -> Array:
    """Integers, towards zero."""
    quotient = np.floor_divide(a, b)
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient * b != a) & ((a < 0) != (b < 0))).astype(a.dtype)
    return quotient


def in_halves(a: Array, b: Array, *, subtract: bool) -> Array:
    """``add.s16x2`` and ``sub.s16x2``: both halves of 32 bits, each modulo 2^16."""
    low, high = u32(0xFFFF), u32(16)
    if subtract:
        return ((a & low) - (b & low)) & low | ((((a >> high) - (b >> high)) & low) << high)
    return ((a & low) + (b & low)) & low | ((((a >> high) + (b >> high)) & low) << high)


def in_pairs(function: Callable[..., Array], *operands: Array) -> Array:
    """``.f32x2``: a function of float32 on both halves of 64 bits."""
    return function(*(operand.view(f32) for operand in operands)).view(u64)
