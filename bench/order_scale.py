"""How long searches for orders of channels take at real sizes, and what their windows cost.

Part "ordinary": a 4096 x 14336 matrix at 2:4; RIA's search in windows of several sizes, with as many passes
as about a minute buys, and without windows. Part "published": linears of SmolLM2-135M by magnitude; RIA's
published search (bench/peers/ria_channels.py) beside ours at as many passes, more passes, swaps and stripes.
Part "transposable": rows and columns of such a matrix. Part "forced": rows and columns of linears of
SmolLM2-135M, beside a search that solves a mask for every choice of a slot's rows
(bench/peers/forced_masks.py).

Large matrices are random: "normal" has columns of one size, which makes windows cost most, "wanda" heavy
tails (bench/common.py). Rows are appended to results/order_scale.csv; what is there already is not run
again. ``gain`` is what the order keeps beyond the natural one, as a share of all score, ``seconds`` processor
time of one thread with all that belongs to a call, ``window`` the columns of a window (0: all, -1: default).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from common import RESULTS, append_csv, read_csv, scores
from peers.forced_masks import forced_masks
from peers.ria_channels import ria_channels
from smollm2 import linears
from torch import Tensor

import nmsolve
from nmsolve.permute import (
    deal_columns,
    retained_score,
    ria_permutation,
    stripe_search,
    swap_search,
    transposable_permutation,
)

PARTS = ("published", "ordinary", "forced", "transposable")
KEY = ("part", "scope", "pattern", "method", "window", "passes", "rows", "cols")
SHAPE = (4096, 14336)
LAYERS = (
    "model.layers.15.mlp.down_proj",
    "model.layers.15.mlp.gate_proj",
    "model.layers.10.self_attn.q_proj",
)

# What a run measures: method, window and passes, and the function that finds the order.
Search = tuple[str, int, int, Callable[[], Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--patterns", nargs="+", metavar="N:M", default=["2:4", "4:8"])
    parser.add_argument("--scopes", nargs="+", choices=("normal", "wanda"), default=("normal", "wanda"))
    parser.add_argument("--layers", nargs="+", default=LAYERS)
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--passes", nargs="+", type=int, help="only searches of so many")
    parser.add_argument("--shape", nargs=2, type=int, default=SHAPE, metavar=("ROWS", "COLS"))
    parser.add_argument("--out", type=Path, default=RESULTS / "order_scale.csv")
    args = parser.parse_args()

    torch.set_num_threads(1)
    patterns = [nmsolve.NMPattern.parse(pattern) for pattern in args.patterns]
    for part in args.parts:
        for scope, matrix in matrices(part, args):
            for pattern in patterns:
                if part == "ordinary" and pattern.m > 4:
                    continue
                measure(args, part, scope, matrix, pattern)


def matrices(part: str, args: argparse.Namespace) -> Iterator[tuple[str, Tensor]]:
    """Name and scores of what a part orders."""
    if part in ("ordinary", "transposable"):
        for scope in args.scopes:
            yield scope, scores(scope, tuple(args.shape))
        return
    for name, weight in linears():
        layer = name.removesuffix(".weight")
        if layer in args.layers:
            yield layer, weight.abs()


def measure(
    args: argparse.Namespace, part: str, scope: str, matrix: Tensor, pattern: nmsolve.NMPattern
) -> None:
    done = {tuple(row[k] for k in KEY) for row in read_csv(args.out)} if args.out.exists() else set()
    searches = ordinary if part in ("ordinary", "published") else transposable
    kept = retained if part in ("ordinary", "published") else kept_transposable
    total = float(matrix.sum(dtype=torch.float64))
    before = None
    for method, window, passes, search in searches(part, matrix, pattern):
        key = (part, scope, str(pattern), method, *map(str, (window, passes, *matrix.shape)))
        wanted = method in (args.methods or [method]) and passes in (args.passes or [passes])
        if key in done or not wanted:
            continue
        if before is None:
            before = kept(matrix, pattern)
            compile_all(pattern)
        begun = time.process_time()
        ordered = search()
        seconds = time.process_time() - begun
        row: dict[str, object] = dict(zip(KEY, key, strict=True))
        row |= {"before": before / total, "gain": (kept(ordered, pattern) - before) / total}
        append_csv(args.out, {**row, "seconds": seconds}, "scipy")
        print(
            ", ".join(f"{name} {value}" for name, value in row.items()), f"seconds {seconds:.2f}", flush=True
        )


def compile_all(pattern: nmsolve.NMPattern) -> None:
    """Runs everything once on a matrix of a few groups."""
    small = scores("normal", (4 * pattern.m, 4 * pattern.m))
    searches = {"published": ordinary, "transposable": transposable}
    for part, of in searches.items():
        for *_, search in of(part, small, pattern):
            search()


def ordinary(part: str, matrix: Tensor, pattern: nmsolve.NMPattern) -> Iterator[Search]:
    n, m = pattern.n, pattern.m

    def ria(window: int | None, passes: int) -> Callable[[], Tensor]:
        return lambda: matrix[:, ria_permutation(matrix, n, m, window=window, passes=passes)]

    if part == "published":
        yield "published", 0, 1, lambda: matrix[:, ria_channels(matrix, n, m)]
        for passes in (1, 3, 10, 30):
            yield "ria", 0, passes, ria(None, passes)
        yield "swap", 0, 0, lambda: matrix[:, swap_search(matrix, n, m)]
        if m <= 4:
            yield "stripe", 0, 0, lambda: matrix[:, stripe_search(matrix, n, m)]
            yield "stripe, 100 escapes", 0, 0, lambda: matrix[:, stripe_search(matrix, n, m, escapes=100)]
        return
    yield "dealt", 0, 0, lambda: matrix[:, deal_columns(matrix, m)]
    for window in (512, 2048, 4096):
        yield "ria", window, 1, ria(window, 1)
    yield "ria", 4096, 7, ria(4096, 7)
    yield "ria", 0, 1, ria(matrix.shape[1], 1)


def transposable(part: str, matrix: Tensor, pattern: nmsolve.NMPattern) -> Iterator[Search]:
    n, m = pattern.n, pattern.m

    def ours(window: int | None, passes: int) -> Callable[[], Tensor]:
        def search() -> Tensor:
            found = transposable_permutation(matrix, n, m, window=window, passes=passes, tolerance=0.0)
            return matrix[found.rows][:, found.columns]

        return search

    if part == "forced":
        eighth = matrix.shape[1] // 8 // m * m
        for window, passes in ((0, 1), (0, 3), (0, 10), (eighth, 3), (eighth, 10)):
            yield "exchanges", window, passes, ours(window or None, passes)
        yield "forced", 0, 3, lambda: forced_masks(matrix, n, m, 3)
        return
    for passes in (1, 2):
        yield "exchanges", -1, passes, ours(None, passes)


def retained(matrix: Tensor, pattern: nmsolve.NMPattern) -> float:
    return float(retained_score(matrix, pattern))


def kept_transposable(matrix: Tensor, pattern: nmsolve.NMPattern) -> float:
    solution = nmsolve.transposable_mask(matrix, pattern, return_solution=True)
    return solution.total_objective


if __name__ == "__main__":
    main()
