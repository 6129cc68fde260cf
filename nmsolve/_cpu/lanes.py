"""Vector registers as values in Numba functions: 64 bytes side by side, one block of scores per lane.

Numba leaves vectorisation to LLVM's loop vectoriser, which prefers half-width registers on most AVX-512
machines and gives up on loops with two reductions. Here a register is a type of its own, :class:`Lanes`, with
LLVM's vector type behind it: the operators below are one instruction each where the machine has 64-byte
registers, and LLVM splits them into two (AVX2) or four (NEON, SSE) where it does not.

``float32`` and ``int32`` make 16 lanes, ``float64`` and ``int64`` eight; a comparison gives a mask of as
many lanes. Arrays are one-dimensional scratch; addresses are ``int64`` byte addresses. Inner functions take
scratch as pointers (:class:`Scratch`): Numba counts references to arrays with atomic instructions at every
call and slice, which costs more than solving a 4x4 block.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing import signature
from numba.core.typing.templates import AbstractTemplate, AttributeTemplate, infer_getattr, infer_global
from numba.extending import intrinsic as numba_intrinsic
from numba.extending import lower_builtin, lower_getattr, models, register_model

__all__ = [
    "BFLOAT16",
    "FLOAT16",
    "FLOAT32",
    "FLOAT64",
    "Lanes",
    "absolute",
    "as_float",
    "as_int",
    "bits_of",
    "gather",
    "lane_mask",
    "load",
    "load_blocks_1",
    "load_blocks_2",
    "load_blocks_4",
    "load_blocks_8",
    "load_blocks_16",
    "maximum",
    "minimum",
    "multiply_add",
    "part_lanes",
    "peek",
    "poke",
    "power_of_two_scale",
    "scratch",
    "select",
    "smallest",
    "splat",
    "still_needed",
    "store",
    "store_flags_1",
    "store_flags_4",
    "store_flags_8",
    "store_flags_16",
    "trailing_zeros",
]

WIDTH = 64
"""Bytes in a register."""

FLOAT32, BFLOAT16, FLOAT16, FLOAT64 = range(4)
"""What lies at an address of scores. ``FLOAT64`` is read into float64 lanes only, the others into either."""

# An intrinsic is called without the typing context that its definition takes: not for a type checker.
intrinsic: Any = numba_intrinsic

_ORDERED = ("nnan", "nsz")
_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))


class Lanes(types.Type):
    """A register of ``count`` values of the Numba scalar type ``dtype``; booleans make a mask."""

    def __init__(self, dtype: Any, count: int) -> None:
        self.dtype = dtype
        self.count = count
        super().__init__(name=f"Lanes({dtype}, {count})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Lanes) -> None:
        element = _I1 if fe_type.dtype == types.boolean else dmm.lookup(fe_type.dtype).get_value_type()
        super().__init__(dmm, fe_type, ir.VectorType(element, fe_type.count))


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
    return ir.Constant(_I64, kind.dtype.bitwidth // 8)


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


@intrinsic
def scratch(typingctx: Any, array: Any) -> Any:
    """A pointer to the first number of a one-dimensional array.

    Numba frees an array after its last mention in a function, so :func:`still_needed` has to mention it once
    more when the pointer is done with.
    """

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.make_array(sig.args[0])(context, builder, args[0]).data

    return Scratch(array.dtype)(array), emit


@intrinsic
def still_needed(typingctx: Any, array: Any) -> Any:
    """Keep the memory of ``array`` up to here."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.get_dummy_value()

    return types.void(array), emit


def _lanes(dtype: Any) -> Lanes:
    return Lanes(dtype, WIDTH * 8 // dtype.bitwidth)


def _mask(lanes: Lanes) -> Lanes:
    return Lanes(types.boolean, lanes.count)


def _integers(lanes: Lanes) -> Lanes:
    return Lanes(types.int32 if lanes.count == 16 else types.int64, lanes.count)


def _vector(context: Any, lanes: Lanes) -> ir.VectorType:
    return context.get_value_type(lanes)


def _i64(value: int) -> Any:
    """``value`` as an LLVM int64 constant."""
    return ir.Constant(_I64, value)


def _call(builder: Any, name: str, operands: list[Any], flags: tuple[str, ...] = ()) -> Any:
    """LLVM's intrinsic ``name`` overloaded on the type of its first operand."""
    kind = operands[0].type
    suffix = str(kind.element).replace("float", "f32").replace("double", "f64")
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(kind, [operand.type for operand in operands]),
        f"llvm.{name}.v{kind.count}{suffix}",
    )
    return builder.call(function, operands, fastmath=flags)


def _broadcast(builder: Any, value: Any, count: int) -> Any:
    kind = ir.VectorType(value.type, count)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(
        one, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(_I32, count), [0] * count)
    )


def _shuffle(builder: Any, a: Any, b: Any, picks: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(picks)), picks))


def _element(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    if isinstance(array_type, Scratch):
        return builder.gep(array, [index])
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


def _at(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType(kind))


def _operator(
    op: Any, emit: Callable[[Any, Any, Any, bool], Any], *, masks: bool = False, compares: bool = False
) -> None:
    """Make ``a op b`` work on two registers of one type; ``emit`` gets (builder, a, b, is float)."""

    class _Template(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) != 2 or args[0] != args[1] or not isinstance(args[0], Lanes):
                return None
            if (args[0].dtype == types.boolean) != masks and not (masks and args[0].dtype != types.boolean):
                return None
            return signature(_mask(args[0]) if compares else args[0], *args)

    infer_global(op)(_Template)

    @lower_builtin(op, Lanes, Lanes)
    def _lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return emit(builder, args[0], args[1], isinstance(sig.args[0].dtype, types.Float))


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
        return _broadcast(builder, args[0], sig.return_type.count)

    return _lanes(value)(value), emit


@intrinsic
def load(typingctx: Any, array: Any, index: Any) -> Any:
    """The register at ``array[index : index + lanes]``."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = _element(context, builder, sig.args[0], args[0], args[1])
        place = builder.bitcast(place, ir.PointerType(_vector(context, sig.return_type)))
        return builder.load(place, align=array.dtype.bitwidth // 8)

    return _lanes(array.dtype)(array, types.intp), emit


@intrinsic
def store(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """``array[index : index + lanes] = value``."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = _element(context, builder, sig.args[0], args[0], args[1])
        place = builder.bitcast(place, ir.PointerType(args[2].type))
        builder.store(args[2], place, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), emit


@intrinsic
def gather(typingctx: Any, array: Any, base: Any, stride: Any, count: Any) -> Any:
    """``array[base + k * stride]`` in lane ``k < count``, zero in the others."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = _vector(context, sig.return_type)
        lanes = kind.count
        place = _element(context, builder, sig.args[0], args[0], args[1])
        iota = ir.Constant(ir.VectorType(_I32, lanes), list(range(lanes)))
        stride = _broadcast(builder, builder.trunc(args[2], _I32), lanes)
        offsets = builder.sext(builder.mul(iota, stride), ir.VectorType(_I64, lanes))
        active = builder.icmp_signed("<", iota, _broadcast(builder, builder.trunc(args[3], _I32), lanes))
        places = builder.gep(_broadcast(builder, place, lanes), [offsets], source_etype=kind.element)
        suffix = f"v{lanes}{'f' if isinstance(array.dtype, types.Float) else 'i'}{array.dtype.bitwidth}"
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(kind, [places.type, _I32, active.type, kind]),
            f"llvm.masked.gather.{suffix}.v{lanes}p0",
        )
        zero = ir.Constant(kind, None)
        return builder.call(function, [places, _I32(array.dtype.bitwidth // 8), active, zero])

    return _lanes(array.dtype)(array, types.intp, types.intp, types.intp), emit


@intrinsic
def multiply_add(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c``, fused where the machine can."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _call(builder, "fmuladd", list(args))

    return a(a, b, c), emit


def _extremum(name: str, symbol: str) -> Any:
    @intrinsic
    def function(typingctx: Any, a: Any, b: Any) -> Any:
        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            if isinstance(a.dtype, types.Float):
                return _call(builder, name, list(args), _ORDERED)
            return builder.select(builder.icmp_signed(symbol, *args), *args)

        return a(a, b), emit

    return function


minimum = _extremum("minnum", "<")
maximum = _extremum("maxnum", ">")


@intrinsic
def absolute(typingctx: Any, a: Any) -> Any:
    """The magnitude of every lane."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _call(builder, "fabs", list(args))

    return a(a), emit


@intrinsic
def select(typingctx: Any, mask: Any, a: Any, b: Any) -> Any:
    """``a`` where ``mask`` holds, ``b`` elsewhere."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(*args)

    return a(mask, a, b), emit


@intrinsic
def as_float(typingctx: Any, a: Any) -> Any:
    """Integer lanes as floating-point lanes of the same width."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.sitofp(args[0], _vector(context, sig.return_type))

    return Lanes(types.float32 if a.count == 16 else types.float64, a.count)(a), emit


@intrinsic
def as_int(typingctx: Any, a: Any) -> Any:
    """Floating-point lanes rounded towards zero, as integer lanes of the same width."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fptosi(args[0], _vector(context, sig.return_type))

    return _integers(a)(a), emit


@intrinsic
def bits_of(typingctx: Any, mask: Any) -> Any:
    """A mask as an int64, lane 0 in the lowest bit."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.zext(builder.bitcast(args[0], ir.IntType(mask.count)), _I64)

    return types.int64(mask), emit


@intrinsic
def lane_mask(typingctx: Any, bits: Any, like: Any) -> Any:
    """The mask for registers like ``like`` whose lane k is bit k of ``bits``."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = _vector(context, sig.return_type)
        return builder.bitcast(builder.trunc(args[0], ir.IntType(kind.count)), kind)

    return _mask(like)(types.int64, like), emit


@intrinsic
def trailing_zeros(typingctx: Any, bits: Any) -> Any:
    """The index of the lowest set bit of a non-zero int64."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.cttz(args[0], _I1(1))

    return types.int64(types.int64), emit


@intrinsic
def smallest(typingctx: Any, a: Any) -> Any:
    """The smallest lane."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value, width = args[0], a.count
        while width > 1:
            width //= 2
            low = _shuffle(builder, value, value, list(range(width)))
            high = _shuffle(builder, value, value, list(range(width, 2 * width)))
            value = _call(builder, "minnum", [low, high], _ORDERED)
        return builder.extract_element(value, _I32(0))

    return a.dtype(a), emit


@intrinsic
def power_of_two_scale(typingctx: Any, a: Any) -> Any:
    """The power of two that brings ``a >= 0`` into [0.5, 1), within the normal numbers."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        integers = _vector(context, _integers(a))
        element = integers.element
        shift, bias = (23, 127) if a.count == 16 else (52, 1023)

        def constant(value: int) -> Any:
            return ir.Constant(integers, [element(value)] * a.count)

        exponent = builder.lshr(builder.bitcast(args[0], integers), constant(shift))
        biased = builder.sub(constant(3 * bias - 1 - bias), exponent)
        biased = builder.select(builder.icmp_signed("<", biased, constant(1)), constant(1), biased)
        return builder.bitcast(builder.shl(biased, constant(shift)), args[0].type)

    return a(a), emit


@intrinsic
def peek(typingctx: Any, address: Any, like: Any) -> Any:
    """The scalar at ``address``, of the type of ``like``."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(_at(builder, args[0], args[1].type), align=1)

    return like(types.int64, like), emit


@intrinsic
def poke(typingctx: Any, address: Any, value: Any) -> Any:
    """Write the scalar ``value`` at ``address``."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[1], _at(builder, args[0], args[1].type), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, value), emit


def _widened(builder: Any, address: Any, encoding: int, count: int) -> Any:
    """``count`` scores stored as ``encoding`` at ``address``, as float32 (float64 if they are that)."""
    if encoding in (FLOAT32, FLOAT64):
        scalar, size = (ir.FloatType(), 4) if encoding == FLOAT32 else (ir.DoubleType(), 8)
        return builder.load(_at(builder, address, ir.VectorType(scalar, count)), align=size)
    halves = builder.load(_at(builder, address, ir.VectorType(_I16, count)), align=2)
    words, floats = ir.VectorType(_I32, count), ir.VectorType(ir.FloatType(), count)
    wide = builder.zext(halves, words)

    def constant(value: int) -> Any:
        return ir.Constant(words, [_I32(value)] * count)

    if encoding == BFLOAT16:
        return builder.bitcast(builder.shl(wide, constant(16)), floats)
    # A float16's bits moved to float32's places are its value times 2^-112, subnormal numbers included.
    magnitude = builder.shl(builder.and_(wide, constant(0x7FFF)), constant(13))
    sign = builder.shl(builder.and_(wide, constant(0x8000)), constant(16))
    factor = ir.Constant(floats, [ir.Constant(ir.FloatType(), 2.0**112)] * count)
    value = builder.fmul(builder.bitcast(magnitude, floats), factor)
    return builder.bitcast(builder.or_(builder.bitcast(value, words), sign), floats)


def _transpose(builder: Any, registers: list[Any], count: int) -> None:
    """Transpose each ``count`` x ``count`` square of the registers, exchanging ever larger pieces."""
    lanes = registers[0].type.count
    distance = 1
    while distance < count:
        low = [k - distance + lanes if k & distance else k for k in range(lanes)]
        high = [k + lanes if k & distance else k + distance for k in range(lanes)]
        for r in range(count):
            if not r & distance:
                a, b = registers[r], registers[r + distance]
                registers[r] = _shuffle(builder, a, b, low)
                registers[r + distance] = _shuffle(builder, a, b, high)
        distance *= 2


@intrinsic
def part_lanes(typingctx: Any, tile: Any, index: Any, step: Any, out: Any, place: Any, out_step: Any) -> Any:
    """``out[place + lane * out_step + k] = tile[index + k * step + lane]`` for one k per lane."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = _vector(context, _lanes(tile.dtype))
        align = tile.dtype.bitwidth // 8

        def register_at(k: int, array_type: Any, array: Any, first: Any, step: Any) -> Any:
            index = builder.add(first, builder.mul(step, _i64(k)))
            return builder.bitcast(_element(context, builder, array_type, array, index), ir.PointerType(kind))

        registers = [
            builder.load(register_at(k, tile, args[0], args[1], args[2]), align=align)
            for k in range(kind.count)
        ]
        _transpose(builder, registers, kind.count)
        for lane, register in enumerate(registers):
            builder.store(register, register_at(lane, out, args[3], args[4], args[5]), align=align)
        return context.get_dummy_value()

    return types.void(tile, types.intp, types.intp, out, types.intp, types.intp), emit


def _block_loader(count: int) -> Any:
    """An intrinsic that reads ``count`` consecutive scores of each lane's block and turns lanes innermost."""

    @intrinsic
    def function(
        typingctx: Any, encoding: Any, bases: Any, offset: Any, tile: Any, index: Any, step: Any
    ) -> Any:
        """``tile[index + k * step + lane]`` = score k from byte ``bases[lane] + offset``, 0 <= k < count."""

        def transposed(context: Any, builder: Any, sig: Any, args: Any, encoding: int) -> None:
            lanes = _lanes(tile.dtype).count
            pieces = []
            for lane in range(lanes):
                base = builder.load(_element(context, builder, bases, args[1], _i64(lane)))
                piece = _widened(builder, builder.add(base, args[2]), encoding, count)
                if tile.dtype == types.float64 and encoding != FLOAT64:
                    piece = builder.fpext(piece, ir.VectorType(ir.DoubleType(), count))
                pieces.append(piece)
            # Register r holds the pieces of lanes r, r + count, r + 2 count ... one after another.
            registers = []
            for first in range(count):
                parts = pieces[first::count]
                while len(parts) > 1:
                    size = parts[0].type.count
                    parts = [
                        _shuffle(builder, low, high, list(range(2 * size)))
                        for low, high in zip(parts[::2], parts[1::2], strict=True)
                    ]
                registers.append(parts[0])
            _transpose(builder, registers, count)
            for k, register in enumerate(registers):
                place = builder.add(args[4], builder.mul(args[5], _i64(k)))
                place = _element(context, builder, tile, args[3], place)
                place = builder.bitcast(place, ir.PointerType(register.type))
                builder.store(register, place, align=tile.dtype.bitwidth // 8)

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            if count > _lanes(tile.dtype).count:
                return context.get_dummy_value()  # never called: a piece is longer than a register
            encodings = [FLOAT32, BFLOAT16, FLOAT16]
            if tile.dtype == types.float64:
                encodings.append(FLOAT64)
            end = builder.append_basic_block("loaded")
            cases = []
            for encoding in encodings:
                cases.append((encoding, builder.append_basic_block(f"encoding{encoding}")))
            switch = builder.switch(args[0], cases[0][1])
            for encoding, block in cases:
                if encoding != encodings[0]:
                    switch.add_case(ir.Constant(args[0].type, encoding), block)
                builder.position_at_end(block)
                transposed(context, builder, sig, args, encoding)
                builder.branch(end)
            builder.position_at_end(end)
            return context.get_dummy_value()

        return types.void(types.int64, bases, types.int64, tile, types.intp, types.intp), emit

    return function


load_blocks_1, load_blocks_2, load_blocks_4, load_blocks_8, load_blocks_16 = map(
    _block_loader, (1, 2, 4, 8, 16)
)


def _flag_writer(count: int) -> Any:
    """An intrinsic that writes ``count`` bits as ``count`` bytes, 0 or 1."""

    @intrinsic
    def function(typingctx: Any, address: Any, bits: Any) -> Any:
        """The low bits of ``bits``, lowest first, as bytes from ``address``."""

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            flags = builder.bitcast(builder.trunc(args[1], ir.IntType(count)), ir.VectorType(_I1, count))
            flags = builder.zext(flags, ir.VectorType(_I8, count))
            builder.store(flags, _at(builder, args[0], flags.type), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), emit

    return function


store_flags_1, store_flags_4, store_flags_8, store_flags_16 = map(_flag_writer, (1, 4, 8, 16))
