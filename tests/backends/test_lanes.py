"""Registers as values: one, and several one behind the other, do what NumPy does entry by entry."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba")

from numba import njit
from numba.core.errors import TypingError

from nmsolve.backends.cpu._numba import lanes as registers
from nmsolve.backends.cpu._numba.compiled import inner
from nmsolve.backends.cpu._numba.lanes import WIDTH
from nmsolve.backends.cpu._numba.memory import load, load_four, store, store_four
from nmsolve.backends.cpu._numba.scratch import buffer, retyped, scratch, still_needed

DTYPES = (np.float32, np.float64)


def sample(dtype: type, rows: int, seed: int) -> np.ndarray:
    lanes = WIDTH // np.dtype(dtype).itemsize
    return np.random.default_rng(seed).integers(-9, 9, (rows, lanes)).astype(dtype) / 4


@njit
def _mixed(a: object, b: object, out: object, step: int) -> None:
    lanes = WIDTH // a.itemsize
    x, y = load_four(a, 0, step), load(b, 0)
    store_four(out, 0, lanes, x + y)
    store_four(out, 4 * lanes, lanes, y - x)
    store_four(out, 8 * lanes, lanes, registers.multiply_add(y, x, y))
    store_four(out, 12 * lanes, lanes, registers.minimum(x, y))
    store_four(out, 16 * lanes, lanes, registers.maximum(y, x))
    store_four(out, 20 * lanes, lanes, registers.select(x > y, x, registers.four(y)))
    store(out, 24 * lanes, registers.sum_of_four(x))
    store(out, 25 * lanes, registers.add_squares(x, y))
    store(out, 26 * lanes, registers.count_equal(x, registers.four(y), y))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("apart", [1, 3])
def test_four_registers_beside_one(dtype: type, apart: int) -> None:
    a, b = sample(dtype, 4 * apart, 0), sample(dtype, 1, 1)
    a[0] = b
    out = np.empty((27, a.shape[1]), dtype)
    _mixed(a.ravel(), b.ravel(), out.ravel(), apart * a.shape[1])
    x = a[::apart][:4]
    wanted = [x + b, b - x, b * x + b, np.minimum(x, b), np.maximum(x, b), np.maximum(x, b)]
    wanted += [x.sum(0, keepdims=True), (x * x).sum(0) + b, (x == b).sum(0) + b]
    np.testing.assert_array_equal(out, np.concatenate(wanted))


@njit
def _extremes(a: object, b: object) -> object:
    return registers.minimum(a, b), registers.maximum(a, b)


def test_extremes_of_two_numbers() -> None:
    for a, b in ((3, -2), (-1.5, 2), (np.int32(4), 9), (np.float32(0.1), 0.2), (5, 5)):
        assert _extremes(a, b) == (min(a, b), max(a, b))


@njit
def _unlike(a: object, b: object) -> None:
    store(a, 0, load(a, 0) + load(b, 0))


def test_registers_that_do_not_fit_are_refused() -> None:
    a, b = (sample(dtype, 1, 0).ravel() for dtype in DTYPES)
    with pytest.raises(TypingError):
        _unlike(a, b)


@inner
def _fill(memory: object, count: int) -> object:
    numbers = scratch(memory, np.float32(0))
    whole = retyped(numbers + count, np.int64(0))
    for k in range(count):
        numbers[k] = k
        whole[k] = -k
    return numbers, whole


@njit
def _filled(count: int) -> object:
    memory = buffer(count * 12)
    numbers, whole = _fill(memory, count)
    sums = 0.0, 0
    for k in range(count):
        sums = sums[0] + numbers[k], sums[1] + whole[k]
    first = memory.ctypes.data
    last = first + memory.size
    still_needed(memory)
    return sums, first, last


def test_scratch_of_several_types_in_one_buffer() -> None:
    """What is written as one type is not overwritten as the other, and a cache line is left to align in."""
    for count in (16, 48):
        sums, first, last = _filled(count)
        total = count * (count - 1) / 2
        assert sums == (total, -total)
        assert last - (first + WIDTH - 1) // WIDTH * WIDTH >= count * 12
