"""The tables of docs/training.md, from what bench/training.py and the scripts beside it wrote."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from statistics import fmean, stdev
from typing import NamedTuple

from scipy.stats import t as student

from tables.columns import Row, left, listing, markdown, number, percent, results, right, share, source

FILE = "training.csv"
REFRESH = "training_refresh.csv"

Way = tuple[str, str, str]  # method, kind of mask, refresh

DENSE: Way = ("dense", "none", "0")
FIXED: Way = ("fixed", "transposable", "0")
EVERY_STEP: Way = ("straight-through", "transposable", "1")
EVERY_40: Way = ("straight-through", "transposable", "40")
EVERY_200: Way = ("straight-through", "transposable", "200")
SR_STE: Way = ("sr-ste", "transposable", "1")
GRADIENT_DECAY: Way = ("gradient decay", "transposable", "40")
ORDINARY: Way = ("straight-through", "ordinary", "40")

FROZEN = {
    EVERY_40: ("frozen end", "transposable", "40"),
    EVERY_200: ("frozen end", "transposable", "200"),
}

NAMES = {
    DENSE: "dense",
    FIXED: "fixed mask",
    EVERY_STEP: "straight-through, refresh 1",
    EVERY_40: "straight-through, refresh 40",
    EVERY_200: "straight-through, refresh 200",
    SR_STE: "SR-STE, refresh 1",
    GRADIENT_DECAY: "decay of gradients, refresh 40",
    ORDINARY: "ordinary masks, straight-through, refresh 40",
}
PAIRS = (
    (EVERY_STEP, EVERY_40),
    (EVERY_200, EVERY_40),
    (SR_STE, EVERY_STEP),
    (GRADIENT_DECAY, EVERY_40),
    (SR_STE, FIXED),
    (GRADIENT_DECAY, FIXED),
    (FIXED, DENSE),
    (EVERY_40, DENSE),
    (EVERY_40, ORDINARY),
)


class Difference(NamedTuple):
    """Of the losses of two ways, seed by seed."""

    mean: float
    half: float
    """Half the width of the 95 % interval, Student's t."""

    @property
    def clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return abs(self.mean) > self.half


def lengths() -> list[str]:
    """Steps of the compared runs, the shortest first."""
    found = {row["steps"] for row in results(FILE) if row["part"] == "comparison"}
    return sorted(found, key=int)


def runs(steps: str | None = None) -> dict[tuple[Way, str], dict[str, Row]]:
    """The compared rows of one length, by default the shortest: way and pattern -> seed -> row."""
    steps = steps or lengths()[0]
    found: dict[tuple[Way, str], dict[str, Row]] = {}
    for row in results(FILE):
        if (row["part"], row["steps"]) == ("comparison", steps):
            way = (row["method"], row["mask"], row["refresh"])
            found.setdefault((way, row["pattern"]), {})[row["seed"]] = row
    return found


def patterns() -> list[str]:
    """Those that every way has run at, with every seed."""
    found = runs()
    seeds = found[DENSE, "dense"].keys()
    complete = [
        pattern
        for pattern in dict.fromkeys(pattern for _, pattern in found if pattern != "dense")
        if all(found.get((way, pattern), {}).keys() == seeds for way in NAMES if way != DENSE)
    ]
    return sorted(complete, key=lambda pattern: int(pattern.partition(":")[2]))


def held_out(way: Way, pattern: str, steps: str | None = None) -> dict[str, float]:
    """Seed -> held-out loss."""
    rows = runs(steps)[way, "dense" if way == DENSE else pattern]
    return {seed: float(row["held_out"]) for seed, row in rows.items()}


def difference(first: dict[str, float], second: dict[str, float]) -> Difference:
    """``first - second`` over the seeds that both have; at least two."""
    values = [first[seed] - second[seed] for seed in first if seed in second]
    half = student.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return Difference(fmean(values), float(half))


def spread(values: Iterable[float], digits: int = 3) -> str:
    values = list(values)
    return f"{fmean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def cell(found: Difference) -> str:
    text = f"{found.mean:+.3f} ± {found.half:.3f}"
    return f"**{text}**" if found.clear else text


def first_row() -> Row:
    return next(row for row in results(FILE) if row["part"] == "comparison")


# The README shows these.
CHIEF = (DENSE, FIXED, EVERY_40, SR_STE, GRADIENT_DECAY)


def losses(ways: Iterable[Way] = tuple(NAMES)) -> str:
    """Mean over the seeds and standard deviation."""
    sizes = patterns()
    dense = spread(held_out(DENSE, "").values())
    lines = [
        [NAMES[way], *(spread(held_out(way, size).values()) for size in sizes)]
        for way in ways
        if way != DENSE
    ]
    return markdown(
        ["nats a byte", *sizes], [["dense", *[dense] * len(sizes)], *lines], "l" + "r" * len(sizes)
    ) + source(FILE, first_row())


def pairs() -> str:
    """Paired differences of the loss with their 95 % intervals; bold where those leave 0 out."""
    sizes = patterns()
    lines = [
        [
            NAMES[a],
            NAMES[b],
            *(cell(difference(held_out(a, size), held_out(b, size))) for size in sizes),
        ]
        for a, b in PAIRS
    ]
    return markdown(["nats a byte", "against", *sizes], lines, "ll" + "r" * len(sizes))


def across() -> str:
    """The same between patterns."""
    steps = list(itertools.combinations(patterns(), 2))
    lines = [
        [NAMES[way], *(cell(difference(held_out(way, a), held_out(way, b))) for a, b in steps)]
        for way in NAMES
        if way != DENSE
    ]
    heads = [f"{a} against {b}" for a, b in steps]
    return markdown(["nats a byte", *heads], lines, "l" + "r" * len(heads))


def frozen() -> str:
    """What the refreshes of the last quarter cost: the same runs, whose masks are frozen there."""
    pattern = "2:4"
    lines = []
    for way, end in FROZEN.items():
        plain, held, fixed = (held_out(key, pattern) for key in (way, end, FIXED))
        lines.append(
            [
                pattern,
                NAMES[way],
                spread(plain.values()),
                spread(held.values()),
                cell(difference(held, plain)),
                cell(difference(held, fixed)),
            ]
        )
    head = [
        "pattern",
        "nats a byte",
        "to the end",
        "frozen",
        "frozen, against to the end",
        "against fixed mask",
    ]
    return markdown(head, lines, "llrrrr")


def flips() -> str:
    """How far masks move: in each half, summed over its tenths; from first to last; and what they keep."""
    lines = []
    found = runs()
    for pattern, way in ((size, way) for size in patterns() for way in NAMES if way not in (DENSE, FIXED)):
        rows = found[way, pattern]
        tenths = [[float(value) for value in row["moved"].split()] for row in rows.values()]
        halves = [fmean(sum(moved[half]) for moved in tenths) for half in (slice(5), slice(5, 10))]
        lines.append(
            [
                pattern,
                NAMES[way],
                *(percent(half, 1) for half in halves),
                percent(fmean(float(row["moved_in_all"]) for row in rows.values()), 1),
                percent(fmean(float(row["kept"]) for row in rows.values()), 1),
            ]
        )
    head = ["pattern", "masks", "changes, 1st half", "2nd half", "first to last", "kept share"]
    return markdown(head, lines, "llrrrr")


def pilot() -> str:
    """The runs that chose the learning rate and the decays."""
    rows = [row for row in results(FILE) if row["part"] == "pilot"]
    best = {
        method: min((row for row in rows if row["method"] == method), key=lambda row: float(row["held_out"]))
        for method in dict.fromkeys(row["method"] for row in rows)
    }

    def value(row: Row) -> str:
        text = f"{float(row['rate' if row['method'] == 'dense' else 'decay']):g}"
        return f"**{text}**" if row is best[row["method"]] else text

    lines = [
        [
            {"dense": "learning rate, dense", "sr-ste": "decay, SR-STE, 2:4"}.get(
                method, "decay of gradients, 2:4"
            ),
            ", ".join(
                f"{value(row)}: {float(row['held_out']):.3f}" for row in rows if row["method"] == method
            ),
        ]
        for method in best
    ]
    return markdown(["chosen", "value: held-out loss"], lines, "ll")


def refresh() -> str:
    """Milliseconds of the processor: a step and what masks cost beside it."""
    return listing(
        REFRESH,
        results(REFRESH),
        [
            left("blocks x width", "model"),
            left("pattern"),
            right("masked weights", lambda row: f"{int(row['weights']) / 1e6:.2f} M"),
            right("tokens a step", lambda row: f"{int(row['tokens']):,}"),
            right("dense step, ms", number("dense_step_ms")),
            right("step, ms", number("step_ms")),
            right("ordinary masks, ms", number("ordinary_ms")),
            right("transposable, ms", number("transposable_ms")),
            right("transposable / ordinary", number("over_ordinary")),
            right("refresh, ms", number("refresh_ms")),
            right("of a step", share("of_a_step", 1)),
        ],
    )


TABLES: dict[str, Callable[[], str]] = {
    "training": losses,
    "training-chief": lambda: losses(CHIEF),
    "training-pairs": pairs,
    "training-across": across,
    "training-frozen": frozen,
    "training-flips": flips,
    "training-pilot": pilot,
    "training-refresh": refresh,
}
