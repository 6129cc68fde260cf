"""Cost table of the Triton kernels without a GPU: registers, spills, instructions by phase, lower bounds.

Compiles every shipped configuration (kernel_cases.py), assigns the machine code to the loops of the source
(bench/regions.py) and multiplies with how often a program enters each, which Triton's interpreter counts on
random scores (kernel_trips.py). Writes kernel_trips.csv (the counts), kernel_costs.csv and kernel_phases.csv
to bench/results; what is selected is only printed, or written to another folder.
docs/internals/kernel-costs.md explains the columns.

    python bench/kernel_costs.py                                        # everything; writes
    python bench/kernel_costs.py --kernels exact --targets sm_90 --dtypes float32 --count
    python bench/kernel_costs.py --kernels exact --sizes 16 --targets sm_90 --candidates
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import offline
import regions
import sass
from common import RESULTS, read_csv, table, write_csv
from kernel_cases import (
    COMPARED,
    KERNELS,
    SIDE,
    Case,
    blocks_of,
    bytes_per_weight,
    cases,
    n_of,
    shipped,
    weights_per_program,
)
from kernel_model import GPUS, occupancy, predict
from kernel_trips import Trips, count_all, trips_of

TRIPS, COSTS, PHASES = (RESULTS / f"kernel_{name}.csv" for name in ("trips", "costs", "phases"))

NAMES = {
    "exact_kernel": "load, start, store",
    "exhaustive_kernel": "all",
    "grouped_kernel": "load, start, store",
    "grouped_exhaustive_kernel": "load, solve, store",
    "region_of.while1": "region looked up",
    "dual_ascent.for1": "ascent sweep",
    "augment.while1": "augmentation",
    "augment.while1.if1": "ties in bulk",
    "augment.while1.while1": "search sweep",
    "augment.while1.while2": "path step",
    "store_blocks.if1.for1": "certificate, per row of a lane",
    "dykstra_kernel": "load, start, store",
    "dykstra.for1": "refresh",
    "dykstra.for1.for1": "dykstra iteration",
    "take_greedily.while1": "greedy round",
    "complete.while1": "completion step",
    "nm_kernel": "load, store",
    "nm_kernel.for1": "bit of the threshold",
    "sinkhorn_forward_kernel": "load, store",
    "sinkhorn_forward_kernel.while1": "iteration",
    "sinkhorn_forward_kernel.while1.if2": "iteration in the log domain",
    "sinkhorn_forward_kernel.while1.if3": "scalings kept",
    "sinkhorn_backward_kernel": "load, store",
    "sinkhorn_backward_kernel.for1": "iteration",
    "permute_columns_kernel": "all",
    "permute_columns_kernel.for1": "columns",
    "inverse_rms.for1": "sum of squares",
}
"""What the regions of the sources are called in the table; others go by their path."""


class Cost(NamedTuple):
    """A row of the table, and its phases."""

    row: dict[str, Any]
    phases: list[dict[str, Any]]


def cost(case: Case, result: Mapping[str, Any], trips: Trips) -> Cost:
    """The costs of a compiled configuration. Raises ValueError where its loops have not been counted."""
    meta = result["meta"]
    blocks, warps = blocks_of(meta), meta["num_warps"]
    row: dict[str, Any] = {
        "kernel": case.kernel, "m": case.m or "",
        "n": n_of(KERNELS[case.kernel].trips, case.m) if case.m else "",
        "dtype": case.dtype, "target": case.target, "shipped": int(case.shipped),
        "rows_in": meta.get("ROWS_IN", ""), "cols_in": meta.get("COLS_IN", ""),
        "blocks": blocks, "warps": warps, "registers": result["registers"], "spills": result["spills"],
        "spill_bytes": result["stack"] if result["spills"] else 0, "shared_bytes": result["shared"],
    }  # fmt: skip
    empty = dict.fromkeys(
        ("occupancy", "instructions_per_block", "instructions_per_weight", "bytes_per_weight",
         "predicted_ms_8192", "floor_ms_8192", "bound", *sass.KINDS), "",
    )  # fmt: skip
    if case.target.startswith("gfx"):
        return Cost(row | empty, [])
    gpu = GPUS[case.target]
    if isinstance(result["phases"], str):
        raise ValueError(f"{case}: {result['phases']}")
    entered = entries(case, blocks, trips)
    missing = set(result["phases"]) - set(entered)
    if missing:
        raise ValueError(f"{case}: {sorted(missing)} not counted: run bench/kernel_costs.py")
    sources = offline.sources_of(KERNELS[case.kernel].compiled)
    pipes: dict[str, float] = defaultdict(float)
    kinds: dict[str, float] = defaultdict(float)
    phases: dict[str, dict[str, Any]] = {}
    for region, counts in result["phases"].items():
        times = entered[region]
        for name, number in counts["pipes"].items():
            pipes[name] += number * times * warps
        for name, number in counts["kinds"].items():
            kinds[name] += number * times * warps / blocks
        name = phase_of(region, entered, sources)
        phase = phases.setdefault(name, {"entries": entered[name], **dict.fromkeys(sass.KINDS, 0)})
        for kind, number in counts["kinds"].items():
            phase[kind] += number
    weights = weights_per_program(case, meta)
    moved = bytes_per_weight(case)
    prediction = predict(gpu, pipes, SIDE**2 / weights, moved * SIDE**2)
    row |= {
        "occupancy": occupancy(gpu, result["registers"], warps, result["shared"]),
        "instructions_per_block": sum(kinds.values()),
        "instructions_per_weight": sum(kinds.values()) * blocks / weights,
        "bytes_per_weight": moved,
        "predicted_ms_8192": prediction.seconds * 1e3,
        "floor_ms_8192": prediction.floor * 1e3,
        "bound": prediction.bound,
    }
    row |= {kind: kinds[kind] for kind in sass.KINDS}
    names = ("kernel", "m", "dtype", "target", "shipped", "rows_in", "cols_in", "blocks", "warps")
    total = sum(kinds.values())
    lines = []
    for region, phase in phases.items():
        instructions = sum(phase[kind] for kind in sass.KINDS)
        per_block = instructions * phase["entries"] * warps / blocks
        lines.append(
            {name: row[name] for name in names}
            | {
                "phase": NAMES.get(region, region), "region": region, "entries_per_program": phase["entries"],
                "instructions_per_entry": instructions, "instructions_per_block": per_block,
                "share": per_block / total,
            }
            | {kind: phase[kind] for kind in sass.KINDS}
        )  # fmt: skip
    return Cost(row, sorted(lines, key=lambda line: -line["share"]))


def entries(case: Case, blocks: int, trips: Trips) -> dict[str, float]:
    """Mean entries of each region by a program of the case."""
    key = (KERNELS[case.kernel].trips, case.m, blocks)
    if key not in trips:
        raise ValueError(f"{case}: programs of {blocks} blocks not counted: run bench/kernel_costs.py")
    counted = dict(trips[key])
    sources = offline.sources_of(KERNELS[case.kernel].compiled)
    for region in sources.regions:
        chain = sources.chain(region)
        if chain and not sources.regions[region].parent:  # a function: as often as where it is called
            counted[region] = next((counted[name] for name in chain if name in counted), 1.0)
    return counted


def phase_of(region: str, entered: Mapping[str, float], sources: regions.Sources) -> str:
    """The loop, or branch entered less often than what is around it, that a region belongs to."""
    chain = sources.chain(region) or (region,)
    for here, around in zip(chain, [*chain[1:], None], strict=True):
        if around is None or sources.regions[here].loop or entered[here] < entered[around]:
            return here
    raise AssertionError


def compile_cases(chosen: list[Case], processes: int) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Every case with its result; what is the same is compiled once."""
    jobs = {repr(case.job()): case.job() for case in chosen}
    users: dict[str, list[Case]] = defaultdict(list)
    for case in chosen:
        users[repr(case.job())].append(case)
    for key, result in zip(jobs, offline.compile_all(jobs.values(), processes=processes), strict=True):
        yield from ((case, result) for case in users[key])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, metavar="KERNEL", help=", ".join(KERNELS))
    parser.add_argument("--sizes", nargs="+", type=int, metavar="M")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), metavar="DTYPE")
    parser.add_argument("--targets", nargs="+", choices=offline.TARGETS, metavar="TARGET")
    parser.add_argument("--candidates", action="store_true", help="other tiles too (they are always counted)")
    parser.add_argument("--count", action="store_true", help="count anew, not only from kernel_trips.csv")
    parser.add_argument("--phases", action="store_true", help="print the phases as well")
    parser.add_argument("--distribution", default="normal", choices=("normal", "student_t"))
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write what was selected there")
    parser.add_argument("--programs", type=int, default=16, help="to count, of each tile (16)")
    parser.add_argument("--processes", type=int, default=2, help="that compile and count side by side (2)")
    arguments = parser.parse_args()
    selection = (arguments.kernels, arguments.sizes, arguments.dtypes, arguments.targets)
    whole = not (any(selection) or arguments.candidates or arguments.count or arguments.out)
    if whole:
        compared = cases(COMPARED, None, ("float32",), ("sm_90",), True)
        chosen = shipped() + [case for case in compared if not case.shipped]
    else:
        dtypes = arguments.dtypes or ("float32", "bfloat16")
        targets = arguments.targets or offline.TARGETS
        kernels = arguments.kernels or KERNELS
        chosen = [*cases(kernels, arguments.sizes, dtypes, targets, arguments.candidates)]

    counted: list[Mapping[str, Any]] = []
    if arguments.count or whole or arguments.candidates:
        counted = [
            *count_all(
                (
                    (KERNELS[case.kernel].trips, case.m, case.tile[2] if case.tile else None)
                    for case in chosen
                ),
                arguments.programs,
                arguments.processes,
            )
        ]
    folder = RESULTS if whole else arguments.out
    if folder and counted:
        write_csv(folder / TRIPS.name, counted, "triton")
    if not (arguments.count or whole):
        counted = [*read_csv(TRIPS), *counted]
    trips = trips_of(counted, arguments.distribution)

    costs: dict[Case, Cost] = {}
    faults = 0
    for case, result in compile_cases(chosen, arguments.processes):
        try:
            if "error" in result:
                raise ValueError(f"{case}: {result['error']}")
            done = cost(case, result, trips)
        except ValueError as error:
            print(error, file=sys.stderr)
            faults += case.shipped
            continue
        costs[case] = done
        print(line(done.row), flush=True)
        if arguments.phases and done.phases:
            show = [["phase", "entries", "instructions", "share", *sass.KINDS]]
            show += [
                [p["phase"], f"{p['entries_per_program']:.2f}", str(p["instructions_per_entry"]),
                 f"{p['share']:.1%}", *(str(p[kind]) for kind in sass.KINDS)] for p in done.phases
            ]  # fmt: skip
            print(table(show, "lrrr" + "r" * len(sass.KINDS)))
    if folder and not faults:
        in_order = [costs[case] for case in chosen if case in costs]
        write_csv(folder / COSTS.name, [done.row for done in in_order], "triton")
        write_csv(folder / PHASES.name, [phase for done in in_order for phase in done.phases], "triton")
    return 1 if faults else 0


def line(row: Mapping[str, Any]) -> str:
    """One configuration on one line."""
    tile = f"{row['rows_in']}x{row['cols_in']} {row['blocks']} blocks {row['warps']} warps"
    head = f"{row['kernel']:<22} {row['m']:>3} {row['dtype']:<8} {row['target']:<7} {tile:<24}"
    head += f" {row['registers']:>3} registers {row['spills']} spills {row['shared_bytes']:>5} B shared"
    if row["predicted_ms_8192"] == "":
        return head
    return head + (
        f" {row['occupancy']:6.1%} {row['instructions_per_block']:9.1f} instructions/block"
        f" {row['predicted_ms_8192']:7.3f} ms ({row['bound']}), floor {row['floor_ms_8192']:.3f} ms"
    )


if __name__ == "__main__":
    sys.exit(main())
