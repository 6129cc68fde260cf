"""What a compiled configuration costs: its rows of kernel_costs.csv and kernel_phases.csv."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from common import RESULTS

from kernel_costs import offline, sass, source_regions
from kernel_costs.cases import KERNELS, SIDE, Case, blocks_of, bytes_per_weight, n_of, weights_per_program
from kernel_costs.model import GPUS, occupancy, predict
from kernel_costs.trips import Trips

TRIPS, COSTS, PHASES = (RESULTS / f"kernel_{name}.csv" for name in ("trips", "costs", "phases"))

CONFIGURATION = ("kernel", "m", "dtype", "target", "shipped", "rows_in", "cols_in", "blocks", "warps")
"""The columns that tell configurations apart, in both files."""

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
    "reached_by_few.for1": "threshold step",
    "take_greedily.while1": "greedy round",
    "take_greedily.while1.else1.if1": "greedy round, ties",
    "complete.while1": "completion step",
    "nm_kernel": "load, store",
    "nm_kernel.for1": "bit of the threshold",
    "nm_groups_kernel": "all",
    "sinkhorn_forward_kernel": "load, store",
    "sinkhorn_forward_kernel.while1": "iteration with a look",
    "sinkhorn_forward_kernel.while1.if1": "iteration with a look, linear",
    "sinkhorn_forward_kernel.while1.if2": "iteration in the log domain",
    "sinkhorn_forward_kernel.while1.if3": "scalings kept",
    "sinkhorn_forward_kernel.while1.while1": "quiet iteration",
    "sinkhorn_forward_kernel.while1.while1.if2": "quiet iteration, scalings kept",
    "sinkhorn_backward_kernel": "start",
    "sinkhorn_backward_kernel.while1": "span",
    "sinkhorn_backward_kernel.while1.if1": "start of a span",
    "sinkhorn_backward_kernel.while1.if1.if2": "gradient of the plan",
    "sinkhorn_backward_kernel.while1.while1": "iteration",
    "sinkhorn_backward_kernel.while1.if2": "end of a span",
    "nth_largest_kernel": "all",
    "sum_largest_kernel": "all",
    "sum_largest_kernel.for1": "subset",
    "sum_largest_kernel.for1.for1": "rows",
    "sum_maxima_kernel": "start, store",
    "sum_maxima_kernel.for1": "span of rows",
    "sum_maxima_kernel.for1.for1": "word of rows",
    "add_parts_kernel": "all",
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
        raise ValueError(f"{case}: {sorted(missing)} not counted: run python bench kernel_costs")
    sources = offline.sources_of(KERNELS[case.kernel].compiled)
    for region, counts in result["phases"].items():
        if counts["peeled"]:  # which takes a turn off each time, but none off a loop that made none
            entered[region] = max(0.0, entered[region] - entered[around(region, sources)])
    for region, counts in result["phases"].items():
        entered[region] /= counts["turns"]
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
    total = sum(kinds.values())
    lines = []
    for region, phase in phases.items():
        instructions = sum(phase[kind] for kind in sass.KINDS)
        per_block = instructions * phase["entries"] * warps / blocks
        lines.append(
            {name: row[name] for name in CONFIGURATION}
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
    sources = offline.sources_of(KERNELS[case.kernel].compiled)
    if not KERNELS[case.kernel].trips:
        return dict.fromkeys(sources.regions, 1.0)  # the machine code holds a copy for each time
    key = (KERNELS[case.kernel].trips, case.m, blocks)
    if key not in trips:
        raise ValueError(f"{case}: programs of {blocks} blocks not counted: run python bench kernel_costs")
    counted = dict(trips[key])
    if case.kernel == "nm" and case.dtype == "bfloat16":  # counted on float32, whose bits are twice as many
        counted["nm_kernel.for1"] /= 2
    for region in sources.regions:
        chain = sources.chain(region)
        if chain and not sources.regions[region].parent:  # a function: as often as where it is called
            counted[region] = next((counted[name] for name in chain if name in counted), 1.0)
    return counted


def around(region: str, sources: source_regions.Sources) -> str:
    """The region that a loop or branch lies in."""
    chain = sources.chain(region)
    assert chain is not None
    return chain[1]


def phase_of(region: str, entered: Mapping[str, float], sources: source_regions.Sources) -> str:
    """The loop, or branch entered less often than what is around it, that a region belongs to."""
    chain = sources.chain(region) or (region,)
    for here, outer in zip(chain, [*chain[1:], None], strict=True):
        if outer is None or sources.regions[here].loop or entered[here] < entered[outer]:
            return here
    raise AssertionError
