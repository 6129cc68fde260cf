"""The Numba backend of soft and hard permutations: batches shared out over threads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nmsolve.backends.cpu._numba.assignment import solve_assignments
from nmsolve.backends.cpu._numba.exchanges import BAND as EXCHANGE_BAND
from nmsolve.backends.cpu._numba.exchanges import exchange_values as exchange_kernel
from nmsolve.backends.cpu._numba.exchanges import subset_sums as subset_kernel
from nmsolve.backends.cpu._numba.exchanges import sum_best as best_kernel
from nmsolve.backends.cpu._numba.gains import BAND as GAINS_BAND
from nmsolve.backends.cpu._numba.gains import nth_largest_of as nth_of_kernel
from nmsolve.backends.cpu._numba.gains import sum_gains as gains_kernel
from nmsolve.backends.cpu._numba.maxima import BAND
from nmsolve.backends.cpu._numba.maxima import nth_largest as nth_kernel
from nmsolve.backends.cpu._numba.maxima import sum_largest as largest_kernel
from nmsolve.backends.cpu._numba.maxima import sum_maxima as maxima_kernel
from nmsolve.backends.cpu._numba.sinkhorn import backward, forward
from nmsolve.backends.cpu._numba.threads import share_out
from nmsolve.backends.shared import permute_columns, rms_norm_permute

__all__ = [
    "assignment",
    "exchange_values",
    "nth_largest",
    "nth_largest_of",
    "permute_columns",
    "rms_norm_permute",
    "sinkhorn_backward",
    "sinkhorn_forward",
    "sum_best",
    "sum_gains",
    "sum_largest",
    "sum_maxima",
]


def assignment(scores: Tensor, want_solution: bool) -> tuple[Tensor, ...]:
    """As the reference's ``assignment``; -1 comes first where a score is not finite."""
    batch, m = scores.shape[:2]
    permutations = torch.empty(batch, m, dtype=torch.int64)
    certified = batch if want_solution else 0
    row_duals, col_duals = (torch.empty(certified, m, dtype=torch.float64) for _ in range(2))
    values = torch.empty(certified, 3, dtype=torch.float64)
    arrays = _arrays(_widened(scores), permutations, row_duals, col_duals, values)
    _solve(partial(solve_assignments, *arrays), batch, m * m)
    if not want_solution:
        return (permutations,)
    return permutations, row_duals, col_duals, *(values[:, k].clone() for k in range(3))


def sinkhorn_forward(
    logits: Tensor,
    row_marginals: Tensor,
    col_marginals: Tensor,
    temperature: float,
    iterations: int,
    tolerance: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the reference's ``sinkhorn_forward``."""
    batch, rows, cols = logits.shape
    inputs = _arrays(_widened(logits), row_marginals.contiguous(), col_marginals.contiguous())
    kept, work = iterations if keep else 0, inputs[1].dtype
    # NumPy's arrays become tensors in a third of the time that tensors take to become arrays.
    plan = np.empty((batch, rows, cols), work)
    row_scalings, col_scalings = np.empty((batch, kept, rows), work), np.empty((batch, kept, cols), work)
    made = np.zeros((batch, 1 + kept), np.int32)
    settings = (float(temperature), iterations, float(tolerance))
    kernel = partial(forward, *inputs, *settings, plan, row_scalings, col_scalings, made)
    _solve(kernel, batch, rows * cols * iterations)
    plan_, rows_, cols_, made_ = map(torch.from_numpy, (plan, row_scalings, col_scalings, made))
    return plan_, rows_, cols_, made_


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
    """As the reference's ``sinkhorn_backward``."""
    batch, rows, cols = logits.shape
    kept = row_scalings, col_scalings, made
    inputs = _arrays(_widened(gradient), _widened(logits), col_marginals.contiguous(), *kept)
    out = np.empty((batch, rows, cols), inputs[3].dtype)
    _solve(partial(backward, *inputs, float(temperature), out), batch, rows * cols * row_scalings.shape[1])
    return torch.from_numpy(out).to(logits.dtype)


def _solve(kernel: Callable[[int, int], object], batch: int, entries: int) -> None:
    """Run ``kernel(first, last)`` over the batch, of ``entries`` entries each, on torch's threads."""
    share_out(kernel, batch, entries, torch.get_num_threads())


def _widened(tensor: Tensor) -> Tensor:
    """float16 and bfloat16 as float32, which NumPy and Numba know."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [(tensor.detach() if tensor.requires_grad else tensor).numpy() for tensor in tensors]


def nth_largest(columns: Tensor, groups: Tensor, n: int) -> Tensor:
    """As the reference's ``nth_largest``."""
    out = torch.empty(len(groups), columns.shape[1], dtype=columns.dtype)
    flat, index, found = _arrays(columns.view(-1), groups, out.view(-1))
    _solve(partial(nth_kernel, flat, index, n, found), len(groups), groups.shape[1] * columns.shape[1])
    return out


def nth_largest_of(columns: Tensor, values: Tensor, groups: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """As the reference's ``nth_largest_of``."""
    out, held = (torch.empty(len(groups), columns.shape[1], dtype=columns.dtype) for _ in range(2))
    flat, worth, index, *found = _arrays(
        columns.view(-1), values.view(-1), groups, out.view(-1), held.view(-1)
    )
    kernel = partial(nth_of_kernel, flat, worth, index, n, *found)
    _solve(kernel, len(groups), groups.shape[1] * columns.shape[1])
    return out, held


def sum_gains(thresholds: Tensor, held: Tensor, columns: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """As the reference's ``sum_gains``."""
    (batch, groups, rows), width = thresholds.shape, index.shape[1]
    out = torch.empty(batch, groups, width, dtype=torch.float64)
    flat = _arrays(thresholds.view(-1), held.view(-1), columns.view(-1), values.view(-1), index, out)
    _solve(partial(gains_kernel, *flat), batch * -(-groups // GAINS_BAND), GAINS_BAND * width * rows)
    return out


def sum_maxima(thresholds: Tensor, columns: Tensor, index: Tensor) -> Tensor:
    """As the reference's ``sum_maxima``."""
    (batch, groups, rows), width = thresholds.shape, index.shape[1]
    out = torch.empty(batch, groups, width, dtype=torch.float64)
    flat = _arrays(thresholds.view(-1), columns.view(-1), index, out)
    parts = batch * -(-groups // BAND)
    _solve(partial(maxima_kernel, *flat), parts, BAND * width * rows)
    return out


def sum_largest(columns: Tensor, members: Tensor, subsets: Tensor, n: int) -> Tensor:
    """As the reference's ``sum_largest``."""
    out = torch.empty(len(members), len(subsets), dtype=torch.float64)
    flat = _arrays(columns.view(-1), members, subsets)
    kernel = partial(largest_kernel, *flat, n, columns.shape[1], *_arrays(out))
    _solve(kernel, len(members), subsets.numel() * columns.shape[1])
    return out


def exchange_values(
    lines: Tensor, kept: Tensor, groups: Tensor, slot: int, subsets: Tensor, steps: Tensor
) -> Tensor:
    """As the reference's ``exchange_values``."""
    (_, m, blocks), count = lines.shape, len(subsets)
    out = torch.empty(len(groups), count, blocks, dtype=lines.dtype)
    flat = _arrays(lines.view(-1), kept.view(-1), groups)
    kernel = partial(exchange_kernel, *flat, slot, *_arrays(steps, out))
    _solve(kernel, len(groups), m**3 * blocks)
    return out


def sum_best(values: Tensor, lines: Tensor, index: Tensor, subsets: Tensor) -> Tensor:
    """As the reference's ``sum_best``."""
    groups, count, blocks = values.shape
    moved = torch.empty(len(index), count, blocks, dtype=lines.dtype)
    starts = index * lines[0].numel()
    _solve(
        partial(subset_kernel, *_arrays(lines.view(-1), starts, subsets, moved)), len(index), moved[0].numel()
    )
    out = torch.empty(groups, len(index), dtype=torch.float64)
    _solve(
        partial(best_kernel, *_arrays(values, moved, out)),
        -(-groups // EXCHANGE_BAND),
        EXCHANGE_BAND * moved.numel(),
    )
    return out
