"""LLVM instructions that the intrinsics of this package are made of.

An *emitter* adds instructions through an llvmlite builder to the function that Numba is compiling.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic

__all__ = [
    "I1",
    "I8",
    "I16",
    "I32",
    "I64",
    "ORDERED",
    "broadcast",
    "call",
    "int64",
    "intrinsic",
    "pointer_at",
    "shuffle",
]

# An intrinsic is called without the typing context that its definition takes: not for a type checker.
intrinsic: Any = numba_intrinsic

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))

ORDERED = ("nnan", "nsz")
"""Flags of an operation whose operands are never NaN and for which -0 is 0."""


def int64(value: int) -> Any:
    """``value`` as an LLVM int64 constant."""
    return ir.Constant(I64, value)


def call(builder: Any, name: str, operands: list[Any], flags: tuple[str, ...] = ()) -> Any:
    """LLVM's intrinsic ``name`` overloaded on the type of its first operand."""
    kind = operands[0].type
    suffix = str(kind.element).replace("float", "f32").replace("double", "f64")
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(kind, [operand.type for operand in operands]),
        f"llvm.{name}.v{kind.count}{suffix}",
    )
    return builder.call(function, operands, fastmath=flags)


def broadcast(builder: Any, value: Any, count: int) -> Any:
    kind = ir.VectorType(value.type, count)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
    return builder.shuffle_vector(
        one, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(I32, count), [0] * count)
    )


def shuffle(builder: Any, a: Any, b: Any, picks: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(picks)), picks))


def pointer_at(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType(kind))
