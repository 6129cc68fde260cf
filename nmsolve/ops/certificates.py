r"""Certificates at the edges: duals made anew where those of a backend prove less than they could.

A backend's duals are good to its rounding, which is enough but for a few kinds of blocks: prices beyond the
largest float, many equal rows or columns, kept scores far smaller than the prices (zeros, above all). There
the mask is optimal and the bound does not say so. Its *shortfall*, bound minus objective, is what is left of
complementary slackness, a sum without negative terms,

    sum_kept max(0, u_i + v_j - A_ij) + sum_free max(0, A_ij - u_i - v_j) + sum_j v_j (N - held_j),

and duals that leave nothing are potentials of the graph of augmenting paths: with ``p_j = -v_j``, a free
entry says ``p_j <= u_i - A_ij`` and a kept one ``u_i <= p_j + A_ij``. They are found in float64 by
Bellman-Ford's relaxation, twice, as the largest potentials up to 0 and as the smallest from 0. The mean of
the two has room on both sides of a condition where there is any, so that rounding it to the duals' type costs
little. Where it costs too much, as prices are far larger than what is kept or beyond the largest number of
that type, the bound is that of the prices in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nmsolve.blocks import chosen_blocks
from nmsolve.ops.validation import all_finite
from nmsolve.pattern import NMPattern
from nmsolve.solution import kept_score

__all__ = ["certificate", "enough", "exponents", "fit", "tighten", "times_power_of_two"]

# The largest number that sums of blocks may reach, as a power of two.
_LARGEST = 1023

# Row duals, column duals, and the shortfall of the bound that they give: float64, and a multiple of the power
# of two that normalises the block (:func:`exponents`).
Certificate = tuple[Tensor, Tensor, Tensor]


def enough(dtype: torch.dtype) -> float:
    """A gap that is small enough: the documents promise 1e-12 of float64 scores and 1e-6 of others."""
    return 2.0**-40 if dtype == torch.float64 else 2.0**-20


def tighten(
    scores: Tensor,
    mask: Tensor,
    duals: tuple[Tensor, Tensor],
    objective: Tensor,
    bound: Tensor,
    scale: Tensor,
    pattern: NMPattern,
) -> None:
    """Replace, in place, duals and bounds of the blocks whose gap is not small, where that makes it smaller.

    ``mask`` is an optimal one of ``(..., rows, cols)`` scores; objective, bound and scale are as in
    :class:`nmsolve.BlockSolution`. No bound is left below its objective.
    """
    if bound.numel() == 0:
        return
    short = ~(bound - objective <= enough(scores.dtype) * scale)
    for prices in duals:
        if not all_finite(prices):
            short |= ~torch.isfinite(prices).all(-1)
    for blocks, (kept,), at, u, v, reached, proven in chosen_blocks(
        short, pattern, (scores, mask), (*duals, objective, bound)
    ):
        rows, cols = blocks.shape[-2:]
        lines = u[..., :rows], v[..., :cols]
        _replace(blocks[at], kept[at], pattern.n, at, lines, reached, proven)
    torch.maximum(bound, objective, out=bound)


def fit(
    scores: Tensor,
    best: Tensor,
    mask: Tensor,
    duals: tuple[Tensor, Tensor],
    objective: Tensor,
    bound: Tensor,
    scale: Tensor,
    pattern: NMPattern,
) -> None:
    """Replace, in place, duals and numbers of blocks whose absolute scores sum to more than float64 holds.

    ``best`` is an optimal mask, and ``mask`` the one that objective, bound and scale are of. Whatever it
    keeps, these three are divided by the least power of two with which that sum is below 2^1023.
    """
    if scores.dtype != torch.float64 or bound.numel() == 0:
        return
    if float(torch.stack(scores.aminmax()).abs().max()) <= torch.finfo(torch.float64).max / pattern.m**2:
        return
    _, total = kept_score(scores, torch.ones_like(mask), pattern)
    for every, (best_masks, masks), at, u, v, reached, proven, size in chosen_blocks(
        ~torch.isfinite(total), pattern, (scores, best, mask), (*duals, objective, bound, scale)
    ):
        blocks, optimal, kept = every[at], best_masks[at], masks[at]
        rows, cols = blocks.shape[1:]
        u[..., :rows][at], v[..., :cols][at], left = certificate(blocks, optimal, pattern.n, u.dtype)
        a = times_power_of_two(blocks, -exponents(blocks))
        unit = _LARGEST - torch.frexp(a.abs().sum((1, 2))).exponent
        proven[at] = times_power_of_two((a * optimal).sum((1, 2)) + left, unit)
        reached[at], size[at] = (times_power_of_two((x * kept).sum((1, 2)), unit) for x in (a, a.abs()))
    torch.maximum(bound, objective, out=bound)


def _replace(
    blocks: Tensor,
    masks: Tensor,
    n: int,
    wanted: Tensor,
    duals: tuple[Tensor, Tensor],
    objective: Tensor,
    bound: Tensor,
) -> None:
    """Write the new duals and bounds of the ``wanted`` blocks where they are better."""
    u, v, left = certificate(blocks, masks, n, duals[0].dtype)
    shortfall = times_power_of_two(left, exponents(blocks))
    finite = torch.isfinite(duals[0][wanted]).all(1) & torch.isfinite(duals[1][wanted]).all(1)
    better = ~(finite & (bound[wanted] - objective[wanted] <= shortfall))
    where = tuple(index[better] for index in wanted.nonzero(as_tuple=True))
    duals[0][where], duals[1][where] = u[better], v[better]
    bound[where] = objective[where] + shortfall[better]


def certificate(
    blocks: Tensor, masks: Tensor, n: int, dtype: torch.dtype, size: Tensor | None = None
) -> Certificate:
    """Duals of ``(B, R, C)`` blocks with optimal masks, as good as ``dtype`` holds them.

    ``size`` is the sum of the absolute kept scores that the shortfall has to be small beside, if it is not
    that of the blocks.
    """
    if blocks.shape[1] > blocks.shape[2]:
        u, v, shortfall = certificate(blocks.mT, masks.mT, n, dtype, size)
        return v, u, shortfall
    rows, cols = blocks.shape[1:]
    exponent = exponents(blocks)
    a = times_power_of_two(blocks.double(), -exponent)
    potentials = _potentials(a, masks, n)
    if rows < cols:
        shifts = [potentials.amax(1, keepdim=True)]
    else:  # shifted prices prove the same: a line's at 0 may leave round numbers, the middle all within range
        u, _ = _row_duals(a, masks, -potentials, exponent, torch.float64)
        low, high = torch.cat((u, potentials), 1).aminmax(dim=1, keepdim=True)
        shifts = [potentials.amax(1, keepdim=True), u.amin(1, keepdim=True), (low + high) / 2]
    found: list[Certificate] = []
    for shift in shifts:
        v = _rounded(shift - potentials, exponent, dtype)[0]
        u, left = _row_duals(a, masks, v, exponent, dtype)
        if rows < cols:
            left = left + (v * (n - masks.sum(1))).sum(1)
        found.append((u, v, left))
    best = torch.stack([left for *_, left in found]).argmin(0)
    block = torch.arange(len(a), device=a.device)
    u, v, left = (torch.stack(parts)[best, block] for parts in zip(*found, strict=True))
    kept = (a * masks).abs().sum((1, 2)) if size is None else times_power_of_two(size, -exponent)
    short = left > enough(dtype) * kept
    if short.any():  # the prices themselves, before the duals' type rounds them or cuts them off
        exact_v = shifts[-1] - potentials
        exact_u, exact_left = _row_duals(a, masks, exact_v, torch.zeros_like(exponent), torch.float64)
        if rows < cols:
            exact_left = exact_left + (exact_v * (n - masks.sum(1))).sum(1)
        short &= exact_left < left
        u, v = torch.where(short[:, None], exact_u, u), torch.where(short[:, None], exact_v, v)
        left = torch.where(short, exact_left, left)
    largest = torch.finfo(dtype).max
    u, v = (times_power_of_two(prices, exponent).clamp(-largest, largest).to(dtype) for prices in (u, v))
    return u, v, left


def _potentials(a: Tensor, masks: Tensor, n: int) -> Tensor:
    """``(B, C)`` potentials of the columns, for which row prices without a shortfall exist.

    With R < C, the columns that hold fewer than n entries have the highest one.
    """
    inf = torch.inf
    loose = masks.sum(1) < n if a.shape[1] < a.shape[2] else None
    down, up = (torch.zeros_like(a[:, 0]) for _ in range(2))
    kept_low, free_low = a.masked_fill(~masks, inf), (-a).masked_fill(masks, inf)
    kept_high, free_high = (-a).masked_fill(~masks, -inf), a.masked_fill(masks, -inf)
    for _ in range(2 * a.shape[2] + 2):  # rounding could make a path of no length go round for ever
        row = (down.unsqueeze(1) + kept_low).amin(2)
        new_down = torch.minimum(down, (row.unsqueeze(2) + free_low).amin(1))
        row = (up.unsqueeze(1) + free_high).amax(2)
        new_up = torch.maximum(up, (row.unsqueeze(2) + kept_high).amax(1))
        if loose is not None:
            # One more row, whose score is 0, is free at every column and kept at the loose ones.
            level = new_down.masked_fill(~loose, inf).amin(1, keepdim=True)
            new_down = torch.minimum(new_down, level)
            level = new_up.amax(1, keepdim=True)
            new_up = torch.where(loose, level, new_up)
        if torch.equal(new_down, down) and torch.equal(new_up, up):
            break
        down, up = new_down, new_up
    return (down + up) / 2


def _row_duals(
    a: Tensor, masks: Tensor, v: Tensor, exponent: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The row duals that suit the column duals best, and the shortfall that all rows leave, ``(B,)``.

    A row's bound is least between what its N-th and its next largest score leave after the columns' prices.
    """
    level = a - v.unsqueeze(1)
    held = int(masks[0, 0].sum())
    ordered = level.sort(dim=2, descending=True).values
    last, first = ordered[..., max(held - 1, 0)], ordered[..., min(held, a.shape[2] - 1)]
    found = []
    for u in _rounded((last + first) / 2, exponent, dtype):
        beyond = level - u.unsqueeze(2)
        found.append((torch.where(masks, -beyond, beyond).clamp(min=0).sum(2), u))
    left, u = found[0]
    for other_left, other in found[1:]:
        u = torch.where(other_left < left, other, u)
        left = torch.minimum(left, other_left)
    return u, left.sum(1)


def _rounded(x: Tensor, exponent: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Prices as ``dtype`` holds them in the scores' unit: the nearest, the one below and the one above."""
    largest = torch.finfo(dtype).max
    nearest = times_power_of_two(x, exponent).clamp(-largest, largest).to(dtype)
    ends = (nearest.new_tensor(end) for end in (-largest, largest))
    below, above = (nearest.nextafter(end) for end in ends)
    nearest, below, above = (times_power_of_two(y.double(), -exponent) for y in (nearest, below, above))
    return nearest, below, above


def exponents(blocks: Tensor) -> Tensor:
    """The powers of two that ``(B, R, C)`` blocks are divided by, for their largest entry to be below 1."""
    return torch.frexp(blocks.double().abs().amax((1, 2))).exponent


def times_power_of_two(x: Tensor, exponent: Tensor) -> Tensor:
    """``x * 2**exponent`` for one exponent per block; in two factors, so that neither overflows."""
    e = exponent.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    half = (e / 2).floor()
    return x * torch.exp2(half) * torch.exp2(e - half)
