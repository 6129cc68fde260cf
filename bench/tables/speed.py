"""The tables of what the CPU backend costs: time next to what else there is, memory, and the first call."""

from __future__ import annotations

from collections.abc import Callable

from tables.columns import Row, grid, left, listing, number, results, right, share

SPEED, CLAIMS, MICRO = "speed_cpu.csv", "speed_cpu_claims.csv", "micro.csv"

# The README shows these; docs/benchmarks.md shows all.
CHIEF = ("exact, cpu", "greedy, cpu", "tsenor, cpu", "tsenor, published (PyTorch)", "min-cost flow")
CHIEF_PATTERNS = ("2:4", "8:16")


def speed(names: tuple[str, ...] = (), patterns: tuple[str, ...] = ()) -> str:
    """Microseconds per block and, in brackets, the multiple of exact's time.

    All contenders and patterns, or these.
    """
    rows = [
        row
        for row in results(SPEED)
        if row["distribution"] == "normal"
        and (not names or row["contender"] in names)
        and (not patterns or row["pattern"] in patterns)
    ]
    return grid(
        SPEED,
        rows,
        [left("µs per block", lambda row: row["contender"].replace("exact, cpu", "**exact, cpu**"))],
        lambda row: row["pattern"],
        lambda row: f"{number('us_per_block')(row)} ({number('times_exact')(row)}x)",
    )


def distributions() -> str:
    rows = [row for row in results(SPEED) if row["contender"] in ("exact, cpu", "greedy, cpu")]
    return listing(
        SPEED,
        sorted(rows, key=lambda row: row["contender"]),
        [
            left("method", "contender"),
            left("pattern"),
            left("scores", "distribution"),
            right("matrix", lambda row: f"{row['side']}²"),
            right("µs per block", number("us_per_block")),
            right("spread", lambda row: f"{number('us_least')(row)} to {number('us_most')(row)}"),
            right("seconds", number("seconds")),
        ],
    )


def ordinary() -> str:
    """Nanoseconds per entry and, in brackets, bytes read and written per second beside the copy's."""
    file = "ordinary_cpu.csv"
    rows = results(file)
    copies = {
        (row["dtype"], row["pattern"]): float(row["bytes_per_second"])
        for row in rows
        if row["contender"] == "copy"
    }

    def cell(row: Row) -> str:
        part = float(row["bytes_per_second"]) / copies[row["dtype"], row["pattern"]]
        return f"{number('ns_per_entry')(row)} ({part:.2f})"

    columns = [left("ns per entry", "contender"), left("scores", "dtype")]
    return grid(file, rows, columns, lambda row: row["pattern"], cell)


def claims() -> str:
    columns = [left("claim"), right("reached", number("reached")), right("wanted"), left("holds")]
    return listing(CLAIMS, results(CLAIMS), columns)


def memory() -> str:
    file = "memory_cpu.csv"
    return listing(
        file,
        results(file),
        [
            left("method"),
            left("backend"),
            left("pattern"),
            right("matrix", lambda row: f"{row['rows']}²"),
            right("scores, MiB", number("scores_mib")),
            right("working memory, MiB", number("working_mib")),
            right("share", share("working_share", 1)),
        ],
    )


def first_call() -> str:
    file = "first_call.csv"
    return listing(
        file,
        results(file),
        [
            left("call", "method"),
            left(
                "process",
                lambda row: "the first after installation" if row["cache"] == "empty" else "later ones",
            ),
            right("import", lambda row: f"{float(row['import_seconds']):.2f} s"),
            right("first call", lambda row: f"{float(row['first_call_seconds']):.2f} s"),
            right("second call", lambda row: f"{float(row['second_call_seconds']) * 1e3:.1f} ms"),
        ],
    )


def every_operation() -> str:
    """Microseconds of every operation: one line for each set of parameters, one column for each backend."""

    def backend(row: Row) -> str:
        (name,) = [p.partition("=")[2] for p in row["parameters"].split() if p.startswith("backend=")] or [""]
        return name

    def other_parameters(row: Row) -> str:
        return " ".join(p for p in row["parameters"].split() if not p.startswith("backend="))

    rows = results(MICRO)
    by_backend = {backend(row) for row in rows}
    return grid(
        MICRO,
        rows,
        [left("operation"), left("parameters", other_parameters)],
        lambda row: backend(row) or "µs (ns a weight)",
        lambda row: f"{number('us_median')(row)} ({number('ns_per_weight')(row)})",
        ["µs (ns a weight)", *(name for name in ("triton", "cpu", "torch") if name in by_backend)],
    )


def warm_start() -> str:
    """Times from an earlier solve's duals, as multiples of times from nothing."""
    file = "warm_start.csv"

    def spread(name: str) -> Callable[[Row], str]:
        return lambda row: "{} ({} to {})".format(
            *(number(f"{name}_ms{end}")(row) for end in ("", "_least", "_most"))
        )

    return listing(
        file,
        results(file),
        [
            left("backend"),
            left("pattern"),
            left("moved by", lambda row: f"{float(row['change']):g}"),
            right("mask, ms", spread("cold_mask")),
            right("warm mask", lambda row: f"{number('mask_warm_over_cold')(row)}x"),
            right("certificate, ms", spread("cold_certificate")),
            right("warm certificate", lambda row: f"{number('certificate_warm_over_cold')(row)}x"),
            right(
                "warm certificate / mask", lambda row: f"{number('warm_certificate_over_cold_mask')(row)}x"
            ),
        ],
    )


TABLES: dict[str, Callable[[], str]] = {
    "speed": speed,
    "speed-chief": lambda: speed(CHIEF, CHIEF_PATTERNS),
    "speed-distributions": distributions,
    "speed-claims": claims,
    "ordinary": ordinary,
    "memory": memory,
    "first-call": first_call,
    "warm-start": warm_start,
    "micro": every_operation,
}
