"""Plain N:M masks of groups that lie one behind the other: entries ranked where they are, in registers.

A register is read as it lies in memory and holds whole groups, or a group fills whole registers. Each entry
is compared with the others of its group by turning the groups round within the register, and the comparison
is written as bytes. (Transposed and sorted, a group to a lane, groups of 16 and 32 took longer.) Scores are
compared as the integers that their bits make once negative ones are turned over: all dtypes of a size share
the code, and -0 is 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import types

from nmsolve.backends.cpu._numba.compiled import compiled, inner
from nmsolve.backends.cpu._numba.emit import I8, broadcast, int64, intrinsic, pointer_at, shuffle
from nmsolve.backends.cpu._numba.lanes import WIDTH
from nmsolve.backends.cpu._numba.memory import peek, poke

__all__ = ["SIZES", "Rows", "solve_groups"]

SIZES = (4, 8, 16, 32)
"""The group sizes that this is for."""


class Rows(NamedTuple):
    """Rows of groups: addresses of the first, bytes between them, and entries of each and of the last."""

    number: int
    length: int
    last_length: int
    scores: int
    scores_step: int
    mask: int
    mask_step: int


def _constant(kind: Any, values: list[int]) -> Any:
    return ir.Constant(kind, [kind.element(value) for value in values])


def _keys(builder: Any, address: Any, kind: Any) -> Any:
    """The scores at an address as integers in the same order, a register of them."""
    bits = builder.load(pointer_at(builder, address, kind), align=kind.element.width // 8)
    magnitude = builder.and_(bits, _constant(kind, [(1 << (kind.element.width - 1)) - 1] * kind.count))
    negative = builder.icmp_signed("<", bits, ir.Constant(kind, None))
    return builder.select(negative, builder.sub(ir.Constant(kind, None), magnitude), bits)


def _before(builder: Any, keys: list[Any], own: int, group: int) -> Any:
    """How many entries of its group come before each: larger ones, and equal ones to its left."""
    kind = keys[own].type
    lanes = kind.count
    less = builder.sub(keys[own], _constant(kind, [1] * lanes))
    count = ir.Constant(kind, None)
    for other, key in enumerate(keys):
        for turn in range(group):
            if other == own and turn == 0:
                continue
            picks = [lane - lane % group + (lane + turn) % group for lane in range(lanes)]
            turned = shuffle(builder, key, key, picks) if turn else key
            if other != own:
                least = less if other < own else keys[own]
            else:
                left = [int(pick < lane) for lane, pick in enumerate(picks)]
                least = builder.sub(keys[own], _constant(kind, left))
            count = builder.sub(count, builder.sext(builder.icmp_signed(">", turned, least), kind))
    return count


@intrinsic
def _mark(typingctx: Any, scores: Any, mask: Any, n: Any, group: Any, like: Any) -> Any:
    """Which entries are kept of a register, or of a group if that is more, as bytes from address ``mask``."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        width = like.dtype.bitwidth
        kind = ir.VectorType(ir.IntType(width), 8 * WIDTH // width)
        registers = max(1, group.count // kind.count)
        keys = [_keys(builder, builder.add(args[0], int64(WIDTH * k)), kind) for k in range(registers)]
        kept = broadcast(builder, builder.trunc(args[2], kind.element) if width < 64 else args[2], kind.count)
        for own in range(registers):
            before = _before(builder, keys, own, min(group.count, kind.count))
            flags = builder.zext(builder.icmp_signed("<", before, kept), ir.VectorType(I8, kind.count))
            place = builder.add(args[1], int64(kind.count * own))
            builder.store(flags, pointer_at(builder, place, flags.type), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, group, like), emit


@inner
def _mark_row(scores: int, mask: int, length: int, n: int, group: Any, like: Any) -> None:
    """The groups of one row. The last ones go through scratch, so that nothing behind them is touched."""
    step = max(len(group), WIDTH // like.itemsize)
    whole = length - length % step
    for k in range(0, whole, step):
        _mark(scores + k * like.itemsize, mask + k, n, group, like)
    if whole < length:
        rest, flags = np.zeros(step, like.dtype), np.empty(step, np.uint8)
        for k in range(length - whole):
            rest[k] = peek(scores + (whole + k) * like.itemsize, like.dtype.type(0))
        _mark(rest.ctypes.data, flags.ctypes.data, n, group, like)
        for k in range(length - whole):
            poke(mask + whole + k, flags[k])


@compiled
def solve_groups(rows: Rows, n: int, group: Any, like: Any, first: int, last: int) -> None:
    """Rows ``first .. last``: groups as long as the tuple ``group``, scores of the size of ``like``'s."""
    for row in range(first, last):
        length = rows.length if row < rows.number - 1 else rows.last_length
        scores = rows.scores + row * rows.scores_step
        _mark_row(scores, rows.mask + row * rows.mask_step, length, n, group, like)
