"""The tables of docs/permutation.md, from what bench/permutation.py, bench/order_scale.py and
bench/learned_orders.py wrote.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from kernel_costs.cases import SIDE, SLOT_M
from kernel_costs.model import GPUS

from tables.columns import (
    Column,
    Row,
    fixed,
    left,
    listing,
    markdown,
    number,
    percent,
    results,
    right,
    share,
    source,
    whole,
)
from tables.pruning import bootstrapped

FILE = "permutation.csv"
LEARNING = "permutation_learning.csv"
SCALE = "order_scale.csv"
LEARNED = "learned_orders.csv"
GRADIENT = "learned_gradient.csv"

COSTS = "kernel_costs.csv"
VALUES = {"nth_largest": "thresholds", "sum_maxima": "sums of maxima", "add_parts": "their parts added up"}
LAYER = (4096, 14336)
"""Of the table of GPUs, at 2:4."""

SEARCHES = {
    "dealt": "dealt only",
    "ria": "RIA",
    "published": "RIA as published",
    "swap": "swaps",
    "stripe": "stripes",
    "stripe, 100 escapes": "stripes, 100 escapes",
    "exchanges": "by exchanges",
    "forced": "a mask for every choice",
}

NAMES = {
    "natural": "as it is",
    "ria": "RIA",
    "ria 3 passes": "RIA, 3 passes",
    "permllm": "learned, `permllm`",
    "cost-matrix": "learned, `cost-matrix`",
}

LEARNED_NAMES = {
    "natural": "as it is",
    "ria": "RIA, 10 passes",
    "ria of squares": "RIA of the squares, 10 passes",
    "frank-wolfe": "learned from RIA's, `frank-wolfe`",
    "frank-wolfe from natural": "learned from the natural one, `frank-wolfe`",
    "frank-wolfe of what folds": "of `down_proj` alone learned, `frank-wolfe`",
    "permllm": "learned from RIA's, `permllm`",
    "cost-matrix": "learned from RIA's, `cost-matrix`",
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


def learned() -> str:
    """Orders of all MLPs: perplexity, and window by window how far it is from that of RIA's search."""
    rows = results(LEARNED)
    lines = []
    for pattern in dict.fromkeys(row["pattern"] for row in rows):
        here = [row for row in rows if row["pattern"] == pattern]
        found = {id(row): np.array(row["losses"].split(), float) for row in here}
        reference = next(found[id(row)] for row in here if row["order"] == "ria")
        for row in here:
            change = ""
            if row["order"] != "ria":
                difference = found[id(row)] - reference
                low, high = (100 * math.expm1(bound) for bound in bootstrapped(difference))
                change = f"{100 * math.expm1(difference.mean()):+.1f} % ({low:+.1f} to {high:+.1f})"
            steps = f"{row['steps']} x {int(row['batch']):,} tokens" if int(row["steps"]) else ""
            lines.append(
                [
                    pattern,
                    LEARNED_NAMES[row["order"]],
                    share("retained")(row),
                    fixed("perplexity", 1)(row),
                    change,
                    steps,
                    whole("seconds")(row),
                ]
            )
    head = ["pattern", "order", "kept score", "perplexity", "beside RIA", "steps", "seconds"]
    return markdown(head, lines, "llrrrrr") + source(LEARNED, rows[0])


def gradient() -> str:
    """How well two gradients say what exchanged columns do to the loss: correlations and slopes."""
    rows = results(GRADIENT)
    lines = []
    for pattern, swaps in dict.fromkeys((row["pattern"], row["swaps"]) for row in rows):
        here = [row for row in rows if (row["pattern"], row["swaps"]) == (pattern, swaps)]
        change = np.array([float(row["change"]) for row in here])
        cells = [pattern, swaps, f"{np.abs(change).mean():.1e}"]
        for name in ("masks", "plan"):
            said = np.array([float(row[name]) for row in here])
            cells += [f"{np.corrcoef(said, change)[0, 1]:.2f}", f"{np.mean(said * change > 0):.0%}"]
        lines.append(cells)
    head = [
        "pattern",
        "pairs",
        "change of the loss",
        "by masks: correlation",
        "sign",
        "by plan: correlation",
        "sign",
    ]
    return markdown(head, lines, "lrrrrrr") + source(GRADIENT, rows[0])


def _searched(parts: tuple[str, ...]) -> list[Row]:
    """The searches of these parts, by matrix and pattern."""
    rows = [row for row in results(SCALE) if row["part"] in parts]
    return sorted(rows, key=lambda row: (row["scope"], row["pattern"]))


def _window(row: Row) -> str:
    if row["method"] in ("dealt", "forced", "published"):
        return ""
    return {"0": "none", "-1": "default"}.get(row["window"], row["window"])


def _method(row: Row) -> str:
    passes = int(row["passes"])
    many = f", {passes} pass{'es' if passes > 1 else ''}" if passes and row["method"] != "published" else ""
    return SEARCHES[row["method"]] + many


def _search_columns(name: str, cell: Callable[[Row], str]) -> list[Column]:
    return [
        left(name, cell),
        left("pattern"),
        left("search", _method),
        left("window", _window),
        right("gain", share("gain", 3)),
        right("core-seconds", number("seconds")),
    ]


def windows() -> str:
    """RIA's search of a large matrix in windows, and what share of the whole search's gain they reach."""
    rows = _searched(("ordinary",))
    whole = {
        _random(row): float(row["gain"]) for row in rows if row["method"] == "ria" and row["window"] == "0"
    }

    def of_whole(row: Row) -> str:
        return percent(float(row["gain"]) / whole[_random(row)], 1) if _random(row) in whole else ""

    columns = _search_columns("scores", _random)
    return listing(SCALE, rows, [*columns, right("of the gain without", of_whole)])


def gpus() -> str:
    """What the values of one pass of RIA's search take at least: the cost table's slot, for each of them."""
    rows = [
        row
        for row in results(COSTS)
        if row["kernel"] in VALUES and row["m"] in ("", str(SLOT_M)) and row["target"] in GPUS
    ]
    slots = SLOT_M * LAYER[0] * LAYER[1] / SIDE**2
    taken = {(row["kernel"], row["target"]): slots * float(row["predicted_ms_8192"]) for row in rows}
    lines = [[name, *(f"{taken[kernel, gpu]:.2f}" for gpu in GPUS)] for kernel, name in VALUES.items()]
    lines.append(["all", *(f"{sum(taken[kernel, gpu] for kernel in VALUES):.2f}" for gpu in GPUS)])
    head = [f"a pass over {LAYER[0]} x {LAYER[1]} at 2:4, ms", *(gpu.name for gpu in GPUS.values())]
    return markdown(head, lines, "lrrr") + source(COSTS, rows[0])


def published() -> str:
    """RIA's published search and ours."""
    rows = _searched(("published",))
    return listing(SCALE, rows, _search_columns("layer", _layer))


def rows_and_columns() -> str:
    """Rows and columns for transposable masks, of layers and of a large matrix."""
    rows = _searched(("forced",)) + _searched(("transposable",))
    return listing(SCALE, rows, _search_columns("scores", _layer))


def _random(row: Row) -> str:
    return f"{row['scope']}, {row['rows']} x {row['cols']}"


def _layer(row: Row) -> str:
    if row["part"] == "transposable":
        return _random(row)
    return f"`{row['scope'].removeprefix('model.')}`, {row['rows']} x {row['cols']}"


TABLES: dict[str, Callable[[], str]] = {
    "permutation-model": model,
    "permutation-layers": layers,
    "permutation-learning": learning,
    "permutation-learned": learned,
    "permutation-gradient": gradient,
    "permutation-windows": windows,
    "permutation-gpus": gpus,
    "permutation-published": published,
    "permutation-rows-and-columns": rows_and_columns,
}
