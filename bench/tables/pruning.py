"""The tables of docs/choosing.md, from what bench/perplexity.py wrote."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean

import numpy as np
from common import PATTERNS

from tables.columns import Cell, Row, in_order, loss, markdown, percent, results, share, significant, source

NAMES_OF_METHODS = {
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "ria": "RIA",
    "frank-wolfe": "Frank-Wolfe",
    "sparsegpt": "SparseGPT",
    "alps": "ALPS",
}
MASKS = {"ordinary": "ordinary", "exact": "transposable, exact", "tsenor": "transposable, tsenor"}
SIZES = [f"{n}:{m}" for n, m in PATTERNS]
FILE = "perplexity.csv"
MISSING = "not run"


def runs(sequential: str = "off", matmul: str = "bfloat16") -> dict[tuple[str, str, str], Row]:
    """The rows by method, pattern and mask."""
    rows = [row for row in results(FILE) if row["sequential"] == sequential]
    return {(row["method"], row["pattern"], row["mask"]): row for row in rows if row["matmul"] == matmul}


def by_pattern(cell: Cell) -> str:
    """A line for each method and mask, a column for each pattern."""
    rows = runs()
    lines = []
    for method, name in NAMES_OF_METHODS.items():
        for mask, kind in MASKS.items():
            found = [rows.get((method, size, mask)) for size in SIZES]
            if any(found):
                lines.append([name, kind, *(cell(row) if row else MISSING for row in found)])
    return markdown(["method", "mask", *SIZES], lines, "llrrrr")


def perplexity(row: Row) -> str:
    value = float(row["perplexity"])
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def perplexities() -> str:
    rows = runs()
    key = ("dense", "dense", "dense")
    dense, in_float32 = (float(found[key]["perplexity"]) for found in (rows, runs(matmul="float32")))
    table = by_pattern(perplexity)
    return f"{table}\n\nDense: {dense:.3f}, and {in_float32:.3f} with float32 products." + source(
        FILE, rows["wanda", SIZES[0], "ordinary"]
    )


def retained() -> str:
    """Kept share of the scores and, in brackets, the relative reconstruction error."""
    return by_pattern(lambda row: f"{share('retained')(row)} ({float(row['error']):.3f})")


def published() -> str:
    """Wanda beside an independent implementation of its rule."""
    rows = runs()
    lines = []
    for size in SIZES:
        peer = rows.get(("wanda, published rule", size, "ordinary"))
        if peer:
            found, expected = (float(row["perplexity"]) for row in (rows["wanda", size, "ordinary"], peer))
            lines.append(
                [size, f"{found:.2f}", f"{expected:.2f}", f"{max(abs(found / expected - 1), 1e-5):.0e}"]
            )
    return markdown(["pattern", "nmsolve", "published rule", "relative difference at most"], lines, "lrrr")


def gaps() -> str:
    """How many times the ordinary mask's perplexity a transposable mask has."""
    rows = runs()
    lines = []
    for method, name in NAMES_OF_METHODS.items():
        pairs = [(rows.get((method, size, "exact")), rows.get((method, size, "ordinary"))) for size in SIZES]
        cells = [
            f"{float(a['perplexity']) / float(b['perplexity']):.2f}" if a and b else MISSING for a, b in pairs
        ]
        if set(cells) != {MISSING}:
            lines.append([name, *cells])
    return markdown(["exact / ordinary", *SIZES], lines, "lrrrr")


def mask_share() -> str:
    """Share of a whole pruning that the mask solver takes."""
    return by_pattern(lambda row: percent(float(row["mask_seconds"]) / float(row["seconds"]), 0))


def sequential() -> str:
    """Perplexity from the dense model's inputs and, after it, from those of the pruned blocks before."""
    one_shot, in_turn = runs(), runs("block", "float32")
    keys = list(dict.fromkeys((method, mask) for method, _, mask in in_turn))
    sizes = [size for size in SIZES if any(size == found for _, found, _ in in_turn)]
    lines = [
        [
            NAMES_OF_METHODS[method],
            MASKS[mask],
            *(
                perplexity(found[method, size, mask]) if (method, size, mask) in found else MISSING
                for size in sizes
                for found in (one_shot, in_turn)
            ),
        ]
        for method, mask in sorted(
            keys, key=lambda key: (list(NAMES_OF_METHODS).index(key[0]), list(MASKS).index(key[1]))
        )
    ]
    heads = [f"{size}, {kind}" for size in sizes for kind in ("one-shot", "in turn")]
    table = markdown(["method", "mask", *heads], lines, "ll" + "r" * len(heads))
    return table + source(FILE, next(iter(in_turn.values())))


LAYERS_FILE = "layer_errors.csv"
NAMES_OF_LAYERS = {
    "wanda": "Wanda",
    "wanda squared": "Wanda, squared scores",
    "frank-wolfe, plain": "Frank-Wolfe without penalty and exchanges",
    "frank-wolfe, no exchanges": "Frank-Wolfe without exchanges",
    "exchanges": "exchanges alone",
    "frank-wolfe": "Frank-Wolfe",
    "sparsegpt": "SparseGPT",
    "sparsegpt, mask of frank-wolfe": "SparseGPT, mask of Frank-Wolfe",
    "alps": "ALPS",
    "alps, mask of frank-wolfe": "least squares on the mask of Frank-Wolfe",
    "bound": "bound for masks alone",
}


def layer_errors() -> str:
    """Mean relative errors of the layers that every method has been run on."""
    rows = results(LAYERS_FILE)
    found = {(row["layer"], row["pattern"], row["mask"], row["method"]): row for row in rows}
    kinds = list(dict.fromkeys((row["pattern"], row["mask"]) for row in rows))
    layers = [
        name
        for name in dict.fromkeys(row["layer"] for row in rows)
        if all((name, *kind, method) in found for kind in kinds for method in NAMES_OF_LAYERS)
    ]
    lines = []
    for method, name in NAMES_OF_LAYERS.items():
        cells = []
        for kind in kinds:
            picked = [found[(layer, *kind, method)] for layer in layers]
            calibrated = fmean(float(row["error"]) for row in picked)
            if method == "bound":
                cells.append(f"({calibrated:.4f})")
            else:
                cells.append(f"{fmean(float(row['held_out']) for row in picked):.4f} ({calibrated:.4f})")
        lines.append([name, *cells])
    heads = [f"{pattern}, {mask}" for pattern, mask in kinds]
    said = f"\n\nMeans over {len(layers)} layers: other text, and in brackets the text pruned on."
    return markdown(["method", *heads], lines, "l" + "r" * len(heads)) + said + source(LAYERS_FILE, rows[0])


SPREAD_FILE = "perplexity_spread.csv"
NAMES_OF_MODELS = {"smollm2": "SmolLM2-135M", "gpt2-bytes": "GPT-2 of bytes"}
RESAMPLES = 10_000
REFERENCE = "wanda"


def bootstrapped(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of the means of windows drawn with replacement; always the same draws."""
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(1), (0.025, 0.975))
    return float(low), float(high)


def spread(model: str) -> str:
    """Perplexity and, window by window, how far it is from Wanda's, each with its spread."""
    rows = [row for row in results(SPREAD_FILE) if row["model"] == model]
    losses = {
        (row["pattern"], row["mask"], row["method"]): np.array(row["losses"].split(), float) for row in rows
    }
    kinds = list(dict.fromkeys(key[:2] for key in losses if key[2] != "dense"))
    lines = []
    for method, name in (("ria", "RIA"), *NAMES_OF_LAYERS.items()):
        cells = []
        for kind in kinds:
            found, reference = losses.get((*kind, method)), losses.get((*kind, REFERENCE))
            if found is None or reference is None:
                cells.append("")
                continue
            cell = f"{significant(np.exp(found.mean()), 3)}"
            if method != REFERENCE:
                low, high = (100 * math.expm1(bound) for bound in bootstrapped(found - reference))
                cell += f" ({low:+.1f} to {high:+.1f} %)"
            cells.append(cell)
        if any(cells):
            lines.append([name, *cells])
    dense = losses["dense", "dense", "dense"]
    low, high = (math.exp(bound) for bound in bootstrapped(dense))
    tested = f"{int(rows[0]['test_tokens']):,} tokens in {len(dense)} windows"
    said = (
        f"\n\n{NAMES_OF_MODELS[model]}, {tested}; dense {significant(math.exp(dense.mean()), 3)} "
        f"({low:.3g} to {high:.3g}). In brackets: the difference from Wanda on the same windows, the middle "
        f"95 % of {RESAMPLES:,} draws of windows."
    )
    heads = [f"{pattern}, {mask}" for pattern, mask in kinds]
    return markdown(["method", *heads], lines, "l" + "r" * len(heads)) + said + source(SPREAD_FILE, rows[0])


def initial_masks() -> str:
    """Masks and layers within an earlier mask: time beside that without, and what iterations leave."""
    file = "initial_masks.csv"
    rows = results(file)
    lines = []
    for size in in_order(rows, "pattern"):
        for earlier in in_order(rows, "earlier"):
            here = {row["way"]: row for row in rows if (row["pattern"], row["earlier"]) == (size, earlier)}
            seconds = {way: float(row["seconds"]) for way, row in here.items()}
            lines.append(
                [
                    size,
                    earlier,
                    significant(seconds["choose"] / seconds["free"]),
                    loss(1 - float(here["step"]["kept"])),
                    *(
                        significant(seconds[f"{method}, within"] / seconds[f"{method}, free"])
                        for method in ("wanda", "sparsegpt", "frank-wolfe", "alps")
                    ),
                ]
            )
    head = ["pattern", "earlier mask", "the mask", "less in iterations"]
    return markdown([*head, "Wanda", "SparseGPT", "Frank-Wolfe", "ALPS"], lines, "ll" + 6 * "r") + source(
        file, rows[0]
    )


TABLES: dict[str, Callable[[], str]] = {
    "perplexity": perplexities,
    "perplexity-retained": retained,
    "perplexity-published": published,
    "perplexity-gap": gaps,
    "perplexity-mask-share": mask_share,
    "perplexity-sequential": sequential,
    "layer-errors": layer_errors,
    "initial-masks": initial_masks,
    "perplexity-spread": lambda: spread("smollm2"),
    "perplexity-spread-gpt2": lambda: spread("gpt2-bytes"),
}
