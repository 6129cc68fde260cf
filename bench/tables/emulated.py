"""The tables of docs/internals/emulator.md, from what bench/emulated.py wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tables.columns import Row, in_order, markdown, results, rounding, source, whole

VARIANTS, TRIPS = "emulator.csv", "emulator_trips.csv"


def _spread(values: Iterable[str]) -> str:
    """Numbers by size, or names as they come."""
    found = list(dict.fromkeys(values))
    return " ".join(sorted(found, key=int) if all(value.isdigit() for value in found) else found)


def variants() -> str:
    """Every variant on one line: what was executed of it, and how far it is from the oracle at worst."""
    rows = results(VARIANTS)
    lines = []
    for name in in_order(rows, "variant"):
        here = [row for row in rows if row["variant"] == name]
        worst = max(here, key=lambda row: float(row["worst_difference"]))
        lines.append(
            [
                name,
                here[0]["kernel"].removesuffix("_kernel"),
                _spread(row["m"] for row in here),
                _spread(row["dtype"] for row in here),
                _spread(row["target"] for row in here),
                str(len(here)),
                rounding(worst["worst_difference"]),
                rounding(max((row["allowed_difference"] for row in here), key=float)),
                str(sum(int(row["races"]) for row in here)),
            ]
        )
    head = ["variant", "kernel", "M", "dtypes", "targets", "runs", "worst difference", "allowed", "races"]
    return markdown(head, lines, "lllllrrrr") + source(VARIANTS, rows[0])


def covered() -> str:
    """How many runs there are of each dtype on each target."""
    rows = results(VARIANTS)
    targets = in_order(rows, "target")
    lines = []
    for dtype in in_order(rows, "dtype"):
        counts = [sum((row["dtype"], row["target"]) == (dtype, target) for row in rows) for target in targets]
        lines.append([dtype, *map(str, counts)])
    return markdown(["runs", *targets], lines, "l" + "r" * len(targets)) + source(VARIANTS, rows[0])


def instructions() -> str:
    """Warp instructions of PTX per block, float32 on sm_90, in the sizes of the launch table."""
    sizes = ("4", "8", "16", "32", "64")
    rows = [row for row in results(VARIANTS) if (row["target"], row["dtype"]) == ("sm_90", "float32")]
    cell = whole("warp_instructions_per_block")
    lines = []
    for name in in_order(rows, "variant"):
        here = {row["m"]: cell(row) for row in rows if row["variant"] == name}
        if len(here) > 1 and not name.startswith(("permute", "rms")):
            lines.append([name, *(here.get(m, "") for m in sizes)])
    return markdown(["warp instructions per block", *sizes], lines, "lrrrrr") + source(VARIANTS, rows[0])


def trips() -> str:
    """Entries of loops and branches, executed and as the interpreter counted them: how many agree."""
    rows = results(TRIPS)
    lines = []
    for name in in_order(rows, "trips"):
        here = [row for row in rows if row["trips"] == name]
        differences = [_difference(row) for row in here]
        same = sum(float(row["executed"]) == float(row["counted"]) for row in here)
        configurations = {(row["m"], row["blocks"], row["distribution"]) for row in here}
        lines.append(
            [
                name, _spread(row["m"] for row in here if row["m"] != "0") or "-",
                _spread(row["target"] for row in here), str(len(configurations)),
                str(len(here)), str(same), f"{100 * max(differences):.2g} %",
            ]
        )  # fmt: skip
    head = ["counts", "M", "targets", "configurations", "loops and branches",
            "entered equally often", "worst difference"]  # fmt: skip
    return markdown(head, lines, "lllrrrr") + source(TRIPS, rows[0])


def _difference(row: Row) -> float:
    counted, executed = float(row["counted"]), float(row["executed"])
    return abs(executed - counted) / counted if counted else float(executed != 0)


TABLES: dict[str, Callable[[], str]] = {
    "emulator-variants": variants,
    "emulator-covered": covered,
    "emulator-instructions": instructions,
    "emulator-trips": trips,
}
"""The tables of docs/internals/emulator.md."""
