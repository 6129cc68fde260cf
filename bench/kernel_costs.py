"""Cost table of the Triton kernels without a GPU: registers, spills, instructions by phase, lower bounds.

Compiles every shipped configuration (tests/offline.py), assigns the machine code to the loops of the source
(tests/regions.py) and multiplies with how often a program enters each, which Triton's interpreter counts on
random scores. Writes kernel_trips.csv (the counts), kernel_costs.csv and kernel_phases.csv to bench/results;
what is selected is only printed, or written to another folder. docs/kernel-costs.md explains the columns.

    python bench/kernel_costs.py                                        # everything; writes
    python bench/kernel_costs.py --kernels exact --targets sm_90 --dtypes float32 --count
    python bench/kernel_costs.py --kernels exact --sizes 16 --targets sm_90 --candidates
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from common import RESULTS, ROOT, read_csv, table, write_csv
from kernel_model import GPUS, occupancy, predict

sys.path.append(str(ROOT / "tests"))

import offline
import regions
import sass

SIDE = 8192
SIZES = (4, 8, 16, 32, 64)
SINKHORN_SIZES = (*SIZES, 128)
SINKHORN_ITERATIONS = 20
TSENOR = {"iterations": 300, "tau": 150.0}
TRIPS, COSTS, PHASES = (RESULTS / f"kernel_{name}.csv" for name in ("trips", "costs", "phases"))


class Kernel(NamedTuple):
    """A row of the table: what is compiled, for which sizes and with which options."""

    compiled: str
    sizes: tuple[int, ...]
    options: dict[str, Any]
    trips: str
    """The name its counts go by."""


KERNELS = {
    "exact, exhaustive": Kernel("exhaustive", (4,), {}, "exhaustive"),
    "exact": Kernel("exact", SIZES[1:], {}, "exact"),
    "exact, solution": Kernel("exact", SIZES, {"solution": True}, "exact"),
    "exact, edge": Kernel("exact", SIZES, {"edge": True}, "exact, edge"),
    "exact, edge, solution": Kernel("exact", SIZES, {"edge": True, "solution": True}, "exact, edge"),
    "exact, many matrices": Kernel("grouped", SIZES[1:], {}, "exact, many matrices"),
    "assignment": Kernel("exact", SIZES[1:], {}, "assignment"),
    "tsenor": Kernel("dykstra", SIZES, {}, "tsenor"),
    "greedy": Kernel("dykstra", SIZES, {"transport": False}, "greedy"),
    "nm": Kernel("nm", SIZES, {}, "nm"),
    "sinkhorn, forward": Kernel("sinkhorn_forward", SINKHORN_SIZES, {}, "sinkhorn"),
    "sinkhorn, training": Kernel("sinkhorn_forward", SINKHORN_SIZES, {"keep": True}, "sinkhorn"),
    "sinkhorn, backward": Kernel("sinkhorn_backward", SINKHORN_SIZES, {}, "sinkhorn, backward"),
    "permute_columns": Kernel("gather", (0,), {}, "permute_columns"),
    "rms_norm_permute": Kernel("gather", (0,), {"norm": True}, "rms_norm_permute"),
}

COMPARED = ("exact", "tsenor")
ENTRIES_OF_A_LANE = ((4, 4), (4, 8), (8, 4), (8, 8))
"""(rows_in, cols_in) of the tiles that the launch table's are compared with."""

NAMES = {
    "exact_kernel": "load, start, store",
    "exhaustive_kernel": "all",
    "grouped_kernel": "load, start, store",
    "region_of.while1": "region looked up",
    "dual_ascent.for1": "ascent sweep",
    "augment.while1": "augmentation",
    "augment.while1.if1": "ties in bulk",
    "augment.while1.while1": "search sweep",
    "augment.while1.while2": "path step",
    "store_blocks.if2.for1": "certificate, per row of a lane",
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


class Case(NamedTuple):
    """One configuration of one kernel."""

    kernel: str
    m: int
    dtype: str
    target: str
    shipped: bool
    tile: tuple[int, ...] | None

    def job(self) -> dict[str, Any]:
        row = KERNELS[self.kernel]
        options = row.options | ({"tile": self.tile} if self.tile else {})
        (job,) = offline.jobs_of(row.compiled, self.m, self.target, self.dtype, **options)
        return job


def cases(
    kernels: Iterable[str], sizes: Iterable[int] | None, dtypes: Iterable[str], targets: Iterable[str],
    candidates: bool,
) -> Iterator[Case]:  # fmt: skip
    """The shipped configurations, then those to compare with."""
    for kernel in kernels:
        for m in KERNELS[kernel].sizes:
            if sizes and m and m not in sizes:
                continue
            for target in targets:
                for dtype in dtypes:
                    if target.startswith("gfx") and dtype != "float32":
                        continue
                    yield Case(kernel, m, dtype, target, True, None)
                    for tile in candidate_tiles(m) if candidates and kernel in COMPARED else ():
                        if tile != shipped_tile(kernel, m):
                            yield Case(kernel, m, dtype, target, False, tile)


def shipped() -> list[Case]:
    """The configurations of the table: float32 for all kernels, bfloat16 for the chief ones."""
    chief = ("exact", "tsenor", "greedy", "nm", "sinkhorn, forward", "permute_columns", "rms_norm_permute")
    return [
        case
        for case in cases(KERNELS, None, ("float32", "bfloat16"), offline.TARGETS, False)
        if case.dtype == "float32" or case.kernel in chief
    ]


def candidate_tiles(m: int) -> list[tuple[int, int, int, int]]:
    """(rows_in, cols_in, blocks, warps) with all the blocks a warp holds, or all the warps of a block."""
    tiles = []
    for rows_in, cols_in in ENTRIES_OF_A_LANE:
        if max(rows_in, cols_in) <= m:
            lanes = (m // rows_in) * (m // cols_in)
            tiles.append((rows_in, cols_in, max(1, 32 // lanes), max(1, lanes // 32)))
    return tiles


def shipped_tile(kernel: str, m: int) -> tuple[int, ...]:
    """The launch table's entry for a row of the table that has one."""
    from nmsolve.kernels import _launch

    name = "exact_edge" if "edge" in kernel else "tsenor" if kernel == "tsenor" else KERNELS[kernel].compiled
    return tuple(_launch.tile(name, m)[1:])


# --- how often a program enters each region -----------------------------------------------------------------


def blocks_of(meta: Mapping[str, Any]) -> int:
    """Blocks (groups of the N:M kernel) of a program; a program of the gather counts as one."""
    return int(meta.get("BLOCKS", meta.get("GROUPS", 1)))


Trips = dict[tuple[str, int, int], dict[str, float]]
"""(name of the counts, m, blocks per program) -> region -> mean entries per program."""


def count(task: tuple[str, int, int | None, str, int]) -> list[dict[str, Any]]:
    """Run some programs in the interpreter: one row for every loop and branch of the sources."""
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)
    import interpreter

    interpreter.install()
    name, m, blocks, distribution, programs = task
    (compiled,) = {row.compiled for row in KERNELS.values() if row.trips == name}
    sources = offline.sources_of(compiled)
    with regions.counting(sources) as entered:
        blocks, ran = _run_programs(name, m, blocks, distribution, programs)
    return [
        {
            "trips": name, "m": m, "n": _n(name, m), "blocks": blocks, "distribution": distribution,
            "programs": ran, "region": region, "entries": entered[region] / ran,
        }
        for region in sources.regions
        if sources.chain(region) and sources.regions[region].parent
    ]  # fmt: skip


def _n(name: str, m: int) -> int:
    return 1 if name == "assignment" else m // 2


def _run_programs(name: str, m: int, blocks: int | None, distribution: str, programs: int) -> tuple[int, int]:
    """(blocks per program, programs that ran) of one launch."""
    import torch
    from common import scores
    from nmsolve.kernels import _launch

    from nmsolve import gpu, gpu_permute
    from nmsolve.pattern import NMPattern

    if name in ("permute_columns", "rms_norm_permute"):
        norm = name == "rms_norm_permute"
        per_row, per_col, _ = gpu_permute.NORM_TILE if norm else gpu_permute.GATHER_TILE
        x, permutation = (
            torch.randn(per_row, SIDE if norm else per_col),
            torch.randperm(SIDE if norm else per_col),
        )
        if norm:
            gpu_permute.rms_norm_permute(x, torch.ones(SIDE), permutation, 1e-6)
        else:
            gpu_permute.permute_columns(x, permutation)
        return 1, 1
    if name == "nm":
        _, blocks = _launch.group_tile(m, 32)
        gpu.ordinary(scores(distribution, (1, programs, m * blocks)), NMPattern(m // 2, m))
        return blocks, programs
    if name.startswith("sinkhorn"):
        blocks = gpu_permute.sinkhorn_tile(m, m).blocks
        logits = scores("signed", (blocks * programs, m, m))
        ones = torch.ones(blocks * programs, m)
        out = gpu_permute.sinkhorn_forward(logits, ones, ones, 0.1, SINKHORN_ITERATIONS, -1.0, True)
        if name == "sinkhorn, backward":
            gpu_permute.sinkhorn_backward(torch.randn_like(logits), logits, ones, *out[1:], 0.1)
        return blocks, programs
    if name == "exhaustive":
        blocks = gpu.exhaustive_arguments(NMPattern(2, 4))["BLOCKS"]
        gpu.exact(scores(distribution, (1, 4, 4 * blocks * programs)), NMPattern(2, 4))
        return blocks, programs
    table_name = {"exact, edge": "exact_edge", "tsenor": "tsenor", "greedy": "dykstra"}.get(name, "exact")
    shipped = _launch.tile(table_name, m)
    tile = shipped if blocks is None else shipped._replace(blocks=blocks)
    pattern = NMPattern(_n(name, m), m)
    original = _launch.tile
    _launch.tile = lambda kernel, size: tile
    try:
        rows = m - 1 if name == "exact, edge" else m
        x = scores(distribution, (1, rows, m * tile.blocks * programs))
        if name == "tsenor":
            gpu.tsenor(x, pattern, **TSENOR)
        elif name == "greedy":
            gpu.greedy(x, pattern)
        elif name == "exact, many matrices":
            gpu.exact_group(list(x.split(m * tile.blocks * 3, 2)), pattern, want_solution=True)
        else:
            gpu.exact(x, pattern, want_solution=True)
    finally:
        _launch.tile = original
    return tile.blocks, programs


FEW_PROGRAMS = {"exhaustive": 1, "nm": 1, "sinkhorn": 2, "sinkhorn, backward": 1}
BOTH_DISTRIBUTIONS = ("exact", "assignment", "tsenor", "greedy")


def count_all(
    wanted: Iterable[tuple[str, int, int | None]], programs: int, processes: int
) -> list[dict[str, Any]]:
    """Counts for (name, m, blocks per program or None as shipped), on every distribution."""
    tasks = []
    for name, m, blocks in dict.fromkeys(wanted):
        few = min(programs, FEW_PROGRAMS.get(name, programs))
        both = name in BOTH_DISTRIBUTIONS and blocks is None
        for distribution in ("normal", "student_t") if both else ("normal",):
            tasks.append((name, m, blocks, distribution, max(1, few // 2) if m == 64 else few))
    tasks.sort(key=lambda task: -task[1])
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        rows = [row for rows in pool.map(count, tasks) for row in rows]
    order = list(dict.fromkeys(row.trips for row in KERNELS.values()))
    return sorted(rows, key=lambda row: (order.index(row["trips"]), row["m"]))


def trips_of(rows: Iterable[Mapping[str, Any]], distribution: str = "normal") -> Trips:
    """Counts by configuration."""
    found: Trips = defaultdict(dict)
    for row in rows:
        if row["distribution"] == distribution:
            key = (str(row["trips"]), int(row["m"]), int(row["blocks"]))
            found[key][str(row["region"])] = float(row["entries"])
    return dict(found)


# --- the table ----------------------------------------------------------------------------------------------


def bytes_per_weight(case: Case, blocks: int) -> float:
    """Bytes that have to move for each weight: input read once, output written once."""
    item = 2 if case.dtype == "bfloat16" else 4
    if case.kernel in ("permute_columns", "rms_norm_permute"):
        return 2 * item
    if case.kernel.startswith("sinkhorn"):
        scalings = 2 * SINKHORN_ITERATIONS * 4 / case.m
        marginals = 2 * 4 / case.m
        return {
            "sinkhorn, forward": item + 4 + marginals,
            "sinkhorn, training": item + 4 + marginals + scalings,
            "sinkhorn, backward": 4 + 2 * item + marginals / 2 + scalings,
        }[case.kernel]
    certificate = 2 * 4 / case.m + 2 * 8 / case.m**2 if case.kernel.endswith("solution") else 0.0
    return item + 1 + certificate


def weights_per_program(case: Case, meta: Mapping[str, Any]) -> float:
    if "ROWS" in meta:
        return meta["ROWS"] * (SIDE if meta["NORM"] else meta["COLS"])
    if "GROUPS" in meta:
        return meta["GROUPS"] * case.m
    return blocks_of(meta) * case.m**2


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
        "n": _n(KERNELS[case.kernel].trips, case.m) if case.m else "",
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
    moved = bytes_per_weight(case, blocks)
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
