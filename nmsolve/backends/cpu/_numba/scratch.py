"""Pointers to scratch memory as values in Numba functions.

Numba counts references to arrays with atomic instructions at every call and slice, which costs more than
solving a 4x4 block: inner functions take scratch as pointers.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.typing import signature
from numba.core.typing.templates import AbstractTemplate, AttributeTemplate, infer_getattr, infer_global
from numba.extending import lower_builtin, lower_getattr, models, register_model

from nmsolve.backends.cpu._numba.compiled import inner
from nmsolve.backends.cpu._numba.emit import I64, int64, intrinsic, pointer_at
from nmsolve.backends.cpu._numba.lanes import WIDTH

__all__ = ["Scratch", "buffer", "element_pointer", "retyped", "scratch", "scratch_at", "still_needed"]


class Scratch(types.Type):
    """A pointer to numbers of the Numba type ``dtype``: an array without bounds, owner or reference count.

    ``p[k]``, ``p[k] = x`` and ``p + k`` work, and ``p.dtype`` and ``p.itemsize`` as on an array. The memory
    belongs to an array that has to outlive it (see :func:`scratch`).
    """

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(name=f"Scratch({dtype})")


@register_model(Scratch)
class _ScratchModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Scratch) -> None:
        super().__init__(dmm, fe_type, ir.PointerType(dmm.lookup(fe_type.dtype).get_value_type()))


@infer_getattr
class _ScratchAttributes(AttributeTemplate):
    key = Scratch

    def resolve_dtype(self, pointer: Any) -> Any:
        return types.DType(pointer.dtype)

    def resolve_itemsize(self, pointer: Any) -> Any:
        return types.intp


@lower_getattr(Scratch, "dtype")
def _scratch_dtype(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    return context.get_dummy_value()


@lower_getattr(Scratch, "itemsize")
def _scratch_itemsize(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    return ir.Constant(I64, kind.dtype.bitwidth // 8)


@infer_global(operator.getitem)
class _ScratchRead(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Any:
        if isinstance(args[0], Scratch) and isinstance(args[1], types.Integer):
            return signature(args[0].dtype, args[0], types.intp)
        return None


@infer_global(operator.setitem)
class _ScratchWrite(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Any:
        if isinstance(args[0], Scratch) and isinstance(args[1], types.Integer):
            return signature(types.none, args[0], types.intp, args[0].dtype)
        return None


@infer_global(operator.add)
class _ScratchAdd(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Any:
        if isinstance(args[0], Scratch) and isinstance(args[1], types.Integer):
            return signature(args[0], args[0], types.intp)
        return None


@lower_builtin(operator.getitem, Scratch, types.Integer)
def _read_scratch(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return builder.load(builder.gep(args[0], [args[1]]))


@lower_builtin(operator.setitem, Scratch, types.Integer, types.Number)
def _write_scratch(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    builder.store(args[2], builder.gep(args[0], [args[1]]))
    return context.get_dummy_value()


@lower_builtin(operator.add, Scratch, types.Integer)
def _move_scratch(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return builder.gep(args[0], [args[1]])


@inner
def buffer(size: int) -> Any:
    """Memory for :func:`scratch` of ``size`` bytes."""
    return np.empty(size + WIDTH, np.uint8)


@intrinsic
def scratch(typingctx: Any, memory: Any, like: Any) -> Any:
    """A pointer to numbers of the type of ``like`` on the first cache line of a :func:`buffer`.

    Numba frees an array after its last mention in a function, so :func:`still_needed` has to mention it once
    more when the pointer is done with.
    """

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        address = builder.add(builder.ptrtoint(data, I64), int64(WIDTH - 1))
        return pointer_at(builder, builder.and_(address, int64(-WIDTH)), args[1].type)

    return Scratch(like)(memory, like), emit


@intrinsic
def retyped(typingctx: Any, pointer: Any, like: Any) -> Any:
    """The same place, of numbers of the type of ``like``."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.PointerType(args[1].type))

    return Scratch(like)(pointer, like), emit


@intrinsic
def scratch_at(typingctx: Any, address: Any, like: Any) -> Any:
    """A pointer to the numbers of the type of ``like`` at ``address``."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return pointer_at(builder, args[0], args[1].type)

    return Scratch(like)(types.int64, like), emit


@intrinsic
def still_needed(typingctx: Any, array: Any) -> Any:
    """Keep the memory of ``array`` up to here."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.get_dummy_value()

    return types.void(array), emit


def element_pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Where ``array[index]`` lies, for an array or :class:`Scratch`."""
    if isinstance(array_type, Scratch):
        return builder.gep(array, [index])
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])
