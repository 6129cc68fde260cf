"""Regions of equal blocks, and the tile that holds one block of a region in each lane.

A matrix is cut into at most four regions of blocks of one shape (the full ones, the right edge, the lower
edge, the corner). A region always has ``rows <= cols``: where that is not so it is seen transposed, by its
strides. A tile is a flat array; entry (i, j) of lane k lies at ``(i * pitch + j) * lanes + k``, and ``pitch``
is one more than the number of columns, so that reading down a column does not hit one cache set.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from nmsolve.backends.cpu._numba.compiled import inner
from nmsolve.backends.cpu._numba.lanes import WIDTH, minimum
from nmsolve.backends.cpu._numba.memory import (
    load_blocks_1,
    load_blocks_2,
    load_blocks_4,
    load_blocks_8,
    load_blocks_16,
    store_flags_1,
    store_flags_4,
    store_flags_8,
    store_flags_16,
)

__all__ = ["WORD", "Region", "load_tile", "place_lanes", "words_for", "write_flags"]

WORD = 32
"""Bits of a mask's row in one integer of scratch."""


class Region(NamedTuple):
    """Where the blocks of one shape lie. Addresses and strides are bytes, except for ``block_*`` (blocks)."""

    rows: int
    cols: int
    batch: int
    grid_rows: int
    grid_cols: int
    encoding: int
    itemsize: int
    scores: int
    scores_batch: int
    scores_grid_row: int
    scores_grid_col: int
    scores_row: int
    scores_col: int
    mask: int
    mask_batch: int
    mask_grid_row: int
    mask_grid_col: int
    mask_row: int
    mask_col: int
    block_first: int
    block_batch: int
    block_grid_row: int
    block_grid_col: int

    def blocks(self) -> int:
        """How many blocks the region has."""
        return self.batch * self.grid_rows * self.grid_cols

    def flipped(self) -> Region:
        """The same region with rows and columns exchanged inside each block."""
        return self._replace(
            rows=self.cols,
            cols=self.rows,
            scores_row=self.scores_col,
            scores_col=self.scores_row,
            mask_row=self.mask_col,
            mask_col=self.mask_row,
        )

    def walked_down(self) -> Region:
        """The same region with its blocks in another order, down the matrix first."""
        return self._replace(
            grid_rows=self.grid_cols,
            grid_cols=self.grid_rows,
            scores_grid_row=self.scores_grid_col,
            scores_grid_col=self.scores_grid_row,
            mask_grid_row=self.mask_grid_col,
            mask_grid_col=self.mask_grid_row,
            block_grid_row=self.block_grid_col,
            block_grid_col=self.block_grid_row,
        )


@inner
def words_for(cols: int) -> int:
    """How many integers of scratch the bits of a mask's row take."""
    return (cols + WORD - 1) // WORD


@inner
def place_lanes(region: Region, first: int, lanes: int, places: Any) -> int:
    """Find blocks ``first .. first + lanes`` of the region: how many there are.

    ``places[k]``, ``places[lanes + k]`` and ``places[2 * lanes + k]`` become the address of lane k's scores,
    of its mask, and its number among the blocks of the matrix. Lanes beyond the last block repeat it.
    """
    used = minimum(lanes, region.batch * region.grid_rows * region.grid_cols - first)
    for k in range(lanes):
        block = first + minimum(k, used - 1)
        row, col = divmod(block, region.grid_cols)
        batch, row = divmod(row, region.grid_rows)
        places[k] = (
            region.scores
            + batch * region.scores_batch
            + row * region.scores_grid_row
            + col * region.scores_grid_col
        )
        places[lanes + k] = (
            region.mask + batch * region.mask_batch + row * region.mask_grid_row + col * region.mask_grid_col
        )
        places[2 * lanes + k] = (
            region.block_first
            + batch * region.block_batch
            + row * region.block_grid_row
            + col * region.block_grid_col
        )
    return used


@inner
def load_tile(region: Region, places: Any, tile: Any, pitch: int) -> None:
    """Fill the tile with the scores of the lanes' blocks, in the work type."""
    lanes = WIDTH // tile.itemsize
    encoding = region.encoding
    outer, outer_bytes, outer_step = region.rows, region.scores_row, pitch * lanes
    inner, inner_bytes, inner_step = region.cols, region.scores_col, lanes
    if inner_bytes != region.itemsize and outer_bytes == region.itemsize:
        outer, inner = inner, outer
        outer_bytes, inner_bytes = inner_bytes, outer_bytes
        outer_step, inner_step = inner_step, outer_step
    consecutive = inner_bytes == region.itemsize
    for i in range(outer):
        j = 0
        if consecutive:
            if lanes >= 16:
                while j + 16 <= inner:
                    place = i * outer_step + j * inner_step
                    load_blocks_16(
                        encoding, places, i * outer_bytes + j * inner_bytes, tile, place, inner_step
                    )
                    j += 16
            while j + 8 <= inner:
                place = i * outer_step + j * inner_step
                load_blocks_8(encoding, places, i * outer_bytes + j * inner_bytes, tile, place, inner_step)
                j += 8
            if j + 4 <= inner:
                place = i * outer_step + j * inner_step
                load_blocks_4(encoding, places, i * outer_bytes + j * inner_bytes, tile, place, inner_step)
                j += 4
            if j + 2 <= inner:
                place = i * outer_step + j * inner_step
                load_blocks_2(encoding, places, i * outer_bytes + j * inner_bytes, tile, place, inner_step)
                j += 2
        while j < inner:
            place = i * outer_step + j * inner_step
            load_blocks_1(encoding, places, i * outer_bytes + j * inner_bytes, tile, place, inner_step)
            j += 1


@inner
def write_flags(words: Any, first: int, step: int, count: int, address: int, stride: int) -> None:
    """Write ``count`` bits, ``WORD`` to an integer from ``words[first::step]``, as bytes ``stride`` apart."""
    bits, j = np.int64(0), 0
    while j < count:
        if j % WORD == 0:
            bits = np.int64(words[first + (j // WORD) * step]) & 0xFFFFFFFF
        if stride == 1 and j + 16 <= count and j % 16 == 0:
            store_flags_16(address + j, bits)
            bits >>= 16
            j += 16
        elif stride == 1 and j + 8 <= count and j % 8 == 0:
            store_flags_8(address + j, bits)
            bits >>= 8
            j += 8
        elif stride == 1 and j + 4 <= count and j % 4 == 0:
            store_flags_4(address + j, bits)
            bits >>= 4
            j += 4
        else:
            store_flags_1(address + j * stride, bits)
            bits >>= 1
            j += 1
