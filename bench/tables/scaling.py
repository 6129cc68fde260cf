"""The tables of how the time grows: one for each sweep of bench/scaling.py."""

from __future__ import annotations

from collections.abc import Callable

from tables.columns import Cell, Row, grid, in_order, left, markdown, number, pattern, results, source

FILE = "scaling.csv"


def _rows(sweep: str) -> list[Row]:
    return [row for row in results(FILE) if row["sweep"] == sweep]


def _by_pattern(sweep: str, head: str, label: str | Cell = "x") -> str:
    """Nanoseconds per weight: one line for each label, one column for each pattern."""
    return grid(FILE, _rows(sweep), [left(head, label)], pattern, number("ns_per_weight"))


def block_sizes() -> str:
    rows = _rows("m")
    found = {(row["m"], row["backend"]): row for row in rows}
    measured = [(backend, key) for backend in ("cpu", "torch") for key in ("us_per_block", "ns_per_weight")]
    lines = [
        [pattern(found[m, "cpu"]), *(number(key)(found[m, backend]) for backend, key in measured)]
        for m in in_order(rows, "m")
    ]
    head = ["pattern", "cpu, µs a block", "cpu, ns a weight", "torch, µs a block", "torch, ns a weight"]
    return markdown(head, lines, "lrrrr") + source(FILE, rows[0])


def _layer(row: Row) -> str:
    return f"{row['x']}, {row['rows']} x {row['cols']}, {row['distribution']}"


TABLES: dict[str, Callable[[], str]] = {
    "scaling-weights": lambda: _by_pattern("weights", "ns a weight", lambda row: f"{row['rows']}²"),
    "scaling-m": block_sizes,
    "scaling-ties": lambda: _by_pattern("ties", "different values"),
    "scaling-student-t": lambda: _by_pattern("student_t", "degrees of freedom"),
    "scaling-lognormal": lambda: _by_pattern("lognormal", "sigma"),
    "scaling-dtype": lambda: _by_pattern("dtype", "dtype"),
    "scaling-real": lambda: _by_pattern("real", "layers", _layer),
}
