"""Plain N:M masks: one group of M scores per lane, ranked by comparing every pair."""

from __future__ import annotations

from typing import Any

import numpy as np

from nmsolve.backends.cpu._numba.compiled import compiled, inner
from nmsolve.backends.cpu._numba.lanes import WIDTH, minimum, select, splat
from nmsolve.backends.cpu._numba.memory import load, store
from nmsolve.backends.cpu._numba.scratch import buffer, retyped, scratch, still_needed
from nmsolve.backends.cpu._numba.tiles import (
    WORD,
    Region,
    load_tile,
    place_lanes,
    words_for,
    write_flags,
)

__all__ = ["solve_ordinary"]


@inner
def _rank(tile: Any, cols: int, ranks: Any) -> None:
    """How many scores of a lane's group come before each: the larger ones, and equal ones to its left."""
    lanes = WIDTH // tile.itemsize
    unit = splat(ranks.dtype.type(1))
    for j in range(cols):
        store(ranks, j * lanes, splat(ranks.dtype.type(j)))
    for j in range(0, cols * lanes, lanes):
        score, rank = load(tile, j), load(ranks, j)
        for k in range(j + lanes, cols * lanes, lanes):
            larger = load(tile, k) > score
            rank = select(larger, rank + unit, rank)
            other = load(ranks, k)
            store(ranks, k, select(larger, other - unit, other))
        store(ranks, j, rank)


@compiled
def solve_ordinary(region: Region, n: int, reals: Any, ints: Any, first: int, last: int) -> None:
    """Lane groups ``first .. last`` of a region whose blocks have one row."""
    real, integer = reals.dtype.type, ints.dtype.type
    lanes = WIDTH // reals.itemsize
    cols = region.cols
    per_row = words_for(cols)
    memory = buffer((2 * cols + 1 + per_row) * WIDTH + 3 * lanes * 8)
    tile = scratch(memory, real(0))
    ranks = retyped(tile + (cols + 1) * lanes, integer(0))
    words = ranks + cols * lanes
    places = retyped(words + per_row * lanes, np.int64(0))
    kept = splat(integer(n))
    none, unit = splat(integer(0)), splat(integer(1))
    for group in range(first, last):
        used = place_lanes(region, group * lanes, lanes, places)
        load_tile(region, places, tile, cols + 1)
        _rank(tile, cols, ranks)
        for w in range(per_row):
            word, bit = none, unit
            for j in range(w * WORD, minimum(cols, (w + 1) * WORD)):
                word = select(load(ranks, j * lanes) < kept, word | bit, word)
                bit = bit + bit
            store(words, w * lanes, word)
        for lane in range(used):
            write_flags(words, lane, lanes, cols, places[lanes + lane], region.mask_col)
    still_needed(memory)
