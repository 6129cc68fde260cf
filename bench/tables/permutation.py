"""The tables of docs/permutation.md, from what bench/permutation.py wrote."""

from __future__ import annotations

from collections.abc import Callable

from tables.columns import Row, fixed, left, listing, markdown, results, right, share, source, whole

FILE = "permutation.csv"
LEARNING = "permutation_learning.csv"

NAMES = {
    "natural": "as it is",
    "ria": "RIA",
    "ria 3 passes": "RIA, 3 passes",
    "permllm": "learned, `permllm`",
    "cost-matrix": "learned, `cost-matrix`",
}


def model() -> str:
    """All MLPs pruned to ordinary N:M: kept score and perplexity in every order."""

    def steps(row: Row) -> str:
        return f"{row['steps']} x {int(row['batch']):,} tokens" if int(row["batch"]) else ""

    rows = [row for row in results(FILE) if row["part"] == "model"]
    return listing(
        FILE,
        sorted(rows, key=lambda row: row["pattern"]),
        [
            left("pattern"),
            left("order", lambda row: NAMES[row["order"]]),
            right("kept score", share("retained")),
            right("perplexity", fixed("perplexity", 1)),
            right("steps of learning", steps),
            right("seconds", whole("seconds")),
        ],
    )


def layers() -> str:
    """Single linears, transposable, with and without row and column orders."""
    rows = [row for row in results(FILE) if row["part"] == "layers"]
    lines = []
    for scope, pattern in dict.fromkeys((row["scope"], row["pattern"]) for row in rows):
        here = {row["order"]: row for row in rows if (row["scope"], row["pattern"]) == (scope, pattern)}
        found = here["rows and columns"]
        kept = [share("retained")(here[order]) for order in ("natural", "rows and columns", "ordinary")]
        layer = f"`{scope.removeprefix('model.')}`"
        lines.append([pattern, layer, *kept, share("closed", 0)(found), whole("seconds")(found)])
    head = ["pattern", "layer", "transposable", "reordered", "ordinary N:M", "of the gap closed", "seconds"]
    return markdown(head, lines, "llrrrrr") + source(FILE, rows[0])


def learning() -> str:
    """Every check of learning: loss on the held-out batches and kept score."""
    return listing(
        LEARNING,
        results(LEARNING),
        [
            left("pattern"),
            left("strategy", lambda row: f"`{row['order']}`"),
            right("step", lambda row: f"**{row['step']}**" if row["step"] == row["taken"] else row["step"]),
            right("loss in training", lambda row: f"{float(row['loss']):.4g}" if row["loss"] else ""),
            right("held-out loss", lambda row: f"{float(row['held_out']):.4g}"),
            right("kept score", share("kept", 3)),
        ],
    )


TABLES: dict[str, Callable[[], str]] = {
    "permutation-model": model,
    "permutation-layers": layers,
    "permutation-learning": learning,
}
