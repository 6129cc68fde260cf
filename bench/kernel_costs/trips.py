"""How often a program of each kernel enters the loops and branches of its source, in Triton's interpreter."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from kernel_costs import offline, source_regions
from kernel_costs.cases import KERNELS, SIDE, SINKHORN_ITERATIONS, TSENOR, n_of

Trips = dict[tuple[str, int, int], dict[str, float]]
"""(name of the counts, m, blocks per program) -> region -> mean entries per program."""


def count(task: tuple[str, int, int | None, str, int]) -> list[dict[str, Any]]:
    """Run some programs in the interpreter: one row for every loop and branch of the sources."""
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)
    from kernel_costs import interpreter

    interpreter.install()
    name, m, blocks, distribution, programs = task
    (compiled,) = {row.compiled for row in KERNELS.values() if row.trips == name}
    sources = offline.sources_of(compiled)
    with source_regions.counting(sources) as entered:
        blocks, ran = run_programs(name, m, blocks, distribution, programs)
    return [
        {
            "trips": name, "m": m, "n": n_of(name, m), "blocks": blocks, "distribution": distribution,
            "programs": ran, "region": region, "entries": entered[region] / ran,
        }
        for region in sources.regions
        if sources.chain(region) and sources.regions[region].parent
    ]  # fmt: skip


def run_programs(name: str, m: int, blocks: int | None, distribution: str, programs: int) -> tuple[int, int]:
    """(blocks per program, programs that ran) of one launch."""
    if name in ("permute_columns", "rms_norm_permute"):
        return _run_gather(norm=name == "rms_norm_permute")
    if name == "sum_maxima":
        return _run_maxima()
    if name == "sum_largest":
        return _run_largest(m)
    if name == "hierarchical":
        return _run_strips(m, distribution, programs)
    if name.startswith("sinkhorn"):
        return _run_sinkhorn(m, programs, backward=name == "sinkhorn, backward")
    return _run_masks(name, m, blocks, distribution, programs)


def _run_gather(*, norm: bool) -> tuple[int, int]:
    import torch

    from nmsolve.backends.triton import permutations as gpu_permute

    rows, cols, _ = gpu_permute.NORM_TILE if norm else gpu_permute.GATHER_TILE
    if norm:
        x, permutation = torch.randn(rows, SIDE), torch.randperm(SIDE)
        gpu_permute.rms_norm_permute(x, torch.ones(SIDE), permutation, 1e-6)
    else:
        gpu_permute.permute_columns(torch.randn(rows, cols), torch.randperm(cols))
    return 1, 1


def _run_maxima() -> tuple[int, int]:
    """One tile over one of the parts that SIDE rows have."""
    import torch
    from nmsolve.kernels import _launch

    from nmsolve.backends.triton import permutations as gpu_permute

    _, rows = _launch.parts_of(SIDE)
    tile = _launch.maxima_tile(32)
    groups, cols = tile.groups_in * tile.groups_out, tile.cols_in * tile.cols_out
    columns = torch.randn(groups + cols, rows)
    index = torch.arange(groups, groups + cols)[None]
    gpu_permute.sum_maxima(columns[None, :groups], columns, index)
    return 1, 1


def _run_largest(m: int) -> tuple[int, int]:
    """All ways of dealing the columns of one pair of groups."""
    import torch

    from nmsolve.backends.triton import permutations as gpu_permute

    groups = torch.combinations(torch.arange(2 * m), m)
    gpu_permute.sum_largest(torch.randn(2 * m, SIDE), torch.arange(2 * m)[None], groups, m // 2)
    return 1, 1


def _run_strips(m: int, distribution: str, programs: int) -> tuple[int, int]:
    from common import scores

    from nmsolve.backends.triton import strips as gpu_strips

    blocks = scores(distribution, (programs, m, offline.STRIP)).double()
    gpu_strips.best_columns(blocks, n_of("hierarchical", m), 4, 1 << 18)
    return 1, programs


def _run_sinkhorn(m: int, programs: int, *, backward: bool) -> tuple[int, int]:
    import torch
    from common import scores

    from nmsolve.backends.triton import permutations as gpu_permute

    blocks = gpu_permute.sinkhorn_tile(m, m, backward=backward).blocks
    logits = scores("signed", (blocks * programs, m, m))
    ones = torch.ones(blocks * programs, m)
    out = gpu_permute.sinkhorn_forward(logits, ones, ones, 0.1, SINKHORN_ITERATIONS, -1.0, True)
    if backward:
        gpu_permute.sinkhorn_backward(torch.randn_like(logits), logits, ones, ones, *out[1:], 0.1)
    return blocks, programs


def _run_masks(name: str, m: int, blocks: int | None, distribution: str, programs: int) -> tuple[int, int]:
    from common import scores
    from nmsolve.kernels import _launch

    from nmsolve.backends.triton import masks as gpu
    from nmsolve.pattern import NMPattern

    pattern = NMPattern(n_of(name, m), m)
    if name == "nm":
        _, blocks = _launch.group_tile(m, 32)
        every_other = scores(distribution, (1, programs, 2 * m * blocks))[..., ::2]
        gpu.ordinary(every_other, pattern)
        return blocks, programs
    table_name = {"exact, edge": "exact_edge", "tsenor": "tsenor", "greedy": "dykstra"}.get(name, "exact")
    shipped = _launch.tile(table_name, m)
    tile = shipped if blocks is None else shipped._replace(blocks=blocks)
    exhaustive = name.startswith("exhaustive")
    blocks = gpu.exhaustive_arguments(pattern)["BLOCKS"] if exhaustive else tile.blocks
    x = scores(distribution, (1, m - 1 if name == "exact, edge" else m, m * blocks * programs))
    original = _launch.tile
    _launch.tile = lambda kernel, size: tile
    try:
        if name == "tsenor":
            gpu.tsenor(x, pattern, **TSENOR)
        elif name == "greedy":
            gpu.greedy(x, pattern)
        elif name.endswith("many matrices"):
            gpu.exact_group(list(x.split(m * blocks * 3, 2)), pattern, want_solution=not exhaustive)
        else:
            gpu.exact(x, pattern, want_solution=not exhaustive)
    finally:
        _launch.tile = original
    return blocks, programs


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
