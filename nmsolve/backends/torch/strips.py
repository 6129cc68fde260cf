r"""The columns that a strip keeps of a group, in plain PyTorch: the specification, on any device.

A block is V rows of a strip by M columns of a group. Of K columns S that all its rows share, each row keeps
its N largest scores, ``f(S) = sum_r (the N largest of A[r, S])``, and the best S is looked for.

Prices u of the rows bound every choice (Lagrange's relaxation of "a row keeps N"): with ``c_j = sum_r max(0,
A[r, j] - u[r])``,

    f(S) <= N sum(u) + sum_{j in S} c_j    for all S, and so    f(S) <= D(u) = N sum(u) + the K largest c_j.

A column more gains ``g_j = sum_r max(0, A[r, j] - t[r])`` where t is the N-th largest score of each row so
far, and g_j can only fall as columns join. So N or more columns P of a choice bound it, too:

    f(S) <= f(P) + the K - |P| largest g_j.

The search is level by level, for all blocks at once: first every N columns that the prices allow, then those
with one column more, and so on; what cannot beat the best choice known is left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from nmsolve.backends.strip_bounds import bounds_of, floor_of, gains_of, kept_by, priced

__all__ = ["best_columns"]

# Elements of the largest temporaries.
_CHUNK = 1 << 22


def best_columns(columns: Tensor, n: int, k: int, limit: int) -> tuple[Tensor, Tensor]:
    """The k columns of each block that keep the most.

    Parameters
    ----------
    columns : Tensor
        float64 ``(B, M, V)``, finite: the scores of each column.
    n, k : int
        ``0 < n < k < M``.
    limit : int
        Columns, with repeats, after which the search of a block ends; it does not begin where there are more
        choices of n columns. 0 is exchanges alone.

    Returns
    -------
    chosen, bounds : Tensor
        int64 ``(B, k)``, ascending; float64 ``(B,)``, -inf where the choice is proven to be the best, and
        else a bound on what the best one keeps.
    """
    found = [_solve(part, n, k, limit) for part in columns.split(max(1, _CHUNK // columns[0].numel()))]
    chosen, bounds = (torch.cat(parts) for parts in zip(*found, strict=True))
    return chosen.sort(dim=1).values, bounds


def _solve(columns: Tensor, n: int, k: int, limit: int) -> tuple[Tensor, Tensor]:
    chosen, best = _exchanged(columns, columns.sum(2).topk(k, dim=1).indices, n)
    prices, worth = priced(columns, n, k)
    other, value = _exchanged(columns, worth.topk(k, dim=1).indices, n)
    better = value > best
    chosen, best = torch.where(better[:, None], other, chosen), torch.where(better, value, best)
    done = _search(columns, n, prices, worth, chosen, best, limit)
    return chosen, bounds_of(columns, n, chosen, prices, done)


def _exchanged(columns: Tensor, chosen: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """One column exchanged for another while any exchange is better, the best one first; f(S) of the last."""
    k = chosen.shape[1]
    best = kept_by(columns, chosen, n)[0]
    going = torch.arange(len(columns), device=columns.device)
    while len(going):
        here, held = columns[going], chosen[going]
        taken = torch.zeros(here.shape[:2], dtype=torch.bool, device=here.device).scatter_(1, held, True)
        values = []
        for i in range(k):
            rest, least = kept_by(here, torch.cat([held[:, :i], held[:, i + 1 :]], 1), n)
            values.append((rest[:, None] + gains_of(here, least)).masked_fill_(taken, -torch.inf))
        value, which = torch.stack(values, 1).flatten(1).max(1)
        out, into = which // here.shape[1], which % here.shape[1]
        trial = held.scatter(1, out[:, None], into[:, None])
        # The sum anew: differences of large scores do not add up.
        kept = kept_by(here, trial, n)[0]
        better = (value > floor_of(best[going])) & (kept > best[going])
        going = going[better]
        chosen[going], best[going] = trial[better], kept[better]
    return chosen, best


def _search(
    columns: Tensor, n: int, prices: Tensor, worth: Tensor, chosen: Tensor, best: Tensor, limit: int
) -> Tensor:
    """Puts the best choices into ``chosen`` and ``best``, in place; which blocks were searched to the end."""
    m, k = columns.shape[1], chosen.shape[1]
    order = worth.argsort(dim=1, descending=True, stable=True)
    ranked = columns.gather(1, order.unsqueeze(2).expand_as(columns))
    worth = worth.gather(1, order)
    passes = torch.zeros_like(best, dtype=torch.int64)
    if math.comb(m, n) > limit:
        return torch.zeros_like(best, dtype=torch.bool)
    for start in _first_choices(n, k, prices, worth, best):
        # Lists of the columns taken so far, by rank, each choice's ascending; the last list goes on first.
        todo = [start]
        while todo:
            block, taken = todo.pop()
            depth = taken.shape[1]
            block, taken = (part[passes[block] <= limit] for part in (block, taken))
            kept, least = kept_by(ranked[block], taken, n)
            gains = gains_of(ranked[block], least)
            passes.index_add_(0, block, torch.full_like(block, m))
            later = torch.arange(m, device=block.device) > taken[:, -1:]
            gains.masked_fill_(~later, -torch.inf)
            most = gains.topk(k - depth, dim=1).values
            if depth == k - 1:
                _improve(ranked, n, block, taken, kept, gains, order, chosen, best)
                continue
            # With j the next column, the others gain no more than the largest that are left.
            reach = kept[:, None] + gains + most[:, : k - depth - 1].sum(1, keepdim=True)
            row, into = (reach > floor_of(best)[block, None]).nonzero(as_tuple=True)
            step = max(1, _CHUNK // ranked[0].numel())
            for part in torch.arange(len(row), device=row.device).split(step):
                deeper = torch.cat([taken[row[part]], into[part, None]], 1)
                todo.append((block[row[part]], deeper))
    return passes <= limit


def _first_choices(
    n: int, k: int, prices: Tensor, worth: Tensor, best: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """The choices of n columns, by rank, that the prices allow to become the best."""
    m = worth.shape[1]
    summed = torch.nn.functional.pad(worth.cumsum(1), (1, 0))
    every = torch.tensor(list(itertools.combinations(range(m), n)), device=worth.device)
    every = every[every[:, -1] + k - n < m]
    for few in every.split(max(1, _CHUNK // (len(worth) * n))):
        last = few[:, -1]
        reach = worth[:, few].sum(2) + summed[:, last + 1 + k - n] - summed[:, last + 1]
        reach += n * prices.sum(1, keepdim=True)
        block, which = (reach > floor_of(best)[:, None]).nonzero(as_tuple=True)
        step = max(1, _CHUNK // (m * prices.shape[1]))
        for part in torch.arange(len(block), device=block.device).split(step):
            yield block[part], few[which[part]]


def _improve(
    ranked: Tensor,
    n: int,
    block: Tensor,
    taken: Tensor,
    kept: Tensor,
    gains: Tensor,
    order: Tensor,
    chosen: Tensor,
    best: Tensor,
) -> None:
    """Takes the best last column of each choice, and the best choice of each block, in place."""
    gain, last = gains.max(1)
    value = kept + gain
    most = torch.full_like(best, -torch.inf).scatter_reduce_(0, block, value, "amax")
    first = (value == most[block]) & (value > floor_of(best)[block])
    block, full = block[first], torch.cat([taken, last[:, None]], 1)[first]
    value = kept_by(ranked[block], full, n)[0]
    for b, whole, new in zip(block.tolist(), full, value, strict=True):
        if new > best[b]:
            best[b], chosen[b] = new, order[b, whole]
