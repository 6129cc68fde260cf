"""What ``nmsolve bench --tune`` measures: other tiles for the Triton kernels, on this GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import torch

import nmsolve
from nmsolve.backends.dispatch import select
from nmsolve.backends.triton.launch_table import KERNELS, SIZES, Entry, asked_for, check_entry, save
from nmsolve.errors import NMSolveError
from nmsolve.pattern import NMPattern
from nmsolve.timing.methods import call_of, kept_by, measured_on, optimum_of, seconds_of

__all__ = ["Prepared", "Tiles", "candidates", "prepared", "tune", "tune_to_file"]

ENTRIES_OF_A_LANE = ((2, 4), (4, 4), (4, 8), (8, 4), (8, 8), (16, 4), (16, 8))
FASTER_BY = 0.98
"""A tile wins only if it takes less than this part of the shipped one's time."""
WORSE_BY = 1e-6
"""How much less than the optimum, relative to it, an exact tile's mask may keep."""
APART = 1e-3
"""How much the masks of tsenor may keep less with another tile, whose sums round otherwise."""


class Tiles(Protocol):
    """What tuning needs of the Triton backend's module for masks."""

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
    sizes: Iterable[int] = SIZES,
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


class Prepared(NamedTuple):
    """A solve that runs one kernel's tile for blocks of a size."""

    scores: torch.Tensor
    pattern: NMPattern
    method: str
    call: Callable[[], torch.Tensor]


def prepared(kernel: str, size: int, side: int, where: torch.device) -> Prepared:
    """What tuning times for a kernel and size: a square matrix, or one row of partial blocks.

    Examples
    --------
    >>> prepared("tsenor", 8, 30, torch.device("cpu")).scores.shape
    torch.Size([24, 24])
    """
    pattern = NMPattern(size // 2, size)
    side = max(side // size, 1) * size
    shape = (size - 1, side * 16) if kernel == "exact_edge" else (side, side)
    scores = torch.randn(shape, generator=torch.Generator(where).manual_seed(0), device=where).abs()
    method = {"dykstra": "greedy", "tsenor": "tsenor"}.get(kernel, "exact")
    # Of 4 x 4 blocks without a solution another kernel takes care.
    solution = kernel == "exact" and size == 4
    return Prepared(scores, pattern, method, call_of(scores, pattern, method, "triton", solution=solution))


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
    scores, pattern, method, call = prepared(kernel, size, side, where)
    shipped = tiles.shipped_tile(kernel, size)
    tiles.use_tiles({})
    bound = optimum_of(scores, pattern, "torch" if scores.numel() <= 1 << 16 else "triton")
    least = bound * (1 - WORSE_BY)
    if method != "exact":
        least = kept_by(scores, call(), pattern) * (1 - APART)
    time_shipped = statistics.median(timer(call, where, repeats))
    best, best_time = None, time_shipped * FASTER_BY
    for entry in choose(kernel, size):
        if entry == shipped:
            continue
        tiles.use_tiles({(kernel, size): entry})
        try:
            mask = call()
            nmsolve.check_mask(mask, pattern.n, pattern.m)
            kept = kept_by(scores, mask, pattern)
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


def tune_to_file(path: Path, *, device: str = "cuda", repeats: int = 20) -> dict[tuple[str, int], Entry]:
    """Tunes the Triton backend and writes the tiles that won, for ``NMSOLVE_LAUNCH_TABLE`` to name.

    Raises
    ------
    NMSolveError
        If ``device`` is no GPU.
    """
    if torch.device(device).type == "cpu":
        raise NMSolveError(f"tune: needs a GPU; torch {torch.__version__} sees {torch.cuda.device_count()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.cuda.device(device):
        won = tune(cast(Tiles, select("triton", device, 16).masks), device=device, repeats=repeats)
        save(path, won, measured_on(device))
    return won
