"""A basic block of PTX as a Python function of NumPy calls.

The function takes the threads that execute it (True for all, or one bool each) and returns what happens next:
None (the next block, or the one that is branched to), for a conditional branch one bool for each thread, or
"barrier" or "exit". Its globals are what :class:`emulator.machine.Machine` binds: registers, operands,
:mod:`emulator.arithmetic`, and the machine's own functions, which take the place (block, instruction) that
they are called from.

An opcode is translated by the one rule whose pattern matches it whole. What no rule matches is an error,
modifiers included: none is passed over.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from types import CodeType

import numpy as np

from emulator.arithmetic import TYPES, UNSIGNED
from emulator.parse import Instruction, Program, PtxError

LOCAL = 1 << 60
"""Generic address of local memory; no tensor lies there."""

SPECIAL = (
    "%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y",
    "%nctaid.z", "%laneid",
)  # fmt: skip

Rule = Callable[["_Writer", "re.Match[str]", Instruction], None]
_RULES: list[tuple[re.Pattern[str], Rule]] = []


def rule(pattern: str) -> Callable[[Rule], Rule]:
    """Translate the opcodes that ``pattern`` matches whole; ``<F>``, ``<I>``: float and integer types."""
    pattern = pattern.replace("<F>", "(?P<type>f32|f64)").replace("<I>", "(?P<type>[us](?:16|32|64))")

    def register(function: Rule) -> Rule:
        _RULES.append((re.compile(pattern), function))
        return function

    return register


class Translation:
    """The code of a program's blocks, and the names that it needs beside the machine's functions.

    Attributes
    ----------
    views
        Name -> (register, type that it is seen as).
    constants
        Name -> value.
    """

    code: CodeType

    def __init__(self, program: Program) -> None:
        self.program = program
        self.views: dict[str, tuple[str, type]] = {}
        self.constants: dict[str, np.generic] = {}
        source = []
        for b, block in enumerate(program.blocks):
            writer = _Writer(self)
            for k, instruction in enumerate(block):
                try:
                    writer.translate(instruction, f"({b}, {k})")
                except PtxError as error:
                    raise PtxError(f"{program.name}: {error}") from error
            source += [f"def block{b}(M):", *(f"    {line}" for line in writer.lines)]
        self.source = "\n".join(source)
        self.code = compile(self.source, f"<PTX of {program.name}>", "exec")


class _Writer:
    """Writes the lines of one block."""

    def __init__(self, translation: Translation) -> None:
        self.of = translation
        self.lines: list[str] = []
        self.mask = "M"
        self.place = ""

    def translate(self, instruction: Instruction, place: str) -> None:
        function, match = _rule_of(instruction.opcode)
        self.place, self.mask = place, "M"
        if instruction.predicate:
            self.lines.append(f"m = both(M, {self.condition(instruction)})")
            self.mask = "m"
        try:
            function(self, match, instruction)
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise PtxError(f"cannot translate {instruction.text!r}: {error!r}") from error

    def condition(self, instruction: Instruction) -> str:
        assert instruction.predicate is not None
        return ("~" if instruction.negated else "") + self.value(instruction.predicate, "pred")

    def width(self, register: str) -> int:
        """Bytes of a register."""
        prefix = re.match(r"%([A-Za-z]+)\d*$", register)
        if prefix is None or prefix[1] not in self.of.program.registers:
            raise PtxError(f"unknown register {register}")
        return self.of.program.registers[prefix[1]]

    def value(self, operand: str, kind: str) -> str:
        """An expression: the operand as an array of ``kind``."""
        want = TYPES[kind]
        if operand in SPECIAL:
            return f"{operand[1:].replace('.', '_')}.astype({want.__name__})"
        if operand.startswith("-%"):  # as contract.py writes it
            return f"-{self.value(operand[1:], kind)}"
        if operand.startswith("%"):
            width = self.width(operand)
            if width != (0 if kind == "pred" else np.dtype(want).itemsize):
                if width == 0 or kind == "pred":
                    raise PtxError(f"{operand} is not of type {kind}")
                return f"{self.view(operand, UNSIGNED[width])}.astype({want.__name__})"
            return self.view(operand, want)
        name = f"constant_{kind}_{operand}".replace("-", "minus_").replace("$", "_")
        self.of.constants[name] = _constant(operand, want)
        return name

    def view(self, register: str, kind: type) -> str:
        name = f"{register[1:]}_{kind.__name__}"
        self.of.views[name] = (register, kind)
        return name

    def register(self, destination: str, kind: str) -> str:
        """The array of a register that is as large as ``kind``, seen as that."""
        if self.width(destination) != (0 if kind == "pred" else np.dtype(TYPES[kind]).itemsize):
            raise PtxError(f"{destination} does not hold {kind}")
        return self.view(destination, TYPES[kind])

    def put(self, destination: str, kind: str, expression: str) -> None:
        """Store an expression of ``kind`` in a register of the same size."""
        if destination != "_":
            to = self.register(destination, kind)
            self.lines.append(f"copyto({to}, {expression}, where={self.mask})")

    def call(self, destination: str, kind: str, function: str, *operands: str) -> None:
        """A function of operands of ``kind``."""
        arguments = ", ".join(self.value(operand, kind) for operand in operands)
        self.put(destination, kind, f"{function}({arguments})")

    def ufunc(self, destination: str, to: str, kind: str, function: str, *operands: str) -> None:
        """A function of NumPy that writes into the register."""
        arguments = ", ".join(self.value(operand, kind) for operand in operands)
        out = self.register(destination, to)
        self.lines.append(f"np.{function}({arguments}, out={out}, where={self.mask})")


@functools.cache
def _rule_of(opcode: str) -> tuple[Rule, re.Match[str]]:
    found = [(function, match) for pattern, function in _RULES if (match := pattern.fullmatch(opcode))]
    if len(found) != 1:
        raise PtxError(f"unknown instruction {opcode}" if not found else f"{len(found)} rules for {opcode}")
    return found[0]


def _constant(operand: str, kind: type) -> np.generic:
    bits = np.dtype(kind).itemsize * 8
    if operand.startswith("0f"):
        return np.array([int(operand[2:], 16)], np.uint32).view(kind)[0]
    if operand.startswith("0d"):
        return np.array([int(operand[2:], 16)], np.uint64).view(kind)[0]
    if operand == "global_smem":
        return kind(0)
    if operand.startswith("__local_depot"):
        return kind(LOCAL if bits == 64 else 0)  # generic, or in local memory, as Triton 3.9 has it
    number = int(operand.rstrip("U"), 0)
    if kind is np.bool_:
        return np.bool_(number != 0)
    return np.array([number & ((1 << bits) - 1)], UNSIGNED[bits // 8]).view(kind)[0]


def _names(braced: str) -> list[str]:
    return [name.strip() for name in braced.strip("{} ").split(",")]


def _bits(kind: str) -> str:
    """``b32`` and its like as unsigned numbers."""
    return "u" + kind[1:] if kind.startswith("b") else kind


# --- arithmetic ---------------------------------------------------------------------------------------------

_NUMPY = {
    "add": "add", "sub": "subtract", "mul": "multiply", "and": "bitwise_and", "or": "bitwise_or",
    "xor": "bitwise_xor", "max": "maximum", "min": "minimum", "neg": "negative", "abs": "abs",
    "not": "invert",
}  # fmt: skip


@rule(r"(?:add|sub|mul)(?:\.rn)?\.<F>|(?:add|sub|max|min|mul\.lo)\.[us](?:16|32|64)")
def _plain(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    kind = i.opcode.rpartition(".")[2]
    w.ufunc(i.operands[0], kind, kind, _NUMPY[i.name], *i.operands[1:])


@rule(r"(?:and|or|xor)\.(b16|b32|b64|pred)")
def _logic(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    w.ufunc(i.operands[0], _bits(match[1]), _bits(match[1]), _NUMPY[i.name], *i.operands[1:])


@rule(r"not\.(b16|b32|b64|pred)")
def _not(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    w.ufunc(i.operands[0], _bits(match[1]), _bits(match[1]), "invert", i.operands[1])


@rule(r"neg\.(?:bf16|f16)x2")
def _neg_half(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    w.put(i.operands[0], "u32", f"{w.value(i.operands[1], 'u32')} ^ u32(0x80008000)")


@rule(r"(?:neg|abs)\.(f32|f64|s16|s32|s64)")
def _sign(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    w.ufunc(i.operands[0], match[1], match[1], _NUMPY[i.name], i.operands[1])


@rule(r"(add|sub|mul)(?:\.rn)?\.ftz\.f32")
def _plain_ftz(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    x, y = (w.value(operand, "f32") for operand in i.operands[1:])
    sign = {"add": "+", "sub": "-", "mul": "*"}[match[1]]
    w.put(i.operands[0], "f32", f"ftz(ftz({x}) {sign} ftz({y}))")


@rule(r"(max|min)\.<F>")
def _extreme(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    """Of two numbers, or of three from sm_100 on."""
    x, *others = (w.value(operand, match["type"]) for operand in i.operands[1:])
    if len(others) not in (1, 2):
        raise PtxError(f"{len(i.operands)} operands: {i.text}")
    for other in others:
        x = f"f{match[1]}({x}, {other})"
    w.put(i.operands[0], match["type"], x)


@rule(r"(add|sub|mul|fma)(?:\.rn)?\.f32x2")
def _pairs(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    operands = ", ".join(w.value(operand, "u64") for operand in i.operands[1:])
    function = "fma32" if match[1] == "fma" else f"np.{_NUMPY[match[1]]}"
    w.put(i.operands[0], "u64", f"in_pairs({function}, {operands})")


@rule(r"(add|sub)\.s16x2")
def _halves(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    x, y = (w.value(operand, "u32") for operand in i.operands[1:])
    w.put(i.operands[0], "u32", f"in_halves({x}, {y}, subtract={match[1] == 'sub'})")


@rule(r"fma\.rn\.<F>")
def _fma(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    w.call(i.operands[0], match["type"], f"fma{match['type'][1:]}", *i.operands[1:])


@rule(r"fma\.rn\.ftz\.f32")
def _fma_ftz(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    x, y, z = (f"ftz({w.value(operand, 'f32')})" for operand in i.operands[1:])
    w.put(i.operands[0], "f32", f"ftz(fma32({x}, {y}, {z}))")


@rule(r"(add|sub|mul|fma)(?:\.rn)?(\.sat)?\.(bf16|f16)(x2)?")
def _half(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    kind = "u32" if match[4] else "u16"
    operands = [w.value(operand, kind) for operand in i.operands[1:]]
    names = "abc"[: len(operands)]
    how = "fma_half(" if match[1] == "fma" else f"arithmetic_half({match[1]!r}, "
    result = f"{how}{', '.join(names)}, {match[3]!r})"
    function = f"lambda {', '.join(names)}: {f'clipped_half({result}, {match[3]!r})' if match[2] else result}"
    w.put(
        i.operands[0], kind, f"{'both_halves' if match[4] else 'applied'}({function}, {', '.join(operands)})"
    )


@rule(r"(add|sub|fma)\.rn\.f32\.(bf16|f16)")
def _mixed(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    """float32 from terms, or factors, of which the first are halves; from sm_100 on."""
    *halves, last = i.operands[1:]
    terms = [f"from_{match[2]}({w.value(operand, 'u16')}).astype(f32)" for operand in halves]
    c = w.value(last, "f32")
    sign = "-" if match[1] == "sub" else "+"
    w.put(
        i.operands[0],
        "f32",
        f"fma32({', '.join(terms)}, {c})" if match[1] == "fma" else f"{terms[0]} {sign} {c}",
    )


@rule(r"(mul|mad)\.wide\.([us])(16|32)")
def _wide(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    narrow, wide = f"{match[2]}{match[3]}", f"{match[2]}{2 * int(match[3])}"
    x, y = (f"{w.value(operand, narrow)}.astype({TYPES[wide].__name__})" for operand in i.operands[1:3])
    more = f" + {w.value(i.operands[3], wide)}" if match[1] == "mad" else ""
    w.put(i.operands[0], wide, f"{x} * {y}{more}")


@rule(r"mul\.hi\.([us]32)")
def _high(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    w.call(i.operands[0], match[1], "mul_hi", *i.operands[1:])


@rule(r"mad\.lo\.<I>")
def _mad(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    x, y, z = (w.value(operand, match["type"]) for operand in i.operands[1:])
    w.put(i.operands[0], match["type"], f"{x} * {y} + {z}")


@rule(r"(div|rem)\.<I>")
def _division(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    x, y = (w.value(operand, match["type"]) for operand in i.operands[1:])
    quotient = f"divide({x}, {y}, {w.mask}, {w.place})"
    w.put(i.operands[0], match["type"], quotient if match[1] == "div" else f"{x} - {quotient} * {y}")


@rule(r"div\.rn\.<F>")
def _div(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    w.ufunc(i.operands[0], match["type"], match["type"], "divide", *i.operands[1:])


@rule(r"sqrt\.rn\.<F>")
def _sqrt(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    w.ufunc(i.operands[0], match["type"], match["type"], "sqrt", i.operands[1])


@rule(r"rcp\.rn\.<F>")
def _rcp(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    w.put(i.operands[0], match["type"], f"1 / {w.value(i.operands[1], match['type'])}")


@rule(r"(ex2|lg2|rcp|rsqrt|sqrt|div)\.approx(\.ftz)?\.f32")
def _approximate(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    w.call(i.operands[0], "f32", f"{match[1]}_approx{'_ftz' if match[2] else ''}", *i.operands[1:])


@rule(r"div\.full(\.ftz)?\.f32")
def _div_full(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    w.call(i.operands[0], "f32", f"div_full{'_ftz' if match[1] else ''}", *i.operands[1:])


# --- bits ---------------------------------------------------------------------------------------------------


@rule(r"(shl|shr)\.([bus])(16|32|64)")
def _shift(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    kind = _bits(match[2] + match[3])
    x, amount = w.value(i.operands[1], kind), w.value(i.operands[2], "u32")
    w.put(i.operands[0], kind, f"shift({x}, {amount}, left={match[1] == 'shl'})")


@rule(r"bfe\.([us](?:32|64))")
def _bfe(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    x, position, length = w.value(i.operands[1], match[1]), *(w.value(o, "u32") for o in i.operands[2:])
    w.put(i.operands[0], match[1], f"bfe({x}, {position}, {length})")


@rule(r"(bfi|prmt|popc|clz)\.b32")
def _bits_of_words(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    w.call(i.operands[0], "u32", match[1], *i.operands[1:])


# --- moving, choosing, comparing ----------------------------------------------------------------------------


@rule(r"mov\.([bus])(16|32|64)|mov\.(pred|f32|f64)|cvta\.to\.global\.(u)(64)")
def _mov(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    kind = _bits(i.opcode.rpartition(".")[2])
    to, source = i.operands
    if to.startswith("{"):
        bits = int(kind[1:])
        each = bits // len(_names(to))
        for k, name in enumerate(_names(to)):
            part = f"({w.value(source, kind)} >> u{bits}({each * k})).astype(u{each})"
            w.put(name, f"u{each}", part)
    elif source.startswith("{"):
        bits = int(kind[1:])
        each = bits // len(_names(source))
        parts = [f"({w.value(n, f'u{each}')}.astype(u{bits}) << u{bits}({each * k}))"
                 for k, n in enumerate(_names(source))]  # fmt: skip
        w.put(to, kind, " | ".join(parts))
    else:
        w.put(to, kind, w.value(source, kind))


@rule(r"(max|min)\.relu\.s32")
def _relu(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    x, y = (w.value(operand, "s32") for operand in i.operands[1:])
    w.put(i.operands[0], "s32", f"np.maximum(np.{_NUMPY[match[1]]}({x}, {y}), 0)")


@rule(r"cvta\.local\.u64")
def _cvta_local(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    w.put(i.operands[0], "u64", f"({w.value(i.operands[1], 'u64')} | u64({LOCAL}))")


@rule(r"selp\.([bus](?:16|32|64)|f32|f64)")
def _selp(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    kind = _bits(match[1])
    x, y = (w.value(operand, kind) for operand in i.operands[1:3])
    w.put(i.operands[0], kind, f"np.where({w.value(i.operands[3], 'pred')}, {x}, {y})")


_COMPARISONS = {
    "eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater",
    "ge": "greater_equal",
}  # fmt: skip
_UNORDERED = {"ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}


@rule(r"set\.(eq|lt|le|gt|ge)\.f32\.f32")
def _set(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    """1.0 or 0.0."""
    x, y = (w.value(operand, "f32") for operand in i.operands[1:])
    w.put(i.operands[0], "f32", f"np.{_COMPARISONS[match[1]]}({x}, {y}).astype(f32)")


@rule(r"setp\.(eq|ne|lt|le|gt|ge)\.([bus](?:16|32|64))")
def _setp(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    w.ufunc(i.operands[0], "pred", _bits(match[2]), _COMPARISONS[match[1]], *i.operands[1:])


@rule(r"setp\.(eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan)\.<F>")
def _setp_float(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    """Where one is NaN the comparisons ``lt`` … are false, and ``ltu`` … true; so ``ne`` and ``neu``."""
    to, *operands = i.operands
    how, kind = match[1], match["type"]
    if how == "neu" or (how in _COMPARISONS and how != "ne"):
        w.ufunc(to, "pred", kind, _COMPARISONS[how.rstrip("u")], *operands)
        return
    x, y = (w.value(operand, kind) for operand in operands)
    w.put(to, "pred", {
        "ne": f"({x} < {y}) | ({x} > {y})",
        "equ": f"~(({x} < {y}) | ({x} > {y}))",
        "num": f"~(np.isnan({x}) | np.isnan({y}))",
        "nan": f"np.isnan({x}) | np.isnan({y})",
    }.get(how) or f"~({x} {_UNORDERED[how]} {y})")  # fmt: skip


_SYMBOLS = {"eq": "==", "neu": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


@rule(r"setp\.(eq|neu|lt|le|gt|ge)\.(bf16|f16)(x2)?")
def _setp_half(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    sign, wide = _SYMBOLS[match[1]], f"from_{match[2]}"
    if not match[3]:
        x, y = (f"{wide}({w.value(operand, 'u16')})" for operand in i.operands[1:])
        w.put(i.operands[0], "pred", f"{x} {sign} {y}")
        return
    x, y = (w.value(operand, "u32") for operand in i.operands[1:])
    low, high = i.operands[0].split("|")
    w.lines.append(f"low = {wide}({x} & u32(0xFFFF)) {sign} {wide}({y} & u32(0xFFFF))")
    w.lines.append(f"high = {wide}({x} >> u32(16)) {sign} {wide}({y} >> u32(16))")
    w.put(low, "pred", "low")
    w.put(high, "pred", "high")


# --- conversions --------------------------------------------------------------------------------------------


@rule(r"cvt\.rn\.(bf16|f16)x2\.f32")
def _pack(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    high, low = (f"to_{match[1]}({w.value(operand, 'f32')}).astype(u32)" for operand in i.operands[1:])
    w.put(i.operands[0], "u32", f"({high} << u32(16)) | {low}")


@rule(r"cvt\.rn\.(bf16|f16)\.f32")
def _to_half(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    w.put(i.operands[0], "u16", f"to_{match[1]}({w.value(i.operands[1], 'f32')})")


@rule(r"cvt(?:\.rn)?\.(f32|f64)\.(bf16|f16)")
def _from_half(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    wide = f"from_{match[2]}({w.value(i.operands[1], 'u16')})"
    w.put(i.operands[0], match[1], f"{wide}.astype({match[1]})")


@rule(r"cvt(?:\.rn)?(\.ftz)?\.(f32|f64)\.(f32|f64|[us](?:8|16|32|64))")
def _to_float(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    rounded = f"{w.value(i.operands[1], match[3])}.astype({match[2]})"
    w.put(i.operands[0], match[2], f"ftz({rounded})" if match[1] else rounded)


@rule(r"cvt\.rzi\.([us](?:8|16|32|64))\.(f32|f64)")
def _to_int(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    whole = f"to_int({w.value(i.operands[1], match[2])}, {match[1]})"
    _put_extended(w, i.operands[0], match[1], whole)


@rule(r"cvt\.([us](?:8|16|32|64))\.([us](?:8|16|32|64))")
def _between_ints(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    _put_extended(w, i.operands[0], match[1], f"{w.value(i.operands[1], match[2])}.astype({match[1]})")


def _put_extended(w: _Writer, destination: str, kind: str, expression: str) -> None:
    """A result narrower than the register is extended by its sign, or by zeros."""
    wide = f"{kind[0]}{8 * w.width(destination)}"
    w.put(destination, wide, expression if wide == kind else f"{expression}.astype({wide})")


# --- memory -------------------------------------------------------------------------------------------------


def _address(w: _Writer, operand: str) -> str:
    match = re.fullmatch(r"\[\s*(%?[\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
    if match is None:
        raise PtxError(f"cannot read the address {operand}")
    wide = match[1].startswith("%") and w.width(match[1]) == 8
    return f"{w.value(match[1], 'u64' if wide else 'u32')}.astype(s64) + {int(match[2] or 0)}"


@rule(r"ld\.param\.([bus])(8|16|32|64)")
def _parameter(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    name = i.operands[1].strip("[] ")
    if name not in [known for _, known in w.of.program.parameters]:
        raise PtxError(f"unknown parameter {name}")
    kind = _bits(match[1] + match[2])
    _put_extended(w, i.operands[0], kind, f"parameter({name!r}, {kind})")


# Triton 3.8 writes shared::cta for shared, which is the same.
_SPACE, _HINTS = r"(?:\.(global|shared|local)(?:(?<=shared)::cta)?)?", r"(?:\.nc)?(?:\.L1::evict_\w+)?"


@rule(rf"(ld|st){_SPACE}{_HINTS}(?:\.(v2|v4|v8))?\.[busf](8|16|32|64)")
def _memory(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    size = int(match[4]) // 8
    load = match[1] == "ld"
    registers, address = i.operands if load else reversed(i.operands)
    names = _names(registers)
    if len(names) != int((match[3] or "v1")[1:]):
        raise PtxError(f"{len(names)} registers for {i.opcode}")
    values = []
    for name in names:
        bits = 8 * (w.width(name) if name.startswith("%") else size)
        values.append("None" if name == "_" else w.value(name, f"u{bits}"))
    function = f"{match[1]}_{match[2] or 'generic'}"
    w.lines.append(f"{function}({_address(w, address)}, {size}, [{', '.join(values)}], {w.mask}, {w.place})")


@rule(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?(?:\.shared(?:::cta)?)?\.b16")
def _matrices(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    registers, address = i.operands if match[1] == "ld" else reversed(i.operands)
    names = _names(registers)
    if len(names) != int(match[2]):
        raise PtxError(f"{len(names)} registers for {i.opcode}")
    values = ", ".join(w.value(name, "u32") for name in names)
    turned = match[3] is not None
    w.lines.append(f"{match[1]}matrix({_address(w, address)}, [{values}], {turned}, {w.mask}, {w.place})")


@rule(r"cp\.async\.(?:ca|cg)\.shared(?:::cta)?\.global(?:\.L2::\d+B)?")
def _copy(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    """Bytes past the last operand, how many are read, are zeros."""
    to, source, size, *read = i.operands
    count = w.value(read[0] if read else size, "u32")
    w.lines.append(
        f"copy_async({_address(w, to)}, {_address(w, source)}, {int(size, 0)}, {count}, {w.mask}, {w.place})"
    )


@rule(r"cp\.async\.commit_group")
def _commit(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    w.lines.append(f"commit_copies({w.mask})")


@rule(r"cp\.async\.wait_group")
def _wait(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    w.lines.append(f"wait_for_copies({int(i.operands[0], 0)}, {w.mask}, {w.place})")


# --- threads together ---------------------------------------------------------------------------------------


@rule(r"shfl\.sync\.(bfly|idx|up|down)\.b32")
def _shuffle(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    x, lane, clamp, members = (w.value(operand, "u32") for operand in i.operands[1:])
    call = f"shuffle_{match[1]}({x}, {lane}, {clamp}, {members}, {w.mask}, {w.place})"
    w.put(i.operands[0], "u32", call)


@rule(r"redux\.sync\.(max|min|add)\.([us]32)|redux\.sync\.(and|or|xor)\.b32")
def _redux(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    kind, how = match[2] or "u32", _NUMPY[match[1] or match[3]]
    x, members = w.value(i.operands[1], kind), w.value(i.operands[2], "u32")
    w.put(i.operands[0], kind, f"reduce(np.{how}, {x}, {members}, {w.mask}, {w.place})")


@rule(r"redux\.sync\.(max|min)\.f32")
def _redux_float(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    x, members = w.value(i.operands[1], "f32"), w.value(i.operands[2], "u32")
    w.put(i.operands[0], "f32", f"reduce(f{match[1]}, {x}, {members}, {w.mask}, {w.place})")


@rule(r"bar\.warp\.sync")
def _warp_barrier(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    w.lines.append(f"warp_barrier({w.value(i.operands[0], 'u32')}, {w.mask}, {w.place})")


@rule(r"bar\.sync")
def _barrier(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    if i.operands != ("0",) or i.predicate:
        raise PtxError(f"only barrier 0 of the whole CTA is known: {i.text}")
    w.lines += [f"arrive(M, {w.place})", "return 'barrier'"]


@rule(r"bra(?:\.uni)?")
def _branch(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    w.lines.append(f"return {w.condition(i)}" if i.predicate else "return None")


@rule(r"ret")
def _return(w: _Writer, match: re.Match[str], i: Instruction) -> None:
    if i.predicate:
        raise PtxError(f"a return for some threads is not known: {i.text}")
    w.lines.append("return 'exit'")
