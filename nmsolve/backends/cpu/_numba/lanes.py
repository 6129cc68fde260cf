"""Vector registers as values in Numba functions: 64 bytes side by side, one block of scores per lane.

Numba leaves vectorisation to LLVM's loop vectoriser, which prefers half-width registers on most AVX-512
machines and gives up on loops with two reductions. Here a register is a type of its own, :class:`Lanes`, with
LLVM's vector type behind it: the operators below are one instruction each where the machine has 64-byte
registers, and LLVM splits them into two (AVX2) or four (NEON, SSE) where it does not.

``float32`` and ``int32`` make 16 lanes, ``float64`` and ``int64`` eight; a comparison gives a mask of as
many lanes. :mod:`.memory` moves registers to and from memory.

Several registers one behind the other are a value too, with as many more lanes: what is done to four rows is
written, and compiled, once. Beside them one register stands for as many equal ones.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.typing import signature
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import lower_builtin, models, register_model

from nmsolve.backends.cpu._numba.emit import (
    I1,
    I32,
    I64,
    ORDERED,
    broadcast,
    call,
    intrinsic,
    parted,
    repeated,
    shuffle,
)

__all__ = [
    "WIDTH",
    "Lanes",
    "absolute",
    "add_squares",
    "bits_of",
    "count_equal",
    "count_ones",
    "four",
    "lane_mask",
    "lanes_of",
    "maximum",
    "minimum",
    "multiply_add",
    "power_of_two_scale",
    "select",
    "smallest",
    "splat",
    "sum_of_four",
    "total",
    "trailing_zeros",
    "vector_type",
]

WIDTH = 64
"""Bytes in a register."""


class Lanes(types.Type):
    """A register of ``count`` values of the Numba scalar type ``dtype``; booleans make a mask."""

    def __init__(self, dtype: Any, count: int) -> None:
        self.dtype = dtype
        self.count = count
        super().__init__(name=f"Lanes({dtype}, {count})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Lanes) -> None:
        element = I1 if fe_type.dtype == types.boolean else dmm.lookup(fe_type.dtype).get_value_type()
        super().__init__(dmm, fe_type, ir.VectorType(element, fe_type.count))


def lanes_of(dtype: Any) -> Lanes:
    return Lanes(dtype, 8 * WIDTH // dtype.bitwidth)


def mask_of(lanes: Lanes) -> Lanes:
    return Lanes(types.boolean, lanes.count)


def integers_of(lanes: Lanes) -> Lanes:
    return Lanes(types.int32 if lanes.count == 16 else types.int64, lanes.count)


def vector_type(context: Any, lanes: Lanes) -> ir.VectorType:
    return context.get_value_type(lanes)


def _longest(*kinds: Any) -> Any:
    """The type of what is made of these: of one register and several, several; None if they do not fit."""
    if not all(isinstance(kind, Lanes) and kind.dtype == kinds[0].dtype for kind in kinds):
        return None
    longest = max(kinds, key=lambda kind: kind.count)
    return longest if all(longest.count % kind.count == 0 for kind in kinds) else None


def _operator(
    op: Any, emit: Callable[[Any, Any, Any, bool], Any], *, masks: bool = False, compares: bool = False
) -> None:
    """Make ``a op b`` work on registers of one dtype; ``emit`` gets (builder, a, b, is float)."""

    class _Template(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) != 2 or not isinstance(args[0], Lanes):
                return None
            longest = _longest(*args)
            if longest is None or (longest.dtype == types.boolean and not masks):
                return None
            return signature(mask_of(longest) if compares else longest, *args)

    infer_global(op)(_Template)

    @lower_builtin(op, Lanes, Lanes)
    def _lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        a, b = (repeated(builder, value, sig.return_type.count) for value in args)
        return emit(builder, a, b, isinstance(sig.args[0].dtype, types.Float))


def _comparison(symbol: str) -> Callable[[Any, Any, Any, bool], Any]:
    def emit(builder: Any, a: Any, b: Any, is_float: bool) -> Any:
        return builder.fcmp_ordered(symbol, a, b) if is_float else builder.icmp_signed(symbol, a, b)

    return emit


_operator(operator.add, lambda b, x, y, f: b.fadd(x, y) if f else b.add(x, y))
_operator(operator.sub, lambda b, x, y, f: b.fsub(x, y) if f else b.sub(x, y))
_operator(operator.mul, lambda b, x, y, f: b.fmul(x, y) if f else b.mul(x, y))
_operator(operator.truediv, lambda b, x, y, f: b.fdiv(x, y))
_operator(operator.and_, lambda b, x, y, f: b.and_(x, y), masks=True)
_operator(operator.or_, lambda b, x, y, f: b.or_(x, y), masks=True)
_operator(operator.xor, lambda b, x, y, f: b.xor(x, y), masks=True)
for _op, _symbol in (
    (operator.lt, "<"),
    (operator.le, "<="),
    (operator.gt, ">"),
    (operator.ge, ">="),
    (operator.eq, "=="),
    (operator.ne, "!="),
):
    _operator(_op, _comparison(_symbol), compares=True)


@intrinsic
def splat(typingctx: Any, value: Any) -> Any:
    """A register that holds ``value`` in every lane."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return broadcast(builder, args[0], sig.return_type.count)

    return lanes_of(value)(value), emit


@intrinsic
def multiply_add(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c``, fused where the machine can."""
    longest = _longest(a, b, c)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return call(builder, "fmuladd", [repeated(builder, value, longest.count) for value in args])

    return longest(a, b, c), emit


def _extremum(name: str, symbol: str) -> Any:
    @intrinsic
    def function(typingctx: Any, a: Any, b: Any) -> Any:
        """The smaller or larger of two numbers, neither of them NaN, in every lane of registers."""
        if not isinstance(a, Lanes):
            scalar = typingctx.unify_types(a, b)

            def emit_scalar(context: Any, builder: Any, sig: Any, args: Any) -> Any:
                compare = builder.fcmp_ordered if isinstance(scalar, types.Float) else builder.icmp_signed
                return builder.select(compare(symbol, *args), *args)

            return scalar(scalar, scalar), emit_scalar

        longest = _longest(a, b)

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            values = [repeated(builder, value, longest.count) for value in args]
            if isinstance(longest.dtype, types.Float):
                return call(builder, name, values, ORDERED)
            return builder.select(builder.icmp_signed(symbol, *values), *values)

        return longest(a, b), emit

    return function


minimum = _extremum("minnum", "<")
maximum = _extremum("maxnum", ">")


@intrinsic
def four(typingctx: Any, a: Any) -> Any:
    """A register four times, one behind the other."""
    several = Lanes(a.dtype, 4 * a.count)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return repeated(builder, args[0], several.count)

    return several(a), emit


@intrinsic
def sum_of_four(typingctx: Any, a: Any) -> Any:
    """The sum of four registers, lane by lane."""
    one = lanes_of(a.dtype)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        first, second, third, fourth = parted(builder, args[0], one.count)
        return builder.fadd(builder.fadd(first, second), builder.fadd(third, fourth))

    return one(a), emit


@intrinsic
def add_squares(typingctx: Any, a: Any, total: Any) -> Any:
    """``total`` and the squares of ``a``; of a longer ``a`` those of each part, one after another."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = args[1]
        for part in parted(builder, args[0], total.count):
            value = call(builder, "fmuladd", [part, part, value])
        return value

    return total(a, total), emit


@intrinsic
def count_equal(typingctx: Any, a: Any, b: Any, count: Any) -> Any:
    """``count`` and 1 where ``a`` equals ``b``; of longer ones for each part, one after another."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = args[2]
        one = ir.Constant(value.type, [value.type.element(1)] * count.count)
        for x, y in zip(*(parted(builder, arg, count.count) for arg in args[:2]), strict=True):
            value = builder.select(builder.fcmp_ordered("==", x, y), builder.fadd(value, one), value)
        return value

    return count(a, b, count), emit


@intrinsic
def absolute(typingctx: Any, a: Any) -> Any:
    """The magnitude of every lane."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return call(builder, "fabs", list(args))

    return a(a), emit


@intrinsic
def select(typingctx: Any, mask: Any, a: Any, b: Any) -> Any:
    """``a`` where ``mask`` holds, ``b`` elsewhere."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(*args)

    return a(mask, a, b), emit


@intrinsic
def bits_of(typingctx: Any, mask: Any) -> Any:
    """A mask as an int64, lane 0 in the lowest bit."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.zext(builder.bitcast(args[0], ir.IntType(mask.count)), I64)

    return types.int64(mask), emit


@intrinsic
def lane_mask(typingctx: Any, bits: Any, like: Any) -> Any:
    """The mask for registers like ``like`` whose lane k is bit k of ``bits``."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = vector_type(context, sig.return_type)
        return builder.bitcast(builder.trunc(args[0], ir.IntType(kind.count)), kind)

    return mask_of(like)(types.int64, like), emit


@intrinsic
def trailing_zeros(typingctx: Any, bits: Any) -> Any:
    """The index of the lowest set bit of a non-zero int64."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.cttz(args[0], I1(1))

    return types.int64(types.int64), emit


@intrinsic
def count_ones(typingctx: Any, bits: Any) -> Any:
    """How many bits of an int64 are set."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.int64), emit


def _by_halves(builder: Any, value: Any, width: int, join: Callable[[Any, Any], Any]) -> Any:
    """One lane of what joining a register's halves, their halves and so on makes."""
    while width > 1:
        width //= 2
        low = shuffle(builder, value, value, list(range(width)))
        high = shuffle(builder, value, value, list(range(width, 2 * width)))
        value = join(low, high)
    return builder.extract_element(value, I32(0))


@intrinsic
def smallest(typingctx: Any, a: Any) -> Any:
    """The smallest lane."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _by_halves(
            builder, args[0], a.count, lambda low, high: call(builder, "minnum", [low, high], ORDERED)
        )

    return a.dtype(a), emit


@intrinsic
def total(typingctx: Any, a: Any) -> Any:
    """The sum of the lanes, by halves."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _by_halves(builder, args[0], a.count, builder.fadd)

    return a.dtype(a), emit


@intrinsic
def power_of_two_scale(typingctx: Any, a: Any) -> Any:
    """The power of two that brings ``a >= 0`` into [0.5, 1), within the normal numbers."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        integers = vector_type(context, integers_of(a))
        element = integers.element
        shift, bias = (23, 127) if a.count == 16 else (52, 1023)

        def constant(value: int) -> Any:
            return ir.Constant(integers, [element(value)] * a.count)

        exponent = builder.lshr(builder.bitcast(args[0], integers), constant(shift))
        biased = builder.sub(constant(3 * bias - 1 - bias), exponent)
        biased = builder.select(builder.icmp_signed("<", biased, constant(1)), constant(1), biased)
        return builder.bitcast(builder.shl(biased, constant(shift)), args[0].type)

    return a(a), emit
