"""The interpreter that the kernel tests rely on notices what it should."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, offset, STRIDE: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0) * STRIDE + tl.arange(0, SIZE)
    tl.store(y_ptr + at, tl.load(x_ptr + at + offset, mask=at < n), mask=at < n)


@triton.jit
def _larger(a, i, b, j):
    other = (b > a) | ((b == a) & (j < i))
    return tl.where(other, b, a), tl.where(other, j, i)


@triton.jit
def _argmax_kernel(x_ptr, value_ptr, index_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    x = tl.load(x_ptr + i * COLS + j)
    value, index = tl.reduce((x, tl.broadcast_to(j, (ROWS, COLS))), 1, _larger)
    tl.store(value_ptr + tl.arange(0, ROWS), value)
    tl.store(index_ptr + tl.arange(0, ROWS), index)


@triton.jit
def _assert_kernel(x_ptr):
    tl.device_assert(tl.load(x_ptr) > 0, "not positive")


def test_copies() -> None:
    x, y = torch.arange(10.0), torch.zeros(10)
    _copy_kernel[(3,)](x, y, 10, 0, STRIDE=4, SIZE=4)
    assert torch.equal(x, y)


def test_out_of_bounds() -> None:
    x, y = torch.arange(10.0), torch.zeros(10)
    with pytest.raises(InterpreterError, match="load out of bounds: 1 elements"):
        _copy_kernel[(3,)](x, y, 10, 1, STRIDE=4, SIZE=4)
    with pytest.raises(InterpreterError, match="store out of bounds: 2 elements"):
        _copy_kernel[(3,)](torch.arange(12.0), y, 12, 0, STRIDE=4, SIZE=4)


def test_races() -> None:
    x, y = torch.arange(10.0), torch.zeros(10)
    with pytest.raises(InterpreterError, match="store to the same address"):
        _copy_kernel[(3,)](x, y, 10, 0, STRIDE=3, SIZE=4)


def test_custom_reductions() -> None:
    x = torch.randint(0, 4, (8, 16), generator=torch.Generator().manual_seed(0)).float()
    value, index = torch.zeros(8), torch.zeros(8, dtype=torch.int32)
    _argmax_kernel[(1,)](x, value, index, ROWS=8, COLS=16)
    assert torch.equal(value, x.amax(1))
    assert torch.equal(index.long(), (x == x.amax(1, keepdim=True)).int().argmax(1))


def test_assertions() -> None:
    _assert_kernel[(1,)](torch.ones(1))
    with pytest.raises(Exception, match="not positive"):
        _assert_kernel[(1,)](-torch.ones(1))
