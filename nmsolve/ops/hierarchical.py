"""Hierarchical masks: V rows keep the same few columns of each group, and each row N entries of those."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from nmsolve.backends.dispatch import AUTO, REFERENCE, Backend, check_backend, select
from nmsolve.errors import BackendError, NMSolveError
from nmsolve.ops.distributed import is_dtensor
from nmsolve.ops.registration import register
from nmsolve.ops.validation import check_finite, check_scores, describe
from nmsolve.pattern import NMPattern, VNMPattern, VNMPatternLike
from nmsolve.solution import relative_gap

__all__ = ["HierarchicalSolution", "check_hierarchical_mask", "hierarchical_mask"]

# Passes over a column of a block after which its search ends.
_LIMIT = 1 << 18

# Elements that are solved together: bounds the working memory.
_CHUNK = 1 << 21

# float64 scores below this have sums that are numbers.
_LARGEST = 2.0**960


@dataclass(frozen=True)
class HierarchicalSolution:
    """A hierarchical mask with its certificate, for each strip and group.

    Attributes
    ----------
    mask : Tensor
        bool, shape and device of the scores; True = keep.
    columns : Tensor
        int64 ``(..., S, G, K)``: the kept columns of each of the S strips and G groups, counted from the
        group's first one, ascending. A last group of fewer than K columns keeps them all; -1 fills the rest.
    objective : Tensor
        float64 ``(..., S, G)``: kept score.
    bound : Tensor
        float64 ``(..., S, G)``: no choice of columns keeps more. It is the objective where the search came to
        its end, and else the bound of Lagrange's relaxation (:mod:`nmsolve.backends.torch.strips`).
    scale : Tensor
        float64 ``(..., S, G)``: sum of the absolute kept scores, what ``gap`` is relative to.
    """

    mask: Tensor
    columns: Tensor
    objective: Tensor
    bound: Tensor
    scale: Tensor

    @property
    def gap(self) -> Tensor:
        """``(bound - objective) / scale`` of each strip and group: 0 where the choice is proven optimal."""
        return relative_gap(self.bound - self.objective, self.scale)

    @property
    def max_gap(self) -> float:
        """The largest gap (0.0 if there is none)."""
        return float(self.gap.max()) if self.gap.numel() else 0.0

    @property
    def total_objective(self) -> float:
        """Kept score of the whole tensor."""
        return float(self.objective.sum())

    @property
    def total_bound(self) -> float:
        """Upper bound of the kept score of the whole tensor."""
        return float(self.bound.sum())

    @property
    def relative_gap(self) -> float:
        """``(total_bound - total_objective)`` relative to the sum of the absolute kept scores."""
        return relative_gap(float((self.bound - self.objective).sum()), float(self.scale.sum()))


torch.export.register_dataclass(HierarchicalSolution, serialized_type_name="nmsolve.HierarchicalSolution")


@overload
def hierarchical_mask(
    scores: Tensor,
    pattern: VNMPatternLike,
    *,
    limit: int = ...,
    backend: str = ...,
    return_solution: Literal[False] = False,
) -> Tensor: ...
@overload
def hierarchical_mask(
    scores: Tensor,
    pattern: VNMPatternLike,
    *,
    limit: int = ...,
    backend: str = ...,
    return_solution: Literal[True],
) -> HierarchicalSolution: ...
def hierarchical_mask(
    scores: Tensor,
    pattern: VNMPatternLike,
    *,
    limit: int = _LIMIT,
    backend: str = "auto",
    return_solution: bool = False,
) -> Tensor | HierarchicalSolution:
    """The V:N:M mask that keeps the most score, the pattern of VENOM (arXiv 2310.02065).

    In each strip of V rows and each group of M columns, all rows keep the same four columns (the pattern's
    ``columns``), and each row its N largest scores of those. Which columns keep the most is found by branch
    and bound (:mod:`nmsolve.backends.torch.strips`), and proven.

    Parameters
    ----------
    scores : Tensor
        ``(..., rows, cols)``, float64 (below 2^960), float32, float16 or bfloat16, finite, any strides;
        higher = keep. The work is done in float64. Scores may be negative: a row still keeps exactly N. A
        last strip of fewer rows is one of its own; a last group of fewer columns keeps at most K of them and
        at most N of those. What must not be kept is not to be marked by huge negative scores: they are kept
        out of the mask, but cost the others digits, and the gap says how many.
    pattern : VNMPattern, str or (int, int, int)
        ``"64:2:16"``, ``(64, 2, 16)``, or a :class:`~nmsolve.VNMPattern`, which can have other numbers of
        columns than 4.
    limit : int
        The search of a strip and group ends after this many passes over one of its columns, each of V
        numbers; what it has then is a good choice, with a gap. 0 is the best choice that exchanges of single
        columns find. The default has been enough for 4 columns of up to 128 (docs/hierarchical.md).
    backend : {"auto", "cpu", "torch"}
        "cpu" is Numba, "torch" the reference on any device. "triton" searches a block in the registers of a
        program, for M up to 64, up to 8 columns kept, and V times M up to 16384, in powers of two (M at
        least four times the kept columns); "auto" takes it on a GPU, and the reference for larger blocks.
    return_solution : bool
        Return a :class:`~nmsolve.HierarchicalSolution`, with columns, objective, bound and gap.

    Returns
    -------
    Tensor or HierarchicalSolution
        bool mask of the scores' shape on their device, True = keep; or the solution that holds it. The mask
        of a strip and group depends on their scores alone.

    Raises
    ------
    NMSolveError
        If an argument is not as described.
    BackendError
        If the backend asked for cannot run here.

    Examples
    --------
    >>> scores = torch.tensor([[5.0, 1.0, 4.0], [1.0, 9.0, 3.0]])
    >>> hierarchical_mask(scores, nmsolve.VNMPattern(2, 1, 3, columns=2))
    tensor([[ True, False, False],
            [False,  True, False]])
    >>> solution = hierarchical_mask(torch.rand(64, 64), "16:2:8", return_solution=True)
    >>> solution.columns.shape, solution.max_gap
    (torch.Size([4, 8, 4]), 0.0)
    """
    pattern = VNMPattern.of(pattern)
    check_scores(scores)
    if is_dtensor(scores):
        raise NMSolveError(
            "scores: expected a plain tensor, got a DTensor; shards that consist of whole strips and groups "
            "can be masked one by one"
        )
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise NMSolveError(f"limit: expected an integer of at least 0, got {limit!r}")
    check_backend(backend)
    options = (pattern.v, pattern.n, pattern.m, pattern.columns, min(limit, 1 << 62), backend)
    if return_solution:
        return HierarchicalSolution(*_solution_op(scores.detach(), *options))
    mask: Tensor = _mask_op(scores.detach(), *options)
    return mask


def check_hierarchical_mask(mask: Tensor, pattern: VNMPatternLike) -> None:
    """Raise unless a mask is V:N:M, naming the first strip, group or row that is not.

    Parameters
    ----------
    mask : Tensor
        bool ``(..., rows, cols)``, True = keep.
    pattern : VNMPattern, str or (int, int, int)
        The pattern it should have, edges as in :func:`hierarchical_mask`.

    Raises
    ------
    NMSolveError
        If the mask is not as described.

    Examples
    --------
    >>> check_hierarchical_mask(hierarchical_mask(torch.rand(8, 16), "4:2:8"), "4:2:8")
    >>> check_hierarchical_mask(torch.eye(8, dtype=torch.bool), "8:1:8")
    Traceback (most recent call last):
    nmsolve.errors.NMSolveError: mask: strip 0, group 0 keeps 8 columns, expected at most 4 (pattern 8:1:8)
    """
    pattern = VNMPattern.of(pattern)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim < 2:
        raise NMSolveError(f"mask: expected a bool tensor of at least 2 dimensions, got {describe(mask)}")
    if mask.numel() == 0:
        return
    flat = mask.reshape(-1, *mask.shape[-2:])
    for rows, cols in _regions(mask, pattern):
        blocks = _blocks(flat[:, rows, cols], pattern)  # (B, S, G, V, M)
        k, n = _kept_of(blocks.shape[-1], pattern)
        origin = rows.start // pattern.v, cols.start // pattern.m
        for what, held, most in (("columns", blocks.any(-2).sum(-1), k), ("row", blocks.sum(-1), n)):
            wrong = held > most if what == "columns" else held != most
            if not bool(wrong.any()):
                continue
            batch, s, g, *row = at = wrong.nonzero()[0].tolist()
            where = f"matrix {batch}, " if mask.ndim > 2 else ""
            where += f"strip {origin[0] + s}, group {origin[1] + g}"
            count = int(held[tuple(at)])
            if row:
                message = f"{where}, row {row[0]} keeps {count} entries, expected {most}"
            else:
                message = f"{where} keeps {count} columns, expected at most {most}"
            raise NMSolveError(f"mask: {message} (pattern {pattern})")


# --- strips and groups --------------------------------------------------------------------------------------


def _regions(scores: Tensor, pattern: VNMPattern) -> Iterator[tuple[slice, slice]]:
    """The up to four rectangles whose strips and groups all have one shape."""
    rows, cols = scores.shape[-2:]
    full_rows, full_cols = rows // pattern.v * pattern.v, cols // pattern.m * pattern.m
    for r0, r1 in ((0, full_rows), (full_rows, rows)):
        for c0, c1 in ((0, full_cols), (full_cols, cols)):
            if r1 > r0 and c1 > c0:
                yield slice(r0, r1), slice(c0, c1)


def _blocks(matrices: Tensor, pattern: VNMPattern) -> Tensor:
    """``(B, rows, cols)`` of a region as the view ``(B, S, G, V, M)``."""
    v, m = (min(*pair) for pair in zip((pattern.v, pattern.m), matrices.shape[1:], strict=True))
    return matrices.unflatten(2, (-1, m)).unflatten(1, (-1, v)).transpose(2, 3)


def _kept_of(width: int, pattern: VNMPattern) -> tuple[int, int]:
    """Columns that a group of so many keeps, and entries that a row keeps of those."""
    k = min(pattern.columns, width)
    return k, min(pattern.n, k)


def _tiles(scores: Tensor, pattern: VNMPattern) -> Iterator[tuple[int, slice, slice]]:
    """(matrix, rows, columns) of whole strips and groups of one shape, of about _CHUNK elements at most."""
    for rows, cols in _regions(scores, pattern):
        height, width = min(pattern.v, rows.stop - rows.start), min(pattern.m, cols.stop - cols.start)
        across = max(1, _CHUNK // (height * width)) * width
        down = max(1, _CHUNK // (height * min(across, cols.stop - cols.start))) * height
        for b in range(len(scores)):
            for r in range(rows.start, rows.stop, down):
                for c in range(cols.start, cols.stop, across):
                    yield b, slice(r, min(r + down, rows.stop)), slice(c, min(c + across, cols.stop))


# --- solving ------------------------------------------------------------------------------------------------


def _runner(backend: str, scores: Tensor, pattern: VNMPattern) -> Backend:
    row = select(backend, scores.device)
    # The largest block, those at edges being smaller.
    height, width = (min(*pair) for pair in zip((pattern.v, pattern.m), scores.shape[-2:], strict=True))
    if not scores.numel() or row.holds_strip(height, width, pattern.columns):
        return row
    if backend != AUTO:
        raise BackendError(
            f"backend: {row.name!r} holds no blocks of {height} x {width} that keep {pattern.columns} "
            "columns; use 'auto' or 'torch'"
        )
    return REFERENCE


def _solve(
    scores: Tensor, v: int, n: int, m: int, columns: int, limit: int, backend: str
) -> tuple[Tensor, ...]:
    """The tensors of a :class:`HierarchicalSolution`, in their order."""
    pattern = VNMPattern(v, n, m, columns)
    row = _runner(backend, scores, pattern)
    check_finite(scores)
    if scores.dtype == torch.float64 and scores.numel() and float(scores.abs().max()) >= _LARGEST:
        raise NMSolveError(
            f"scores: expected absolute values below {_LARGEST:.1e}, got {scores.abs().max():.1e}"
        )
    outputs = _blank_solution(scores, v, n, m, columns, limit, backend)
    if scores.numel() == 0:
        return outputs
    mask, chosen, objective, bound, scale = (
        tensor.view(-1, *tensor.shape[scores.ndim - 2 :]) for tensor in outputs
    )
    matrices = scores.reshape(-1, *scores.shape[-2:])
    for b, rows, cols in _tiles(matrices, pattern):
        tile = _blocks(matrices[b : b + 1, rows, cols], pattern)[0]
        found, most = _best_columns(tile, pattern, limit, row)
        kept, value, size = _fill(tile, found, pattern, row)
        part = mask[b : b + 1, rows, cols]
        part.copy_(kept.transpose(1, 2).reshape(part.shape))
        strips = slice(rows.start // v, -(-rows.stop // v))
        groups = slice(cols.start // m, -(-cols.stop // m))
        chosen[b, strips, groups, : found.shape[-1]] = found
        objective[b, strips, groups] = value
        bound[b, strips, groups] = torch.maximum(most, value)
        scale[b, strips, groups] = size
    return outputs


def _best_columns(tile: Tensor, pattern: VNMPattern, limit: int, row: Backend) -> tuple[Tensor, Tensor]:
    """``(S, G, K)`` columns of ``(S, G, V, M)`` blocks, ascending, and ``(S, G)`` bounds; -inf is proven."""
    *lead, _, width = tile.shape
    k, n = _kept_of(width, pattern)
    proven = torch.full(lead, -torch.inf, dtype=torch.float64, device=tile.device)
    if k == width or n == 0:
        return torch.arange(k, device=tile.device).expand(*lead, k), proven
    if n == k:
        # Rows keep all of the columns: the best are those of the largest sums.
        sums = tile.sum(-2, dtype=torch.float64)
        return sums.topk(k, dim=-1).indices.sort(dim=-1).values, proven
    blocks = tile.transpose(-2, -1).flatten(0, 1).double()
    found, bounds = row.strips.best_columns(blocks, n, k, limit)
    return found.view(*lead, k), bounds.view(lead)


def _fill(tile: Tensor, chosen: Tensor, pattern: VNMPattern, row: Backend) -> tuple[Tensor, Tensor, Tensor]:
    """The mask ``(S, G, V, M)`` that keeps the best of the chosen columns; objective and scale ``(S, G)``."""
    k, n = _kept_of(tile.shape[-1], pattern)
    index = chosen.unsqueeze(-2).expand(*tile.shape[:-1], k)
    held = tile.gather(-1, index)
    keep = row.masks.ordinary(held.reshape(1, -1, k), NMPattern(n, k)).view(held.shape)
    kept = held.double() * keep
    mask = torch.zeros(tile.shape, dtype=torch.bool, device=tile.device).scatter_(-1, index, keep)
    return mask, kept.sum((-2, -1)), kept.abs().sum((-2, -1))


# --- operators ----------------------------------------------------------------------------------------------


def _blank_solution(
    scores: Tensor, v: int, n: int, m: int, columns: int, limit: int, backend: str
) -> tuple[Tensor, ...]:
    """Outputs without a choice made: nothing kept."""
    *lead, rows, cols = scores.shape
    grid = (*lead, -(-rows // v), -(-cols // m))
    values = (scores.new_zeros(grid, dtype=torch.float64) for _ in range(3))
    chosen = scores.new_full((*grid, columns), -1, dtype=torch.int64)
    return scores.new_zeros(scores.shape, dtype=torch.bool), chosen, *values


_ARGUMENTS = "(Tensor scores, int v, int n, int m, int columns, int limit, str backend)"
_mask_op = register(
    "hierarchical_mask",
    _ARGUMENTS + " -> Tensor",
    lambda *arguments: _solve(*arguments)[0],
    lambda *arguments: _blank_solution(*arguments)[0],
)
_solution_op = register(
    "hierarchical_solution",
    _ARGUMENTS + " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _solve,
    _blank_solution,
)
