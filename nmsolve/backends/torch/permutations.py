"""Soft and hard permutations in plain PyTorch: the specification of the kernels, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from nmsolve.backends.shared import (
    assignment_of,
    exchange_values,
    nth_largest,
    nth_largest_of,
    permute_columns,
    rms_norm_permute,
    sum_best,
    sum_gains,
    sum_largest,
    sum_maxima,
)
from nmsolve.backends.torch import masks as reference
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
    "sum_best",
    "sum_gains",
    "sum_largest",
    "sum_maxima",
]


def assignment(scores: Tensor, want_solution: bool) -> tuple[Tensor, ...]:
    """Optimal columns ``(B, M)`` int64 of the rows of ``(B, M, M)`` scores, as the transposable 1:M mask.

    With ``want_solution`` also row duals, column duals, objective, bound and scale, all float64.
    """
    wide = scores.detach().double()
    pattern = NMPattern(1, wide.shape[1])
    result = reference.exact(wide, pattern, warm=None, want_solution=want_solution)
    return assignment_of(wide, result, want_solution)


# --- Sinkhorn -----------------------------------------------------------------------------------------------


def sinkhorn_forward(
    logits: Tensor,
    row_marginals: Tensor,
    col_marginals: Tensor,
    temperature: float,
    iterations: int,
    tolerance: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Plans of ``(B, R, C)`` logits by alternate scaling of rows and columns, in the log domain.

    With ``K = logits / temperature`` and ``g_0 = 0``, iteration t sets

        f_t = log a - logsumexp_j(K + g_{t-1}),    g_t = log b - logsumexp_i(K + f_t),

    and the plan is ``exp(K + f + g)`` after the last one. What is kept is the matrix ``K + f + g`` itself:
    its entries that matter are near 0, so that rounding does not grow with the logits. A logit of -inf leaves
    its entry 0; a line of nothing else has nothing to scale, and its scaling stays 0. A block with a NaN or
    +inf becomes NaN. ``row_marginals`` a
    is ``(B, R)`` and ``col_marginals`` b ``(B, C)``, float32 or, for float64 logits, float64, which is what
    the work is done in. A block stops before iteration t > 1 if all its row sums are within ``tolerance`` of
    a.

    Returns
    -------
    plan, row_scalings, col_scalings, made : Tensor
        ``(B, R, C)``, ``(B, T, R)`` and ``(B, T, C)`` of the work dtype, ``(B, 1 + T)`` int32, of which the
        first column counts. The scalings f and g of every iteration that was made are there if ``keep``; else
        T is 0.
    """
    z = logits.to(row_marginals.dtype) / temperature
    z.masked_fill_(~(z < torch.inf).all(2, keepdim=True).all(1, keepdim=True), torch.nan)
    batch, rows, cols = z.shape
    log_a, log_b = row_marginals.log(), col_marginals.log()
    f, g = torch.zeros_like(z[:, :, 0]), torch.zeros_like(z[:, 0])
    kept_f, kept_g = (z.new_zeros(batch, iterations if keep else 0, lines) for lines in (rows, cols))
    made = torch.zeros(batch, 1 + kept_f.shape[1], dtype=torch.int32, device=z.device)
    going = torch.ones(batch, 1, dtype=torch.bool, device=z.device)
    for t in range(iterations):
        total = z.logsumexp(2)
        if t and tolerance >= 0:
            going = going & ((total.exp() - row_marginals).abs().amax(1, keepdim=True) > tolerance)
            if not going.any():
                break
        step = torch.where(going & ~total.isneginf(), log_a - total, 0)
        z += step.unsqueeze(2)
        f = f + step
        total = z.logsumexp(1)
        step = torch.where(going & ~total.isneginf(), log_b - total, 0)
        z += step.unsqueeze(1)
        g = g + step
        made[:, :1] += going
        if keep:
            kept_f[:, t], kept_g[:, t] = f, g
    return softmax(z, 1) * col_marginals.unsqueeze(1), kept_f, kept_g, made


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
    r"""Gradient with respect to the logits, by a reverse sweep through the scalings.

    Iteration t used two softmaxes, ``R = softmax_j(K + g_{t-1})`` for f_t and ``S = softmax_i(K + f_t)`` for
    g_t. With the incoming gradient G of the plan ``b * S_T`` as ``Q = G * b * S_T``, start with ``dK = Q``,
    ``df = Q 1``, ``dg = Q^T 1``, and for t = T, ..., 1:

        dK -= S dg,   df -= S dg (summed over j),   dK -= R df,   dg = - R^T df,   df = 0.
    """
    work = row_scalings.dtype
    level = logits.to(work) / temperature
    total = torch.zeros_like(level)
    df, dg = torch.zeros_like(level[:, :, 0]), torch.zeros_like(level[:, 0])
    counts = made[:, 0]
    ends = set(counts.tolist())
    for t in range(max(ends, default=0) - 1, -1, -1):
        s = softmax(level + row_scalings[:, t].unsqueeze(2), 1)
        if t + 1 in ends:
            last = (counts == t + 1).view(-1, 1, 1)
            q = torch.where(last, gradient.to(work) * col_marginals.unsqueeze(1) * s, 0)
            total, df, dg = total + q, df + q.sum(2), dg + q.sum(1)
        # Of a block that stopped before iteration t nothing has been added yet: df and dg are 0.
        part = s.mul_(dg.unsqueeze(1))
        df = df - part.sum(2)
        r = softmax(level + col_scalings[:, t - 1].unsqueeze(1) if t else level, 2)
        back = r.mul_(df.unsqueeze(2))
        total -= part
        total -= back
        dg, df = -back.sum(1), torch.zeros_like(df)
    return (total / temperature).to(logits.dtype)


def softmax(x: Tensor, dim: int) -> Tensor:
    """Softmax, and 0 along lines of -inf."""
    return torch.where(x.isneginf(), 0, x.softmax(dim))
