"""The tables of docs/internals/kernel-costs.md, from what bench/kernel_costs wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kernel_costs.model import GPUS

from tables.columns import (
    Column,
    Row,
    fixed,
    grid,
    in_order,
    left,
    listing,
    markdown,
    number,
    pattern,
    results,
    right,
    share,
    source,
    whole,
)

COSTS, PHASES, TRIPS = "kernel_costs.csv", "kernel_phases.csv", "kernel_trips.csv"

# Whose parts are shown phase by phase, and whose bounds GPU by GPU.
CHIEF = ("exact", "tsenor")

KERNEL = left("kernel")
SIZE = right("M", lambda row: row["m"] or "-")
BOUND = right("at least, ms", number("predicted_ms_8192", 3))


def _shipped() -> list[Row]:
    return [row for row in results(COSTS) if row["shipped"] == "1"]


def _on_h100(rows: Sequence[Row]) -> list[Row]:
    """The rows of float32 on sm_90."""
    return [row for row in rows if (row["target"], row["dtype"]) == ("sm_90", "float32")]


def _tile(row: Row) -> str:
    if not row["rows_in"]:
        return "-"
    return f"{row['rows_in']} x {row['cols_in']}, {row['blocks']}, {row['warps']}"


def _compiled(tile: Callable[[Row], str], *more: Column) -> list[Column]:
    """What was compiled, what it occupies (``more`` beside the registers) and what a block takes."""
    return [
        KERNEL,
        SIZE,
        left("entries of a lane, blocks, warps", tile),
        right("registers"),
        *more,
        right("occupancy", share("occupancy", 0)),
        right("instructions per block", whole("instructions_per_block")),
    ]


def costs() -> str:
    """Every kernel in float32 on the H100."""
    return listing(
        COSTS,
        _on_h100(_shipped()),
        [
            *_compiled(_tile),
            right("per weight", number("instructions_per_weight", 3)),
            BOUND,
            right("memory alone, ms", number("floor_ms_8192", 3)),
            left("limit", "bound"),
        ],
    )


def tiles() -> str:
    """The shipped tiles and those that they are compared with, float32 on sm_90."""

    def tile(row: Row) -> str:
        return f"**{_tile(row)}**" if row["shipped"] == "1" else _tile(row)

    rows = results(COSTS)
    compared = {(row["kernel"], row["m"]) for row in rows if row["shipped"] == "0"}
    shown = [row for row in _on_h100(rows) if (row["kernel"], row["m"]) in compared]
    shown.sort(key=lambda row: (row["kernel"], int(row["m"]), row["shipped"] != "1"))
    return listing(COSTS, shown, [*_compiled(tile, right("spills")), BOUND])


def gpus() -> str:
    """Lower bounds of the chief kernels on each GPU, in both dtypes where the table has them."""

    def gpu(row: Row) -> str:
        return f"{GPUS[row['target']].name}, {row['dtype']}"

    rows = [
        row
        for row in _shipped()
        if row["target"] in GPUS and row["kernel"] in (*CHIEF, "greedy", "nm", "nm, whole groups")
    ]
    heads = [gpu({"target": target, "dtype": dtype}) for target in GPUS for dtype in ("float32", "bfloat16")]
    return grid(COSTS, rows, [left("at least, ms", "kernel"), SIZE], gpu, BOUND.cell, heads)


def phases() -> str:
    """Where the instructions of the chief kernels go, float32 on sm_90."""
    rows = [
        row
        for row in _on_h100(results(PHASES))
        if row["kernel"] in CHIEF and row["shipped"] == "1" and float(row["share"]) >= 0.001
    ]
    return listing(
        PHASES,
        rows,
        [
            KERNEL,
            SIZE,
            left("phase"),
            right("times per program", fixed("entries_per_program", 2)),
            right("instructions", "instructions_per_entry"),
            *(right(unit) for unit in ("float", "integer", "shuffle", "special", "shared")),
            right("share", share("share", 1)),
        ],
    )


def resources() -> str:
    """Registers of every shipped configuration in float32 by target; none spills."""
    return grid(
        COSTS,
        [row for row in _shipped() if row["dtype"] == "float32"],
        [left("registers, spills, bytes of shared memory", "kernel"), SIZE],
        lambda row: row["target"],
        lambda row: f"{row['registers']}, {row['spills']}, {row['shared_bytes']}",
    )


def trips() -> str:
    """How often a program enters the loops of the exact and approximate kernels, by distribution."""
    names = {row["region"]: row["phase"] for row in results(PHASES)}
    rows = results(TRIPS)
    own = {(row["kernel"], row["m"], row["blocks"]) for row in _shipped()}
    lines = []
    for name in ("exact", "assignment", "tsenor", "greedy"):
        here = [row for row in rows if row["trips"] == name and (name, row["m"], row["blocks"]) in own]
        for m in in_order(here, "m"):
            for region in in_order(here, "region"):
                found = {r["distribution"]: r for r in here if (r["m"], r["region"]) == (m, region)}
                counted = [float(row["entries"]) for row in found.values()]
                if region not in names or all(count in (0.0, 1.0) for count in counted):
                    continue
                normal = found["normal"]
                entries = [fixed("entries", 2)(found[key]) for key in ("normal", "student_t")]
                lines.append(
                    [name, pattern(normal), normal["blocks"], names[region], *entries, normal["programs"]]
                )
    head = ["kernel", "pattern", "blocks", "per program", "normal", "Student t, 1.5", "programs counted"]
    return markdown(head, lines, "llrlrrr") + source(TRIPS, rows[0])


TABLES: dict[str, Callable[[], str]] = {
    "kernel-costs": costs,
    "kernel-gpus": gpus,
    "kernel-phases": phases,
    "kernel-tiles": tiles,
    "kernel-resources": resources,
    "kernel-trips": trips,
}
