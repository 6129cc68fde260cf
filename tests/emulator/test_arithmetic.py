"""The arithmetic of the emulator against integers, fractions, and what the PTX manual writes out."""

from __future__ import annotations

import bisect
import functools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from emulator import arithmetic as a
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("numpy", minversion="2.0", reason="the emulator promotes integers as NumPy 2 does")
unhurried = settings(deadline=None)  # another process may have the core
words = st.integers(0, 2**32 - 1)
small = st.integers(0, 300)


@pytest.fixture(autouse=True)
def _no_warnings():
    with np.errstate(all="ignore"):
        yield


def one(kind: type, value: object) -> np.ndarray:
    return np.array([value], kind)


def word(value: int, kind: type = np.uint32) -> np.ndarray:
    """The bits of a 32-bit integer as ``kind``."""
    return np.array([value], np.uint32).view(kind)


def nearest(exact: Fraction, kind: type) -> float | None:
    """``exact`` rounded to the nearest ``kind``, ties to even; None where it may overflow."""
    if kind is np.float64:
        return None if abs(exact) >= Fraction(2) ** 1023 else float(exact)
    if abs(exact) >= Fraction(2) ** 127:
        return None
    guess = np.float32(float(exact))
    around = (guess, np.nextafter(guess, np.float32(np.inf)), np.nextafter(guess, np.float32(-np.inf)))
    return float(min(around, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(np.uint32)) & 1)))


def floats(bits: int) -> st.SearchStrategy[float]:
    """Any, and those near each other, whose sums cancel."""
    near = st.builds(
        lambda mantissa, exponent: float(mantissa) * 2.0**exponent,
        st.integers(-(2 ** (23 if bits == 32 else 52)), 2 ** (23 if bits == 32 else 52)),
        st.integers(-30, 5),
    )
    return near | st.floats(width=bits, allow_nan=False, allow_infinity=False)


# --- floating point -----------------------------------------------------------------------------------------


@given(floats(32), floats(32), floats(32))
@unhurried
@example(1 + 2.0**-12, 1 + 2.0**-12, 2.0**-60)  # rounding twice makes a tie
@example(1 + 2.0**-12, 1 + 3 * 2.0**-12, -(2.0**-60))
@example(2.0**-100, 2.0**-49, 2.0**-149)  # a subnormal result
def test_fma32_is_rounded_once(x: float, y: float, z: float) -> None:
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    expected = nearest(exact, np.float32)
    found = a.fma32(one(np.float32, x), one(np.float32, y), one(np.float32, z))[0]
    assert expected is None or found == np.float32(expected)


def test_rounding_twice_would_be_noticed() -> None:
    x, y = 1 + 2.0**-12, 1 + 2.0**-12
    twice = np.float32(np.float64(x) * np.float64(y) + 2.0**-60)
    assert a.fma32(one(np.float32, x), one(np.float32, y), one(np.float32, 2.0**-60))[0] != twice


@given(floats(64), floats(64), floats(64), st.integers(-2, 2))
@unhurried
@example(1.5 * 2.0**600, 2.0**300, 0.0, 1)  # too large to be split
@example(2.0**-600, 1.25 * 2.0**-450, 2.0**-1060, 1)
def test_fma64_is_rounded_once(x: float, y: float, z: float, cancel: int) -> None:
    product = x * y
    third = -product * (1 + cancel * 2.0**-52) if abs(product) < 1e300 and cancel else z
    expected = nearest(Fraction(x) * Fraction(y) + Fraction(third), np.float64)
    found = a.fma64(one(np.float64, x), one(np.float64, y), one(np.float64, third))[0]
    assert expected is None or found == expected


halves = st.integers(0, 0xFFFF)


def half_value(bits: int, kind: str) -> float:
    if kind == "f16":
        return float(np.array([bits], np.uint16).view(np.float16)[0])
    return float(word(bits << 16, np.float32)[0])


@functools.cache
def half_values(kind: str) -> list[float]:
    """All that are finite and not negative, at the numbers of their bits."""
    return [half_value(bits, kind) for bits in range(0x7C00 if kind == "f16" else 0x7F80)]


def nearest_half(exact: Fraction, kind: str) -> float:
    """``exact`` rounded to the nearest half number, ties to even."""
    values, size = half_values(kind), abs(exact)
    k = max(1, min(len(values) - 1, bisect.bisect_left(values, size)))
    near = min((k - 1, k), key=lambda at: (abs(Fraction(values[at]) - size), at & 1))
    return math.copysign(values[near], -1 if exact < 0 else 1)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@given(halves, halves, halves)
@unhurried
@example(0x3C01, 0x3C01, 0x8001)
@example(0x0001, 0x3800, 0x0000)  # half of the smallest subnormal number: a tie
@example(0x7BFF, 0x3C00, 0x0001)
@example(0x3F81, 0x3F81, 0x0080)  # bf16: rounded to float32 first it would be a tie
def test_halves_are_rounded_once(kind: str, x: int, y: int, z: int) -> None:
    numbers = [half_value(bits, kind) for bits in (x, y, z)]
    if not all(map(math.isfinite, numbers)):
        return
    a_, b, c = (one(np.uint16, bits) for bits in (x, y, z))
    p, q, r = map(Fraction, numbers)
    top = Fraction(65504) if kind == "f16" else Fraction(2) ** 127
    for exact, found in (
        (p * q + r, a.fma_half(a_, b, c, kind)),
        (p + q, a.arithmetic_half("add", a_, b, kind)),
        (p - q, a.arithmetic_half("sub", a_, b, kind)),
        (p * q, a.arithmetic_half("mul", a_, b, kind)),
    ):
        if abs(exact) < top:
            assert half_value(int(found[0]), kind) == nearest_half(exact, kind)


def test_halves_of_zeros_infinities_and_nan() -> None:
    """-0 - 0 is -0, 0 - 0 is 0, inf - inf and inf 0 are NaN."""
    for kind, inf in (("f16", 0x7C00), ("bf16", 0x7F80)):
        x, y = np.array([0x8000, 0, inf, inf], np.uint16), np.array([0, 0, inf, 0], np.uint16)
        assert a.arithmetic_half("sub", x, y, kind).tolist() == [0x8000, 0, 0x7FFF, inf]
        assert a.arithmetic_half("mul", x, y, kind).tolist() == [0x8000, 0, inf, 0x7FFF]
        assert a.arithmetic_half("add", x, x ^ 0x8000, kind).tolist() == [0, 0, 0x7FFF, 0x7FFF]


def test_halves_are_clipped_to_one() -> None:
    """-inf, -1, -0 and NaN become 0, what is above 1 becomes 1."""
    for kind, one_half, one, two, inf in (
        ("f16", 0x3800, 0x3C00, 0x4000, 0x7C00),
        ("bf16", 0x3F00, 0x3F80, 0x4000, 0x7F80),
    ):
        x = np.array([inf | 0x8000, one | 0x8000, 0x8000, 0x7FFF, 1, one_half, one, two, inf], np.uint16)
        assert a.clipped_half(x, kind).tolist() == [0, 0, 0, 0, 1, one_half, one, one, one]


def test_both_halves_of_a_word() -> None:
    found = a.both_halves(
        lambda x, y: a.arithmetic_half("add", x, y, "f16"), word(0x3C004000), word(0x3C00C000)
    )
    assert found.tolist() == [0x40000000]


def test_fma_of_infinities_nan_and_zeros() -> None:
    for fma, kind in ((a.fma32, np.float32), (a.fma64, np.float64)):
        x = np.array([np.inf, np.inf, 0.0, np.nan, -0.0, 1e30, 0.0], kind)
        y = np.array([1.0, 0.0, np.inf, 1.0, 1.0, 1e30, -1.0], kind)
        z = np.array([-np.inf, 1.0, 1.0, 1.0, -0.0, -np.inf, 0.0], kind)
        found = fma(x, y, z)
        assert np.array_equal(found, np.array([np.nan] * 4 + [0, -np.inf, 0], kind), equal_nan=True)
        assert np.signbit(found[4])
        assert not np.signbit(found[6])


def test_ftz_keeps_signs_and_normal_numbers() -> None:
    x = np.array([2.0**-126, 2.0**-127, -(2.0**-149), 0.0, np.inf, np.nan], np.float32)
    found = a.ftz(x)
    assert np.array_equal(found, np.array([2.0**-126, 0, 0, 0, np.inf, np.nan], np.float32), equal_nan=True)
    assert np.signbit(found[2])


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_extremes_take_the_number_and_order_zeros(kind: type) -> None:
    x = np.array([0.0, -0.0, np.nan, 1.0, -2.0, np.nan], kind)
    y = np.array([-0.0, 0.0, 2.0, np.nan, 3.0, np.nan], kind)
    largest, smallest = a.fmax(x, y), a.fmin(x, y)
    assert np.array_equal(largest, np.array([0, 0, 2, 1, 3, np.nan], kind), equal_nan=True)
    assert np.array_equal(smallest, np.array([0, 0, 2, 1, -2, np.nan], kind), equal_nan=True)
    assert not np.signbit(largest[:2]).any()
    assert np.signbit(smallest[:2]).all()


APPROXIMATE = {
    "ex2_approx": (np.exp2, 2), "ex2_approx_ftz": (np.exp2, 2), "lg2_approx": (np.log2, 1),
    "lg2_approx_ftz": (np.log2, 1), "rcp_approx": (np.reciprocal, 1), "rcp_approx_ftz": (np.reciprocal, 1),
    "rsqrt_approx": (lambda x: 1 / np.sqrt(x), 2), "rsqrt_approx_ftz": (lambda x: 1 / np.sqrt(x), 2),
    "sqrt_approx": (np.sqrt, 1), "sqrt_approx_ftz": (np.sqrt, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", APPROXIMATE)
@pytest.mark.parametrize("noise", [False, True])
def test_approximate_functions_err_within_their_bounds(name: str, noise: bool, monkeypatch) -> None:
    monkeypatch.setattr(a.Noise, "on", noise)
    x = np.random.default_rng(0).uniform(0.01, 30, 1000).astype(np.float32)
    exact, ulps = APPROXIMATE[name][0](x.astype(np.float64)), APPROXIMATE[name][1]
    found = getattr(a, name)(x)
    away = np.abs(found.astype(np.float64) - exact) / np.spacing(np.abs(exact.astype(np.float32)))
    assert away.max() <= (ulps + 0.51 if noise else 0.51)
    assert not noise or away.max() > 0.51
    assert np.array_equal(found, getattr(a, name)(x))  # copies of a value agree


def test_values_that_approximate_functions_name() -> None:
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -1.0, 2.0**-130], np.float32)
    inf, nan = np.inf, np.nan
    expected = {
        "ex2_approx_ftz": [1, 1, inf, 0, nan, 0.5, 1],
        "lg2_approx_ftz": [-inf, -inf, inf, nan, nan, nan, -inf],
        "lg2_approx": [-inf, -inf, inf, nan, nan, nan, -130],
        "rcp_approx_ftz": [inf, -inf, 0, 0, nan, -1, inf],
        "rsqrt_approx": [inf, -inf, 0, nan, nan, nan, 2.0**65],
    }
    for name, values in expected.items():
        assert np.array_equal(getattr(a, name)(special), np.array(values, np.float32), equal_nan=True), name


def test_approximate_division_of_large_divisors() -> None:
    x = np.array([1.0, np.inf, 6.0, -1.0, 1.0], np.float32)
    y = np.array([2.0**127, 2.0**127, 3.0, 2.0**127, np.inf], np.float32)
    assert np.array_equal(a.div_approx(x, y), np.array([0, np.nan, 2, 0, 0], np.float32), equal_nan=True)
    assert a.div_full(x, y)[0] == np.float32(2.0**-127)
    assert a.div_full_ftz(x, y)[0] == 0


# --- conversions --------------------------------------------------------------------------------------------


@given(st.floats(width=32), st.sampled_from(["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"]))
@unhurried
@example(float(2**31), "s32")
@example(float(2**63), "s64")
@example(float(2**64), "u64")
@example(-1.5, "u32")
def test_conversions_to_integers_saturate(x: float, name: str) -> None:
    kind = a.TYPES[name]
    limits = np.iinfo(kind)
    if np.isnan(x):
        expected = 0
    elif np.isinf(x):
        expected = limits.max if x > 0 else limits.min
    else:
        expected = min(max(int(x), int(limits.min)), int(limits.max))
    assert int(a.to_int(one(np.float32, x), kind)[0]) == expected


@given(words)
@unhurried
@example(0x7F800001)
@example(0x3F808000)
@example(0x3F818000)
def test_bfloat16_rounds_to_even(bits: int) -> None:
    x = word(bits, np.float32)
    found = a.to_bf16(x)
    if np.isnan(x[0]):
        assert found[0] == 0x7FFF
    else:
        assert found.view(np.int16)[0] == torch.from_numpy(x).bfloat16().view(torch.int16)[0].item()
    assert np.array_equal(a.to_bf16(a.from_bf16(found)), found)


@given(st.integers(0, 2**16 - 1))
@unhurried
def test_float16_and_back(bits: int) -> None:
    x = a.from_f16(np.array([bits], np.uint32))
    assert np.isnan(x[0]) or a.to_f16(x.astype(np.float32))[0] == bits


# --- integers and bits --------------------------------------------------------------------------------------


@given(words, words, st.booleans(), st.sampled_from([np.uint16, np.uint32, np.uint64, np.int32, np.int64]))
@unhurried
@example(0x80000000, 31, False, np.int32)
@example(0x80000000, 32, False, np.int32)
@example(1, 32, True, np.uint32)
@example(1, 2**32 - 1, True, np.uint64)
def test_shifts_past_the_width(value: int, amount: int, left: bool, kind: type) -> None:
    width = np.iinfo(kind).bits
    for n in (amount, amount % (2 * width)):
        x = np.array([value & ((1 << width) - 1)], np.uint64).astype(a.UNSIGNED[width // 8]).view(kind)
        expected = int(x[0]) << min(n, width) if left else int(x[0]) >> min(n, width)
        found = a.shift(x, np.array([n], np.uint32), left=left)
        assert int(found[0]) & ((1 << width) - 1) == expected & ((1 << width) - 1)


@given(st.integers(0, 2**64 - 1), small, small, st.sampled_from([np.uint32, np.int32, np.uint64, np.int64]))
@unhurried
@example(0x80000000, 31, 1, np.int32)
@example(0x80000000, 40, 3, np.int32)
@example(0xFF, 3, 0, np.int32)
def test_bfe(value: int, position: int, length: int, kind: type) -> None:
    """The loop of the manual."""
    width = np.iinfo(kind).bits
    value &= (1 << width) - 1
    p, n, top = position & 255, length & 255, width - 1
    sign = 0 if np.iinfo(kind).min == 0 or n == 0 else (value >> min(p + n - 1, top)) & 1
    expected = sum(((value >> (p + i)) & 1 if i < n and p + i <= top else sign) << i for i in range(width))
    x = np.array([value], a.UNSIGNED[width // 8]).view(kind)
    found = a.bfe(x, np.array([position], np.uint32), np.array([length], np.uint32))
    assert int(found[0]) & ((1 << width) - 1) == expected


@given(words, words, small, small)
@unhurried
def test_bfi(x: int, y: int, position: int, length: int) -> None:
    expected, p, n = y, position & 255, length & 255
    for i in range(n):
        if p + i < 32:
            expected = expected & ~(1 << (p + i)) | (((x >> i) & 1 if i < 32 else 0) << (p + i))
    assert int(a.bfi(word(x), word(y), word(position), word(length))[0]) == expected


@given(words, words, words)
@unhurried
def test_prmt(x: int, y: int, selector: int) -> None:
    source = [*x.to_bytes(4, "little"), *y.to_bytes(4, "little")]
    expected = []
    for k in range(4):
        choice = (selector >> (4 * k)) & 15
        byte = source[choice & 7]
        expected.append((255 if byte & 128 else 0) if choice & 8 else byte)
    assert int(a.prmt(word(x), word(y), word(selector))[0]) == int.from_bytes(bytes(expected), "little")


@given(words, words)
@unhurried
@example(0, 0)
@example(2**32 - 1, 2**32 - 1)
@example(0x80000000, 0xFFFFFFFF)
def test_words(x: int, y: int) -> None:
    assert int(a.popc(word(x))[0]) == x.bit_count()
    assert int(a.clz(word(x))[0]) == 32 - x.bit_length()
    assert int(a.mul_hi(word(x), word(y))[0]) == (x * y) >> 32
    signed = [v - (v >> 31 << 32) for v in (x, y)]
    assert int(a.mul_hi(word(x, np.int32), word(y, np.int32))[0]) == (signed[0] * signed[1]) >> 32
    low, high = x & 0xFFFF, x >> 16
    for sign in (1, -1):
        expected = (low + sign * (y & 0xFFFF)) & 0xFFFF | ((high + sign * (y >> 16)) & 0xFFFF) << 16
        assert int(a.in_halves(word(x), word(y), subtract=sign < 0)[0]) == expected


@given(st.integers(-(2**63) + 1, 2**63 - 1), st.integers(-(2**63), 2**63 - 1).filter(bool))
@unhurried
def test_division_is_towards_zero(x: int, y: int) -> None:
    expected = abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
    assert int(a.div_trunc(one(np.int64, x), one(np.int64, y))[0]) == expected


@given(floats(32), floats(32), floats(32), floats(32))
@unhurried
def test_pairs_are_two_of_each(x: float, y: float, z: float, w: float) -> None:
    first, second = (np.array(pair, np.float32) for pair in ((x, y), (z, w)))
    found = a.in_pairs(a.fma32, *(pair.view(np.uint64) for pair in (first, second, first)))
    assert np.array_equal(found.view(np.float32), a.fma32(first, second, first))
    found = a.in_pairs(np.subtract, first.view(np.uint64), second.view(np.uint64))
    assert np.array_equal(found.view(np.float32), first - second)
