"""The tables of docs/internals/solver.md: how much the exact solver's phases have to do."""

from __future__ import annotations

from collections.abc import Callable

from tables.columns import fixed, in_order, left, listing, markdown, results, right, share, source

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
            right("7 sweeps", fixed("mean_7_sweeps", 2)),
            right("smooth count", fixed("mean_smooth_count", 2)),
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


TABLES: dict[str, Callable[[], str]] = {"ascent": ascent, "augmentations": augmentations}
