"""How a matrix is cut into blocks, and what a block may keep.

A ``(rows, cols)`` matrix is tiled from its top-left corner into ``M x M`` blocks. Where M does not divide a
dimension, the last blocks are partial: ``R x C`` with R or C below M. One rule covers full and partial
blocks: **at most N kept per line, as many kept as that allows, and among those masks the one with the
largest kept score.** In a full block that is exactly N per row and column.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from nmsolve.pattern import NMPattern

__all__ = ["BlockGrid", "Demand", "batched_matrices", "chosen_blocks", "demand", "grid_of", "split_blocks"]

# Elements that chosen_blocks looks at together.
_CHUNK = 1 << 18


class Demand(NamedTuple):
    """What the lines of an ``R x C`` block hold.

    Every row holds ``row`` and every column ``col`` entries; a line of the longer side holds *at most* that
    many (``slack`` is the total by which the longer side's lines fall short, 0 when R == C).
    """

    row: int
    col: int
    slack: int


def demand(rows: int, cols: int, n: int) -> Demand:
    """What a ``rows x cols`` block (both at least 1) holds with ``n`` kept per line at most.

    The shorter side's lines can all be filled with ``min(n, longer side)`` entries without any line of the
    longer side exceeding n (deal them out cyclically), and no mask has more entries than that.

    Examples
    --------
    >>> demand(4, 4, 2), demand(3, 4, 2), demand(4, 1, 2)
    (Demand(row=2, col=2, slack=0), Demand(row=2, col=2, slack=2), Demand(row=2, col=2, slack=6))
    """
    if rows == cols:
        exact = min(n, rows)
        return Demand(exact, exact, 0)
    if rows < cols:
        exact = min(n, cols)
        return Demand(exact, n, n * cols - exact * rows)
    exact = min(n, rows)
    return Demand(n, exact, n * rows - exact * cols)


@dataclass(frozen=True)
class BlockGrid:
    """The tiling of ``rows x cols`` matrices into blocks of size ``m``."""

    rows: int
    cols: int
    m: int

    @property
    def block_rows(self) -> int:
        """Number of blocks from top to bottom, a partial one included."""
        return -(-self.rows // self.m)

    @property
    def block_cols(self) -> int:
        """Number of blocks from left to right, a partial one included."""
        return -(-self.cols // self.m)

    def block_slices(self, rows: slice, cols: slice) -> tuple[slice, slice]:
        """The block indices that element slices starting on block borders cover."""
        return (
            slice(rows.start // self.m, -(-rows.stop // self.m)),
            slice(cols.start // self.m, -(-cols.stop // self.m)),
        )

    def regions(self) -> Iterator[tuple[slice, slice, int, int]]:
        """The up to four rectangles whose blocks all have one shape.

        Yields ``(row slice, column slice, R, C)`` in elements: the full blocks, the right edge, the bottom
        edge and the corner, leaving out what is empty.
        """
        full_rows, full_cols = self.rows // self.m * self.m, self.cols // self.m * self.m
        for r0, r1, r in ((0, full_rows, self.m), (full_rows, self.rows, self.rows - full_rows)):
            for c0, c1, c in ((0, full_cols, self.m), (full_cols, self.cols, self.cols - full_cols)):
                if r1 > r0 and c1 > c0:
                    yield slice(r0, r1), slice(c0, c1), r, c

    def tiles(self, batch: int, elements: int) -> Iterator[tuple[slice, slice, slice, int, int]]:
        """Every block once, in chunks of blocks of one shape with about ``elements`` entries at most.

        Yields ``(batch slice, row slice, column slice, R, C)``; a chunk holds at least one block.
        """
        for rows, cols, r, c in self.regions():
            across, down = (cols.stop - cols.start) // c, (rows.stop - rows.start) // r
            blocks = max(1, elements // (r * c))
            step_c = min(across, blocks)
            step_r = min(down, max(1, blocks // across))
            step_b = max(1, blocks // (across * down))
            for b in range(0, batch, step_b):
                for i in range(rows.start, rows.stop, step_r * r):
                    for j in range(cols.start, cols.stop, step_c * c):
                        yield (
                            slice(b, min(b + step_b, batch)),
                            slice(i, min(i + step_r * r, rows.stop)),
                            slice(j, min(j + step_c * c, cols.stop)),
                            r,
                            c,
                        )


def split_blocks(matrices: Tensor, r: int, c: int) -> Tensor:
    """``(..., g*r, h*c)`` as the view ``(..., g, h, r, c)`` of its blocks."""
    return matrices.unflatten(-1, (-1, c)).unflatten(-3, (-1, r)).transpose(-3, -2)


def batched_matrices(tensor: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views ``(batch, rows, cols)`` that make up tensors of the same leading dimensions, without a copy.

    Leading dimensions are joined where every tensor's strides allow it and walked one index at a time where
    they do not. The other tensors may have any number of trailing dimensions behind the same leading ones.
    """
    lead = tensor.ndim - 2
    if lead == 0:
        yield tuple(t.unsqueeze(0) for t in (tensor, *others))
        return
    try:
        yield tuple(t.view(-1, *t.shape[lead:]) if lead > 1 else t for t in (tensor, *others))
        return
    except RuntimeError:  # the strides of the leading dimensions do not join
        pass
    for index in range(tensor.shape[0]):
        yield from batched_matrices(tensor[index], *(t[index] for t in others))


def grid_of(scores: Tensor, pattern: NMPattern) -> BlockGrid:
    """The tiling of ``(..., rows, cols)`` scores under ``pattern``."""
    return BlockGrid(scores.shape[-2], scores.shape[-1], pattern.m)


def chosen_blocks(
    wanted: Tensor, pattern: NMPattern, matrices: Sequence[Tensor], per_block: Sequence[Tensor] = ()
) -> Iterator[tuple[Any, ...]]:
    """Where the ``wanted`` blocks of ``(..., rows, cols)`` matrices are: tiles of blocks that have any.

    Yields views ``(b, g, h, R, C)`` of the tile's blocks in the first matrix and, in a list, in the others,
    which of them are wanted ``(b, g, h)``, and views of the tile in each tensor with something per block.
    """
    if not wanted.any():
        return
    count = len(matrices)
    grid = grid_of(matrices[0], pattern)
    for parts in batched_matrices(*matrices, wanted, *per_block):
        for b, i, j, r, c in grid.tiles(parts[0].shape[0], _CHUNK):
            where = (b, *grid.block_slices(i, j))
            at, *others = (part[where] for part in parts[count:])
            if at.any():
                first, *masks = (split_blocks(part[b, i, j], r, c) for part in parts[:count])
                yield first, masks, at, *others
