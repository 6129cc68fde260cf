"""The tables of docs/hierarchical.md, from what bench/hierarchical.py wrote."""

from __future__ import annotations

from collections.abc import Callable

from tables.columns import Row, in_order, markdown, percent, results, significant, source

FILE = "hierarchical.csv"

# The methods of part "layers" and how the table calls them; the enumeration's masks are ours.
KEPT = {
    "unstructured": "unstructured",
    "ordinary": "N:M",
    "sums": "V:N:M by sums",
    "exact": "V:N:M",
    "columns": "columns reordered",
    "rows and columns": "rows, too",
}


def of_layers() -> dict[str, dict[str, list[Row]]]:
    """Pattern -> method -> its rows, of patterns that every layer has been measured with."""
    rows = [row for row in results(FILE) if row["part"] == "layers"]
    layers = in_order(rows, "scope")
    found: dict[str, dict[str, list[Row]]] = {}
    for pattern in in_order(rows, "pattern"):
        here = [row for row in rows if row["pattern"] == pattern]
        methods = {
            method: [row for row in here if row["method"] == method] for method in in_order(here, "method")
        }
        if all(len(methods.get(method, ())) == len(layers) for method in (*KEPT, "enumerated")):
            found[pattern] = methods
    return found


def mean(rows: list[Row], key: str) -> float:
    return sum(float(row[key]) for row in rows) / len(rows)


def kept() -> str:
    """Mean kept share of the layers' scores, by pattern and by who chooses what is kept."""
    found = of_layers()
    lines = [
        [pattern, *(percent(mean(methods[method], "kept")) for method in KEPT)]
        for pattern, methods in found.items()
    ]
    rows = [row for methods in found.values() for row in methods["exact"]]
    layers = ", ".join(f"`{name.removeprefix('model.')}`" for name in in_order(rows, "scope"))
    return markdown(["pattern", *KEPT.values()], lines, "l" + "r" * len(KEPT)) + (
        f"\n\nMeans over {layers}." + source(FILE, rows[0])
    )


def seconds() -> str:
    """Processor seconds for those layers together, by VENOM's loops and by ours; and what orders take."""
    lines = []
    found = of_layers()
    for pattern, methods in found.items():
        taken = {
            method: sum(float(row["seconds"]) for row in rows)
            for method, rows in methods.items()
            if method in ("enumerated", "exact", "columns", "rows and columns")
        }
        lines.append(
            [
                pattern,
                significant(taken["enumerated"]),
                significant(taken["exact"]),
                significant(taken["columns"]),
                significant(taken["rows and columns"]),
                percent(mean(methods["exact"], "proven"), 0),
            ]
        )
    head = ["pattern", "enumeration", "V:N:M", "columns reordered", "rows, too", "proven"]
    first = next(iter(found.values()))["exact"][0]
    return markdown(head, lines, "lrrrrr") + source(FILE, first)


def cost() -> str:
    """Microseconds for one strip and group by M."""
    rows = [row for row in results(FILE) if row["part"] == "cost"]
    sizes = sorted({int(row["pattern"].split(":")[2]) for row in rows})
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["method"] == "exact":
            v = row["pattern"].split(":")[0]
            cells = lines.setdefault((row["scope"], v), [])
            cells.append(f"{significant(float(row['seconds']) * 1e6)} ({percent(float(row['proven']), 0)})")
    head = ["scores", "V", *(f"2:{m}" for m in sizes)]
    return markdown(head, [[*key, *cells] for key, cells in lines.items()], "lr" + "r" * len(sizes)) + source(
        FILE, rows[0]
    )


TABLES: dict[str, Callable[[], str]] = {
    "hierarchical-kept": kept,
    "hierarchical-seconds": seconds,
    "hierarchical-cost": cost,
}
