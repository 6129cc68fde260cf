"""PTX as Triton writes it: one kernel, its instructions in basic blocks, and where each block leads."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import NamedTuple

_INSTRUCTION = re.compile(r"(?:@(!?)(%p\d+)\s+)?([\w.:]+)\s*(.*)$", re.DOTALL)
_LABEL = re.compile(r"([\w$]+):$")
_DECLARATIONS = (".reg", ".local", ".pragma", ".file", ".section")
_WIDTHS = {"b8": 1, "b16": 2, "b32": 4, "b64": 8, "f16": 2, "f32": 4, "f64": 8, "pred": 0}


class PtxError(RuntimeError):
    """A kernel does what it must not, or PTX is not understood."""


class Instruction(NamedTuple):
    opcode: str
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool
    text: str
    source: str
    """Where it comes from: ``file:line:column``, with the calls around it."""

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]


class Program:
    """One kernel: what its PTX says.

    Attributes
    ----------
    parameters
        ``(type, name)`` of each.
    threads
        Of a CTA.
    registers
        Prefix -> bytes of a register (0: a predicate).
    local_bytes
        Of one thread.
    blocks
        Instructions that are executed together.
    successors
        Of each block: for a conditional branch the one that it leads to where it is taken, then the next.
    digest
        Of all that decides what is executed: lines of the source and paths are not in it.
    """

    def __init__(self, text: str) -> None:
        start = text.index(".entry")
        body = text.index("{", start)
        head = text[start:body]
        self.name = _found(r"\.entry\s+([\w$]+)\s*\(", head)
        self.target = _found(r"\.target\s+(\w+)", text)
        self.threads = int(_found(r"\.reqntid\s+(\d+)", head))
        parameter = r"\.param\s+\.(\w+)(?:\s+\.ptr)?(?:\s+\.\w+)*?(?:\s+\.align\s+\d+)?\s+(\w+_param_\d+)"
        self.parameters: list[tuple[str, str]] = re.findall(parameter, head)
        self.registers = {
            prefix: _WIDTHS[kind] for kind, prefix in re.findall(r"\.reg\s+\.(\w+)\s+%([A-Za-z]+)\b", text)
        }
        local = re.search(r"\.local\s+\.align\s+\d+\s+\.b8\s+\w+\[(\d+)\]", text)
        self.local_bytes = int(local[1]) if local else 0
        self.blocks, labels = _basic_blocks(text[body + 1 :])
        self.successors = [_successors(block, b, labels) for b, block in enumerate(self.blocks)]
        texts = [[instruction.text for instruction in block] for block in self.blocks]
        executed = self.target, self.threads, self.parameters, self.local_bytes, texts, self.successors
        self.digest = hashlib.sha256(repr(executed).encode()).hexdigest()[:12]


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise PtxError(f"no {pattern} in the PTX")
    return match[1]


def _basic_blocks(body: str) -> tuple[list[list[Instruction]], dict[str, int]]:
    """Blocks, and label -> number of the block that it stands before."""
    blocks: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for item in _statements(body):
        if isinstance(item, str):
            if blocks[-1]:
                blocks.append([])
            labels[item] = len(blocks) - 1
            continue
        blocks[-1].append(item)
        if item.name in ("bra", "ret") or item.opcode == "bar.sync":
            blocks.append([])
    while blocks and not blocks[-1]:
        blocks.pop()
    return blocks, labels


def _statements(body: str) -> Iterator[Instruction | str]:
    """Instructions, and the names of labels."""
    source = pending = ""
    for raw in body.splitlines():
        line, _, comment = raw.partition("//")
        line = line.strip()
        if line.startswith(".loc"):
            source = comment.strip()
        elif line == "}":
            return
        elif match := _LABEL.match(line):
            yield match[1]
        elif line and not line.startswith(_DECLARATIONS):
            pending += " " + line
            while ";" in pending:
                statement, pending = pending.split(";", 1)
                if statement.strip(" {}"):
                    yield _instruction(statement.strip(), source)


def _instruction(text: str, source: str) -> Instruction:
    match = _INSTRUCTION.match(text)
    if match is None:
        raise PtxError(f"not an instruction: {text!r}")
    negated, predicate, opcode, operands = match.groups()
    return Instruction(opcode, _split(operands), predicate, bool(negated), text, source)


def _split(text: str) -> tuple[str, ...]:
    """Operands, at the commas outside of brackets."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    if current.strip():
        parts.append(current.strip())
    return tuple(parts)


def _successors(block: list[Instruction], b: int, labels: dict[str, int]) -> list[int]:
    last = block[-1]
    after = [b + 1] if last.predicate or last.name not in ("bra", "ret") else []
    return [labels[last.operands[0]], *after] if last.name == "bra" else after
