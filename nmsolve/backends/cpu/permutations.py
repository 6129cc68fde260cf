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
from nmsolve.backends.cpu._numba.sinkhorn import (
    backward_double,
    backward_single,
    forward_double,
    forward_single,
)
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

# Entries times iterations of plans up to which starting a thread takes as long as it saves, and how many of
# them are the work that other kernels do on one entry.
_ALONE = 1 << 23
_LIGHT = 16


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
    row_marginals: Tensor | None,
    col_marginals: Tensor | None,
    temperature: float,
    iterations: int,
    tolerance: float,
    keep: bool,
) -> tuple[Tensor, ...]:
    """As the reference's ``sinkhorn_forward``; the plan alone unless ``keep``.

    What is kept are factors and references; see :mod:`nmsolve.backends.cpu._numba.sinkhorn`.
    """
    batch, rows, cols = logits.shape
    logits = _widened(logits).contiguous()
    work = logits.dtype
    plan = torch.empty((batch, rows, cols), dtype=work)
    made: tuple[Tensor, ...] = (plan,)
    a = b = u = v = marks = None
    if row_marginals is not None and col_marginals is not None:
        a, b = row_marginals.contiguous(), col_marginals.contiguous()
    if keep:
        u = torch.empty((batch, iterations, rows), dtype=work)
        v = torch.empty((batch, iterations, cols), dtype=work)
        marks = torch.empty((batch, 1 + iterations), dtype=torch.int32)
        made = plan, u, v, marks
    kernel = forward_double if work == torch.float64 else forward_single
    settings = temperature, iterations, tolerance
    places = plan.data_ptr(), _place(u), _place(v), _place(marks)
    arguments = (logits.data_ptr(), _place(a), _place(b), *settings, *places, rows, cols)
    _solve_plans(kernel, arguments, batch, rows * cols * iterations)
    return made


def sinkhorn_backward(
    gradient: Tensor,
    logits: Tensor,
    row_marginals: Tensor | None,
    col_marginals: Tensor | None,
    row_scalings: Tensor,
    col_scalings: Tensor,
    made: Tensor,
    temperature: float,
) -> Tensor:
    """As the reference's ``sinkhorn_backward``, from this module's forward."""
    batch, rows, cols = logits.shape
    iterations, given = row_scalings.shape[1], logits.dtype
    logits = _widened(logits).contiguous()
    work = logits.dtype
    gradient = (gradient if gradient.dtype == work else gradient.to(work)).contiguous()
    a = b = None
    if row_marginals is not None and col_marginals is not None:
        a, b = row_marginals.contiguous(), col_marginals.contiguous()
    u, v, marks = row_scalings.contiguous(), col_scalings.contiguous(), made.contiguous()
    out = torch.empty((batch, rows, cols), dtype=work)
    kernel = backward_double if work == torch.float64 else backward_single
    inputs = gradient.data_ptr(), logits.data_ptr(), _place(a), _place(b)
    kept = u.data_ptr(), v.data_ptr(), marks.data_ptr()
    arguments = (*inputs, *kept, temperature, iterations, out.data_ptr(), rows, cols)
    _solve_plans(kernel, arguments, batch, rows * cols * iterations)
    return out if given == work else out.to(given)


def _place(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _solve_plans(
    kernel: Callable[..., object], arguments: tuple[object, ...], batch: int, entries: int
) -> None:
    """Run ``kernel(*arguments, first, last)`` over the batch."""
    if batch * entries <= _ALONE:
        kernel(*arguments, 0, batch)
    else:
        _solve(partial(kernel, *arguments), batch, entries // _LIGHT)


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
