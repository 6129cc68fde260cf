r"""Orders of the input channels that let an N:M mask keep more score.

M consecutive positions of a permutation (see :mod:`nmsolve.permute.orders`) form a *group*, and position
``g M + s`` is *slot* s of group g.

Let ``t[r, g]`` be the N-th largest score of row r among the columns of group g other than the one in slot s,
and ``b[r, g]`` the sum of its N - 1 largest. With column j in slot s the row keeps
``b[r, g] + max(t[r, g], A[r, j])``, so the kept score of every group with every column in its slot s is

    F_s[g, j] = sum_r b[r, g] + sum_r max(t[r, g], A[r, j]).

The searches below need nothing else. A step never lowers the kept score: giving every group a column for
slot s is one assignment on F_s, and staying is one of its choices; swaps are made between disjoint pairs of
groups, whose gains add up exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from nmsolve.errors import NMSolveError
from nmsolve.ops.assignment import assignment
from nmsolve.ops.validation import check_finite, check_scores, describe
from nmsolve.pattern import NMPattern, PatternLike
from nmsolve.permute.orders import check_permutation, retained_score

__all__ = [
    "deal_columns",
    "ria_permutation",
    "stripe_search",
    "swap_search",
]

# Elements of the three-dimensional temporaries.
_CHUNK = 1 << 22

# The most ways of dealing two groups' columns anew that a stripe search tries: C(8, 4) / 2 = 35 for M = 4.
_MAX_SPLITS = 35


def deal_columns(scores: Tensor, m: int) -> Tensor:
    """RIA's first step: columns sorted by score, dealt boustrophedon into the m slots.

    The C/m columns with the largest sums take slot 0 of groups 0, 1, 2, ..., the next ones slot 1 of the
    groups in reverse order, and so on, so that no group gets several of the largest. A last group of fewer
    than m columns stays as it is.

    Parameters
    ----------
    scores : Tensor
        ``(..., rows, cols)``.
    m : int
        Group size.

    Returns
    -------
    Tensor
        Permutation, int64 ``(..., cols)``.

    Examples
    --------
    >>> deal_columns(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), 2)
    tensor([0, 3, 1, 2])
    """
    m = NMPattern(0, m).m
    cols = scores.shape[-1]
    full = cols // m * m
    order = scores[..., :full].sum(-2, dtype=torch.float64).argsort(dim=-1, descending=True, stable=True)
    slots = order.unflatten(-1, (m, full // m))
    dealt = torch.stack([s.flip(-1) if k % 2 else s for k, s in enumerate(slots.unbind(-2))], dim=-1)
    rest = torch.arange(full, cols, device=scores.device).expand(*order.shape[:-1], cols - full)
    return torch.cat([dealt.flatten(-2), rest], dim=-1)


def ria_permutation(scores: Tensor, n: int | PatternLike, m: int | None = None, *, passes: int = 1) -> Tensor:
    """RIA's channel permutation (arXiv 2402.11299, section 3.2): deal the columns, then refine slot by slot.

    After :func:`deal_columns`, each slot in turn takes the best of all ways to give its columns to the
    groups, by one assignment of ``(C/m, C/m)`` kept scores; see the module's docstring.

    Parameters
    ----------
    scores : Tensor
        ``(..., rows, cols)``, higher = keep; each matrix gets its own permutation. For layers that share
        one permutation, concatenate their scores along the rows.
    n, m : int
        Pattern, or in one piece, as in :func:`nmsolve.transposable_mask`.
    passes : int
        How often every slot is refined; the published method does it once. More never keep less; it stops
        when a pass gains nothing.

    Returns
    -------
    Tensor
        Permutation, int64 ``(..., cols)``. Columns of a last group of fewer than m stay where they are.

    Raises
    ------
    NMSolveError
        If an argument is not as described.

    Examples
    --------
    >>> scores = torch.tensor([[4.0, 3.0, 0.0, 1.0]])
    >>> retained_score(scores, 1, 2, ria_permutation(scores, 1, 2))
    tensor(7., dtype=torch.float64)
    """
    pattern = _checked(scores, n, m)
    m = pattern.m
    if passes < 0:
        raise NMSolveError(f"passes: expected 0 or more, got {passes!r}")
    if _nothing_to_gain(scores, pattern):
        return torch.arange(scores.shape[-1], device=scores.device).expand(
            *scores.shape[:-2], scores.shape[-1]
        )
    dealt = deal_columns(scores, m)
    flat = scores.detach().reshape(-1, *scores.shape[-2:])
    permutation = dealt.reshape(-1, dealt.shape[-1]).clone()
    groups = _groups(permutation, m)
    generator = torch.Generator().manual_seed(0)
    for turn in range(passes):
        before, previous = _total(flat, pattern, permutation), permutation.clone()
        if turn:
            # The order within a group does not count: dealing columns to other slots opens other moves.
            within = torch.rand(groups.shape, generator=generator).argsort(dim=-1).to(groups.device)
            groups.copy_(groups.gather(-1, within))
        for slot in range(m):
            values = torch.stack(
                [_slot_values(a, p, pattern, slot) for a, p in zip(flat, groups, strict=True)]
            )
            chosen = assignment(values)
            groups[:, :, slot] = groups[:, :, slot].gather(1, chosen)
        if _total(flat, pattern, permutation) <= before * (1 + 1e-9):
            # Another order of equal columns may differ by rounding.
            permutation = previous
            break
    return permutation.view(dealt.shape)


def swap_search(
    scores: Tensor,
    n: int | PatternLike,
    m: int | None = None,
    *,
    start: Tensor | None = None,
    rounds: int = 100,
    escapes: int = 0,
    seed: int = 0,
) -> Tensor:
    """Channel swaps between groups while any raises the kept score, as apex's search for 2:4.

    A round evaluates every swap of two columns, exactly and together, and makes the best ones that touch no
    group twice. When no swap helps, an *escape* shuffles the columns of a few random groups and the search
    goes on; the best order seen is returned.

    Parameters
    ----------
    scores : Tensor
        ``(rows, cols)``, higher = keep.
    n, m : int
        Pattern, or in one piece, as in :func:`nmsolve.transposable_mask`.
    start : Tensor, optional
        Permutation to start from (identity); the result keeps at least its score.
    rounds : int
        At most this many rounds in all.
    escapes : int
        At most this many escapes.
    seed : int
        Of the escapes.

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
    n, m = pattern.n, pattern.m
    if _nothing_to_gain(scores, pattern):
        return best
    generator = torch.Generator().manual_seed(seed)
    current, best_score = best.clone(), float(retained_score(scores, n, m, best))
    groups = _groups(current, m)
    values = torch.empty(*groups.shape, scores.shape[-1], dtype=torch.float64, device=scores.device)
    every = torch.arange(scores.shape[-1], device=scores.device)
    stale = torch.arange(len(groups), device=scores.device)
    for _ in range(rounds):
        for slot in range(m):
            values[stale, slot] = _slot_values(scores, groups[stale], pattern, slot, every)
        stale = _swap(values, groups)
        if len(stale):
            continue
        score = float(retained_score(scores, n, m, current))
        if score > best_score:
            best, best_score = current.clone(), score
        if escapes == 0:
            break
        escapes -= 1
        current.copy_(best)
        picked = torch.randperm(len(groups), generator=generator)[: max(2, len(groups) // 8)]
        members = groups[picked].flatten()
        groups[picked] = members[torch.randperm(len(members), generator=generator)].view(-1, m)
        stale = torch.arange(len(groups), device=scores.device)
    return current if float(retained_score(scores, n, m, current)) > best_score else best


def stripe_search(
    scores: Tensor,
    n: int | PatternLike,
    m: int | None = None,
    *,
    start: Tensor | None = None,
    rounds: int = 50,
    seed: int = 0,
) -> Tensor:
    """Exhaustive search over windows of two groups, as apex's for 2:4 (its "stripe groups" of 8 columns).

    A round pairs all groups at random and deals the ``2 m`` columns of every pair in the best of all
    ``C(2m, m) / 2`` ways. Pairs are disjoint, so their gains add up.

    Parameters
    ----------
    scores : Tensor
        ``(rows, cols)``, higher = keep.
    n, m : int
        Pattern, or in one piece; m at most 4, beyond which the ways are too many (6,435 for m = 8).
    start : Tensor, optional
        Permutation to start from (identity); the result keeps at least its score.
    rounds : int
        Random pairings.
    seed : int
        Of the pairings.

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
    n, m = pattern.n, pattern.m
    window = [(0, *rest) for rest in itertools.combinations(range(1, 2 * m), m - 1)]
    if len(window) > _MAX_SPLITS:
        raise NMSolveError(
            f"m: a stripe search tries every way of dealing two groups' columns, {len(window):,} for m={m}; "
            "expected m of at most 4; swap_search takes any m"
        )
    if _nothing_to_gain(scores, pattern):
        return permutation
    first = torch.tensor(window, device=scores.device)
    second = torch.tensor([sorted({*range(2 * m)} - {*split}) for split in window], device=scores.device)
    generator = torch.Generator().manual_seed(seed)
    groups = _groups(permutation, m)
    for _ in range(rounds):
        order = torch.randperm(len(groups), generator=generator)[: len(groups) // 2 * 2].view(-1, 2)
        members = groups[order].flatten(1)
        kept = torch.zeros(len(members), len(first), dtype=torch.float64, device=scores.device)
        for rows in _row_chunks(scores, members.numel() * len(first)):
            columns = rows[:, members]
            for part in (first, second):
                kept += columns[..., part].topk(n, dim=-1).values.sum((0, -1))
        # Split 0 is how things stand: among equals the first is taken.
        chosen = kept.argmax(dim=1)
        split = torch.cat([first[chosen], second[chosen]], dim=1)
        groups[order.flatten()] = members.gather(1, split).view(-1, m)
    return permutation


def _total(flat: Tensor, pattern: NMPattern, permutation: Tensor) -> float:
    return float(retained_score(flat, pattern.n, pattern.m, permutation).sum())


def _checked(scores: Tensor, n: int | PatternLike, m: int | None) -> NMPattern:
    pattern = NMPattern.of(n, m)
    check_scores(scores)
    check_finite(scores)
    return pattern


def _single(
    scores: Tensor, n: int | PatternLike, m: int | None, start: Tensor | None
) -> tuple[Tensor, NMPattern, Tensor]:
    """The checked arguments of a search on one matrix; scores are widened to float32 at least."""
    pattern = _checked(scores, n, m)
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


def _nothing_to_gain(scores: Tensor, pattern: NMPattern) -> bool:
    """Every order keeps the same: all or nothing is kept, or there are not two full groups."""
    return pattern.n in (0, pattern.m) or scores.shape[-1] // pattern.m < 2 or scores.numel() == 0


def _groups(permutation: Tensor, m: int) -> Tensor:
    """``(..., G, m)``: the full groups of a permutation, as a view that can be written to."""
    full = permutation.shape[-1] // m * m
    return permutation[..., :full].unflatten(-1, (-1, m))


def _row_chunks(scores: Tensor, per_row: int) -> Iterator[Tensor]:
    yield from scores.split(max(1, _CHUNK // max(per_row, 1)))


def _slot_values(
    scores: Tensor, groups: Tensor, pattern: NMPattern, slot: int, columns: Tensor | None = None
) -> Tensor:
    """``F_s[g, j]`` of the module's docstring for ``(G, m)`` groups of ``(rows, cols)`` scores.

    The columns j are those that hold the slot now, or ``columns``; a value means something for the groups
    that do not hold it already.
    """
    n, m = pattern.n, pattern.m
    others = groups[:, [k for k in range(m) if k != slot]]
    moved = groups[:, slot] if columns is None else columns
    top = scores[:, others].double().topk(n, dim=-1).values
    threshold, column = top[..., -1], scores[:, moved].double()
    # max(t, a) = (t + a + |t - a|) / 2, and a matrix of L1 distances needs no temporary of its own size
    # times the rows.
    distance = torch.cdist(threshold.T.contiguous(), column.T.contiguous(), p=1)
    base = top[..., :-1].sum((0, -1)) + threshold.sum(0) / 2
    return base[:, None] + (column.sum(0) + distance) / 2


def _swap(values: Tensor, groups: Tensor) -> Tensor:
    """Makes the best swaps between disjoint groups, in place; the indices of the groups that changed.

    ``values`` is ``(G, m, C)``: kept score of each group with each column in each of its slots, columns by
    their number in the matrix.
    """
    count, m = groups.shape
    position = groups.flatten()
    placed = values.flatten(0, 1)[:, position]
    now = placed.diagonal()
    gain = placed + placed.T - now[:, None] - now[None, :]
    by_pair = gain.unflatten(0, (count, m)).unflatten(2, (count, m)).transpose(1, 2).flatten(2)
    best, which = by_pair.max(dim=-1)
    # Gains within rounding of the sums they come from are none.
    floor = 1e-12 * now.abs().max()
    best = torch.where(best > floor, best, 0).triu(1).cpu()
    candidates = best.flatten().argsort(descending=True, stable=True)[: int((best > 0).sum())]
    changed: set[int] = set()
    for g, h in ((c // count, c % count) for c in candidates.tolist()):
        if g in changed or h in changed:
            continue
        changed.update((g, h))
        i, j = divmod(int(which[g, h]), m)
        held = groups[g, i].clone()
        groups[g, i] = groups[h, j]
        groups[h, j] = held
    return torch.tensor(sorted(changed), dtype=torch.int64, device=groups.device)
