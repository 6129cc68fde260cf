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
    "joined",
    "parted",
    "pointer_at",
    "repeated",
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


def joined(builder: Any, parts: list[Any]) -> Any:
    """Vectors of one length, a power of two of them, one behind the other."""
    while len(parts) > 1:
        both = list(range(2 * parts[0].type.count))
        parts = [shuffle(builder, *pair, both) for pair in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def parted(builder: Any, value: Any, count: int) -> list[Any]:
    """The vectors of ``count`` elements that a longer one consists of."""
    size = value.type.count
    if size == count:
        return [value]
    return [shuffle(builder, value, value, list(range(k, k + count))) for k in range(0, size, count)]


def repeated(builder: Any, value: Any, count: int) -> Any:
    """A vector as often, one behind the other, as makes ``count`` elements."""
    size = value.type.count
    return value if size == count else shuffle(builder, value, value, [k % size for k in range(count)])


def pointer_at(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType(kind))
