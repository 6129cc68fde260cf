"""Tables of docs/permutation.md from results/permutation.csv and results/permutation_learning.csv.

``TABLES`` has the same form as in tables.py, which puts them between their marks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from common import RESULTS, read_csv

FILE = "permutation.csv"
LEARNING = "permutation_learning.csv"

NAMES = {
    "natural": "as it is",
    "ria": "RIA",
    "ria 3 passes": "RIA, 3 passes",
    "permllm": "learned, `permllm`",
    "cost-matrix": "learned, `cost-matrix`",
}

Row = dict[str, str]


def markdown(head: list[str], rows: Iterable[list[str]], align: str) -> str:
    rule = ["---:" if a == "r" else "---" for a in align]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def source(file: str, row: Row) -> str:
    where = f"{row['machine']}; {row['software']}; {row['date']}, commit {row['commit']}"
    return f"\n\n<sub>`bench/results/{file}`: {where}</sub>"


def percent(share: str, digits: int = 2) -> str:
    return f"{float(share) * 100:.{digits}f} %"


def model() -> str:
    """All MLPs pruned to ordinary N:M: kept score and perplexity in every order."""
    rows = [row for row in read_csv(RESULTS / FILE) if row["part"] == "model"]
    lines = [
        [
            row["pattern"],
            NAMES[row["order"]],
            percent(row["retained"]),
            f"{float(row['perplexity']):.1f}",
            f"{row['steps']} x {int(row['batch']):,} tokens" if int(row["batch"]) else "",
            f"{float(row['seconds']):,.0f}",
        ]
        for row in sorted(rows, key=lambda row: row["pattern"])
    ]
    head = ["pattern", "order", "kept score", "perplexity", "steps of learning", "seconds"]
    return markdown(head, lines, "llrrrr") + source(FILE, rows[0])


def layers() -> str:
    """Single linears, transposable, with and without row and column orders."""
    rows = [row for row in read_csv(RESULTS / FILE) if row["part"] == "layers"]
    lines = []
    for scope, pattern in dict.fromkeys((row["scope"], row["pattern"]) for row in rows):
        here = {row["order"]: row for row in rows if (row["scope"], row["pattern"]) == (scope, pattern)}
        found = here["rows and columns"]
        kept = [percent(here[order]["retained"]) for order in ("natural", "rows and columns", "ordinary")]
        closed = percent(found["closed"], 0)
        lines.append(
            [pattern, f"`{scope.removeprefix('model.')}`", *kept, closed, f"{float(found['seconds']):,.0f}"]
        )
    head = ["pattern", "layer", "transposable", "reordered", "ordinary N:M", "of the gap closed", "seconds"]
    return markdown(head, lines, "llrrrrr") + source(FILE, rows[0])


def learning() -> str:
    """Every check of learning: loss on the held-out batches and kept score."""
    rows = read_csv(RESULTS / LEARNING)
    lines = [
        [
            row["pattern"],
            f"`{row['order']}`",
            f"**{row['step']}**" if row["step"] == row["taken"] else row["step"],
            f"{float(row['loss']):.4g}" if row["loss"] else "",
            f"{float(row['held_out']):.4g}",
            percent(row["kept"], 3),
        ]
        for row in rows
    ]
    head = ["pattern", "strategy", "step", "loss in training", "held-out loss", "kept score"]
    return markdown(head, lines, "llrrrr") + source(LEARNING, rows[0])


TABLES: dict[str, Callable[[], str]] = {
    "permutation-model": model,
    "permutation-layers": layers,
    "permutation-learning": learning,
}
