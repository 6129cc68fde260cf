"""Time per block on the CPU, next to what else there is, side by side in one run.

Writes bench/results/speed_cpu.csv. All contenders of a pattern are timed in turn, round by round, after one
round of warm-up. Methods that take long run on a part of the blocks; every row says how many. OR-tools runs
on one core, as it always does; everything else on as many threads as --threads says.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from common import PATTERNS, RESULTS, Seconds, cores, interleaved, scores, table, write_csv
from peers.min_cost_flow import MinCostFlow, integer_costs
from peers.tsenor import tsenor
from peers.two_approximation import two_approximation
from torch import Tensor

import nmsolve

FLOWS_TOGETHER = 16  # blocks side by side in one graph, for the row that leaves out Python's part

# What the project set out to reach: (pattern, contender) -> least ratio of its time to exact's.
FLOORS = {
    ("4:8", "min-cost flow"): 60.0,
    ("8:16", "min-cost flow"): 60.0,
    ("16:32", "min-cost flow"): 30.0,
    **{(f"{n}:{m}", "tsenor, published (PyTorch)"): 50.0 for n, m in PATTERNS[1:]},
    **{(f"{n}:{m}", "greedy, published (PyTorch)"): 1.0 for n, m in PATTERNS},
}
EXACT = "exact, cpu"
STUDENT_LIMIT = 3.0


def split(matrix: Tensor, m: int, blocks: int) -> Tensor:
    """The first ``blocks`` blocks of a matrix, ``(blocks, m, m)``."""
    return (
        matrix.unflatten(1, (-1, m)).unflatten(0, (-1, m)).transpose(1, 2).flatten(0, 1)[:blocks].contiguous()
    )


def flow(blocks: Tensor, n: int, together: int) -> Callable[[], object]:
    """OR-tools on integer costs made beforehand."""
    costs = integer_costs(blocks.double().numpy())
    solver = MinCostFlow(n, blocks.shape[1], together)
    return lambda: [solver.solve(costs[k : k + together]) for k in range(0, len(costs), together)]


def contenders(matrix: Tensor, n: int, m: int) -> dict[str, tuple[int, Callable[[], object]]]:
    """Name -> (blocks, call)."""
    everything = matrix.numel() // m**2
    some = min(everything, 65536 * 16 // m**2)
    few = min(everything, max(256, 4096 * 16 // m**2))
    part = matrix[: max(m, matrix.shape[0] // 16 // m * m)]
    published, sample = split(matrix, m, some), split(matrix, m, few)

    def mask(on: Tensor, method: str, backend: str) -> tuple[int, Callable[[], object]]:
        return on.numel() // m**2, lambda: nmsolve.transposable_mask(on, n, m, method=method, backend=backend)

    return {
        EXACT: mask(matrix, "exact", "cpu"),
        "exact with certificate, cpu": (
            everything,
            lambda: nmsolve.transposable_mask(matrix, n, m, backend="cpu", return_solution=True),
        ),
        "greedy, cpu": mask(matrix, "greedy", "cpu"),
        "tsenor, cpu": mask(part, "tsenor", "cpu"),
        "exact, torch": mask(part, "exact", "torch"),
        "greedy, torch": mask(part, "greedy", "torch"),
        "tsenor, torch": mask(split(matrix, m, few), "tsenor", "torch"),
        "ordinary N:M, cpu": (everything, lambda: nmsolve.nm_mask(matrix, n, m, backend="cpu")),
        "greedy, published (PyTorch)": (some, lambda: two_approximation(published, n)),
        "tsenor, published (PyTorch)": (few, lambda: tsenor(sample, n)),
        "min-cost flow": (few, flow(sample, n, 1)),
        f"min-cost flow, {FLOWS_TOGETHER} blocks a graph": (few, flow(sample, n, FLOWS_TOGETHER)),
    }


def row(
    n: int, m: int, distribution: str, matrix: Tensor, name: str, blocks: int, took: Seconds, exact: float
) -> dict:
    per_block = took.median / blocks
    return {
        "pattern": f"{n}:{m}",
        "distribution": distribution,
        "dtype": str(matrix.dtype).removeprefix("torch."),
        "side": matrix.shape[0],
        "contender": name,
        "threads": 1 if name.startswith("min-cost flow") else torch.get_num_threads(),
        "blocks": blocks,
        "repeats": took.repeats,
        "us_per_block": per_block * 1e6,
        "us_least": took.least / blocks * 1e6,
        "us_most": took.most / blocks * 1e6,
        "seconds": took.median,
        "times_exact": per_block / exact,
    }


def measure(
    n: int, m: int, distribution: str, matrix: Tensor, repeats: int, only: tuple[str, ...] = ()
) -> list[dict]:
    runs = {name: run for name, run in contenders(matrix, n, m).items() if not only or name in only}
    times = interleaved({name: call for name, (_, call) in runs.items()}, repeats)
    exact = times[EXACT].median / runs[EXACT][0]
    rows = [row(n, m, distribution, matrix, name, runs[name][0], took, exact) for name, took in times.items()]
    for line in rows:
        print(
            "{pattern} {distribution} {dtype} {side}: {contender}: {us_per_block:.3g} us a block "
            "({us_least:.3g} to {us_most:.3g}), {times_exact:.3g} x exact".format(**line),
            flush=True,
        )
    return rows


def claims(rows: list[dict]) -> list[dict]:
    """The floors, what was reached, and whether that is enough."""
    lines = []

    def claim(what: str, reached: float, wanted: str, holds: bool) -> None:
        lines.append({"claim": what, "reached": reached, "wanted": wanted, "holds": "yes" if holds else "NO"})

    found = {(r["pattern"], r["contender"]): r for r in rows if r["distribution"] == "normal"}
    for (pattern, name), least in FLOORS.items():
        ratio = found[pattern, name]["times_exact"]
        claim(f"{pattern}: time of {name} / exact", ratio, f"at least {least:g}", ratio >= least)
    for n, m in PATTERNS:
        here = {r["distribution"]: r for r in rows if r["pattern"] == f"{n}:{m}" and r["contender"] == EXACT}
        ratio = here["student_t"]["us_per_block"] / found[f"{n}:{m}", EXACT]["us_per_block"]
        wanted = f"at most {STUDENT_LIMIT:g}"
        claim(f"{n}:{m}: time of exact, Student t / normal", ratio, wanted, ratio <= STUDENT_LIMIT)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--side", type=int, default=4096, help="rows and columns of the score matrix (4096)")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (5)")
    parser.add_argument("--threads", type=int, default=cores(), help="threads (every core)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    side, repeats = arguments.side, arguments.repeats

    rows = []
    for n, m in PATTERNS:
        rows += measure(n, m, "normal", scores("normal", (side, side)), repeats)
    ours = (EXACT, "greedy, cpu")
    for distribution in ("student_t", "wanda"):
        matrix = scores(distribution, (side, side))
        for n, m in PATTERNS:
            rows += measure(n, m, distribution, matrix, repeats, ours)
    matrix = scores("normal", (side, side)).bfloat16()
    for n, m in PATTERNS:
        rows += measure(n, m, "bfloat16", matrix, repeats, ours)
    matrix = scores("normal", (2 * side, 2 * side))
    rows += measure(8, 16, "normal, large", matrix, repeats, ours)

    reached = claims(rows)
    lines = [[f"{v:.3g}" if isinstance(v, float) else v for v in line.values()] for line in reached]
    print(table([list(reached[0]), *lines], "lrrl"))
    if side == parser.get_default("side"):
        write_csv(RESULTS / "speed_cpu_claims.csv", reached, "ortools")
        write_csv(RESULTS / "speed_cpu.csv", rows, "ortools")
    return 0


if __name__ == "__main__":
    sys.exit(main())
