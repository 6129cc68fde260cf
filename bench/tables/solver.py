"""The tables of docs/internals/solver.md: how much the exact solver's phases have to do."""

from __future__ import annotations

from collections.abc import Callable

from tables.columns import fixed, in_order, left, listing, markdown, results, right, rounding, share, source

PATHS = "augmentations.csv"
PATTERNS = ("8:16", "16:32")


def ascent() -> str:
    """Augmenting paths that variants of the ascent leave to the search."""
    file = "ascent.csv"
    return listing(
        file,
        results(file),
        [
            left("pattern"),
            left("scores", "distribution"),
            right("mean", fixed("mean", 2)),
            right("most", "largest"),
            right("blocks that need none", share("blocks_done", 0)),
            right("mean, fixed schedule", fixed("mean_fixed_schedule", 2)),
            right("9 sweeps", fixed("mean_9_sweeps", 2)),
            right("Newton's steps", fixed("mean_newton", 2)),
            right("counted throughout", fixed("mean_counted", 2)),
            right("never counted", fixed("mean_never_counted", 2)),
        ],
    )


def augmentations() -> str:
    """Paths of the CPU backend on every kind of blocks, and the most of any backend."""
    rows = [row for row in results(PATHS) if row["pattern"] in PATTERNS]
    lines = []
    for kind in in_order(rows, "kind"):
        cells = [kind]
        for pattern in PATTERNS:
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
    for pattern in PATTERNS:
        head += [f"{pattern}: mean", "most", "bound", "most sweeps of a block"]
    return markdown(head, lines, "l" + "r" * (len(head) - 1)) + source(PATHS, rows[0])


def forbidden() -> str:
    """Masks where entries are forbidden, beside the optimum of integers."""
    file = "forbidden.csv"
    rows = results(file)
    lines = []
    for backend in in_order(rows, "backend"):
        here = [row for row in rows if row["backend"] == backend]
        counts = [
            sum(int(row[key]) for row in here) for key in ("blocks", "below", "wrongly_refused", "refused")
        ]
        worst = max((row["largest_gap"] for row in here), key=float)
        lines.append([backend, *(f"{count:,}" for count in counts), rounding(worst)])
    head = ["backend", "blocks", "below the optimum", "wrongly refused", "rightly refused", "largest gap"]
    return markdown(head, lines, "lrrrrr") + source(file, rows[0])


def against() -> str:
    """Processor time of ordinary scores, beside that of an earlier commit."""
    file = "against.csv"
    rows = results(file)
    lines = []
    for what, backend in dict.fromkeys((row["what"], row["backend"]) for row in rows):
        for dtype in in_order(rows, "dtype"):
            here = [r for r in rows if (r["what"], r["backend"], r["dtype"]) == (what, backend, dtype)]
            if here:
                ratios = [f"{r['pattern']}: {float(r['ratio']):.2f}" for r in here]
                spread = [
                    f"{float(r['ratio_first_quartile']):.2f} to {float(r['ratio_third_quartile']):.2f}"
                    for r in here
                ]
                lines.append([what, backend, dtype, ", ".join(ratios), ", ".join(spread)])
    head = ["", "backend", "scores", "time / time before", "quartiles"]
    return markdown(head, lines, "lllll") + source(file, rows[0])


TABLES: dict[str, Callable[[], str]] = {
    "ascent": ascent,
    "augmentations": augmentations,
    "forbidden": forbidden,
    "against": against,
}
