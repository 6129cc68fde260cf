r"""Pairs of float16 in one register, as int32 tensors: two entries an instruction on NVIDIA GPUs.

Triton keeps a float16 in a register of its own, so the pairs' instructions are written as PTX; the
interpreter computes the same. The low half comes first.
"""

import triton
import triton.language as tl
from nmsolve.kernels._tile import INTERPRETED, quotient

HALF = tl.constexpr(0x38003800)  # a pair of 1/2
MINUS_HALF = tl.constexpr(-0x47FF4800)  # of -1/2: 0xB800B800


@triton.jit
def reciprocal(x):
    """1 / x for float32 to a unit in the last place."""
    if INTERPRETED:
        return quotient(1.0, x)
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def halves(x):
    """Both halves of a pair as float16."""
    low = x.to(tl.int16).to(tl.float16, bitcast=True)
    return low, (x >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def low_of(x):
    """The low half of a pair as float32."""
    low, _ = halves(x)
    return low.to(tl.float32)


@triton.jit
def high_of(x):
    """The high half of a pair as float32."""
    _, high = halves(x)
    return high.to(tl.float32)


@triton.jit
def packed(low, high):
    """Two float16 as a pair, where interpreted."""
    high = high.to(tl.int16, bitcast=True).to(tl.int32)
    return (low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (high << 16)


@triton.jit
def pair(low, high):
    """Two float32 rounded to a pair."""
    if INTERPRETED:
        return packed(low.to(tl.float16), high.to(tl.float16))
    return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.int32, True, 1)


@triton.jit
def add(x, y):
    if INTERPRETED:
        x_low, x_high = halves(x)
        y_low, y_high = halves(y)
        return packed(x_low + y_low, x_high + y_high)
    return tl.inline_asm_elementwise("add.f16x2 $0, $1, $2;", "=r,r,r", [x, y], tl.int32, True, 1)


@triton.jit
def multiply_add(x, y, z):
    """x y + z, rounded once."""
    if INTERPRETED:
        return pair(low_of(x) * low_of(y) + low_of(z), high_of(x) * high_of(y) + high_of(z))
    return tl.inline_asm_elementwise("fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [x, y, z], tl.int32, True, 1)


@triton.jit
def multiply_add_clipped(x, y, z):
    """x y + z, rounded once, clipped to [0, 1]."""
    if INTERPRETED:
        low = low_of(x) * low_of(y) + low_of(z)
        high = high_of(x) * high_of(y) + high_of(z)
        return pair(tl.minimum(tl.maximum(low, 0.0), 1.0), tl.minimum(tl.maximum(high, 0.0), 1.0))
    return tl.inline_asm_elementwise(
        "fma.rn.sat.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [x, y, z], tl.int32, True, 1
    )


@triton.jit
def less_square(x):
    """x - x^2, rounded once: no product is left that the assembler might or might not contract with a sum."""
    if INTERPRETED:
        return multiply_add(x ^ -0x7FFF8000, x, x)
    minus = tl.inline_asm_elementwise("neg.f16x2 $0, $1;", "=r,r", [x], tl.int32, True, 1)
    return multiply_add(minus, x, x)


@triton.jit
def fold(x, y):
    """The pair (x.low + x.high, y.low + y.high)."""
    if INTERPRETED:
        x_low, x_high = halves(x)
        y_low, y_high = halves(y)
        return packed(x_low + x_high, y_low + y_high)
    low = tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [x, y], tl.int32, True, 1)
    high = tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [x, y], tl.int32, True, 1)
    return add(low, high)


@triton.jit
def add_both(low, high, more_low, more_high):
    return low + more_low, high + more_high


@triton.jit
def sum_of(x, AXIS: tl.constexpr):
    """Sums of pairs along an axis, which stays."""
    if INTERPRETED:
        low, high = tl.reduce(halves(x), AXIS, add_both, keep_dims=True)
        return packed(low, high)
    return tl.reduce(x, AXIS, add, keep_dims=True)


@triton.jit
def split_cols(x):
    """The columns with even and those with odd numbers of a lane, of a tile or of a column vector."""
    shape: tl.constexpr = x.shape
    x = tl.reshape(x, [shape[0], shape[1] // 2, 2, shape[2], shape[3], shape[4]])
    return tl.split(tl.permute(x, [0, 1, 3, 4, 5, 2]))


@triton.jit
def join_cols(even, odd):
    """What :func:`split_cols` took apart."""
    x = tl.permute(tl.join(even, odd), [0, 1, 5, 2, 3, 4])
    shape: tl.constexpr = x.shape
    return tl.reshape(x, [shape[0], 2 * shape[1], shape[3], shape[4], shape[5]])
