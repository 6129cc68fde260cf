"""Registers, blocks and flags to and from memory.

Arrays are one-dimensional scratch: NumPy's, or pointers (:class:`~.scratch.Scratch`). Addresses are ``int64``
byte addresses.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from nmsolve.backends.cpu._numba.emit import (
    I1,
    I8,
    I16,
    I32,
    I64,
    broadcast,
    int64,
    intrinsic,
    joined,
    parted,
    pointer_at,
    shuffle,
)
from nmsolve.backends.cpu._numba.lanes import Lanes, lanes_of, vector_type
from nmsolve.backends.cpu._numba.scratch import element_pointer

__all__ = [
    "BFLOAT16",
    "FLOAT16",
    "FLOAT32",
    "FLOAT64",
    "gather",
    "load",
    "load_blocks_1",
    "load_blocks_2",
    "load_blocks_4",
    "load_blocks_8",
    "load_blocks_16",
    "load_four",
    "load_wide",
    "part_lanes",
    "peek",
    "poke",
    "store",
    "store_flags_1",
    "store_flags_4",
    "store_flags_8",
    "store_flags_16",
    "store_four",
]

FLOAT32, BFLOAT16, FLOAT16, FLOAT64 = range(4)
"""What lies at an address of scores. ``FLOAT64`` is read into float64 lanes only, the others into either."""


@intrinsic
def load(typingctx: Any, array: Any, index: Any) -> Any:
    """The register at ``array[index : index + lanes]``."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = element_pointer(context, builder, sig.args[0], args[0], args[1])
        place = builder.bitcast(place, ir.PointerType(vector_type(context, sig.return_type)))
        return builder.load(place, align=array.dtype.bitwidth // 8)

    return lanes_of(array.dtype)(array, types.intp), emit


@intrinsic
def load_wide(typingctx: Any, array: Any, index: Any) -> Any:
    """``array[index : index + 8]`` as lanes of 64 bits; the array is of floats or signed integers."""
    narrow = array.dtype.bitwidth == 32
    wide = lanes_of(types.float64 if isinstance(array.dtype, types.Float) else types.int64)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.VectorType(context.get_value_type(array.dtype), wide.count)
        place = element_pointer(context, builder, sig.args[0], args[0], args[1])
        value = builder.load(builder.bitcast(place, ir.PointerType(kind)), align=array.dtype.bitwidth // 8)
        if not narrow:
            return value
        extend = builder.fpext if isinstance(array.dtype, types.Float) else builder.sext
        return extend(value, vector_type(context, wide))

    return wide(array, types.intp), emit


@intrinsic
def store(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """``array[index : index + lanes] = value``."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = element_pointer(context, builder, sig.args[0], args[0], args[1])
        place = builder.bitcast(place, ir.PointerType(args[2].type))
        builder.store(args[2], place, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), emit


def _four_places(context: Any, builder: Any, array_type: Any, args: Any, kind: Any) -> list[Any]:
    """Where the four registers ``step`` apart lie that begin at ``array[index]``."""
    places = []
    for k in range(4):
        index = builder.add(args[1], builder.mul(args[2], int64(k)))
        place = element_pointer(context, builder, array_type, args[0], index)
        places.append(builder.bitcast(place, ir.PointerType(kind)))
    return places


@intrinsic
def load_four(typingctx: Any, array: Any, index: Any, step: Any) -> Any:
    """The registers at ``array[index + k * step]`` for k from 0 to 3, one behind the other."""
    one = lanes_of(array.dtype)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        places = _four_places(context, builder, array, args, vector_type(context, one))
        return joined(builder, [builder.load(place, align=array.dtype.bitwidth // 8) for place in places])

    return Lanes(array.dtype, 4 * one.count)(array, types.intp, types.intp), emit


@intrinsic
def store_four(typingctx: Any, array: Any, index: Any, step: Any, value: Any) -> Any:
    """Four registers to ``array[index + k * step]``."""
    one = lanes_of(array.dtype)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        places = _four_places(context, builder, array, args, vector_type(context, one))
        for place, part in zip(places, parted(builder, args[3], one.count), strict=True):
            builder.store(part, place, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, value), emit


@intrinsic
def gather(typingctx: Any, array: Any, base: Any, stride: Any, count: Any) -> Any:
    """``array[base + k * stride]`` in lane ``k < count``, zero in the others."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = vector_type(context, sig.return_type)
        lanes = kind.count
        place = element_pointer(context, builder, sig.args[0], args[0], args[1])
        iota = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
        stride = broadcast(builder, builder.trunc(args[2], I32), lanes)
        offsets = builder.sext(builder.mul(iota, stride), ir.VectorType(I64, lanes))
        active = builder.icmp_signed("<", iota, broadcast(builder, builder.trunc(args[3], I32), lanes))
        places = builder.gep(broadcast(builder, place, lanes), [offsets], source_etype=kind.element)
        suffix = f"v{lanes}{'f' if isinstance(array.dtype, types.Float) else 'i'}{array.dtype.bitwidth}"
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(kind, [places.type, I32, active.type, kind]),
            f"llvm.masked.gather.{suffix}.v{lanes}p0",
        )
        zero = ir.Constant(kind, None)
        return builder.call(function, [places, I32(array.dtype.bitwidth // 8), active, zero])

    return lanes_of(array.dtype)(array, types.intp, types.intp, types.intp), emit


@intrinsic
def peek(typingctx: Any, address: Any, like: Any) -> Any:
    """The scalar at ``address``, of the type of ``like``."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(pointer_at(builder, args[0], args[1].type), align=1)

    return like(types.int64, like), emit


@intrinsic
def poke(typingctx: Any, address: Any, value: Any) -> Any:
    """Write the scalar ``value`` at ``address``."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[1], pointer_at(builder, args[0], args[1].type), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, value), emit


def _widened(builder: Any, address: Any, encoding: int, count: int) -> Any:
    """``count`` scores stored as ``encoding`` at ``address``, as float32 (float64 if they are that)."""
    if encoding in (FLOAT32, FLOAT64):
        scalar, size = (ir.FloatType(), 4) if encoding == FLOAT32 else (ir.DoubleType(), 8)
        return builder.load(pointer_at(builder, address, ir.VectorType(scalar, count)), align=size)
    halves = builder.load(pointer_at(builder, address, ir.VectorType(I16, count)), align=2)
    words, floats = ir.VectorType(I32, count), ir.VectorType(ir.FloatType(), count)
    wide = builder.zext(halves, words)

    def constant(value: int) -> Any:
        return ir.Constant(words, [I32(value)] * count)

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
                registers[r] = shuffle(builder, a, b, low)
                registers[r + distance] = shuffle(builder, a, b, high)
        distance *= 2


@intrinsic
def part_lanes(typingctx: Any, tile: Any, index: Any, step: Any, out: Any, place: Any, out_step: Any) -> Any:
    """``out[place + lane * out_step + k] = tile[index + k * step + lane]`` for one k per lane."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = vector_type(context, lanes_of(tile.dtype))
        align = tile.dtype.bitwidth // 8

        def register_at(k: int, array_type: Any, array: Any, first: Any, step: Any) -> Any:
            index = builder.add(first, builder.mul(step, int64(k)))
            return builder.bitcast(
                element_pointer(context, builder, array_type, array, index), ir.PointerType(kind)
            )

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

        def pieces(context: Any, builder: Any, args: Any, encoding: int) -> list[Any]:
            """What is read of each lane's block."""
            read = []
            for lane in range(lanes_of(tile.dtype).count):
                base = builder.load(element_pointer(context, builder, bases, args[1], int64(lane)))
                piece = _widened(builder, builder.add(base, args[2]), encoding, count)
                if tile.dtype == types.float64 and encoding != FLOAT64:
                    piece = builder.fpext(piece, ir.VectorType(ir.DoubleType(), count))
                read.append(piece)
            return read

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            if count > lanes_of(tile.dtype).count:
                return context.get_dummy_value()  # never called: a piece is longer than a register
            encodings = [FLOAT32, BFLOAT16, FLOAT16]
            if tile.dtype == types.float64:
                encodings.append(FLOAT64)
            end = builder.append_basic_block("read")
            cases = [builder.append_basic_block(f"encoding{encoding}") for encoding in encodings]
            switch = builder.switch(args[0], cases[0])
            found = []
            for encoding, block in zip(encodings, cases, strict=True):
                if encoding != encodings[0]:
                    switch.add_case(ir.Constant(args[0].type, encoding), block)
                builder.position_at_end(block)
                found.append(pieces(context, builder, args, encoding))
                builder.branch(end)
            builder.position_at_end(end)
            read = [builder.phi(piece.type) for piece in found[0]]
            for of_encoding, block in zip(found, cases, strict=True):
                for phi, piece in zip(read, of_encoding, strict=True):
                    phi.add_incoming(piece, block)
            # Register r holds the pieces of lanes r, r + count, r + 2 count ... one after another.
            registers = [joined(builder, read[first::count]) for first in range(count)]
            _transpose(builder, registers, count)
            for k, register in enumerate(registers):
                place = builder.add(args[4], builder.mul(args[5], int64(k)))
                place = element_pointer(context, builder, tile, args[3], place)
                place = builder.bitcast(place, ir.PointerType(register.type))
                builder.store(register, place, align=tile.dtype.bitwidth // 8)
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
            flags = builder.bitcast(builder.trunc(args[1], ir.IntType(count)), ir.VectorType(I1, count))
            flags = builder.zext(flags, ir.VectorType(I8, count))
            builder.store(flags, pointer_at(builder, args[0], flags.type), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), emit

    return function


store_flags_1, store_flags_4, store_flags_8, store_flags_16 = map(_flag_writer, (1, 4, 8, 16))
