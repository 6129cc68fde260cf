"""The pictures of docs/benchmarks.md, docs/training.md and docs/scale.md, from the files in bench/results.

docs/benchmarks_peers.png: time against error. docs/benchmarks_growth.png: how exact's time grows.
docs/training.png: sparse training, its losses and its masks' flips. docs/scale.png: large models on paper.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import RESULTS, ROOT, read_csv
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tables import training as training_tables

from nmsolve.files import writing

Row = dict[str, str]

FLOOR = 1e-7  # errors below the resolution of the scores, float32, are drawn here
SIZE = "8192"

# Okabe and Ito's colours, apart for every kind of colour vision; the shape alone identifies a method.
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK, GREY = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#999999",
)  # fmt: skip
STYLES = {
    "nmsolve exact (cpu)": (RED, "*"),
    "nmsolve exact (torch)": (RED, "P"),
    "nmsolve assignment (cpu)": (RED, "3"),
    "nmsolve greedy (cpu)": (ORANGE, "v"),
    "nmsolve tsenor (cpu)": (PINK, "D"),
    "row-then-column": (ORANGE, "<"),
    "2-approximation": (ORANGE, "^"),
    "torch.sparse tile": (ORANGE, ">"),
    "best of 1000 random": (SKY, "X"),
    "all 90 patterns": (BLUE, "h"),
    "TSENOR": (PINK, "s"),
    "TSENOR without local search": (PINK, "o"),
    "min-cost flow (OR-tools)": (GREEN, "p"),
    "network simplex (networkx)": (GREEN, "d"),
    "linear program (HiGHS)": (BLUE, "|"),
    "PDLP (OR-tools)": (BLUE, "x"),
    "SciPy assignment": (BLACK, "1"),
    "torch-linear-assignment": (BLACK, "2"),
}
UNFILLED = ("|", "x", "1", "2", "3")
TRAINING_STYLES = {
    training_tables.DENSE: (BLACK, "_"),
    training_tables.FIXED: (ORANGE, "s"),
    training_tables.EVERY_STEP: (SKY, "o"),
    training_tables.EVERY_40: (BLUE, "o"),
    training_tables.EVERY_200: (GREEN, "o"),
    training_tables.SR_STE: (RED, "^"),
    training_tables.GRADIENT_DECAY: (PINK, "v"),
    training_tables.ORDINARY: (GREY, "x"),
}
PATTERN_STYLES = {"2:4": (SKY, "o"), "4:8": (BLUE, "s"), "8:16": (RED, "^"), "16:32": (BLACK, "D")}


def marker(axis: Axes, row: Row) -> None:
    """One method; hollow if it leaves lines short."""
    colour, shape = STYLES[row["peer"]]
    short = float(row["lines_short"]) > 0 and shape not in UNFILLED
    axis.plot(
        float(row["seconds"]),
        max(FLOOR, float(row["mean_relative_error"])),
        marker=shape,
        markersize=15 if shape == "*" else 9,
        color=colour,
        markerfacecolor="white" if short else colour,
        markeredgewidth=1.6,
        linestyle="none",
        clip_on=False,
        zorder=4 if shape == "*" else 3,
    )


def peers(rows: list[Row], file: Path) -> None:
    rows = [row for row in rows if row["size"] == SIZE]
    patterns = list(dict.fromkeys(f"{row['n']}:{row['m']}" for row in rows))
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    axes = list(figure.subplots(2, 3, sharex=True, sharey=True).flat)
    for axis, pattern in zip(axes, patterns, strict=False):
        here = [row for row in rows if f"{row['n']}:{row['m']}" == pattern]
        exact = next(row for row in here if row["peer"] == "nmsolve exact (cpu)")
        axis.set(xscale="log", yscale="log", title=pattern, ylim=(FLOOR, 1))
        axis.axvline(float(exact["seconds"]), color=RED, linewidth=0.8, linestyle=":")
        axis.grid(alpha=0.3)
        for row in here:
            marker(axis, row)
        axis.set_xlabel(f"seconds, {SIZE} x {SIZE} weights")
        axis.xaxis.set_tick_params(labelbottom=True)
    ticks = [FLOOR, *(10.0**k for k in range(-6, 1))]
    for axis in axes[len(patterns) :]:
        axis.axis("off")
    for axis in axes[::3]:
        axis.set_ylabel("mean loss against the optimum")
        axis.set_yticks(ticks, ["none", *(f"{100 * t:g} %" for t in ticks[1:])])
    handles = [
        Line2D([], [], color=c, marker=s, markersize=8, linestyle="none", label=name)
        for name, (c, s) in STYLES.items()
        if any(row["peer"] == name for row in rows)
    ]
    axes[-1].legend(
        handles=handles, loc="center", fontsize=8, frameon=False, title="hollow: leaves lines short"
    )
    save(figure, file)


def curves(axis: Axes, rows: list[Row], value: str = "ns_per_weight") -> None:
    """One line for each pattern."""
    for pattern in dict.fromkeys(f"{row['n']}:{row['m']}" for row in rows):
        here = [row for row in rows if f"{row['n']}:{row['m']}" == pattern]
        colour, shape = PATTERN_STYLES[pattern]
        axis.plot(
            [float(row["x"]) for row in here],
            [float(row[value]) for row in here],
            color=colour,
            marker=shape,
            markersize=5,
            label=pattern,
        )


def growth(rows: list[Row], file: Path) -> None:
    def sweep(name: str) -> list[Row]:
        return [row for row in rows if row["sweep"] == name]

    figure = Figure(figsize=(11, 6.4), layout="constrained")
    (size, blocks, counts), (ties, student, lognormal) = figure.subplots(2, 3)

    sizes = [{**row, "x": str(int(row["rows"]) * int(row["cols"]))} for row in sweep("weights")]
    curves(size, sizes, "seconds")
    size.set(xscale="log", yscale="log", xlabel="weights", ylabel="seconds", title="number of weights")

    for backend, (colour, shape) in {"cpu": (RED, "^"), "torch": (BLACK, "D")}.items():
        here = [row for row in sweep("m") if row["backend"] == backend]
        blocks.plot(
            [int(row["m"]) for row in here],
            [float(row["ns_per_weight"]) for row in here],
            color=colour,
            marker=shape,
            markersize=5,
            label=f"{backend} backend",
        )
    blocks.set(xscale="log", yscale="log", xlabel="M", ylabel="ns per weight", title="block size, N = M/2")
    blocks.set_xticks([4, 8, 16, 32, 64, 128], ["4", "8", "16", "32", "64", "128"], minor=False)
    blocks.set_xticks([], minor=True)

    for m, (colour, shape) in {"16": (RED, "^"), "32": (BLACK, "D")}.items():
        here = [row for row in sweep("n") if row["m"] == m]
        counts.plot(
            [int(row["n"]) / int(m) for row in here],
            [float(row["ns_per_weight"]) for row in here],
            color=colour,
            marker=shape,
            markersize=5,
            label=f"M = {m}",
        )
    counts.set(xlabel="N / M", ylabel="ns per weight", title="kept entries")

    curves(ties, sweep("ties"))
    ties.set(xscale="log", xlabel="different values among the scores", title="ties")
    curves(student, sweep("student_t"))
    student.set(xscale="log", xlabel="degrees of freedom", title="heavy tails: Student t")
    curves(lognormal, sweep("lognormal"))
    lognormal.set(xlabel="sigma", title="heavy tails: lognormal")

    harder = (ties, student, lognormal)
    highest = max(max(line.get_ydata()) for axis in harder for line in axis.lines)
    lowest = min(min(line.get_ydata()) for axis in harder for line in axis.lines)
    for axis in harder:
        axis.set(yscale="log", ylabel="ns per weight", ylim=(lowest / 1.5, highest * 1.5))
    counts.set_ylim(0, 1.4 * max(max(line.get_ydata()) for line in counts.lines))
    for axis in figure.axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False)
    save(figure, file)


def training(rows: list[Row], file: Path) -> None:
    """Losses along the runs and at their end, and how far masks move, as means over the seeds."""
    short = min(int(row["steps"]) for row in rows)
    rows = [row for row in rows if row["part"] == "comparison" and int(row["steps"]) == short]
    patterns = training_tables.patterns()
    ways = list(TRAINING_STYLES)

    def of(way: tuple[str, ...], pattern: str) -> list[Row]:
        found = [row for row in rows if (row["method"], row["mask"], row["refresh"]) == way]
        return [row for row in found if row["pattern"] in (pattern, "dense")]

    def mean(found: list[Row], column: str) -> list[float]:
        along = zip(*([float(v) for v in row[column].split()] for row in found), strict=True)
        return [sum(values) / len(values) for values in along]

    figure = Figure(figsize=(13, 4.4), layout="constrained")
    curve, ends, masks = figure.subplots(1, 3)
    for k, way in enumerate(ways):
        colour, shape = TRAINING_STYLES[way]
        label = training_tables.NAMES[way]
        steps = int(rows[0]["steps"])
        losses = mean(of(way, patterns[0]), "curve")
        every = steps // len(losses)
        late = len(losses) // 4
        along = [every * (i + 1) for i in range(late, len(losses))]
        curve.plot(along, losses[late:], color=colour, label=label, linewidth=1.3)
        for place, pattern in enumerate(patterns):
            here = [float(row["held_out"]) for row in of(way, pattern)]
            x = [place + 0.1 * (k - len(ways) / 2)] * len(here)
            ends.plot(x, here, shape, color=colour, markersize=4)
        moves = mean(of(way, patterns[0]), "moved")
        if any(moves):
            tenths = [(i + 1) * steps // 10 for i in range(len(moves))]
            masks.plot(tenths, [100 * share for share in moves], color=colour, label=label, linewidth=1.3)
    curve.set(xlabel="optimizer step", ylabel="nats a byte", title=f"held-out loss, {patterns[0]}")
    ends.set(ylabel="nats a byte", title="at the end, each seed")
    ends.set_xticks(range(len(patterns)), patterns)
    masks.set(xlabel="optimizer step", ylabel="%", title=f"mask entries changed in a tenth, {patterns[0]}")
    masks.set_ylim(bottom=0)
    for axis in figure.axes:
        axis.grid(alpha=0.3)
    handles, labels = curve.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    save(figure, file)


def scale(rows: list[Row], file: Path) -> None:
    """Dealing, masking and sums on paper, by the number of ranks."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    shares, times, sums = figure.subplots(1, 3)

    def line(axis: Axes, here: list[Row], column: str, look: tuple[str, str], label: str) -> None:
        x = [int(row["ranks"]) for row in here]
        y = [float(row[column]) for row in here]
        axis.plot(x, y, look[1], color=look[0], markersize=5, label=label)

    for model, colour in zip(dict.fromkeys(row["model"] for row in rows), (RED, BLUE), strict=True):
        of = {
            quantities: [row for row in rows if (row["model"], row["quantities"]) == (model, quantities)]
            for quantities in dict.fromkeys(row["quantities"] for row in rows)
        }
        mask, gpu = of["mask, CPU"], of["mask, H100"]
        line(shares, mask, "largest_over_mean", (colour, "o-"), f"{model}, bytes")
        line(shares, mask, "solved_largest_over_mean", (colour, "x:"), f"{model}, solved weights")
        line(times, mask, "solve_seconds", (colour, "^-"), f"{model}, solving, two cores a rank")
        line(times, mask, "write_seconds", (colour, "o--"), f"{model}, writing")
        line(times, gpu, "solve_seconds", (colour, "*:"), f"{model}, solving, H100 (predicted)")
        line(sums, of["prune, Hessians"], "block_sent_gb", (colour, "o-"), f"{model}, Hessians")
        line(sums, of["prune, diagonals"], "block_sent_gb", (colour, "x:"), f"{model}, diagonals")
    shares.set(title="mask: largest share over the mean", ylabel="largest / mean")
    times.set(title="mask: time of the slowest host", ylabel="seconds", yscale="log")
    times.set_ylim(top=100 * times.get_ylim()[1])  # room for the legend
    sums.set(title="prune: a rank sends for one block", ylabel="GB", yscale="log")
    ranks = sorted({int(row["ranks"]) for row in rows})
    for axis in figure.axes:
        axis.set(xscale="log", xlabel="ranks, 8 on a host")
        axis.set_xticks(ranks, [str(count) for count in ranks], minor=False)
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, frameon=False)
    save(figure, file)


def save(figure: Figure, file: Path) -> None:
    """Write the picture; the same results give the same bytes."""
    with writing(file) as picture:
        figure.savefig(picture, dpi=90, format="png", metadata={"Software": None})
    print(f"wrote {file.name} ({file.stat().st_size / 1000:.0f} kB)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the pictures")
    arguments = parser.parse_args()
    peers(read_csv(arguments.results / "peers.csv"), arguments.out / "benchmarks_peers.png")
    growth(read_csv(arguments.results / "scaling.csv"), arguments.out / "benchmarks_growth.png")
    training(read_csv(arguments.results / "training.csv"), arguments.out / "training.png")
    scale(read_csv(arguments.results / "scale.csv"), arguments.out / "scale.png")


if __name__ == "__main__":
    main()
