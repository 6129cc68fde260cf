"""Prices and bounds of the columns that a strip keeps, in PyTorch: see :mod:`nmsolve.backends.torch.strips`.

Blocks are float64 ``(B, M, V)``, the scores of each of M columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["bounds_of", "floor_of", "gains_of", "kept_by", "priced"]

# What is within rounding of the best choice so far is not searched for.
_ROUNDING = 1e-13

# Steps that lower D(u) where the search ended early, for each column of a group.
_STEPS = 8


def priced(columns: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Prices u ``(B, V)`` that bound choices well, and with them the worth c ``(B, M)`` of each column."""
    m = columns.shape[1]
    even = max(1, min(m - 1, n * m // k))
    prices = columns.topk(even + 1, dim=1).values[:, -2:].mean(1)
    return prices, gains_of(columns, prices)


def bounds_of(columns: Tensor, n: int, chosen: Tensor, prices: Tensor, done: Tensor) -> Tensor:
    """What ``best_columns`` returns as bounds of ``chosen``, the best where a search is ``done``."""
    k = chosen.shape[1]
    best = kept_by(columns, chosen, n)[0]
    bounds = torch.full_like(best, -torch.inf)
    # Sums of scores that cancel prove no more than their rounding allows.
    error = 2.0**-50 * (k + 2) * columns.abs().amax(1).sum(1)
    coarse = error > 1e-12 * best.abs()
    bounds[coarse] = (best + error)[coarse]
    if not bool(done.all()):
        open_ = (~done).nonzero()[:, 0]
        bound = _lowered(columns[open_], n, k, prices[open_], best[open_])
        proven = bound <= floor_of(best[open_])
        bounds[open_] = torch.where(proven, bounds[open_], bound)
    return bounds


def floor_of(best: Tensor) -> Tensor:
    """What a choice has to keep more than, to be looked at."""
    return best + _ROUNDING * best.abs()


def gains_of(columns: Tensor, least: Tensor) -> Tensor:
    """``sum_r max(0, A[r, j] - t[r])`` for ``(..., M, V)`` and ``(..., V)``."""
    return (columns - least.unsqueeze(-2)).clamp_(min=0).sum(-1)


def kept_by(columns: Tensor, chosen: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """f of ``(P, K)`` columns of ``(P, M, V)``, and each row's N-th largest score in them."""
    index = chosen.unsqueeze(-1).expand(*chosen.shape, columns.shape[-1])
    top = columns.gather(-2, index).topk(n, dim=-2).values
    return top.sum((-2, -1)), top[..., -1, :]


def _lowered(columns: Tensor, n: int, k: int, prices: Tensor, best: Tensor) -> Tensor:
    """D(u), lowered by subgradients with Polyak's step towards ``best``."""
    least, kept_prices = torch.full_like(best, torch.inf), prices
    trial, factor = prices, torch.ones_like(best)
    waited = torch.zeros_like(best, dtype=torch.int64)
    for _ in range(_STEPS * columns.shape[1]):
        most, taken = gains_of(columns, trial).topk(k, dim=1)
        value = n * trial.sum(1) + most.sum(1)
        better = value < least
        least = torch.where(better, value, least)
        kept_prices = torch.where(better[:, None], trial, kept_prices)
        waited = torch.where(better, 0, waited + 1)
        # Back to the best prices with half the step when it has not helped for a while.
        stuck = waited == 4
        factor, waited = torch.where(stuck, factor / 2, factor), torch.where(stuck, 0, waited)
        index = taken.unsqueeze(2).expand(-1, -1, columns.shape[2])
        short = n - (columns.gather(1, index) > trial[:, None]).sum(1)
        size = short.square().sum(1).clamp(min=1)
        step = (factor * (value - best) / size)[:, None] * short
        trial = torch.where(stuck[:, None], kept_prices, trial - step)
    return least
