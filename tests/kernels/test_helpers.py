"""What the sources of the kernels keep to."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ROOT / "nmsolve" / "backends" / "triton"


def jitted(folder: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function that Triton compiles, with its file and name."""
    for file in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.dump(d) for d in node.decorator_list):
                yield f"{file.name}: {node.name}", node


def test_helpers_take_at_most_eight_arguments() -> None:
    """What belongs together goes in a tuple; a kernel's own arguments cannot (they would be specialised)."""
    functions = {name: len(node.args.posonlyargs + node.args.args) for name, node in jitted(ROOT / "kernels")}
    helpers = {name: count for name, count in functions.items() if not name.endswith("_kernel")}
    assert len(helpers) > 40
    assert {name: count for name, count in helpers.items() if count > 8} == {}


def test_arguments_of_kernels_are_named() -> None:
    """Two of twenty integers that changed places would be compiled without a word."""
    launches = [
        (f"{file.name}:{node.lineno}", node)
        for file in sorted(LAUNCHERS.glob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and "kernel" in ast.unparse(node.func.value)
    ]
    assert len(launches) >= 7
    assert [place for place, node in launches if node.args] == []
