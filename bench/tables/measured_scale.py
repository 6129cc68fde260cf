"""The tables of docs/scale.md of what was measured on this machine: time, memory, and experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median

from tables.columns import (
    Row,
    fixed,
    left,
    listing,
    markdown,
    percent,
    results,
    right,
    significant,
    source,
    whole,
)

MASK, MEMORY, EXPERTS = "mask_scale.csv", "offload_memory.csv", "experts_perplexity.csv"
ONE = "one process"


def masking() -> str:
    """`nmsolve mask` on a checkpoint of gigabytes: medians of the runs, and of the ratios in each round."""
    rows = results(MASK)
    rounds: dict[str, dict[str, Row]] = {}
    for row in rows:
        rounds.setdefault(row["round"], {})[row["contender"]] = row
    lines = []
    for contender in dict.fromkeys(row["contender"] for row in rows):
        own = [found[contender] for found in rounds.values()]
        before = own[0]["before"]
        times = [float(row["seconds"]) for row in own]
        spread = f"{significant(min(times), 3)} to {significant(max(times), 3)}"
        work = significant(_median(row["processor_seconds"] for row in own), 3)
        peak = significant(_median(row["peak_mb"] for row in own), 3)
        ratios = [_ratio(rounds, contender, key) for key in ("seconds", "processor_seconds")]
        name = f"{before}, one process" if before else contender
        lines.append([name, significant(median(times), 3), spread, ratios[0], work, ratios[1], peak])
    head = [
        "",
        "seconds",
        "of the runs",
        "over one process",
        "processor seconds",
        "over one process",
        "memory, MB",
    ]
    text = markdown(head, lines, "lrrrrrr")
    runs = f"{len(rounds)} rounds; {significant(float(rows[0]['gb']), 3)} GB"
    return f"{text}\n\n{runs}.{source(MASK, rows[-1])}"


def _median(values: Iterable[str]) -> float:
    return median(map(float, values))


def _ratio(rounds: dict[str, dict[str, Row]], contender: str, key: str) -> str:
    """The median of the ratios to one process of this checkout, each within a round."""
    return f"{median(float(found[contender][key]) / float(found[ONE][key]) for found in rounds.values()):.2f}"


def memory() -> str:
    """`nmsolve prune --offload`: the most that was resident."""
    rows = results(MEMORY)
    columns = [
        left("`--offload`", "offload"),
        right("model, MB", whole("model_mb")),
        right("weights at once, MB", whole("at_once_mb")),
        right("peak, MB", whole("peak_mb")),
        right("without a model, MB", whole("without_model_mb")),
        right("above that / model", _above),
    ]
    return listing(MEMORY, rows, columns)


def _above(row: Row) -> str:
    return f"{(float(row['peak_mb']) - float(row['without_model_mb'])) / float(row['model_mb']):.2f}"


def experts() -> str:
    """Perplexity of a small Mixtral with its experts pruned, and with attention alone."""
    rows = results(EXPERTS)
    cases: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row["pattern"], row["transposable"], row["method"]), {})[row["experts"]] = row
    lines = []
    for (pattern, transposable, method), found in cases.items():
        pruned, dense = found["pruned"], found["dense"]
        kind = f"{pattern} transposable" if transposable == "1" else pattern
        shares = [percent(float(pruned[key]), 1) for key in ("expert_share", "share")]
        lines.append([kind, method, *shares, fixed("perplexity", 3)(dense), fixed("perplexity", 3)(pruned)])
    head = ["pattern", "method", "of the experts' weights", "of all", "experts dense", "experts pruned"]
    text = markdown(head, lines, "llrrrr")
    return f"{text}\n\nDense: {fixed('perplexity_dense', 3)(rows[0])}.{source(EXPERTS, rows[0])}"


TABLES: dict[str, Callable[[], str]] = {
    "mask-scale": masking,
    "offload-memory": memory,
    "experts-perplexity": experts,
}
