"""What ``nmsolve bench`` measures: the time of mask functions and of tiles, on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

import nmsolve
from nmsolve.blocks import grid_of
from nmsolve.dispatch import select
from nmsolve.errors import NMSolveError
from nmsolve.launch_table import KERNELS, Entry, asked_for, check_entry
from nmsolve.pattern import NMPattern
from nmsolve.solution import kept_score

__all__ = ["METHODS", "Timing", "candidates", "measure", "measured_on", "seconds_of", "tune"]

METHODS = ("exact", "tsenor", "greedy", "ordinary")

ENTRIES_OF_A_LANE = ((2, 4), (4, 4), (4, 8), (8, 4), (8, 8), (16, 4), (16, 8))
FASTER_BY = 0.98
"""A tile wins only if it takes less than this part of the shipped one's time."""
WORSE_BY = 1e-6
"""How much less than the optimum, relative to it, an exact tile's mask may keep."""
APART = 1e-3
"""How much the masks of tsenor may keep less with another tile, whose sums round otherwise."""


@dataclass(frozen=True)
class Timing:
    """Time of one method on one matrix; ``gap`` is None for ordinary N:M, which is its own optimum."""

    pattern: str
    method: str
    backend: str
    device: str
    dtype: str
    rows: int
    cols: int
    repeats: int
    milliseconds: float
    least: float
    most: float
    gigaweights_per_second: float
    microseconds_per_block: float
    gap: float | None


def seconds_of(
    work: Callable[[], object], device: torch.device, repeats: int, warm_up: int = 2
) -> list[float]:
    """Seconds of each repeat: by the GPU's own clock on a GPU, by the wall clock elsewhere."""
    for _ in range(warm_up):
        work()
    taken = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            work()
            taken.append(time.perf_counter() - begin)
    return taken


def measure(
    patterns: Iterable[NMPattern],
    sizes: Iterable[tuple[int, int]],
    *,
    methods: Iterable[str] = METHODS,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    backend: str = "auto",
    repeats: int = 5,
    seed: int = 0,
) -> Iterator[Timing]:
    """Times on |normal| scores, pattern by pattern and size by size.

    The first calls, which compile, are not timed. Backends that cannot run raise before any work.

    Examples
    --------
    >>> (row,) = measure([NMPattern(2, 4)], [(64, 64)], methods=["greedy"], backend="torch", repeats=1)
    >>> row.method, row.rows, row.gap >= 0
    ('greedy', 64, True)
    """
    patterns, sizes, methods, where = list(patterns), list(sizes), list(methods), torch.device(device)
    for pattern in patterns:
        select(backend, where, pattern.m)
    for pattern in patterns:
        name = select(backend, where, pattern.m).__name__.rpartition(".")[2]  # type: ignore[attr-defined]
        solver = {"gpu": "triton", "cpu": "cpu", "reference": "torch"}[name]
        for rows, cols in sizes:
            generator = torch.Generator(where).manual_seed(seed)
            scores = torch.randn(rows, cols, generator=generator, device=where).abs().to(dtype)
            grid = grid_of(scores, pattern)
            transposable = set(methods) & {"exact", "tsenor", "greedy"}
            bound = _bound(scores, pattern, backend) if transposable else 0.0
            for method in methods:
                call = _call(scores, pattern, method, backend)
                taken = seconds_of(call, where, repeats)
                median = statistics.median(taken)
                gap = None
                if method != "ordinary":
                    gap = max(0.0, bound - _kept(scores, call(), pattern)) / bound
                yield Timing(
                    pattern=str(pattern),
                    method=method,
                    backend=solver,
                    device=str(where),
                    dtype=str(dtype).removeprefix("torch."),
                    rows=rows,
                    cols=cols,
                    repeats=repeats,
                    milliseconds=median * 1e3,
                    least=min(taken) * 1e3,
                    most=max(taken) * 1e3,
                    gigaweights_per_second=rows * cols / median / 1e9,
                    microseconds_per_block=median * 1e6 / (grid.block_rows * grid.block_cols),
                    gap=gap,
                )


def _call(
    scores: Tensor, pattern: NMPattern, method: str, backend: str, *, solution: bool = False
) -> Callable[[], Tensor]:
    if method == "ordinary":
        return lambda: nmsolve.nm_mask(scores, pattern.n, pattern.m, backend=backend)
    if solution:
        return lambda: (
            nmsolve.transposable_mask(
                scores, pattern.n, pattern.m, method=method, backend=backend, return_solution=True
            ).mask
        )
    return lambda: nmsolve.transposable_mask(scores, pattern.n, pattern.m, method=method, backend=backend)


def _bound(scores: Tensor, pattern: NMPattern, backend: str) -> float:
    solution = nmsolve.transposable_mask(scores, pattern.n, pattern.m, backend=backend, return_solution=True)
    return solution.total_bound


def _kept(scores: Tensor, mask: Tensor, pattern: NMPattern) -> float:
    return float(kept_score(scores, mask, pattern)[0].sum())


# --- tiles --------------------------------------------------------------------------------------------------


class Tiles(Protocol):
    """What tuning needs of :mod:`nmsolve.gpu`."""

    def shipped_tile(self, kernel: str, m: int) -> Entry:
        """The entry of the launch table that ships."""

    def use_tiles(self, entries: Mapping[tuple[str, int], Entry]) -> None:
        """Replace entries of the launch table, those that were replaced before put back."""


def candidates(kernel: str, size: int) -> Iterator[Entry]:
    """Tiles for blocks of a size: as many blocks as fill one warp, or two; for large blocks several warps."""
    for rows_in, cols_in in ENTRIES_OF_A_LANE:
        if rows_in > size or cols_in > size:
            continue
        lanes = (size // rows_in) * (size // cols_in)
        for warps in (1, 2, 4, 8):
            blocks = 32 * warps // lanes
            if blocks and blocks <= 64 and (warps == 1 or blocks <= 2):
                yield check_entry(kernel, (size, rows_in, cols_in, blocks, warps))


def tune(
    tiles: Tiles,
    *,
    sizes: Iterable[int] = (4, 8, 16, 32, 64),
    kernels: Iterable[str] = KERNELS,
    side: int = 4096,
    device: str = "cuda",
    repeats: int = 20,
    choose: Callable[[str, int], Iterable[Entry]] = candidates,
    timer: Callable[..., list[float]] = seconds_of,
    progress: Callable[[str], None] = print,
) -> dict[tuple[str, int], Entry]:
    """The tiles that beat the shipped ones here: by kernel and size, only those that differ.

    Every tile is checked before it is timed. A mask of the exact kernel must be valid and keep what the
    certificate says is the optimum; one of the approximate kernel must be valid and keep as much as with the
    shipped tile. Tiles that fail or do not compile are passed over. The launch table is as before afterwards.
    """
    where = torch.device(device)
    won: dict[tuple[str, int], Entry] = {}
    try:
        for kernel in kernels:
            for size in sizes:
                best = _best_tile(tiles, kernel, size, side, where, repeats, choose, timer, progress)
                if best is not None:
                    won[kernel, size] = best
    finally:
        tiles.use_tiles(asked_for())
    return won


def _best_tile(
    tiles: Tiles,
    kernel: str,
    size: int,
    side: int,
    where: torch.device,
    repeats: int,
    choose: Callable[[str, int], Iterable[Entry]],
    timer: Callable[..., list[float]],
    progress: Callable[[str], None],
) -> Entry | None:
    pattern = NMPattern(size // 2, size)
    side = max(side // size, 1) * size
    shape = (size - 1, side * 16) if kernel == "exact_edge" else (side, side)
    scores = torch.randn(shape, generator=torch.Generator(where).manual_seed(0), device=where).abs()
    method = {"dykstra": "greedy", "tsenor": "tsenor"}.get(kernel, "exact")
    # Of 4 x 4 blocks without a solution another kernel takes care.
    call = _call(scores, pattern, method, "triton", solution=kernel == "exact" and size == 4)
    shipped = tiles.shipped_tile(kernel, size)
    tiles.use_tiles({})
    bound = _bound(scores, pattern, "torch" if scores.numel() <= 1 << 16 else "triton")
    least = bound * (1 - WORSE_BY)
    if method != "exact":
        least = _kept(scores, call(), pattern) * (1 - APART)
    time_shipped = statistics.median(timer(call, where, repeats))
    best, best_time = None, time_shipped * FASTER_BY
    for entry in choose(kernel, size):
        if entry == shipped:
            continue
        tiles.use_tiles({(kernel, size): entry})
        try:
            mask = call()
            nmsolve.check_mask(mask, pattern.n, pattern.m)
            kept = _kept(scores, mask, pattern)
            if not least <= kept <= bound * (1 + WORSE_BY):
                raise NMSolveError(f"kept {kept:.8g}, the optimum is {bound:.8g}")
            taken = statistics.median(timer(call, where, repeats))
        except Exception as error:
            progress(f"{kernel} {size}: {entry[1:]} passed over: {type(error).__name__}: {error}"[:200])
            continue
        if taken < best_time:
            best, best_time = entry, taken
    seconds = best_time if best else time_shipped
    progress(
        f"{kernel} {size}: {tuple(best or shipped)[1:]}, {seconds * 1e3:.3f} ms; "
        f"shipped {tuple(shipped)[1:]}, {time_shipped * 1e3:.3f} ms"
    )
    return best


def measured_on(device: str) -> dict[str, Any]:
    """Where a table was measured."""
    where = torch.device(device)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else str(where)
    return {"gpu": name, "nmsolve": nmsolve.__version__, "torch": torch.__version__}
