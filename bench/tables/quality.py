"""The tables of how much masks keep: against independent optima, by method, and on a real model."""

from __future__ import annotations

from collections.abc import Callable

from tables.columns import (
    Column,
    Row,
    in_order,
    left,
    listing,
    loss,
    lost,
    markdown,
    number,
    pattern,
    percent,
    results,
    right,
    rounding,
    share,
    source,
)

QUALITY, DEMO, FUZZ = "quality.csv", "demo.csv", "fuzz_backends.csv"

# How the table names what bench/fuzz_backends.py compares.
COUNTED = ("blocks", "compared", "infeasible", "beyond", "rounded", "mixed_beyond", "mixed")
WORST = ("difference", "gap", "gap_of_second", "gap_warm", "mixed_gap")
PARTS = {"torch": "cpu, torch", "interpreter": "cpu, triton (interpreted)", "ptx": "cpu, triton (PTX, sm_90)"}


def demo() -> str:
    """Every method on the real model."""
    method = left("method", lambda row: row["method"] + (" on the same layers" if row["same_layers"] else ""))
    return _demo(results(DEMO), [method, right("layers")])


def demo_chief() -> str:
    """The exact method alone: what the README shows."""
    return _demo([row for row in results(DEMO) if row["method"] == "exact" and not row["same_layers"]], [])


def _demo(rows: list[Row], which: list[Column]) -> str:
    def below_bound(row: Row) -> str:
        return rounding(row["below_bound"]) if row["method"] == "exact" else lost("below_bound")(row)

    return listing(
        DEMO,
        rows,
        [
            left("pattern"),
            *which,
            right("of the ordinary N:M score", share("of_ordinary")),
            right("below the bound", below_bound),
            right("seconds", number("seconds")),
            right("weights/s", lambda row: f"{number('weights_per_second', unit=1e6)(row)} M"),
        ],
    )


def exact() -> str:
    """The largest errors of the exact method, one line for each backend and dtype."""
    rows = [row for row in results(QUALITY) if row["method"] == "exact"]
    lines = []
    for backend, dtype in dict.fromkeys((row["backend"], row["dtype"]) for row in rows):
        here = [row for row in rows if (row["backend"], row["dtype"]) == (backend, dtype)]
        flow, highs, gap = (
            rounding(max((row[key] for row in here), key=float))
            for key in ("error_to_flow_max", "error_to_highs_max", "gap_max")
        )
        blocks = sum(int(row["blocks"]) for row in here)
        filled = sum(float(row["full_share"]) * int(row["blocks"]) for row in here) / blocks
        lines.append(
            [
                backend,
                dtype,
                " ".join(in_order(here, "m")),
                f"{blocks:,}",
                percent(filled, 0),
                flow,
                f"{highs} ({sum(int(row['highs_blocks']) for row in here):,})",
                gap,
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
    return markdown(head, lines, "lllrrrrr") + source(QUALITY, rows[0])


def approximate() -> str:
    rows = [row for row in results(QUALITY) if row["method"] != "exact"]
    return listing(
        QUALITY,
        sorted(rows, key=lambda row: (row["method"], row["backend"])),
        [
            left("method"),
            left("backend"),
            left("pattern", pattern),
            right("blocks"),
            right("mean loss", lost("error_mean")),
            right("largest loss", lost("error_to_flow_max")),
            right("blocks with exactly N", share("full_share")),
        ],
    )


def methods() -> str:
    """When to take which method, with the mean losses that were measured."""
    rows = results(QUALITY)

    def mean_losses(method: str) -> str:
        found = [r for r in rows if r["method"] == method and r["backend"] == "cpu"]
        losses = [float(row["error_mean"]) for row in found]
        return f"{loss(min(losses))} to {loss(max(losses))} less"

    lines = [
        ["`exact` (default)", "always, unless something below applies", "the optimum, with its proof"],
        [
            "`greedy`",
            "you want the published 2-approximation, with every line filled",
            mean_losses("greedy"),
        ],
        ["`tsenor`", "you compare with the paper (arXiv 2505.23949)", mean_losses("tsenor")],
    ]
    return markdown(["method", "take it when", "kept score"], lines, "lll") + source(QUALITY, rows[0])


def fuzz() -> str:
    """A line for each dtype of each pair of backends, all sizes together: sums of counts, the worst gaps."""
    rows = results(FUZZ)
    lines = []
    for part, dtype in dict.fromkeys((row["part"], row["dtype"]) for row in rows):
        here = [row for row in rows if (row["part"], row["dtype"]) == (part, dtype)]
        total = {key: sum(int(row[key]) for row in here) for key in COUNTED}
        worst = {key: rounding(max((row[f"worst_{key}"] for row in here), key=float)) for key in WORST}
        lines.append(
            [
                PARTS[part],
                dtype,
                _sizes([int(row["m"]) for row in here]),
                *(f"{total[key]:,}" for key in COUNTED[:3]),
                *(worst[key] for key in WORST[:4]),
                *(f"{total[key]:,}" for key in COUNTED[3:5]),
                f"{total['mixed_beyond']:,} of {total['mixed']:,}",
                worst["mixed_gap"],
            ]
        )
    head = ["backends", "dtype", "M", "blocks", "solved by both", "infeasible", "objectives differ by", "gap"]
    head += ["gap of the second", "gap, bad start", "beyond", "rounded", "mixed beyond", "mixed gap"]
    return markdown(head, lines, "lll" + "r" * 11) + source(FUZZ, rows[-1])


def _sizes(found: list[int]) -> str:
    """From the least to the largest where none between them is missing, or how many there are."""
    low, high = min(found), max(found)
    if low == high:
        return str(low)
    return f"{low} to {high}" if high - low + 1 == len(found) else f"{len(found)} sizes up to {high}"


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "demo-chief": demo_chief,
    "fuzz-backends": fuzz,
    "methods": methods,
    "quality": exact,
    "quality-approximate": approximate,
}
