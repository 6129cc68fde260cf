"""Writes the tables of README.md and docs/ from the result files.

A table stands between ``<!-- table: NAME -->`` and ``<!-- /table -->``; nothing else is touched. With --check
nothing is written, and the exit code is 1 if a document does not say what the results say. A module
``tables_AREA.py`` beside this one adds the tables of its own dictionary ``TABLES``.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from common import RESULTS, ROOT, read_csv

DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- /table -->)", re.S)

Row = dict[str, str]


def markdown(head: list[str], rows: Iterable[list[str]], align: str) -> str:
    rule = ["---:" if a == "r" else "---" for a in align]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def source(file: str, row: Row) -> str:
    where = f"{row['machine']}; {row['software']}; {row['date']}, commit {row['commit']}"
    return f"\n\n<sub>`bench/results/{file}`: {where}</sub>"


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


def in_order(rows: Iterable[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


# --- the tables ---------------------------------------------------------------------------------------------


def demo() -> str:
    rows = read_csv(RESULTS / "demo.csv")
    lines = [
        [
            row["pattern"],
            f"{row['method']} on the same layers" if row["same_layers"] else row["method"],
            row["layers"],
            percent(float(row["of_ordinary"])),
            rounding(row["below_bound"]) if row["method"] == "exact" else loss(float(row["below_bound"])),
            significant(float(row["seconds"])),
            f"{significant(float(row['weights_per_second']) / 1e6)} M",
        ]
        for row in rows
    ]
    head = [
        "pattern",
        "method",
        "layers",
        "of the ordinary N:M score",
        "below the bound",
        "seconds",
        "weights/s",
    ]
    return markdown(head, lines, "llrrrrr") + source("demo.csv", rows[0])


# The README shows these; docs/benchmarks.md shows all.
CHIEF = (
    "exact, cpu",
    "greedy, cpu",
    "tsenor, cpu",
    "greedy, published (PyTorch)",
    "tsenor, published (PyTorch)",
    "min-cost flow",
)


def speed(names: tuple[str, ...] = ()) -> str:
    """Microseconds per block and, in brackets, the multiple of exact's time."""
    rows = [row for row in read_csv(RESULTS / "speed_cpu.csv") if row["distribution"] == "normal"]
    patterns = in_order(rows, "pattern")
    lines = []
    for name in names or in_order(rows, "contender"):
        cells = [name.replace("exact, cpu", "**exact, cpu**")]
        for pattern in patterns:
            (row,) = [r for r in rows if r["contender"] == name and r["pattern"] == pattern]
            ratio = float(row["times_exact"])
            cells.append(f"{significant(float(row['us_per_block']))} ({significant(ratio)}x)")
        lines.append(cells)
    return markdown(["µs per block", *patterns], lines, "lrrrr") + source("speed_cpu.csv", rows[0])


def speed_distributions() -> str:
    rows = [
        row
        for row in read_csv(RESULTS / "speed_cpu.csv")
        if row["contender"] in ("exact, cpu", "greedy, cpu")
    ]
    lines = [
        [
            row["contender"],
            row["pattern"],
            row["distribution"],
            f"{row['side']}²",
            significant(float(row["us_per_block"])),
            f"{significant(float(row['us_least']))} to {significant(float(row['us_most']))}",
            significant(float(row["seconds"])),
        ]
        for row in sorted(rows, key=lambda row: row["contender"])
    ]
    head = ["method", "pattern", "scores", "matrix", "µs per block", "spread", "seconds"]
    return markdown(head, lines, "lllrrrr") + source("speed_cpu.csv", rows[0])


def speed_claims() -> str:
    rows = read_csv(RESULTS / "speed_cpu_claims.csv")
    lines = [[row["claim"], significant(float(row["reached"])), row["wanted"], row["holds"]] for row in rows]
    return markdown(["claim", "reached", "wanted", "holds"], lines, "lrrl") + source(
        "speed_cpu_claims.csv", rows[0]
    )


def quality() -> str:
    rows = read_csv(RESULTS / "quality.csv")
    exact = [row for row in rows if row["method"] == "exact"]
    lines = []
    for backend, dtype in dict.fromkeys((row["backend"], row["dtype"]) for row in exact):
        here = [row for row in exact if (row["backend"], row["dtype"]) == (backend, dtype)]

        def worst(key: str, here: list[Row] = here) -> str:
            return rounding(max((row[key] for row in here), key=float))

        blocks = sum(int(row["blocks"]) for row in here)
        filled = sum(float(row["full_share"]) * int(row["blocks"]) for row in here) / blocks
        lines.append(
            [
                backend,
                dtype,
                " ".join(in_order(here, "m")),
                f"{blocks:,}",
                percent(filled, 0),
                worst("error_to_flow_max"),
                f"{worst('error_to_highs_max')} ({sum(int(row['highs_blocks']) for row in here):,})",
                worst("gap_max"),
            ]
        )
    head = [
        "backend",
        "dtype",
        "M",
        "blocks",
        "exactly N",
        "against min-cost flow",
        "against HiGHS (blocks)",
        "gap",
    ]
    return markdown(head, lines, "lllrrrrr") + source("quality.csv", rows[0])


def quality_approximate() -> str:
    rows = [row for row in read_csv(RESULTS / "quality.csv") if row["method"] != "exact"]
    lines = [
        [
            row["method"],
            row["backend"],
            f"{row['n']}:{row['m']}",
            row["blocks"],
            loss(float(row["error_mean"])),
            loss(float(row["error_to_flow_max"])),
            percent(float(row["full_share"])),
        ]
        for row in sorted(rows, key=lambda row: (row["method"], row["backend"]))
    ]
    head = ["method", "backend", "pattern", "blocks", "mean loss", "largest loss", "blocks with exactly N"]
    return markdown(head, lines, "lllrrrr") + source("quality.csv", rows[0])


def methods() -> str:
    """When to take which method, with the mean losses that were measured."""
    rows = read_csv(RESULTS / "quality.csv")

    def lost(method: str) -> str:
        found = [r for r in rows if r["method"] == method and r["backend"] == "cpu"]
        losses = [float(row["error_mean"]) for row in found]
        return f"{loss(min(losses))} to {loss(max(losses))} less"

    lines = [
        ["`exact` (default)", "always, unless something below applies", "the optimum, with its proof"],
        ["`greedy`", "you want the published 2-approximation, with every line filled", lost("greedy")],
        ["`tsenor`", "you compare with the paper (arXiv 2505.23949)", lost("tsenor")],
    ]
    return markdown(["method", "take it when", "kept score"], lines, "lll") + source("quality.csv", rows[0])


def memory() -> str:
    rows = read_csv(RESULTS / "memory_cpu.csv")
    lines = [
        [
            row["method"],
            row["backend"],
            row["pattern"],
            f"{row['rows']}²",
            significant(float(row["scores_mib"])),
            significant(float(row["working_mib"])),
            percent(float(row["working_share"]), 1),
        ]
        for row in rows
    ]
    head = ["method", "backend", "pattern", "matrix", "scores, MiB", "working memory, MiB", "share"]
    return markdown(head, lines, "lllrrrr") + source("memory_cpu.csv", rows[0])


def first_call() -> str:
    rows = read_csv(RESULTS / "first_call.csv")
    lines = [
        [
            row["method"],
            "the first after installation" if row["cache"] == "empty" else "later ones",
            f"{float(row['import_seconds']):.2f} s",
            f"{float(row['first_call_seconds']):.2f} s",
            f"{float(row['second_call_seconds']) * 1e3:.1f} ms",
        ]
        for row in rows
    ]
    head = ["call", "process", "import", "first call", "second call"]
    return markdown(head, lines, "llrrr") + source("first_call.csv", rows[0])


def ascent() -> str:
    rows = read_csv(RESULTS / "ascent.csv")
    lines = [
        [
            row["pattern"],
            row["distribution"],
            f"{float(row['mean']):.2f}",
            row["largest"],
            percent(float(row["blocks_done"]), 0),
            f"{float(row['mean_fixed_schedule']):.2f}",
            f"{float(row['mean_7_sweeps']):.2f}",
            f"{float(row['mean_smooth_count']):.2f}",
        ]
        for row in rows
    ]
    head = [
        "pattern", "scores", "mean", "most", "blocks that need none", "mean, fixed schedule", "7 sweeps",
        "smooth count",
    ]  # fmt: skip
    return markdown(head, lines, "llrrrrrr") + source("ascent.csv", rows[0])


def augmentations() -> str:
    """Paths of the CPU backend on every kind of blocks at 8:16 and 16:32, and the most of any backend."""
    rows = [row for row in read_csv(RESULTS / "augmentations.csv") if row["pattern"] in ("8:16", "16:32")]
    lines = []
    for kind in in_order(rows, "kind"):
        cells = [kind]
        for pattern in ("8:16", "16:32"):
            here = {r["backend"]: r for r in rows if (r["kind"], r["pattern"]) == (kind, pattern)}
            if not here:
                cells += ["", "", "", ""]
                continue
            sweeps = [int(r["sweeps_most"]) for r in here.values() if r["sweeps_most"]]
            most = max(int(r["paths_most"]) for r in here.values())
            mean = float(here["cpu"]["paths_mean"])
            cells += [f"{mean:.2f}", str(most), here["cpu"]["paths_bound"], str(max(sweeps, default=0))]
        lines.append(cells)
    head = ["blocks"]
    for pattern in ("8:16", "16:32"):
        head += [f"{pattern}: mean", "most", "bound", "most sweeps of a block"]
    return markdown(head, lines, "lrrrrrrrr") + source("augmentations.csv", rows[0])


# --- peers --------------------------------------------------------------------------------------------------

LARGEST = "8192"  # side of the matrix whose times the pictures and the tables show


def _peer_cells(cell: Callable[[Row], str], size: str) -> tuple[list[Row], list[str], list[list[str]]]:
    """Rows of peers.csv of one size, the patterns, and one line of cells for each peer."""
    rows = [{**row, "pattern": f"{row['n']}:{row['m']}"} for row in read_csv(RESULTS / "peers.csv")]
    rows = [row for row in rows if row["size"] == size]
    patterns = in_order(rows, "pattern")
    lines = []
    for name in in_order(rows, "peer"):
        found = {row["pattern"]: row for row in rows if row["peer"] == name}
        cells = [cell(found[pattern]) if pattern in found else "" for pattern in patterns]
        lines.append([f"**{name}**" if name == "nmsolve exact (cpu)" else name, *cells])
    return rows, patterns, lines


def peers_time() -> str:
    """Seconds for the largest matrix; "~" where they are extrapolated from a sample."""

    def cell(row: Row) -> str:
        return ("~" if row["extrapolated"] == "1" else "") + significant(float(row["seconds"]))

    rows, patterns, lines = _peer_cells(cell, LARGEST)
    return markdown(["seconds", *patterns], lines, "l" + "r" * len(patterns)) + source("peers.csv", rows[0])


def peers_error() -> str:
    """Mean loss and, in brackets, the lines that are short."""

    def cell(row: Row) -> str:
        mean, short = float(row["mean_relative_error"]), float(row["lines_short"])
        lost = "0" if abs(mean) < 1e-7 else loss(mean) if mean > 0 else f"-{loss(-mean)}"
        return lost + (f" ({loss(short)})" if short else "")

    rows, patterns, lines = _peer_cells(cell, LARGEST)
    return markdown(["mean loss", *patterns], lines, "l" + "r" * len(patterns)) + source("peers.csv", rows[0])


def peers_sizes() -> str:
    """Seconds at each size for 8:16, and the sample they come from."""
    rows = [row for row in read_csv(RESULTS / "peers.csv") if (row["n"], row["m"]) == ("8", "16")]
    sizes = in_order(rows, "size")
    lines = []
    for name in in_order(rows, "peer"):
        found = {row["size"]: row for row in rows if row["peer"] == name}
        cells = [
            ("~" if found[size]["extrapolated"] == "1" else "") + significant(float(found[size]["seconds"]))
            for size in sizes
        ]
        largest = found[sizes[-1]]
        lines.append([name, *cells, f"{int(largest['sampled_blocks']):,}", largest["threads"]])
    head = ["8:16, seconds", *(f"{size}²" for size in sizes), f"blocks solved at {sizes[-1]}²", "threads"]
    return markdown(head, lines, "l" + "r" * (len(sizes) + 2)) + source("peers.csv", rows[0])


# --- how the time grows -------------------------------------------------------------------------------------


def _scaling(name: str) -> list[Row]:
    rows = [row for row in read_csv(RESULTS / "scaling.csv") if row["sweep"] == name]
    return [{**row, "pattern": f"{row['n']}:{row['m']}"} for row in rows]


def _by_pattern(name: str, head: str, label: Callable[[Row], str]) -> str:
    """Nanoseconds per weight: one line for each label, one column for each pattern."""
    rows = _scaling(name)
    patterns = in_order(rows, "pattern")
    lines = []
    for text in dict.fromkeys(label(row) for row in rows):
        found = {row["pattern"]: row for row in rows if label(row) == text}
        lines.append([text, *(significant(float(found[p]["ns_per_weight"])) for p in patterns)])
    return markdown([head, *patterns], lines, "l" + "r" * len(patterns)) + source("scaling.csv", rows[0])


def scaling_m() -> str:
    rows = _scaling("m")
    lines = []
    for m in in_order(rows, "m"):
        found = {row["backend"]: row for row in rows if row["m"] == m}
        cpu, torch = found["cpu"], found["torch"]
        lines.append(
            [
                cpu["pattern"],
                significant(float(cpu["us_per_block"])),
                significant(float(cpu["ns_per_weight"])),
                significant(float(torch["us_per_block"])),
                significant(float(torch["ns_per_weight"])),
            ]
        )
    head = ["pattern", "cpu, µs a block", "cpu, ns a weight", "torch, µs a block", "torch, ns a weight"]
    return markdown(head, lines, "lrrrr") + source("scaling.csv", rows[0])


# --- permutations -------------------------------------------------------------------------------------------


def assignment() -> str:
    rows = read_csv(RESULTS / "assignment.csv")
    lines = [
        [
            f"{row['batch']} x {row['m']}²",
            row["scores"],
            significant(float(row["us_per_matrix"])),
            significant(float(row["scipy_us_per_matrix"])),
            significant(float(row["torch_linear_assignment_us_per_matrix"])),
            f"{significant(float(row['times_faster']))}x",
        ]
        for row in rows
    ]
    head = [
        "matrices",
        "scores",
        "nmsolve, µs",
        "SciPy, µs",
        "torch-linear-assignment, µs",
        "SciPy / nmsolve",
    ]
    return markdown(head, lines, "llrrrr") + source("assignment.csv", rows[0])


def sinkhorn() -> str:
    rows = read_csv(RESULTS / "sinkhorn.csv")
    lines = [
        [
            f"{row['batch']} x {row['m']}²",
            row["method"],
            significant(float(row["forward_ms"])),
            significant(float(row["both_ms"])),
            f"{significant(float(row['held_bytes']) / 2**20)} MiB",
            rounding(row["gradient_error"]),
        ]
        for row in rows
    ]
    head = ["logits", "method", "forward, ms", "and backward, ms", "held between", "error of the gradient"]
    return markdown(head, lines, "llrrrr") + source("sinkhorn.csv", rows[0])


def micro() -> str:
    """Microseconds of every operation: one line for each set of parameters, one column for each backend."""
    rows = read_csv(RESULTS / "micro.csv")
    backends = [name for name in ("triton", "cpu", "torch") if any(_backend(row) == name for row in rows)]
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        rest = " ".join(part for part in row["parameters"].split() if not part.startswith("backend="))
        cell = f"{significant(float(row['us_median']))} ({significant(float(row['ns_per_weight']))})"
        lines.setdefault((row["operation"], rest), {})[_backend(row)] = cell
    cells = [
        [operation, rest, *(found.get(name, "") for name in ("", *backends))]
        for (operation, rest), found in lines.items()
    ]
    head = ["operation", "parameters", "µs (ns a weight)", *backends]
    return markdown(head, cells, "llr" + "r" * len(backends)) + source("micro.csv", rows[0])


def _backend(row: Row) -> str:
    (name,) = [p.partition("=")[2] for p in row["parameters"].split() if p.startswith("backend=")] or [""]
    return name


TABLES: dict[str, Callable[[], str]] = {
    "peers-time": peers_time,
    "peers-error": peers_error,
    "peers-sizes": peers_sizes,
    "scaling-weights": lambda: _by_pattern("weights", "ns a weight", lambda row: f"{row['rows']}²"),
    "scaling-m": scaling_m,
    "scaling-ties": lambda: _by_pattern("ties", "different values", lambda row: row["x"]),
    "scaling-student-t": lambda: _by_pattern("student_t", "degrees of freedom", lambda row: row["x"]),
    "scaling-lognormal": lambda: _by_pattern("lognormal", "sigma", lambda row: row["x"]),
    "scaling-dtype": lambda: _by_pattern("dtype", "dtype", lambda row: row["x"]),
    "scaling-real": lambda: _by_pattern(
        "real", "layers", lambda row: f"{row['x']}, {row['rows']} x {row['cols']}, {row['distribution']}"
    ),
    "assignment": assignment,
    "sinkhorn": sinkhorn,
    "micro": micro,
    "methods": methods,
    "demo": demo,
    "speed": speed,
    "speed-chief": lambda: speed(CHIEF),
    "speed-distributions": speed_distributions,
    "speed-claims": speed_claims,
    "quality": quality,
    "quality-approximate": quality_approximate,
    "memory": memory,
    "first-call": first_call,
    "ascent": ascent,
    "augmentations": augmentations,
}


def all_tables() -> dict[str, Callable[[], str]]:
    """These tables and those of the modules ``tables_AREA.py``, which may use this one."""
    found = dict(TABLES)
    for file in sorted(Path(__file__).parent.glob("tables_*.py")):
        found |= importlib.import_module(file.stem).TABLES
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether the documents are up to date")
    arguments = parser.parse_args()
    tables = all_tables()
    stale = []
    for document in DOCUMENTS:
        before = document.read_text(encoding="utf-8")
        after = MARKED.sub(lambda found: f"{found[1]}{tables[found[2]]()}\n{found[3]}", before)
        if after != before:
            stale.append(document.relative_to(ROOT))
            if not arguments.check:
                document.write_text(after, encoding="utf-8")
    for document in stale:
        print(
            f"{document}: {'differs from bench/results; run make tables' if arguments.check else 'updated'}"
        )
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
