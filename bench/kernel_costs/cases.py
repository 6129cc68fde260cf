"""The configurations of the kernels that the cost table lists, and other tiles to compare them with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from kernel_costs import offline

SIDE = 8192
SIZES = (4, 8, 16, 32, 64)
SINKHORN_SIZES = (*SIZES, 128)
SINKHORN_ITERATIONS = 20
TSENOR = {"iterations": 300, "tau": 150.0}


class Kernel(NamedTuple):
    """A row of the table: what is compiled, for which sizes and with which options."""

    compiled: str
    sizes: tuple[int, ...]
    options: dict[str, Any]
    trips: str
    """The name its counts go by; empty if nothing runs more than once."""


KERNELS = {
    "exact, exhaustive": Kernel("exhaustive", (4,), {}, "exhaustive"),
    "exact": Kernel("exact", SIZES[1:], {}, "exact"),
    "exact, solution": Kernel("exact", SIZES, {"solution": True}, "exact"),
    "exact, edge": Kernel("exact", SIZES, {"edge": True}, "exact, edge"),
    "exact, edge, solution": Kernel("exact", SIZES, {"edge": True, "solution": True}, "exact, edge"),
    "exact, many matrices": Kernel("grouped", SIZES[1:], {}, "exact, many matrices"),
    "exact, exhaustive, many matrices": Kernel("grouped_exhaustive", (4,), {}, "exhaustive, many matrices"),
    "assignment": Kernel("exact", SIZES[1:], {}, "assignment"),
    "tsenor": Kernel("dykstra", SIZES, {}, "tsenor"),
    "greedy": Kernel("dykstra", SIZES, {"transport": False}, "greedy"),
    "nm": Kernel("nm", SIZES, {}, "nm"),
    "nm, whole groups": Kernel("nm_groups", SIZES[:-1], {}, ""),
    "hierarchical": Kernel("strips", SIZES[1:], {}, "hierarchical"),
    "sinkhorn, forward": Kernel("sinkhorn_forward", SINKHORN_SIZES, {}, "sinkhorn"),
    "sinkhorn, training": Kernel("sinkhorn_forward", SINKHORN_SIZES, {"keep": True}, "sinkhorn"),
    "sinkhorn, backward": Kernel("sinkhorn_backward", SINKHORN_SIZES, {}, "sinkhorn, backward"),
    "nth_largest": Kernel("nth_largest", SIZES[:-1], {}, ""),
    "sum_largest": Kernel("sum_largest", (4,), {}, "sum_largest"),
    "sum_maxima": Kernel("maxima", (0,), {}, "sum_maxima"),
    "add_parts": Kernel("add_parts", (0,), {}, ""),
    "permute_columns": Kernel("gather", (0,), {}, "permute_columns"),
    "rms_norm_permute": Kernel("gather", (0,), {"norm": True}, "rms_norm_permute"),
}

SLOT_M, WINDOW = 4, 512
"""The sums of maxima are those of one slot of 2:4, in windows of so many groups."""
STRIPES = 256
"""Groups of which every pair is dealt anew."""

COMPARED = ("exact", "tsenor")
ENTRIES_OF_A_LANE = ((4, 4), (4, 8), (8, 4), (8, 8))
"""(rows_in, cols_in) of the tiles that the launch table's are compared with."""


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
    chief = (
        "exact",
        "tsenor",
        "greedy",
        "nm",
        "nm, whole groups",
        "sinkhorn, forward",
        "permute_columns",
        "rms_norm_permute",
    )
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


def n_of(trips: str, m: int) -> int:
    """N of the blocks that are counted."""
    if trips == "hierarchical":
        return 2
    return 1 if trips == "assignment" else m // 2


def blocks_of(meta: Mapping[str, Any]) -> int:
    """Blocks (groups of the N:M kernel) of a program; a program of the gather counts as one."""
    if "LANES" in meta:
        return int(meta["LANES"] * meta["TILES"])
    return int(meta.get("BLOCKS", meta.get("GROUPS", 1)))


def weights_per_program(case: Case, meta: Mapping[str, Any]) -> float:
    """Entries of the scores that a program reads."""
    if case.kernel == "hierarchical":
        return offline.STRIP * case.m
    if case.kernel == "nth_largest":
        return meta["ROWS"] * case.m
    if case.kernel == "sum_largest":
        return SIDE * case.m * 2 / (STRIPES - 1)
    if case.kernel == "sum_maxima":
        sums = meta["GROUPS_IN"] * meta["GROUPS_OUT"] * meta["COLS_IN"] * meta["COLS_OUT"]
        return SIDE * SLOT_M * sums / WINDOW / parts_of_the_rows()
    if case.kernel == "add_parts":
        return SIDE * SLOT_M * meta["ENTRIES"] / WINDOW
    if "ROWS" in meta:
        return meta["ROWS"] * (SIDE if meta["NORM"] else meta["COLS"])
    if "GROUPS" in meta or "LANES" in meta:
        return blocks_of(meta) * case.m
    return blocks_of(meta) * case.m**2


def parts_of_the_rows() -> int:
    """How many the sums of maxima are made of."""
    from nmsolve.kernels import _launch

    return _launch.parts_of(SIDE)[0]


def bytes_per_weight(case: Case) -> float:
    """Bytes that have to move for each weight: input read once, output written once."""
    sums = WINDOW / SLOT_M / SIDE  # of the maxima, for each weight
    if case.kernel == "nth_largest":
        return 4
    if case.kernel == "sum_largest":
        return 4 + 8 * math.comb(2 * case.m, case.m) * (STRIPES - 1) / 2 / case.m / SIDE
    if case.kernel == "sum_maxima":
        return 2 * 4 / SLOT_M + 4 * parts_of_the_rows() * sums
    if case.kernel == "add_parts":
        return (4 * parts_of_the_rows() + 8) * sums
    if case.kernel == "hierarchical":
        return 8  # its launcher makes them float64
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
