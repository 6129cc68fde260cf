"""The tables of docs/internals/compilers.md, from what bench/compilers.py and bench/stacks.py wrote."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from compilers import REFERENCE
from stacks import STACKS

from tables.columns import Row, in_order, left, markdown, results, right, source, whole

COMPILERS = "compilers.csv"
COSTS = "kernel_costs.csv"
PACKAGES = (
    ("torch", "PyTorch"),
    ("triton", "Triton"),
    ("numpy", "NumPy"),
    ("numba", "Numba"),
    ("transformers", "transformers"),
    ("safetensors", "safetensors"),
)


def _releases(rows: Sequence[Row]) -> list[str]:
    return sorted(in_order(rows, "triton"), key=lambda release: [*map(int, release.split("."))])


def _sound(rows: Sequence[Row], outcome: str) -> str:
    """How many of the rows have an outcome, of how many."""
    return f"{sum(row['outcome'] == outcome for row in rows)} of {len(rows)}" if rows else ""


def _spilling(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["spills"] not in ("", "0")]


def _configuration(row: Row) -> tuple[str, str, str]:
    return row["kernel"], row["m"], row["target"]


def releases() -> str:
    """Every release on one line: what compiles, what spills, what it costs, what agrees."""
    rows = results(COMPILERS)
    reference = {
        (row["kernel"], row["m"] if row["m"] != "0" else "", row["target"]): float(
            row["instructions_per_block"]
        )
        for row in results(COSTS)
        if row["dtype"] == "float32" and row["shipped"] == "1" and row["instructions_per_block"]
    }
    lines = []
    for release in _releases(rows):
        own = [row for row in rows if row["triton"] == release]
        by_how = {
            how: [row for row in own if row["how"] == how] for how in ("compiled", "interpreted", "emulated")
        }
        compiled = by_how["compiled"]
        spilling = [
            f"{row['kernel']} {row['m']} on {row['target']} ({row['spills']})" for row in _spilling(compiled)
        ]
        ratios = [
            float(row["instructions_per_block"]) / reference[_configuration(row)]
            for row in compiled
            if row["instructions_per_block"] and _configuration(row) in reference
        ]
        lines.append(
            [
                release,
                own[0]["torch"],
                _sound(compiled, "compiles"),
                ", ".join(spilling) or "none",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) of {len(ratios)}"
                if ratios
                else "",
                _sound(by_how["interpreted"], "agrees"),
                _sound(by_how["emulated"], "agrees"),
            ]
        )
    head = ["Triton", "of PyTorch", "compile", "spill", f"instructions / those of {REFERENCE}"]
    head += ["agree interpreted", "agree emulated"]
    return markdown(head, lines, "llllrrr") + source(COMPILERS, rows[0])


def targets() -> str:
    """Every target of the reference on one line: what compiles, what spills."""
    rows = [row for row in results(COMPILERS) if (row["triton"], row["how"]) == (REFERENCE, "compiled")]
    lines = []
    for target in in_order(rows, "target"):
        here = [row for row in rows if row["target"] == target]
        spilling = ", ".join(f"{row['kernel']} {row['m']} ({row['spills']})" for row in _spilling(here))
        most = max(int(row["registers"]) for row in here if row["registers"])
        lines.append([target, _sound(here, "compiles"), spilling or "none", str(most)])
    head = ["target", "compile", "spill", "most registers"]
    return markdown(head, lines, "lllr") + source(COMPILERS, rows[0])


def instructions() -> str:
    """Instructions per block on sm_90, by release."""
    rows = [row for row in results(COMPILERS) if (row["how"], row["target"]) == ("compiled", "sm_90")]
    found: dict[tuple[str, str], dict[str, str]] = {}
    cell = whole("instructions_per_block")
    order = in_order(sorted(rows, key=lambda row: row["triton"] != REFERENCE), "kernel")
    for row in sorted(rows, key=lambda row: (order.index(row["kernel"]), int(row["m"] or 0))):
        text = cell(row) if row["instructions_per_block"] else row["outcome"]
        found.setdefault((row["kernel"], row["m"] or "-"), {})[row["triton"]] = text
    heads = _releases(rows)
    columns = [left("instructions per block"), right("M"), *map(right, heads)]
    return markdown(
        [column.head for column in columns],
        [[*key, *(cells.get(head, "") for head in heads)] for key, cells in found.items()],
        "".join(column.align for column in columns),
    ) + source(COMPILERS, rows[0])


def stacks() -> str:
    """The suite with the oldest and the newest versions, one on a line."""
    rows = results(STACKS)
    columns = [left("stack"), left("Python", "python"), *(left(name, key) for key, name in PACKAGES)]
    columns += [right(key, whole(key)) for key in ("passed", "failed", "skipped", "seconds")]
    columns += [left("commit"), left("date")]
    table = markdown(
        [column.head for column in columns],
        [[column.cell(row) for column in columns] for row in rows],
        "".join(column.align for column in columns),
    )
    return f"{table}\n\n<sub>`bench/results/{STACKS}`: {', '.join(in_order(rows, 'machine'))}</sub>"


TABLES: dict[str, Callable[[], str]] = {
    "compilers": releases,
    "compiler-targets": targets,
    "compiler-instructions": instructions,
    "stacks": stacks,
}
"""The tables of docs/internals/compilers.md."""
