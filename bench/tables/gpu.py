"""Tables of what was measured on a GPU, and of what is only predicted."""

from __future__ import annotations

from collections.abc import Callable

from kernel_costs.model import GPUS

from tables import columns
from tables.columns import (
    Row,
    in_order,
    left,
    listing,
    markdown,
    number,
    results,
    right,
    significant,
    source,
    whole,
)

TARGET = "sm_90"
"""The predictions that are shown where nothing was measured."""
NOTHING = "Not measured yet: no day with a GPU has been published."


def measured(name: str) -> list[Row]:
    """Rows of all days that were published; none if there was no such day."""
    file = f"gpu/{name}"
    return results(file) if (columns.RESULTS / file).exists() else []


def status() -> str:
    """One sentence on what has run on a GPU."""
    checks = measured("checks.csv")
    if not checks:
        return "No kernel has been run or timed on a GPU yet."
    said = []
    for gpu in in_order(checks, "gpu"):
        rows = [row for row in checks if row["gpu"] == gpu and row["check"] == "suite"]
        passed = sum(row["outcome"] == "passed" for row in rows)
        timed = sum(row["gpu"] == gpu and bool(row["ms"]) for row in measured("times.csv"))
        said.append(f"{gpu} ({passed} tests passed, {timed} configurations timed)")
    return f"The kernels have run on a GPU: {'; '.join(said)}."


def predicted() -> list[Row]:
    return [
        row
        for row in results("kernel_costs.csv")
        if row["shipped"] == "1" and row["target"] == TARGET and row["predicted_ms_8192"]
    ]


def times() -> str:
    """Every configuration of the cost table: its time if it was measured, else its bound."""
    rows = predicted()
    days = measured("times.csv")
    found = {(row["gpu"], row["kernel"], row["m"], row["dtype"]): row for row in days if row["ms"]}
    gpus = in_order(days, "gpu")
    lines = []
    for row in rows:
        cells = [row["kernel"], row["m"] or "-", row["dtype"]]
        cells += [number("predicted_ms_8192", 3)(row), number("floor_ms_8192", 3)(row)]
        for gpu in gpus or [""]:
            here = found.get((gpu, row["kernel"], row["m"], row["dtype"]))
            cells.append(_time(here) if here else f"predicted, {number('predicted_ms_8192', 3)(row)} or more")
        lines.append(cells)
    head = ["kernel", "M", "dtype", f"at least on a {GPUS[TARGET].name}, ms", "memory alone, ms"]
    table = markdown([*head, *(gpus or ["ms"])], lines, "lrlrr" + "r" * len(gpus or [""]))
    sources = [("gpu/times.csv", next(row for row in days if row["gpu"] == gpu)) for gpu in gpus]
    return table + "".join(source(*each) for each in [("kernel_costs.csv", rows[0]), *sources])


def _time(row: Row) -> str:
    quartiles = [significant(float(row[f"ms_{name}_quartile"]), 3) for name in ("first", "third")]
    return f"measured, {number('ms', 3)(row)} ({' to '.join(quartiles)})"


def peers() -> str:
    """What else there is, on the same GPU."""
    rows = [row for row in measured("peers.csv") if row["ms"]]
    if not rows:
        return NOTHING
    return listing(
        "gpu/peers.csv",
        rows,
        [
            left("GPU", "gpu"),
            left("problem"),
            left("method", "peer"),
            right("pattern", lambda row: f"{row['n']}:{row['m']}" if row["n"] != "0" else f"{row['m']}²"),
            left("dtype"),
            right("blocks", whole("blocks")),
            right("ms", number("ms", 3)),
            right("µs per block", number("us_per_block", 3)),
            right("loss", lambda row: f"{float(row['loss']):.2g}" if row["loss"] else ""),
        ],
    )


def launches() -> str:
    """Groups beside loops, and graphs that are replayed beside what they captured."""
    rows = [row for row in measured("launches.csv") if row["ms"]]
    if not rows:
        return NOTHING
    return listing(
        "gpu/launches.csv",
        rows,
        [
            left("GPU", "gpu"),
            left("what"),
            left("way"),
            right("pattern", lambda row: f"{row['n']}:{row['m']}"),
            right("matrices", lambda row: f"{row['matrices']} of {row['rows']} x {row['cols']}"),
            right("ms", number("ms", 3)),
            left("same masks", "same"),
        ],
    )


def checks() -> str:
    """How many tests ran, and how they ended."""
    rows = measured("checks.csv")
    if not rows:
        return NOTHING
    lines = []
    for gpu in in_order(rows, "gpu"):
        for check in in_order([row for row in rows if row["gpu"] == gpu], "check"):
            here = [row for row in rows if (row["gpu"], row["check"]) == (gpu, check)]
            counts = [
                f"{sum(row['outcome'] == outcome for row in here)} {outcome}"
                for outcome in in_order(here, "outcome")
            ]
            lines.append([gpu, check, ", ".join(counts)])
    return markdown(["GPU", "check", "outcomes"], lines, "lll") + source("gpu/checks.csv", rows[0])


TABLES: dict[str, Callable[[], str]] = {
    "gpu-status": status,
    "gpu-times": times,
    "gpu-peers": peers,
    "gpu-launches": launches,
    "gpu-checks": checks,
}
