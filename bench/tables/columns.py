"""What the documents' tables are made of: columns, numbers as text, and where the numbers come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from common import RESULTS, read_csv

Row = dict[str, str]
Cell = Callable[[Row], str]


# --- numbers as text ----------------------------------------------------------------------------------------


def significant(value: float, digits: int = 2) -> str:
    """A number with so many significant digits, without an exponent."""
    if value >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{float(f'{value:.{digits}g}'):.10f}".rstrip("0").rstrip(".")


def percent(share: float, digits: int = 2) -> str:
    return f"{share * 100:.{digits}f} %"


def loss(share: float) -> str:
    """A share lost, in percent with two significant digits."""
    return f"{significant(share * 100)} %"


def rounding(value: str) -> str:
    """A number at rounding level, as a power of ten with one digit; 0 if it is not positive."""
    return f"{float(value):.0e}" if float(value) > 0 else "0"


# --- cells --------------------------------------------------------------------------------------------------


def number(key: str, digits: int = 2, unit: float = 1) -> Cell:
    """The result ``key``, in multiples of ``unit``, with so many significant digits."""
    return lambda row: significant(float(row[key]) / unit, digits)


def fixed(key: str, decimals: int) -> Cell:
    """The result ``key`` with so many decimals."""
    return lambda row: f"{float(row[key]):.{decimals}f}"


def whole(key: str) -> Cell:
    """The result ``key`` without decimals."""
    return lambda row: f"{float(row[key]):,.0f}"


def share(key: str, decimals: int = 2) -> Cell:
    """The result ``key``, a share, in percent."""
    return lambda row: percent(float(row[key]), decimals)


def lost(key: str) -> Cell:
    """The result ``key``, a share that is lost, in percent."""
    return lambda row: loss(float(row[key]))


def pattern(row: Row) -> str:
    return f"{row['n']}:{row['m']}"


# --- tables -------------------------------------------------------------------------------------------------


class Column(NamedTuple):
    head: str
    align: str
    """``"l"`` or ``"r"``."""
    cell: Cell


def left(head: str, cell: str | Cell | None = None) -> Column:
    """A column of text: a result as the file has it, by default the one named ``head``, or made from rows."""
    return _column(head, "l", cell)


def right(head: str, cell: str | Cell | None = None) -> Column:
    """As :func:`left`, aligned to the right."""
    return _column(head, "r", cell)


def _column(head: str, align: str, cell: str | Cell | None) -> Column:
    if callable(cell):
        return Column(head, align, cell)
    key = head if cell is None else cell
    return Column(head, align, lambda row: row[key])


def results(file: str) -> list[Row]:
    return read_csv(RESULTS / file)


def in_order(rows: Iterable[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]], align: str) -> str:
    """A table of text; ``align`` has an ``"l"`` or ``"r"`` for each column."""
    rule = ["---:" if a == "r" else "---" for a in align]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


def source(file: str, row: Row) -> str:
    """The line under a table that says where and when its numbers were measured."""
    where = f"{row['machine']}; {row['software']}; {row['date']}, commit {row['commit']}"
    return f"\n\n<sub>`bench/results/{file}`: {where}</sub>"


def listing(file: str, rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """One line for each row."""
    lines = [[column.cell(row) for column in columns] for row in rows]
    table = markdown([column.head for column in columns], lines, "".join(column.align for column in columns))
    return table + source(file, rows[0])


def grid(
    file: str,
    rows: Sequence[Row],
    labels: Sequence[Column],
    across: Cell,
    cell: Cell,
    heads: Sequence[str] = (),
) -> str:
    """One line for all rows with the same labels, one cell in it for each value of ``across``.

    ``heads`` are those values, by default in the order of the rows. Cells without a row are empty.
    """
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        lines.setdefault(tuple(label.cell(row) for label in labels), {})[across(row)] = cell(row)
    heads = heads or list(dict.fromkeys(map(across, rows)))
    return markdown(
        [*(label.head for label in labels), *heads],
        [[*names, *(found.get(head, "") for head in heads)] for names, found in lines.items()],
        "".join(label.align for label in labels) + "r" * len(heads),
    ) + source(file, rows[0])
