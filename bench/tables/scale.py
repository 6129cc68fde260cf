"""The tables of docs/scale.md, from what bench/scale.py computed."""

from __future__ import annotations

from collections.abc import Callable

from tables.columns import (
    Row,
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

FILE = "scale.csv"
CPU, GPU = "mask, CPU", "mask, H100"


def by_quantities() -> dict[tuple[str, str], dict[str, Row]]:
    """Model and ranks -> quantities -> row."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in results(FILE):
        found.setdefault((row["model"], row["ranks"]), {})[row["quantities"]] = row
    return found


def models() -> str:
    """What the headers say."""
    rows = list({row["model"]: row for row in results(FILE)}.values())
    return listing(
        FILE,
        rows,
        [
            left("model"),
            right("parameters", lambda row: f"{float(row['parameters']) / 1e9:.1f}e9"),
            right("GB", whole("gb")),
            right("files", whole("files")),
            right("tensors", whole("tensors")),
            right("of them masked", whole("masked")),
            right("pieces", whole("pieces")),
        ],
    )


def masking() -> str:
    """`nmsolve mask` by the number of ranks."""
    lines = []
    for (model, ranks), found in by_quantities().items():
        cpu, gpu = found[CPU], found[GPU]
        lines.append(
            [
                model,
                ranks,
                cpu["hosts"],
                f"{float(cpu['largest_over_mean']):.4f}",
                f"{float(cpu['solved_largest_over_mean']):.4f}",
                number("most_read_gb", 3)(cpu),
                number("most_written_gb", 3)(cpu),
                _span(cpu),
                _span(gpu),
                number("files_gb_per_s", 3)(gpu),
            ]
        )
    head = ["model", "ranks", "hosts", "largest / mean, bytes", "largest / mean, solved"]
    head += ["a rank reads, GB", "writes, GB", "seconds, CPU", "seconds, H100", "all files, GB/s"]
    reads, writes = (number(f"{what}_rate_gb", 3)(cpu) for what in ("read", "write"))
    speeds = [f"{whole('solve_rate_m')(row)} million weights per second" for row in (cpu, gpu)]
    solver = f"a rank solves {speeds[0]} on two cores (measured), {speeds[1]} on an H100 (predicted)"
    rates = f"a host reads {reads} GB/s and writes {writes} GB/s (assumed); {solver}"
    return f"{markdown(head, lines, 'l' + 'r' * 9)}\n\nRates: {rates}.{source(FILE, cpu)}"


def _span(row: Row) -> str:
    """Seconds with reading, solving and writing at once, and one after the other."""
    return " to ".join(significant(float(row[key]), 3) for key in ("seconds", "seconds_in_turn"))


def pruning() -> str:
    """What `nmsolve prune` sums."""
    rows = [row for row in results(FILE) if row["quantities"].startswith("prune, ")]
    most = max((row["ranks"] for row in rows), key=int)
    least = min((row["ranks"] for row in rows), key=int)
    ends = {(row["model"], row["quantities"], row["ranks"]): row for row in rows}
    lines = []
    for row in (row for row in rows if row["ranks"] == most):
        few = ends[row["model"], row["quantities"], least]
        lines.append(
            [
                row["model"],
                row["quantities"].removeprefix("prune, "),
                *(number(key, 3)(row) for key in ("at_once_gb", "block_gb", "model_gb")),
                *(number("model_sent_gb", 3)(end) for end in (few, row)),
                number("seconds", 3)(row),
                f"{float(row['solving_ranks']):.2f}",
            ]
        )
    head = ["model", "sums", "largest, GB", "a block, GB", "the model, GB"]
    head += [f"sent by each of {least} ranks, GB", f"of {most}, GB", f"seconds at {most}", "ranks that solve"]
    rate = number("network_rate_gb", 3)(rows[0])
    text = markdown(head, lines, "ll" + "r" * 7)
    return f"{text}\n\nRate: a rank sends {rate} GB/s (assumed).{source(FILE, rows[0])}"


TABLES: dict[str, Callable[[], str]] = {
    "scale-models": models,
    "scale-mask": masking,
    "scale-prune": pruning,
}
