"""Launch table: how a kernel's tile is laid out for each block size. No run-time tuning.

The rows are those of the newest compiler, and of any that is newer still; rows that an older one would spill
with have others for it. Which row is used changes no mask.
"""

import re
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
        Tile(16, 8, 4, 4, 1),
        Tile(32, 8, 8, 2, 1),
        Tile(64, 8, 8, 1, 2),
    ),
}

# Rows for Triton before the release that a key names.
_OLDER = {
    # Fewer shuffles; 3.9 spills for sm_100 with 8 x 8 entries a lane (7 loads and stores).
    (3, 9): {"tsenor": (Tile(16, 8, 8, 8, 1),)},
    # Spilled registers for sm_100 with 3.6, of 8 x 8 entries a lane: 80 loads and stores, and 18.
    (3, 7): {"tsenor": (Tile(8, 8, 4, 16, 1), Tile(16, 8, 4, 4, 1))},
}

KERNELS = tuple(_TILES)
SIZES = tuple(entry.size for entry in _TILES["exact"])

EXHAUSTIVE_BLOCKS = 128
EXHAUSTIVE_WARPS = 4


def options(warps: int) -> dict[str, int]:
    """What the compiler is told of a program: its warps, and to contract products and sums.

    Triton up to 3.9 contracts by default and warns that 3.10 will not; tsenor, Sinkhorn and the norm take
    more instructions without.
    """
    return {"num_warps": warps, "enable_fp_fusion": True}


def rows_of(release: str) -> dict[str, tuple[Tile, ...]]:
    """The table for a release of Triton, such as "3.7.1" or "3.8.0+git": a tile for each kernel and size.

    Examples
    --------
    >>> rows_of("3.6.0")["tsenor"][1]
    Tile(size=8, rows_in=8, cols_in=4, blocks=16, warps=1)
    >>> rows_of("3.9.0")["tsenor"][1]
    Tile(size=8, rows_in=8, cols_in=8, blocks=32, warps=1)
    """
    numbers = tuple(map(int, re.findall(r"\d+", release)[:2]))
    rows = {kernel: {entry.size: entry for entry in entries} for kernel, entries in _TILES.items()}
    for before in sorted(_OLDER, reverse=True):  # the oldest that applies has the last word
        if numbers < before:
            for kernel, entries in _OLDER[before].items():
                rows[kernel].update({entry.size: entry for entry in entries})
    return {kernel: tuple(entries.values()) for kernel, entries in rows.items()}


_rows = dict(_TILES)
_REPLACED: dict[tuple[str, int], Tile] = {}


def use_rows_of(release: str) -> None:
    """Use the table for this release of Triton from now on."""
    _rows.update(rows_of(release))


def replace(entries: Mapping[tuple[str, int], tuple[int, int, int, int, int]]) -> None:
    """Use these entries, by kernel and size, in place of the table's; earlier ones no longer count."""
    _REPLACED.clear()
    _REPLACED.update({key: Tile(*entry) for key, entry in entries.items()})


def tabled(kernel: str, m: int) -> Tile:
    """The table's own entry for blocks of size ``m`` (at most 64)."""
    return next(entry for entry in _rows[kernel] if entry.size >= m)


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


def whole_groups_tile(m: int, bits: int) -> tuple[int, int, int, int]:
    """(scores of a word, lanes, groups of a lane, warps) of the kernel for whole groups of M.

    A word has 16 bytes, or a group if that is less; a lane reads at least 16 scores before it sorts. Of
    float64, several warps spill for sm_80, to make room for one more program.
    """
    warps = 1 if bits == 64 else 4
    return min(m, 128 // bits), 32 * warps, max(1, 16 // m), warps


class MaximaTile(NamedTuple):
    """Layout of one program of :mod:`nmsolve.kernels.maxima`, by its constexpr arguments."""

    word: int
    groups_in: int
    cols_in: int
    shares: int
    groups_out: int
    cols_out: int
    warps: int


def maxima_tile(bits: int) -> MaximaTile:
    """4 x 8 sums of a lane (4 x 4 of float64), from words of 16 bytes; two pairs of warps share the rows.

    8 x 8 sums take 4 % fewer instructions, and spill for sm_100, sm_120 and gfx11.
    """
    return MaximaTile(128 // bits, 4, 256 // bits, 2, 16, 4, 4)


SPAN_ROWS, PART_ROWS = 128, 1024
"""Rows that are added up one by one, and, about, rows of a program. Both add in the type of the scores."""


def parts_of(rows: int) -> tuple[int, int]:
    """(parts, rows of each but perhaps the last): equal parts, multiples of 16, of about ``PART_ROWS``.

    Examples
    --------
    >>> parts_of(576), parts_of(4112)
    ((1, 576), (4, 1040))
    """
    parts = max(1, (rows + PART_ROWS // 2) // PART_ROWS)
    part = max(16, -(-rows // (16 * parts)) * 16)
    return max(1, -(-rows // part)), part


PARTS_ENTRIES = 1024
"""Sums that a program of four warps adds up."""

MOST_SORTED = 32
"""The most columns of a group that a lane sorts."""


def sorting_tile(bits: int, columns: int, warps: int) -> int:
    """Rows of the kernels that sort columns: a lane reads 16 bytes of each; of more than 16 columns, 8 bytes.

    Of 31 columns 16 bytes spilled for gfx1100 and gfx1201.
    """
    return 32 * warps * (128 if columns <= 16 else 64) // bits
