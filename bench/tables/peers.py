"""The tables of what else solves the problem: time and loss of every peer."""

from __future__ import annotations

from collections.abc import Callable

from tables.columns import Cell, Row, grid, in_order, left, loss, markdown, number, pattern, results, source

FILE = "peers.csv"
LARGEST = "8192"  # side of the matrix whose times and losses the tables show


def _by_pattern(head: str, cell: Cell) -> str:
    """One line for each peer, one column for each pattern, at the largest size."""

    def name(row: Row) -> str:
        return f"**{row['peer']}**" if row["peer"] == "nmsolve exact (cpu)" else row["peer"]

    rows = [row for row in results(FILE) if row["size"] == LARGEST]
    return grid(FILE, rows, [left(head, name)], pattern, cell)


def _seconds(row: Row) -> str:
    """Seconds; "~" where they are extrapolated from a sample."""
    return ("~" if row["extrapolated"] == "1" else "") + number("seconds")(row)


def _error(row: Row) -> str:
    """Mean loss and, in brackets, the lines that are short."""
    mean, short = float(row["mean_relative_error"]), float(row["lines_short"])
    lost = "0" if abs(mean) < 1e-7 else loss(mean) if mean > 0 else f"-{loss(-mean)}"
    return lost + (f" ({loss(short)})" if short else "")


def sizes() -> str:
    """Seconds at each size for 8:16, and the sample they come from."""
    rows = [row for row in results(FILE) if pattern(row) == "8:16"]
    sizes = in_order(rows, "size")
    lines = []
    for name in in_order(rows, "peer"):
        found = {row["size"]: row for row in rows if row["peer"] == name}
        largest = found[sizes[-1]]
        sample = [f"{int(largest['sampled_blocks']):,}", largest["threads"]]
        lines.append([name, *(_seconds(found[size]) for size in sizes), *sample])
    head = ["8:16, seconds", *(f"{size}²" for size in sizes), f"blocks solved at {sizes[-1]}²", "threads"]
    return markdown(head, lines, "l" + "r" * (len(sizes) + 2)) + source(FILE, rows[0])


TABLES: dict[str, Callable[[], str]] = {
    "peers-time": lambda: _by_pattern("seconds", _seconds),
    "peers-error": lambda: _by_pattern("mean loss", _error),
    "peers-sizes": sizes,
}
