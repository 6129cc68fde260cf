"""The tables of docs/kernel-costs.md, from what bench/kernel_costs.py wrote."""

from __future__ import annotations

from collections.abc import Callable

from common import RESULTS, read_csv
from kernel_model import GPUS
from tables import Row, in_order, markdown, percent, significant, source

COSTS, PHASES, TRIPS = "kernel_costs.csv", "kernel_phases.csv", "kernel_trips.csv"

# Whose parts are shown phase by phase, and whose bounds GPU by GPU.
CHIEF = ("exact", "tsenor")


def _shipped() -> list[Row]:
    return [row for row in read_csv(RESULTS / COSTS) if row["shipped"] == "1"]


def _tile(row: Row) -> str:
    if not row["rows_in"]:
        return "-"
    return f"{row['rows_in']} x {row['cols_in']}, {row['blocks']}, {row['warps']}"


def costs() -> str:
    """Every kernel in float32 on the H100."""
    rows = [row for row in _shipped() if (row["target"], row["dtype"]) == ("sm_90", "float32")]
    lines = [
        [
            row["kernel"],
            row["m"] or "-",
            _tile(row),
            row["registers"],
            percent(float(row["occupancy"]), 0),
            f"{float(row['instructions_per_block']):,.0f}",
            significant(float(row["instructions_per_weight"]), 3),
            significant(float(row["predicted_ms_8192"]), 3),
            significant(float(row["floor_ms_8192"]), 3),
            row["bound"],
        ]
        for row in rows
    ]
    head = [
        "kernel",
        "M",
        "entries of a lane, blocks, warps",
        "registers",
        "occupancy",
        "instructions per block",
        "per weight",
        "at least, ms",
        "memory alone, ms",
        "limit",
    ]
    return markdown(head, lines, "lrlrrrrrrl") + source(COSTS, rows[0])


def gpus() -> str:
    """Lower bounds of the chief kernels on each GPU, in both dtypes where the table has them."""
    rows = [row for row in _shipped() if row["target"] in GPUS and row["kernel"] in (*CHIEF, "greedy", "nm")]
    kinds = [(target, dtype) for target in GPUS for dtype in ("float32", "bfloat16")]
    lines = []
    for kernel in in_order(rows, "kernel"):
        for m in in_order([row for row in rows if row["kernel"] == kernel], "m"):
            found = {
                (row["target"], row["dtype"]): significant(float(row["predicted_ms_8192"]), 3)
                for row in rows
                if (row["kernel"], row["m"]) == (kernel, m)
            }
            lines.append([kernel, m, *(found.get(kind, "") for kind in kinds)])
    head = ["at least, ms", "M", *(f"{GPUS[target].name}, {dtype}" for target, dtype in kinds)]
    return markdown(head, lines, "lr" + "r" * len(kinds)) + source(COSTS, rows[0])


def phases() -> str:
    """Where the instructions of the chief kernels go, float32 on sm_90."""
    rows = [
        row
        for row in read_csv(RESULTS / PHASES)
        if row["kernel"] in CHIEF
        and (row["target"], row["dtype"], row["shipped"]) == ("sm_90", "float32", "1")
        and float(row["share"]) >= 0.001
    ]
    lines = [
        [
            row["kernel"],
            row["m"],
            row["phase"],
            f"{float(row['entries_per_program']):.2f}",
            row["instructions_per_entry"],
            row["float"],
            row["integer"],
            row["shuffle"],
            row["special"],
            row["shared"],
            percent(float(row["share"]), 1),
        ]
        for row in rows
    ]
    head = [
        "kernel",
        "M",
        "phase",
        "times per program",
        "instructions",
        "float",
        "integer",
        "shuffle",
        "special",
        "shared",
        "share",
    ]
    return markdown(head, lines, "lrlrrrrrrrr") + source(PHASES, rows[0])


def tiles() -> str:
    """The shipped tiles and those that they are compared with, float32 on sm_90."""
    compared = [row for row in read_csv(RESULTS / COSTS) if row["shipped"] == "0"]
    kernels = {(row["kernel"], row["m"]) for row in compared}
    rows = [
        row
        for row in read_csv(RESULTS / COSTS)
        if (row["kernel"], row["m"]) in kernels and (row["target"], row["dtype"]) == ("sm_90", "float32")
    ]
    rows.sort(key=lambda row: (row["kernel"], int(row["m"]), row["shipped"] != "1"))
    lines = [
        [
            row["kernel"],
            row["m"],
            f"**{_tile(row)}**" if row["shipped"] == "1" else _tile(row),
            row["registers"],
            row["spills"],
            percent(float(row["occupancy"]), 0),
            f"{float(row['instructions_per_block']):,.0f}",
            significant(float(row["predicted_ms_8192"]), 3),
        ]
        for row in rows
    ]
    head = [
        "kernel",
        "M",
        "entries of a lane, blocks, warps",
        "registers",
        "spills",
        "occupancy",
        "instructions per block",
        "at least, ms",
    ]
    return markdown(head, lines, "lrlrrrrr") + source(COSTS, rows[0])


def resources() -> str:
    """Registers of every shipped configuration in float32 by target; none spills."""
    rows = [row for row in _shipped() if row["dtype"] == "float32"]
    targets = in_order(rows, "target")
    lines = []
    for kernel in in_order(rows, "kernel"):
        for m in in_order([row for row in rows if row["kernel"] == kernel], "m"):
            found = {row["target"]: row for row in rows if (row["kernel"], row["m"]) == (kernel, m)}
            cells = [
                f"{found[target]['registers']}, {found[target]['spills']}, {found[target]['shared_bytes']}"
                for target in targets
            ]
            lines.append([kernel, m or "-", *cells])
    head = ["registers, spills, bytes of shared memory", "M", *targets]
    return markdown(head, lines, "lr" + "r" * len(targets)) + source(COSTS, rows[0])


def trips() -> str:
    """How often a program enters the loops of the exact and approximate kernels, by distribution."""
    names = {row["region"]: row["phase"] for row in read_csv(RESULTS / PHASES)}
    rows = read_csv(RESULTS / TRIPS)
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
                lines.append(
                    [name, f"{normal['n']}:{m}", normal["blocks"], names[region]]
                    + [f"{float(found[key]['entries']):.2f}" for key in ("normal", "student_t")]
                    + [normal["programs"]]
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
