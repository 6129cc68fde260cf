"""Multiplications and additions that ptxas may make one instruction of, made one."""

from __future__ import annotations

from emulator.parse import Instruction, Program


def contract(program: Program) -> int:
    """Within a block, ``add`` and ``sub`` of a product become ``fma``; returns how many.

    PTX lets the assembler do so where neither names a rounding. The product is still computed, for others.
    """
    made = 0
    for block in program.blocks:
        products: dict[str, Instruction] = {}
        for k, instruction in enumerate(block):
            new = _fused(instruction, products)
            if new is not None:
                block[k] = new
                made += 1
            written = instruction.operands[0] if instruction.operands else ""
            products = {to: by for to, by in products.items() if written not in by.operands}
            is_product = instruction.opcode in ("mul.f32", "mul.f64") and not instruction.predicate
            if is_product and written not in instruction.operands[1:]:
                products[written] = instruction
    return made


def _fused(instruction: Instruction, products: dict[str, Instruction]) -> Instruction | None:
    """``a b + c``, ``a b - c`` or ``c - a b`` in place of an addition or subtraction of a product."""
    if instruction.opcode not in ("add.f32", "sub.f32", "add.f64", "sub.f64") or instruction.predicate:
        return None
    kind = instruction.opcode[-3:]
    to, *terms = instruction.operands
    for which in (1, 0):
        product = products.get(terms[which])
        if product is None or product.opcode != f"mul.{kind}":
            continue
        a, b = product.operands[1:]
        c = terms[1 - which]
        if instruction.name == "sub" and which == 1:
            a = _negative(a)
        elif instruction.name == "sub":
            c = _negative(c)
        return instruction._replace(opcode=f"fma.rn.{kind}", operands=(to, a, b, c))
    return None


def _negative(operand: str) -> str:
    if operand.startswith("%"):
        return f"-{operand}"
    return f"{operand[:2]}{int(operand[2], 16) ^ 8:X}{operand[3:]}"  # the sign of 0f… or 0d…
