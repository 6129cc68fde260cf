"""The Triton backend: allocation, grids and launches. The only importer of nmsolve.kernels.

Scores are ``(batch, rows, cols)`` with any strides; a kernel reads them where they lie. Full blocks go in one
launch, the partial blocks at the right and bottom edge in one more each; those of many matrices together in
:func:`exact_group`.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmsolve.backends import ascent_schedule
from nmsolve.backends.triton import launch_table
from nmsolve.blocks import BlockGrid, grid_of
from nmsolve.kernels import _launch
from nmsolve.kernels.ascent import AscentSchedule
from nmsolve.kernels.dykstra import dykstra_kernel
from nmsolve.kernels.exact import exact_kernel
from nmsolve.kernels.exhaustive import exhaustive_kernel
from nmsolve.kernels.grouped import grouped_exhaustive_kernel, grouped_kernel
from nmsolve.kernels.nm import nm_kernel
from nmsolve.kernels.nm_groups import nm_groups_kernel
from nmsolve.pattern import NMPattern
from nmsolve.solution import BlockResult

__all__ = [
    "device_of",
    "exact",
    "exact_group",
    "greedy",
    "ordinary",
    "shipped_tile",
    "tsenor",
    "use_tiles",
    "why_not",
]

SCHEDULE = AscentSchedule(*(getattr(ascent_schedule, name) for name in AscentSchedule._fields))
"""The constants of the dual ascent, as the exact kernels take them."""


_launch.use_rows_of(triton.__version__)
_launch.replace(launch_table.asked_for())


def shipped_tile(kernel: str, m: int) -> launch_table.Entry:
    """The entry of the launch table that ships for blocks of size ``m``."""
    return _launch.tabled(kernel, m)


def use_tiles(entries: Mapping[tuple[str, int], launch_table.Entry]) -> None:
    """Use these entries in place of the launch table's; earlier ones no longer count."""
    _launch.replace(entries)


def why_not(device: torch.device) -> str | None:
    """Why this backend cannot run tensors on ``device``, or None if it can."""
    if device.type == "cuda":
        return None
    if isinstance(exact_kernel, triton.JITFunction):
        return (
            f"the tensor is on {device}; Triton compiles for GPUs (TRITON_INTERPRET=1 emulates one, slowly)"
        )
    if device.type == "cpu":
        return None
    return f"Triton's interpreter runs CPU tensors, and this one is on {device}"


def exact(
    scores: Tensor,
    pattern: NMPattern,
    *,
    warm: tuple[Tensor, Tensor] | None = None,
    want_solution: bool = False,
) -> BlockResult:
    """Optimal masks of ``(batch, rows, cols)`` scores; duals, objective and bound when asked.

    Full 4 x 4 blocks are solved exhaustively where no duals are asked for; a mask may then differ from that
    of the solution where several are optimal. ``warm`` are row and column duals ``(batch, GR, GC, M)`` to
    start from instead of the ascent's.
    """
    grid = grid_of(scores, pattern)
    result = _empty_result(scores, pattern, want_solution)
    warm_u = warm_v = None
    if warm is not None:
        warm_u, warm_v = (duals.to(_dual_dtype(scores)).contiguous() for duals in warm)
    for region in _regions(grid, pattern.m, scores):
        if _is_exhaustive(pattern, region.edge, want_solution):
            with device_of(scores):
                exhaustive_kernel[_programs(region, _launch.EXHAUSTIVE_BLOCKS)](
                    scores_ptr=scores,
                    mask_ptr=_mask_pointer(result.mask, region),
                    **_matrix_arguments(scores),
                    **region.rectangle,
                    **exhaustive_arguments(pattern),
                    PACKED=region.packed,
                )
            continue
        tile = _exact_tile(region.edge, pattern.m)
        with device_of(scores):
            exact_kernel[_programs(region, tile.blocks)](
                scores_ptr=scores,
                mask_ptr=_mask_pointer(result.mask, region),
                row_duals_ptr=result.row_duals,
                col_duals_ptr=result.col_duals,
                objective_ptr=result.objective,
                bound_ptr=result.bound,
                warm_row_ptr=warm_u,
                warm_col_ptr=warm_v,
                n=pattern.n,
                m=pattern.m,
                **_matrix_arguments(scores),
                **region.rectangle,
                grid_rows=grid.block_rows,
                grid_cols=grid.block_cols,
                unit=1,
                **tile_arguments(tile),
                PADDED=region.edge or tile.size != pattern.m,
                SLACK=region.edge,
                PACKED=region.packed,
                WARM=warm is not None,
                SOLUTION=want_solution,
                SCHEDULE=SCHEDULE,
            )
    return result


def exact_group(
    scores: list[Tensor],
    pattern: NMPattern,
    *,
    warm: None = None,
    want_solution: bool = False,
) -> list[BlockResult]:
    """What :func:`exact` returns for each matrix, in one launch of full blocks and one of partial ones.

    Full blocks take two launches where 4 divides the width of some matrices and not of others. The launches
    read where the matrices lie from a table, which is copied to the GPU without waiting for it. A CUDA graph
    would copy it again at every replay, from memory that is no longer its own: while one is captured, every
    matrix has launches of its own, whose arguments are all in the graph.
    """
    with device_of(scores[0]):
        if scores[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return [exact(matrix, pattern, want_solution=want_solution) for matrix in scores]
    results = [_empty_result(matrix, pattern, want_solution) for matrix in scores]
    groups: dict[tuple[bool, bool], list[_Member]] = defaultdict(list)
    for matrix, result in zip(scores, results, strict=True):
        for region in _regions(grid_of(matrix, pattern), pattern.m, matrix):
            groups[region.edge, region.packed].append(_Member(region, matrix, result))
    for (edge, packed), members in groups.items():
        if _is_exhaustive(pattern, edge, want_solution):
            meta = exhaustive_arguments(pattern)
            table, programs = _table(members, meta["BLOCKS"], pattern)
            with device_of(scores[0]):
                grouped_exhaustive_kernel[(programs,)](
                    table_ptr=table,
                    regions=len(members),
                    ELEMENT=_ELEMENTS[scores[0].dtype],
                    **meta,
                    PACKED=packed,
                )
            continue
        tile = _exact_tile(edge, pattern.m)
        table, programs = _table(members, tile.blocks, pattern)
        with device_of(scores[0]):
            grouped_kernel[(programs,)](
                table_ptr=table,
                regions=len(members),
                n=pattern.n,
                m=pattern.m,
                unit=1,
                ELEMENT=_ELEMENTS[scores[0].dtype],
                **tile_arguments(tile),
                PADDED=edge or tile.size != pattern.m,
                SLACK=edge,
                PACKED=packed,
                SOLUTION=want_solution,
                SCHEDULE=SCHEDULE,
            )
    return results


def greedy(scores: Tensor, pattern: NMPattern) -> Tensor:
    """Masks by descending score, completed to the full count."""
    return _approximate(scores, pattern, 0, 0.0, transport=False)


def tsenor(scores: Tensor, pattern: NMPattern, *, iterations: int, tau: float) -> Tensor:
    """Masks by entropic transport, greedy rounding and swaps (arXiv 2505.23949); every line is filled."""
    return _approximate(scores, pattern, iterations, float(tau), transport=True)


def _approximate(
    scores: Tensor, pattern: NMPattern, iterations: int, tau: float, *, transport: bool
) -> Tensor:
    if pattern.n == 0:
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for region in _regions(grid_of(scores, pattern), pattern.m, scores):
        tile = dykstra_tile(pattern.m, scores.dtype, transport=transport, packed=region.packed)
        with device_of(scores):
            dykstra_kernel[_programs(region, tile.blocks)](
                scores_ptr=scores,
                mask_ptr=_mask_pointer(mask, region),
                n=pattern.n,
                m=pattern.m,
                **_matrix_arguments(scores),
                **region.rectangle,
                unit=1,
                iterations=iterations,
                tau=tau,
                **tile_arguments(tile),
                PADDED=region.edge or tile.size != pattern.m,
                SLACK=region.edge,
                PACKED=region.packed,
                TRANSPORT=transport,
            )
    return mask


def ordinary(scores: Tensor, pattern: NMPattern) -> Tensor:
    """Plain N:M along the last dimension: the N largest of each group of M, ties to the lowest index."""
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    batch, rows, cols = scores.shape
    groups = batch * rows * -(-cols // pattern.m)
    if whole_groups(scores, pattern):
        meta = whole_groups_arguments(pattern, scores.element_size() * 8)
        with device_of(scores):
            nm_groups_kernel[(triton.cdiv(groups, meta["LANES"] * meta["TILES"]),)](
                scores_ptr=scores, mask_ptr=mask.view(torch.int32), groups=groups, **meta
            )
    elif groups:
        size, together = _launch.group_tile(pattern.m, scores.element_size() * 8)
        with device_of(scores):
            nm_kernel[(triton.cdiv(groups, together),)](
                scores_ptr=scores,
                mask_ptr=mask.view(torch.uint8),
                n=pattern.n,
                m=pattern.m,
                **_matrix_arguments(scores),
                SIZE=size,
                GROUPS=together,
                **_launch.options(warps=1),
            )
    return mask


def whole_groups(scores: Tensor, pattern: NMPattern) -> bool:
    """Whether the groups lie one behind the other, in a size that a lane can sort."""
    fits = pattern.m in (4, 8, 16, 32) and pattern.n > 0 and scores.shape[-1] % pattern.m == 0
    return fits and scores.numel() > 0 and scores.is_contiguous()


def whole_groups_arguments(pattern: NMPattern, bits: int) -> dict[str, Any]:
    """The meta-arguments of the kernel for whole groups of scores of ``bits`` bits."""
    width, lanes, tiles, warps = _launch.whole_groups_tile(pattern.m, bits)
    size = {"N": pattern.n, "M": pattern.m, "LOG": pattern.m.bit_length() - 1}
    return size | {"WIDTH": width, "LANES": lanes, "TILES": tiles, **_launch.options(warps)}


_ELEMENTS = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


class _Region(NamedTuple):
    """A rectangle of blocks in each matrix that one launch covers."""

    rectangle: dict[str, int]  # in blocks, as the kernels' arguments name it
    blocks: int
    edge: bool  # whether its blocks are partial
    packed: bool  # whether 4 mask entries are stored as one word


def _regions(grid: BlockGrid, m: int, scores: Tensor) -> Iterator[_Region]:
    full_rows, full_cols = grid.rows // m, grid.cols // m
    for first_row, first_col, rows, cols, edge in (
        (0, 0, full_rows, full_cols, False),
        (0, full_cols, full_rows, grid.block_cols - full_cols, True),
        (full_rows, 0, grid.block_rows - full_rows, grid.block_cols, True),
    ):
        blocks = len(scores) * rows * cols
        if blocks:
            packed = not edge and m % 4 == 0 and grid.cols % 4 == 0
            rectangle = {
                "first_block_row": first_row,
                "first_block_col": first_col,
                "block_rows": rows,
                "block_cols": cols,
            }
            yield _Region(rectangle, blocks, edge, packed)


class _Member(NamedTuple):
    """A region of a group launch, with its matrix and where the result goes."""

    region: _Region
    scores: Tensor
    result: BlockResult


def _table(members: Sequence[_Member], per_program: int, pattern: NMPattern) -> tuple[Tensor, int]:
    """The table of a group launch, see :mod:`nmsolve.kernels.grouped`, and its number of programs."""
    rows = []
    programs = 0
    for region, scores, result in members:
        grid = grid_of(scores, pattern)
        addresses = [0 if output is None else output.data_ptr() for output in result]
        rows.append(
            [
                programs,
                scores.data_ptr(),
                *addresses,
                *_matrix_arguments(scores).values(),
                *region.rectangle.values(),
                grid.block_rows,
                grid.block_cols,
            ]
        )
        programs += triton.cdiv(region.blocks, per_program)
    device = members[0].scores.device
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True), programs


def _dual_dtype(scores: Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def _empty_result(scores: Tensor, pattern: NMPattern, want_solution: bool) -> BlockResult:
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    if not want_solution:
        return BlockResult(mask)
    grid = grid_of(scores, pattern)
    blocks = (len(scores), grid.block_rows, grid.block_cols)
    u, v = (
        torch.empty((*blocks, pattern.m), dtype=_dual_dtype(scores), device=scores.device) for _ in range(2)
    )
    objective, bound = (torch.empty(blocks, dtype=torch.float64, device=scores.device) for _ in range(2))
    return BlockResult(mask, u, v, objective, bound)


def _exact_tile(edge: bool, m: int) -> _launch.Tile:
    return _launch.tile("exact_edge" if edge else "exact", m)


def _is_exhaustive(pattern: NMPattern, edge: bool, want_solution: bool) -> bool:
    """Whether looking at every mask is the fastest way: full 4 x 4 blocks of which no duals are wanted."""
    return pattern.m == 4 and 0 < pattern.n < 4 and not edge and not want_solution


def exhaustive_arguments(pattern: NMPattern) -> dict[str, int]:
    """The constexpr arguments of the exhaustive kernels but PACKED, and options for the compiler."""
    tile = {"N": pattern.n, "BLOCKS": _launch.EXHAUSTIVE_BLOCKS}
    return tile | _launch.options(_launch.EXHAUSTIVE_WARPS)


def dykstra_tile(m: int, dtype: torch.dtype, *, transport: bool, packed: bool) -> _launch.Tile:
    """The tile of ``dykstra_kernel``; ``packed`` masks are those of full blocks."""
    tile = _launch.tile("tsenor", m)
    fits = transport and packed and tile.size == m and dtype != torch.float64
    return tile if fits else _launch.tile("dykstra", m)


def tile_arguments(tile: _launch.Tile, *, amd: bool = torch.version.hip is not None) -> dict[str, int]:
    """The constexpr arguments that lay out a kernel's tile, and options for the compiler.

    NVIDIA's assembler would rather spill than use more than 168 registers, to fit more warps; ``maxnreg``
    tells it otherwise. AMD's compiler does not take it.
    """
    return ({} if amd else {"maxnreg": 255}) | {
        "ROWS_IN": tile.rows_in,
        "COLS_IN": tile.cols_in,
        "ROWS_OUT": tile.size // tile.rows_in,
        "COLS_OUT": tile.size // tile.cols_in,
        "BLOCKS": tile.blocks,
        **_launch.options(tile.warps),
    }


def _mask_pointer(mask: Tensor, region: _Region) -> Tensor:
    return mask.view(torch.int32 if region.packed else torch.uint8)


def _matrix_arguments(scores: Tensor) -> dict[str, int]:
    """Sizes and strides, as the kernels' arguments name them."""
    batch, rows, cols = scores.shape
    stride_batch, stride_row, stride_col = scores.stride()
    return {
        "rows": rows,
        "cols": cols,
        "batch": batch,
        "stride_batch": stride_batch,
        "stride_row": stride_row,
        "stride_col": stride_col,
    }


def _programs(region: _Region, per_program: int) -> tuple[int]:
    """The grid of a launch on a region."""
    return (triton.cdiv(region.blocks, per_program),)


def device_of(scores: Tensor) -> contextlib.AbstractContextManager[None]:
    return torch.cuda.device(scores.device) if scores.is_cuda else contextlib.nullcontext()
