"""Machine code of NVIDIA GPUs: instructions with their source lines, basic blocks, loops.

Only paths that a warp takes whose lanes stay together count: targets of ``BRA.DIV`` (what the compiler keeps
ready for diverged warps) belong to no basic block that is *hot*, nor do subroutines (64-bit division), which
count where they are called.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import NamedTuple

_FILE = re.compile(r'//## File "([^"]+)", line (\d+)')
_LABEL = re.compile(r"^([.$]\S+):")
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);")
_TARGET = re.compile(r"(?:`\(([.$]\S+?)\)|\b0x([0-9a-f]+))\s*$")


_NUMBER = re.compile(r"\b0x[0-9a-f]+\b")
_REGISTER = re.compile(r"\bU?R\d+\b")
_ENDS = ("CALL", "EXIT", "RET")


class Instruction(NamedTuple):
    address: int
    predicate: str
    opcode: str
    operands: str
    target: int | None
    """Address that a branch leads to."""
    source: tuple[str, int]
    """(file, line) that the compiler names."""
    callee: int | None = None
    """Address of the subroutine that is called, which comes back."""

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]


def parse(listing: str) -> list[Instruction]:
    """Instructions of the first function in the output of ``nvdisasm -g -c``."""
    labels: dict[str, int] = {}
    waiting: list[str] = []
    found: list[tuple[int, str, str, str, tuple[str, int]]] = []
    source = ("", 0)
    for line in listing.splitlines():
        if match := _FILE.search(line):
            source = (match[1], int(match[2]))
        elif match := _LABEL.match(line):
            waiting.append(match[1])
        elif match := _LINE.match(line):
            address = int(match[1], 16)
            if found and address <= found[-1][0]:
                break
            labels.update(dict.fromkeys(waiting, address))
            waiting.clear()
            found.append((address, (match[2] or "").strip(), match[3], match[4], source))
    code = []
    for address, predicate, opcode, operands, source in found:
        target = callee = None
        if opcode.partition(".")[0] in ("BRA", "BSSY", "CALL") and (match := _TARGET.search(operands)):
            target = labels.get(match[1]) if match[1] else int(match[2], 16)
            if match[1] and match[1].startswith("$"):
                target, callee = None, target
        code.append(Instruction(address, predicate, opcode, operands, target, source, callee))
    return code


def returns(line: Instruction) -> bool:
    """Whether it calls a subroutine that comes back; on sm_80 a CALL of a label leaves some loops."""
    return line.name == "CALL" and line.target is None


def subroutine(code: list[Instruction], call: Instruction) -> list[Instruction]:
    """What is executed between a call and its return.

    Raises ValueError if that is not one straight run of the code.
    """
    found = [line for line in code if call.callee is not None and line.address >= call.callee]
    ends = next((k for k, line in enumerate(found) if _branches(line) or line.name in _ENDS), 0)
    if not found or found[ends].name != "RET" or found[ends].predicate:
        raise ValueError(f"the call at {call.address:#x} is of no straight subroutine: {call.operands}")
    return found[: ends + 1]


def added(line: Instruction) -> tuple[int, bool] | None:
    """The number that an instruction adds, without its sign, and whether to the register that it writes.

    None for other instructions than additions of one number.
    """
    numbers = [int(number, 16) for number in _NUMBER.findall(line.operands)]
    if line.name not in ("IADD", "IADD3", "VIADD", "UIADD3") or len(numbers) != 1:
        return None
    registers = _REGISTER.findall(line.operands)
    return min(numbers[0], 2**32 - numbers[0]), registers[0] in registers[1:]


class Block(NamedTuple):
    """Instructions ``code[first:last]`` that are executed together, and the blocks that may follow."""

    first: int
    last: int
    successors: tuple[int, ...]


def basic_blocks(code: list[Instruction]) -> list[Block]:
    """Basic blocks in the order of their addresses; branches of diverged warps lead nowhere."""
    index = {line.address: k for k, line in enumerate(code)}
    starts = {0}
    for k, line in enumerate(code):
        if _branches(line) or line.name in ("EXIT", "RET"):
            starts.add(k + 1)
        if _branches(line) and line.target in index:
            starts.add(index[line.target])
    firsts = sorted(start for start in starts if start < len(code))
    number = {first: b for b, first in enumerate(firsts)}
    blocks = []
    for b, first in enumerate(firsts):
        last = firsts[b + 1] if b + 1 < len(firsts) else len(code)
        end = code[last - 1]
        conditional = bool(end.predicate) or "," in end.operands
        follow = []
        if _branches(end) and not _of_diverged_warps(end):
            follow.append(number[index[end.target]])  # type: ignore[index]
        ends = _branches(end) or end.name in ("EXIT", "RET")
        if (not ends or conditional or _of_diverged_warps(end)) and last < len(code):
            follow.append(b + 1)
        blocks.append(Block(first, last, tuple(dict.fromkeys(follow))))
    return blocks


def _branches(line: Instruction) -> bool:
    """Whether it goes elsewhere in the function for good."""
    return line.name == "BRA" or (line.name == "CALL" and not returns(line))


def _of_diverged_warps(line: Instruction) -> bool:
    return ".DIV" in line.opcode or ".CONV" in line.opcode


def reachable(blocks: list[Block], start: int = 0, without: int | None = None) -> set[int]:
    """Blocks that can be reached from one, without passing another."""
    todo, seen = ([start] if start != without else []), set()
    while todo:
        b = todo.pop()
        if b not in seen:
            seen.add(b)
            todo += [after for after in blocks[b].successors if after != without]
    return seen


def slow_divisions(code: list[Instruction], blocks: list[Block]) -> set[int]:
    """Blocks that are taken only where a 64-bit division cannot be one of 32 bits: with numbers past 2^32.

    Such a block calls a subroutine once and is the shorter one of two that a branch chooses from, whose other
    one divides in place and goes on where it does.
    """
    hot = reachable(blocks)
    calls = {b: sum(map(returns, code[blocks[b].first : blocks[b].last])) for b in hot}
    return {
        slow
        for branch in hot
        for slow, fast in itertools.permutations(blocks[branch].successors, 2)
        if (calls[slow], calls[fast]) == (1, 0)
        and len(blocks[slow].successors) == 1
        and blocks[slow].successors == blocks[fast].successors
        and blocks[slow].last - blocks[slow].first < blocks[fast].last - blocks[fast].first
        and all(slow not in blocks[b].successors for b in hot - {branch})
    }


def straight_runs(blocks: list[Block]) -> list[list[int]]:
    """The blocks that are reached, in runs that are executed from end to end.

    In a run a block's only successor has no other block before it. Shuffles of warps that may have diverged
    end a block, so that a branch of the source is several.
    """
    hot = reachable(blocks)
    before = Counter(after for b in hot for after in blocks[b].successors)
    follows = {}
    for b in hot:
        if len(blocks[b].successors) == 1 and before[blocks[b].successors[0]] == 1:
            follows[b] = blocks[b].successors[0]
    runs = []
    for b in sorted(hot - set(follows.values())):
        run = [b]
        while run[-1] in follows:
            run.append(follows[run[-1]])
        runs.append(run)
    return runs


class Loop(NamedTuple):
    """A natural loop: its first block, all its blocks, and the index of the loop around it."""

    head: int
    body: frozenset[int]
    parent: int | None


def natural_loops(blocks: list[Block]) -> list[Loop]:
    """Loops, outer ones before inner ones. Those with the same head are one.

    An edge from n to h starts one where every path to n passes h; its body is all that reaches n without
    passing h.
    """
    hot = reachable(blocks)
    before: dict[int, list[int]] = {b: [] for b in hot}
    for b in hot:
        for after in blocks[b].successors:
            before[after].append(b)
    bodies: dict[int, set[int]] = {}
    for head in sorted(hot):
        dominated = hot - reachable(blocks, without=head)
        back = [b for b in before[head] if b in dominated]
        if not back:
            continue
        body, todo = {head}, back
        while todo:
            b = todo.pop()
            if b not in body:
                body.add(b)
                todo += before[b]
        bodies[head] = body
    order = sorted(bodies, key=lambda head: (-len(bodies[head]), head))
    loops: list[Loop] = []
    for head in order:
        around = [k for k, loop in enumerate(loops) if head in loop.body]
        loops.append(Loop(head, frozenset(bodies[head]), around[-1] if around else None))
    return loops


def innermost(loops: list[Loop]) -> dict[int, int]:
    """Block -> number of the innermost loop around it; outer loops come before inner ones."""
    return {b: k for k, loop in enumerate(loops) for b in loop.body}


# --- what executes an instruction ---------------------------------------------------------------------------

_KINDS = {
    "shuffle": ("SHFL", "REDUX"),
    "special": ("MUFU",),
    "shared": ("LDS", "STS", "LDSM", "STSM", "ATOMS"),
    "barrier": ("BAR",),
    "global": ("LDG", "STG", "LD", "ST", "RED", "ATOMG"),
    "local": ("LDL", "STL"),
    "convert": ("F2F", "F2I", "I2F", "I2FP", "F2FP", "FRND"),
    "float": ("FADD", "FMUL", "FFMA", "FMNMX", "FMNMX3", "FSEL", "FSETP", "FSET", "FCHK", "FADD2", "FMUL2",
              "FFMA2", "FSWZADD", "HADD2", "HMUL2", "HFMA2"),
    "double": ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX"),
    "control": ("BRA", "BSSY", "BSYNC", "EXIT", "WARPSYNC", "CALL", "RET", "NOP", "YIELD", "NANOSLEEP",
                "BMOV", "BREAK", "ELECT", "JMP", "BRX", "DEPBAR", "ERRBAR", "MEMBAR", "CCTL", "ACQBULK"),
}  # fmt: skip
KINDS = (*_KINDS, "integer")
_KIND = {name: kind for kind, names in _KINDS.items() for name in names}


def kind(line: Instruction) -> str:
    """One of :data:`KINDS`; whatever is none of the others is counted as integer."""
    return _KIND.get(line.name, "integer")


_PIPES = {
    "fma": ("FADD", "FMUL", "FFMA", "FSWZADD"),
    "fma_packed": ("FADD2", "FMUL2", "FFMA2"),
    "half": ("HADD2", "HMUL2", "HFMA2"),
    "half_mma": (),
    "fma_heavy": ("IMAD", "IDP", "IDP4A"),
    "minmax": ("FMNMX", "FMNMX3"),
    "special": ("MUFU", "F2I", "I2F", "F2F", "FRND", "POPC", "FLO", "BREV"),
    "shuffle": ("SHFL",),
    "memory": (
        "LDG", "STG", "LD", "ST", "LDS", "STS", "LDSM", "STSM", "LDL", "STL", "ATOMS", "ATOMG", "RED", "LDC",
    ),
    "double": ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX"),
    "none": (*_KINDS["control"], "BAR", "S2R", "S2UR", "CS2R", "REDUX"),
}  # fmt: skip
PIPES = (*_PIPES, "uniform", "alu")
_PIPE = {name: pipe for pipe, names in _PIPES.items() for name in names}


def pipe(line: Instruction) -> str:
    """The unit that executes an instruction, one of :data:`PIPES`; by default the integer and logic unit."""
    name = line.name
    if name in _PIPE:
        return "half_mma" if line.opcode.startswith("HFMA2.MMA") else _PIPE[name]
    if name in ("R2UR", "VOTEU") or (name.startswith("U") and name != "UNKNOWN"):
        return "uniform"
    return "alu"


def count(lines: list[Instruction]) -> dict[str, Counter[str]]:
    """Instructions by kind and by pipe."""
    return {"kinds": Counter(map(kind, lines)), "pipes": Counter(map(pipe, lines))}
