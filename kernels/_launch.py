"""Launch table: how a kernel's tile is laid out for each block size. No run-time tuning."""

from collections.abc import Mapping
from typing import NamedTuple


class Tile(NamedTuple):
    """Register layout of one program, see :mod:`nmsolve.kernels._tile`."""

    size: int
    """Lanes per block and dimension: the smallest tabled power of two that holds a block."""
    rows_in: int
    cols_in: int
    blocks: int
    warps: int


_TILES = {
    "exact": (
        Tile(4, 4, 4, 32, 1),
        Tile(8, 4, 8, 16, 1),
        Tile(16, 4, 8, 4, 1),
        Tile(32, 4, 8, 1, 1),
        Tile(64, 4, 8, 1, 4),
    ),
    # Edge blocks need more vectors (the slack line), so fewer entries per lane.
    "exact_edge": (
        Tile(4, 4, 4, 32, 1),
        Tile(8, 4, 4, 8, 1),
        Tile(16, 4, 4, 2, 1),
        Tile(32, 8, 4, 1, 1),
        Tile(64, 8, 4, 1, 4),
    ),
    "dykstra": (
        Tile(4, 4, 4, 32, 1),
        Tile(8, 8, 4, 16, 1),
        Tile(16, 8, 4, 4, 1),
        Tile(32, 8, 4, 1, 1),
        Tile(64, 8, 4, 1, 4),
    ),
    # Entropic transport of full blocks, masks stored as words: the fewest shuffles in the iteration.
    "tsenor": (
        Tile(4, 4, 4, 32, 1),
        Tile(8, 8, 8, 32, 1),
        Tile(16, 8, 8, 8, 1),
        Tile(32, 8, 8, 2, 1),
        Tile(64, 8, 8, 1, 2),
    ),
}

KERNELS = tuple(_TILES)
SIZES = tuple(entry.size for entry in _TILES["exact"])

EXHAUSTIVE_BLOCKS = 128
EXHAUSTIVE_WARPS = 4


_REPLACED: dict[tuple[str, int], Tile] = {}


def replace(entries: Mapping[tuple[str, int], tuple[int, int, int, int, int]]) -> None:
    """Use these entries, by kernel and size, in place of the table's; earlier ones no longer count."""
    _REPLACED.clear()
    _REPLACED.update({key: Tile(*entry) for key, entry in entries.items()})


def tabled(kernel: str, m: int) -> Tile:
    """The table's own entry for blocks of size ``m`` (at most 64)."""
    return next(entry for entry in _TILES[kernel] if entry.size >= m)


def tile(kernel: str, m: int) -> Tile:
    """The tile that ``kernel`` uses for blocks of size ``m`` (at most 64)."""
    entry = tabled(kernel, m)
    return _REPLACED.get((kernel, entry.size), entry)


def group_tile(m: int, bits: int) -> tuple[int, int]:
    """(lanes per group, groups per program) of the N:M kernel for scores of ``bits`` bits, one warp.

    A lane holds at most 16 scores (8 float64 ones): groups beyond that are spread over lanes.
    """
    size = 1 << (m - 1).bit_length()
    return size, min(64, (256 if bits == 64 else 512) // size)
