"""The tables of docs/choosing.md, from results/perplexity.csv; tables.py writes them."""

from __future__ import annotations

from collections.abc import Callable

from common import PATTERNS, RESULTS, read_csv
from tables import Row, markdown, percent, significant, source

METHODS = {"magnitude": "magnitude", "wanda": "Wanda", "ria": "RIA", "sparsegpt": "SparseGPT", "alps": "ALPS"}
MASKS = {"ordinary": "ordinary", "exact": "transposable, exact", "tsenor": "transposable, tsenor"}
SIZES = [f"{n}:{m}" for n, m in PATTERNS]
FILE = "perplexity.csv"
MISSING = "not run"


def results(sequential: str = "off") -> dict[tuple[str, str, str], Row]:
    """The rows by method, pattern and mask."""
    rows = read_csv(RESULTS / FILE)
    return {
        (row["method"], row["pattern"], row["mask"]): row for row in rows if row["sequential"] == sequential
    }


def by_pattern(sequential: str, cell: Callable[[Row], str]) -> str:
    """A line for each method and mask, a column for each pattern."""
    rows = results(sequential)
    lines = []
    for method, name in METHODS.items():
        for mask, kind in MASKS.items():
            found = [rows.get((method, size, mask)) for size in SIZES]
            if any(found):
                lines.append([name, kind, *(cell(row) if row else MISSING for row in found)])
    return markdown(["method", "mask", *SIZES], lines, "llrrrr")


def perplexities() -> str:
    rows = results()
    dense = float(rows["dense", "dense", "dense"]["perplexity"])
    table = by_pattern("off", lambda row: significant(float(row["perplexity"]), 3))
    return f"{table}\n\nDense: {dense:.2f}." + source(FILE, rows["wanda", SIZES[0], "ordinary"])


def retained() -> str:
    """Kept share of the scores and, in brackets, the relative reconstruction error."""
    return by_pattern("off", lambda row: f"{percent(float(row['retained']))} ({float(row['error']):.3f})")


def published() -> str:
    """Wanda beside an independent implementation of its rule."""
    rows = results()
    lines = []
    for size in SIZES:
        peer = rows.get(("wanda, published rule", size, "ordinary"))
        if peer:
            found, expected = (float(row["perplexity"]) for row in (rows["wanda", size, "ordinary"], peer))
            lines.append([size, f"{found:.2f}", f"{expected:.2f}", f"{abs(found / expected - 1):.0e}"])
    return markdown(["pattern", "nmsolve", "published rule", "relative difference"], lines, "lrrr")


def seconds() -> str:
    """Seconds of a whole pruning and, in brackets, the share of the mask solver."""

    def cell(row: Row) -> str:
        total = float(row["seconds"])
        return f"{total:.0f} ({percent(float(row['mask_seconds']) / total, 0)})"

    return by_pattern("off", cell)


def sequential() -> str:
    """Perplexity when the blocks before have been pruned already."""
    return by_pattern("block", lambda row: significant(float(row["perplexity"]), 3))


TABLES: dict[str, Callable[[], str]] = {
    "perplexity": perplexities,
    "perplexity-retained": retained,
    "perplexity-published": published,
    "perplexity-seconds": seconds,
    "perplexity-sequential": sequential,
}
