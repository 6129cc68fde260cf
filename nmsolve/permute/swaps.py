r"""Searches that exchange columns between two groups, until no exchange lets an N:M mask keep more.

`swap_search` exchanges one column for another. With ``F[g, s, j]`` the kept score of group g with column j
in its slot s (:mod:`nmsolve.permute.insertions`), a swap gains the sum of two values less the two that are
there. A change of a group changes that group's values and those of no other, so that after the first round
only the pairs with a changed group are valued anew.

`stripe_search` deals the 2 M columns of two groups in the best of all ways. It values every pair of groups,
as apex's exhaustive search does, makes the best ones that are disjoint, and values the pairs with a changed
group anew.

Of many columns, groups are dealt into windows at random, and a search looks for pairs inside of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from nmsolve.errors import NMSolveError
from nmsolve.ops.validation import check_finite, check_scores, describe
from nmsolve.pattern import NMPattern, PatternLike
from nmsolve.permute.insertions import Insertions
from nmsolve.permute.orders import check_permutation, retained_score
from nmsolve.permute.windows import check_window, deal_windows, groups_of, nothing_to_gain

__all__ = ["stripe_search", "swap_search"]

# The most ways of dealing two groups' columns anew that a stripe search tries: C(8, 4) / 2 = 35 for M = 4.
_MAX_SPLITS = 35

# Of a window by default: columns for swaps, whose values are there all at once, and groups for stripes.
_SWAP_COLUMNS = 2048
_STRIPE_GROUPS = 256

# A sweep over windows that gains less than this share of the kept score is the last.
_LITTLE = 1e-5


def swap_search(
    scores: Tensor,
    n: int | PatternLike,
    m: int | None = None,
    *,
    start: Tensor | None = None,
    rounds: int = 100,
    escapes: int = 0,
    seed: int = 0,
    window: int | None = None,
) -> Tensor:
    """Channel swaps between groups while any raises the kept score, as apex's search for 2:4.

    A round makes the best of all swaps of two columns, valued exactly and together, that touch no group
    twice. When no swap helps, an *escape* shuffles the columns of a few random groups and the search goes on;
    the best order seen is returned.

    Parameters
    ----------
    scores : Tensor
        ``(rows, cols)``, higher = keep.
    n, m : int
        Pattern, or in one piece, as in :func:`nmsolve.transposable_mask`.
    start : Tensor, optional
        Permutation to start from (identity); the result keeps at least its score.
    rounds : int
        At most this many rounds in all; with windows, in each.
    escapes : int
        At most this many escapes; with windows, in each.
    seed : int
        Of the escapes and windows.
    window : int, optional
        Columns between which swaps are valued, at least two groups; all where they are no more. If left out,
        2,048. Windows are dealt anew until little is gained.

    Returns
    -------
    Tensor
        Permutation, int64 ``(cols,)``.

    Raises
    ------
    NMSolveError
        If an argument is not as described.

    Examples
    --------
    >>> scores = torch.tensor([[4.0, 3.0, 0.0, 1.0]])
    >>> retained_score(scores, 1, 2, swap_search(scores, 1, 2))
    tensor(7., dtype=torch.float64)
    """
    scores, pattern, best = _single(scores, n, m, start)
    _check_counts(rounds=rounds, escapes=escapes)
    size = check_window(window, pattern, max(2, _SWAP_COLUMNS // pattern.m))
    if nothing_to_gain(scores, pattern):
        return best
    generator = torch.Generator().manual_seed(seed)

    def search(values: Insertions, groups: Tensor) -> Tensor:
        return _Swaps(values, groups).run(rounds, escapes, generator)

    return _in_windows(scores, pattern, best, size, generator, search)


def stripe_search(
    scores: Tensor,
    n: int | PatternLike,
    m: int | None = None,
    *,
    start: Tensor | None = None,
    rounds: int = 1000,
    escapes: int = 0,
    seed: int = 0,
    window: int | None = None,
) -> Tensor:
    """Exhaustive search over pairs of groups, as apex's for 2:4 (its "stripe groups" of 8 columns).

    A round deals the ``2 m`` columns of the best pairs of groups in the best of all ``C(2m, m) / 2`` ways.
    Pairs are disjoint, so that their gains add up. When no pair gains anything, an *escape* exchanges two
    columns of a random pair of groups and the search goes on; the best order seen is returned. apex makes 100
    of them, without which its search ends where this one does.

    Parameters
    ----------
    scores : Tensor
        ``(rows, cols)``, higher = keep.
    n, m : int
        Pattern, or in one piece; m at most 4, beyond which the ways are too many (6,435 for m = 8).
    start : Tensor, optional
        Permutation to start from (identity); the result keeps at least its score.
    rounds : int
        At most this many rounds; with windows, in each.
    escapes : int
        At most this many escapes; with windows, in each.
    seed : int
        Of the escapes and windows.
    window : int, optional
        Columns among which all pairs of groups are tried, at least two groups; all where they are no more. If
        left out, 256 groups. Windows are dealt anew until little is gained.

    Returns
    -------
    Tensor
        Permutation, int64 ``(cols,)``.

    Raises
    ------
    NMSolveError
        If an argument is not as described.

    Examples
    --------
    >>> scores = torch.tensor([[4.0, 3.0, 0.0, 1.0]])
    >>> retained_score(scores, 1, 2, stripe_search(scores, 1, 2))
    tensor(7., dtype=torch.float64)
    """
    scores, pattern, permutation = _single(scores, n, m, start)
    _check_counts(rounds=rounds, escapes=escapes)
    m = pattern.m
    splits = [(0, *rest) for rest in itertools.combinations(range(1, 2 * m), m - 1)]
    if len(splits) > _MAX_SPLITS:
        raise NMSolveError(
            f"m: a stripe search tries every way of dealing two groups' columns, {len(splits):,} for m={m}; "
            "expected m of at most 4; swap_search takes any m"
        )
    size = check_window(window, pattern, _STRIPE_GROUPS)
    if nothing_to_gain(scores, pattern):
        return permutation
    both = [[*split, *sorted({*range(2 * m)} - {*split})] for split in splits]
    ways = torch.tensor(both, device=scores.device)
    generator = torch.Generator().manual_seed(seed)

    def search(values: Insertions, groups: Tensor) -> Tensor:
        return _deal_pairs(values, groups, ways, rounds, escapes, generator)

    return _in_windows(scores, pattern, permutation, size, generator, search)


def _in_windows(
    scores: Tensor,
    pattern: NMPattern,
    permutation: Tensor,
    size: int,
    generator: torch.Generator,
    search: Callable[[Insertions, Tensor], Tensor],
) -> Tensor:
    """``permutation`` after a search of every window, and of others while that gains something."""
    n, m = pattern.n, pattern.m
    groups = groups_of(permutation, m)
    kept = float(retained_score(scores, n, m, permutation))
    while True:
        before, found = kept, permutation.clone()
        dealt = groups_of(found, m)
        for window in deal_windows(len(groups), size, generator).to(groups.device):
            # A window's columns by themselves: their values are those of no other.
            order = dealt[window].flatten()
            here = torch.arange(len(order), device=groups.device).view(-1, m)
            dealt[window] = order[search(Insertions(scores[:, order], pattern), here)]
        kept = float(retained_score(scores, n, m, found))
        if kept <= before:
            return permutation
        permutation = found
        if size >= len(groups) or kept - before <= _LITTLE * abs(before):
            return permutation


class _Swaps:
    """All swaps between groups ``(G, m)``, which are changed in place, and what they gain."""

    def __init__(self, values: Insertions, groups: Tensor) -> None:
        count, m = groups.shape
        self.source, self.groups = values, groups.clone()
        self.values = groups.new_empty(count, m, groups.numel(), dtype=torch.float64)
        # The best gain of a swap between two groups, and the slots of it: m times that of the first and that
        # of the second.
        self.best = groups.new_zeros(count, count, dtype=torch.float64)
        self.which = groups.new_zeros(count, count)
        self.stale = torch.arange(count, device=groups.device)

    def run(self, rounds: int, escapes: int, generator: torch.Generator) -> Tensor:
        """Rounds of swaps and escapes; the best groups."""
        best, best_score = self.groups.clone(), float("-inf")
        for _ in range(rounds):
            self._value()
            if self._swap():
                continue
            score = self._kept()
            if score > best_score:
                best, best_score = self.groups.clone(), score
            if escapes == 0:
                break
            escapes -= 1
            self._escape(best, generator)
        return self.groups if self._kept() > best_score else best

    def _kept(self) -> float:
        return _kept(self.source, self.groups)

    def _escape(self, best: Tensor, generator: torch.Generator) -> None:
        """Back to the best groups, a few of them shuffled."""
        count, m = best.shape
        other = (self.groups != best).any(1)
        picked = torch.randperm(count, generator=generator)[: max(2, count // 8)].to(best.device)
        self.groups.copy_(best)
        members = best[picked].flatten()
        self.groups[picked] = members[torch.randperm(len(members), generator=generator)].view(-1, m)
        other[picked] = True
        self.stale = other.nonzero()[:, 0]

    def _value(self) -> None:
        """Values the groups that changed, and all swaps with them."""
        (count, m), stale = self.groups.shape, self.stale
        if not len(stale):
            return
        self.values[stale] = self.source.of_all(self.groups[stale])
        position = self.groups.flatten()
        slots = self.values.flatten(0, 1)
        now = slots.gather(1, position[:, None])[:, 0]
        ours = self.values[stale][:, :, position].flatten(0, 1)
        theirs = slots[:, self.groups[stale].flatten()].T
        gain = ours + theirs - now.view(count, m)[stale].view(-1, 1) - now
        by_pair = gain.unflatten(0, (-1, m)).unflatten(2, (count, m)).transpose(1, 2).flatten(2)
        best, which = by_pair.max(dim=-1)
        # Gains within rounding of the sums they come from are none.
        best = torch.where(best > self.source.rounding * now.abs().max(), best, 0)
        best[torch.arange(len(stale), device=stale.device), stale] = 0
        self.best[stale], self.which[stale] = best, which
        self.best[:, stale], self.which[:, stale] = best.T, (which % m * m + which // m).T

    def _swap(self) -> bool:
        """Makes the best swaps between disjoint groups; whether there are any."""
        m = self.groups.shape[1]
        g, h = _disjoint(self.best)
        slots = self.which[g, h]
        first, second = self.groups[g, slots // m], self.groups[h, slots % m]
        self.groups[g, slots // m], self.groups[h, slots % m] = second, first
        self.stale = torch.cat([g, h]).sort().values
        return len(g) > 0


def _disjoint(best: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs ``g < h`` of positive gains ``(G, G)``, the best first, none with a group of one before.

    One group after the other looks who is free, which the host does for all devices.
    """
    gains = best.triu(1).cpu()
    count = len(gains)
    candidates = gains.flatten().argsort(descending=True, stable=True)[: int((gains > 0).sum())]
    changed: set[int] = set()
    pairs = []
    for g, h in ((c // count, c % count) for c in candidates.tolist()):
        if g not in changed and h not in changed:
            changed.update((g, h))
            pairs.append((g, h))
    first, second = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).to(best.device).unbind(1)
    return first, second


def _deal_pairs(
    values: Insertions, groups: Tensor, ways: Tensor, rounds: int, escapes: int, generator: torch.Generator
) -> Tensor:
    """The best groups after rounds of dealing the best pairs anew; ``ways`` are ``(K, 2 m)``."""
    groups, (count, m) = groups.clone(), groups.shape
    gains = groups.new_zeros(count, count, dtype=torch.float64)
    which = groups.new_zeros(count, count)
    first, second = torch.triu_indices(count, count, 1, device=groups.device)
    found, most = groups.clone(), -math.inf
    for _ in range(rounds):
        kept = values.of_ways(torch.cat([groups[first], groups[second]], dim=1), ways)
        # Way 0 is how things stand: among equals the first is taken.
        best, chosen = kept.max(dim=1)
        gain = best - kept[:, 0]
        gain = torch.where(gain > values.rounding * kept.abs().max(), gain, 0)
        gains[first, second], which[first, second] = gain, chosen
        g, h = _disjoint(gains)
        changed = torch.zeros(count, dtype=torch.bool, device=groups.device)
        if len(g):
            members = torch.cat([groups[g], groups[h]], 1).gather(1, ways[which[g, h]])
            groups[g], groups[h] = members[:, :m], members[:, m:]
            changed[g] = changed[h] = True
        else:
            score = _kept(values, groups)
            if score > most:
                found, most = groups.clone(), score
            if not escapes:
                return found
            escapes -= 1
            changed |= (groups != found).any(1)
            groups.copy_(found)
            pair = torch.randperm(count, generator=generator)[:2].to(groups.device)
            slots = torch.randint(m, (2,), generator=generator).to(groups.device)
            groups[pair, slots] = groups[pair, slots].flip(0)
            changed[pair] = True
        touched = (changed[:, None] | changed[None, :]).triu(1)
        first, second = touched.nonzero(as_tuple=True)
    return groups if _kept(values, groups) > most else found


def _kept(values: Insertions, groups: Tensor) -> float:
    return float(retained_score(values.columns.T, values.n, values.m, groups.flatten()))


def _check_counts(**counts: object) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise NMSolveError(f"{name}: expected an integer of at least 0, got {count!r}")


def _single(
    scores: Tensor, n: int | PatternLike, m: int | None, start: Tensor | None
) -> tuple[Tensor, NMPattern, Tensor]:
    """The checked arguments of a search on one matrix; scores are widened to float32 at least."""
    pattern = NMPattern.of(n, m)
    check_scores(scores)
    check_finite(scores)
    if scores.ndim != 2:
        raise NMSolveError(f"scores: expected (rows, cols), got {describe(scores)}")
    cols = scores.shape[-1]
    if start is None:
        start = torch.arange(cols, device=scores.device)
    elif start.ndim != 1:
        raise NMSolveError(f"start: expected an int64 tensor of shape ({cols},), got {describe(start)}")
    check_permutation(start, cols, "start")
    wide = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    return wide, pattern, start.to(scores.device).clone()
