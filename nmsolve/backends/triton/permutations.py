"""The Triton backend of soft and hard permutations: allocation, grids and launches."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from nmsolve.backends import shared
from nmsolve.backends.shared import (
    assignment_of,
    exchange_values,
    nth_largest_of,
    sum_best,
    sum_gains,
)
from nmsolve.backends.triton import masks as gpu
from nmsolve.kernels import _launch
from nmsolve.kernels.gather import permute_columns_kernel
from nmsolve.kernels.maxima import (
    add_parts_kernel,
    nth_largest_kernel,
    sum_largest_kernel,
    sum_maxima_kernel,
)
from nmsolve.kernels.sinkhorn import sinkhorn_forward_kernel
from nmsolve.kernels.sinkhorn_gradient import sinkhorn_backward_kernel
from nmsolve.pattern import NMPattern

__all__ = [
    "assignment",
    "exchange_values",
    "nth_largest",
    "nth_largest_of",
    "permute_columns",
    "rms_norm_permute",
    "sinkhorn_backward",
    "sinkhorn_forward",
    "sinkhorn_tile",
    "sum_best",
    "sum_gains",
    "sum_largest",
    "sum_maxima",
]

_LOG2_E = 1.4426950408889634

# Outputs per program of the gather: (rows, columns, warps), alone and behind the normalisation of whole rows.
GATHER_TILE = (4, 512, 4)
NORM_TILE = (1, 1024, 4)


class SinkhornTile(NamedTuple):
    """Register layout of one program, see :mod:`nmsolve.kernels._tile`."""

    rows_in: int
    cols_in: int
    rows_out: int
    cols_out: int
    blocks: int
    warps: int
    padded: bool

    def meta(self, *, amd: bool = torch.version.hip is not None) -> dict[str, int]:
        """The kernels' constexpr arguments; ``maxnreg`` as in ``masks.tile_arguments``."""
        return ({} if amd else {"maxnreg": 255}) | {
            "ROWS_IN": self.rows_in,
            "COLS_IN": self.cols_in,
            "ROWS_OUT": self.rows_out,
            "COLS_OUT": self.cols_out,
            "BLOCKS": self.blocks,
            "PADDED": self.padded,
            **_launch.options(self.warps),
        }


# Of 16 columns Triton 3.8 and later would spill registers for sm_80 and sm_100, and any for gfx11 and gfx12.
_SIXTEEN_COLUMNS = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)


def sinkhorn_tile(
    rows: int,
    cols: int,
    *,
    backward: bool = False,
    plain: bool = False,
    amd: bool = torch.version.hip is not None,
) -> SinkhornTile:
    """The entries of a lane: 8 x 4 of small blocks, which lie in memory side by side, 8 x 8 of others.

    Of small blocks there are as many as fill a warp. The reverse sweep has two tiles, and takes 8 x 8 from
    64 x 64 on. ``plain`` is a forward sweep without tolerance that keeps nothing: of whole blocks of 128
    it takes 8 x 16 for NVIDIA's GPUs, and half as many lanes share a row.

    Examples
    --------
    >>> tile = sinkhorn_tile(64, 60)
    >>> tile.rows_in, tile.rows_out, tile.cols_in, tile.cols_out, tile.blocks, tile.warps
    (8, 8, 8, 8, 1, 2)
    """
    sides = rows, cols
    rows, cols = triton.next_power_of_2(rows), triton.next_power_of_2(cols)
    entries = rows * cols
    rows_in, cols_in = min(rows, 8), min(cols, 4 if entries < (4096 if backward else 1024) else 8)
    if plain and not amd and sides == (128, 128) and _SIXTEEN_COLUMNS:
        cols_in = 16
    lanes = entries // (rows_in * cols_in)
    warps = max(1, lanes // 32)
    blocks = max(1, 32 // lanes)
    padded = sides != (rows, cols)
    return SinkhornTile(rows_in, cols_in, rows // rows_in, cols // cols_in, blocks, warps, padded)


def assignment(scores: Tensor, want_solution: bool) -> tuple[Tensor, ...]:
    """As the reference's ``assignment``, as the block solver's 1:M mask, in float32."""
    result = gpu.exact(scores, NMPattern(1, scores.shape[1]), warm=None, want_solution=want_solution)
    return assignment_of(scores, result, want_solution)


def sinkhorn_forward(
    logits: Tensor,
    row_marginals: Tensor,
    col_marginals: Tensor,
    temperature: float,
    iterations: int,
    tolerance: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the reference's ``sinkhorn_forward``, with base-2 logarithms as scalings."""
    batch, rows, cols = logits.shape
    row_marginals, col_marginals = _rows_dense(row_marginals), _rows_dense(col_marginals)
    kept = iterations if keep else 0
    plan = torch.empty(batch, rows, cols, dtype=torch.float32, device=logits.device)
    row_scalings, col_scalings = plan.new_empty(batch, kept, rows), plan.new_empty(batch, kept, cols)
    made = torch.empty(batch, 1 + kept, dtype=torch.int32, device=logits.device)
    tile = sinkhorn_tile(rows, cols, plain=not keep and tolerance < 0)
    with gpu.device_of(logits):
        sinkhorn_forward_kernel[(triton.cdiv(batch, tile.blocks),)](
            logits_ptr=logits,
            row_marginals_ptr=row_marginals,
            col_marginals_ptr=col_marginals,
            plan_ptr=plan,
            row_scalings_ptr=row_scalings,
            col_scalings_ptr=col_scalings,
            made_ptr=made,
            batch=batch,
            rows=rows,
            cols=cols,
            stride_batch=logits.stride(0),
            stride_row=logits.stride(1),
            stride_col=logits.stride(2),
            row_marginals_stride=row_marginals.stride(0),
            col_marginals_stride=col_marginals.stride(0),
            scale=_LOG2_E / temperature,
            iterations=iterations,
            tolerance=float(tolerance),
            one=1,
            KEEP=keep,
            TOLERANCE=tolerance >= 0,
            **tile.meta(),
        )
    return plan, row_scalings, col_scalings, made


def sinkhorn_backward(
    gradient: Tensor,
    logits: Tensor,
    row_marginals: Tensor,
    col_marginals: Tensor,
    row_scalings: Tensor,
    col_scalings: Tensor,
    made: Tensor,
    temperature: float,
) -> Tensor:
    """As the reference's ``sinkhorn_backward``, from this module's forward."""
    batch, rows, cols = logits.shape
    row_marginals, col_marginals = _rows_dense(row_marginals), _rows_dense(col_marginals)
    out = torch.empty(batch, rows, cols, dtype=logits.dtype, device=logits.device)
    spans_sum = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    tile = sinkhorn_tile(rows, cols, backward=True)
    with gpu.device_of(logits):
        sinkhorn_backward_kernel[(triton.cdiv(batch, tile.blocks),)](
            gradient_ptr=gradient,
            logits_ptr=logits,
            row_marginals_ptr=row_marginals,
            col_marginals_ptr=col_marginals,
            row_scalings_ptr=row_scalings,
            col_scalings_ptr=col_scalings,
            made_ptr=made,
            spans_sum_ptr=spans_sum,
            out_ptr=out,
            batch=batch,
            rows=rows,
            cols=cols,
            gradient_stride_batch=gradient.stride(0),
            gradient_stride_row=gradient.stride(1),
            gradient_stride_col=gradient.stride(2),
            stride_batch=logits.stride(0),
            stride_row=logits.stride(1),
            stride_col=logits.stride(2),
            row_marginals_stride=row_marginals.stride(0),
            col_marginals_stride=col_marginals.stride(0),
            scale=_LOG2_E / temperature,
            inverse_temperature=1.0 / temperature,
            iterations=row_scalings.shape[1],
            one=1,
            **tile.meta(),
        )
    return out


def permute_columns(x: Tensor, permutation: Tensor) -> Tensor:
    """``x[:, permutation]`` of ``(rows, cols)`` with any strides."""
    across = triton.cdiv(x.shape[1], GATHER_TILE[1])
    return _gather(x, permutation, x, 0.0, False, *GATHER_TILE, across)


def rms_norm_permute(x: Tensor, weight: Tensor, permutation: Tensor, eps: float) -> Tensor:
    """``(x / sqrt(mean(x^2) + eps) * weight)[:, permutation]``, in float32, rounded once."""
    return _gather(x, permutation, weight.contiguous(), eps, True, *NORM_TILE, 1)


def _gather(
    x: Tensor,
    permutation: Tensor,
    weight: Tensor,
    eps: float,
    norm: bool,
    per_row: int,
    per_col: int,
    warps: int,
    across: int,
) -> Tensor:
    rows, cols = x.shape
    out = torch.empty(rows, cols, dtype=x.dtype, device=x.device)
    with gpu.device_of(x):
        permute_columns_kernel[(triton.cdiv(rows, per_row), across)](
            x_ptr=x,
            permutation_ptr=permutation.contiguous(),
            weight_ptr=weight,
            out_ptr=out,
            rows=rows,
            cols=cols,
            stride_row=x.stride(0),
            stride_col=x.stride(1),
            eps=eps,
            NORM=norm,
            ROWS=per_row,
            COLS=per_col,
            **_launch.options(warps),
        )
    return out


def maxima_arguments(bits: int) -> dict[str, int]:
    """The constexpr arguments of the sums of maxima of so wide scores."""
    tile = _launch.maxima_tile(bits)
    return {
        "WORD": tile.word,
        "GROUPS_IN": tile.groups_in,
        "COLS_IN": tile.cols_in,
        "SHARES": tile.shares,
        "GROUPS_OUT": tile.groups_out,
        "COLS_OUT": tile.cols_out,
        "SPAN": _launch.SPAN_ROWS,
        **_launch.options(tile.warps),
    }


def sum_maxima(thresholds: Tensor, columns: Tensor, index: Tensor) -> Tensor:
    """As the reference's ``sum_maxima``; sums of about a thousand rows are made in the scores' dtype."""
    (batch, groups, rows), width = thresholds.shape, index.shape[1]
    parts, part = _launch.parts_of(rows)
    summed_in = torch.float64 if parts == 1 else columns.dtype
    sums = torch.empty(parts, batch, groups, width, dtype=summed_in, device=columns.device)
    if not sums.numel():
        return sums[0].double()
    meta = maxima_arguments(columns.element_size() * 8)
    down = triton.cdiv(groups, meta["GROUPS_IN"] * meta["GROUPS_OUT"])
    across = triton.cdiv(width, meta["COLS_IN"] * meta["COLS_OUT"])
    with gpu.device_of(columns):
        sum_maxima_kernel[(batch * down * across, parts)](
            thresholds_ptr=thresholds,
            columns_ptr=columns,
            index_ptr=index,
            sums_ptr=sums,
            batch=batch,
            groups=groups,
            width=width,
            rows=rows,
            part=part,
            stride_batch=thresholds.stride(0),
            stride_group=thresholds.stride(1),
            stride_col=columns.stride(0),
            **meta,
        )
    return add_parts(sums) if parts > 1 else sums[0]


def add_parts(sums: Tensor) -> Tensor:
    """The float64 sums over the first dimension of a contiguous tensor, in its order."""
    out = torch.empty(sums.shape[1:], dtype=torch.float64, device=sums.device)
    with gpu.device_of(sums):
        add_parts_kernel[(triton.cdiv(out.numel(), _launch.PARTS_ENTRIES),)](
            parts_ptr=sums,
            out_ptr=out,
            size=out.numel(),
            PARTS=len(sums),
            ENTRIES=_launch.PARTS_ENTRIES,
            **_launch.options(warps=4),
        )
    return out


def sorting_arguments(n: int, k: int, bits: int, *, warps: int) -> dict[str, int]:
    """The constexpr arguments of kernels that sort k columns of so wide scores, for the n-th or n largest."""
    rows = _launch.sorting_tile(bits, k, warps)
    return {"N": n, "K": k, "LOG": (k - 1).bit_length(), "ROWS": rows, **_launch.options(warps)}


def nth_largest(columns: Tensor, groups: Tensor, n: int) -> Tensor:
    """As the reference's ``nth_largest``."""
    count, k = groups.shape
    if k > _launch.MOST_SORTED:
        return shared.nth_largest(columns, groups, n)
    rows = columns.shape[1]
    out = torch.empty(count, rows, dtype=columns.dtype, device=columns.device)
    if not out.numel():
        return out
    meta = sorting_arguments(n, k, columns.element_size() * 8, warps=4)
    with gpu.device_of(columns):
        nth_largest_kernel[(count, triton.cdiv(rows, meta["ROWS"]))](
            columns_ptr=columns,
            groups_ptr=groups,
            out_ptr=out,
            rows=rows,
            stride_col=columns.stride(0),
            **meta,
        )
    return out


def sum_largest(columns: Tensor, members: Tensor, subsets: Tensor, n: int) -> Tensor:
    """As the reference's ``sum_largest``; a lane adds up some rows in the scores' dtype."""
    (pairs, width), (count, k) = members.shape, subsets.shape
    if k > _launch.MOST_SORTED:
        return shared.sum_largest(columns, members, subsets, n)
    out = torch.empty(pairs, count, dtype=torch.float64, device=columns.device)
    if not out.numel():
        return out
    with gpu.device_of(columns):
        sum_largest_kernel[(pairs,)](
            columns_ptr=columns,
            members_ptr=members,
            subsets_ptr=subsets,
            out_ptr=out,
            members=width,
            subsets=count,
            rows=columns.shape[1],
            stride_col=columns.stride(0),
            **sorting_arguments(n, k, columns.element_size() * 8, warps=1),
        )
    return out


def _rows_dense(marginals: Tensor) -> Tensor:
    """Marginals ``(B, lines)`` whose lines lie side by side; batches may overlap."""
    return marginals if marginals.shape[1] < 2 or marginals.stride(1) == 1 else marginals.contiguous()
