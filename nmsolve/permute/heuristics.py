r"""RIA's search for orders of the input channels that let an N:M mask keep more score.

M consecutive positions of a permutation (see :mod:`nmsolve.permute.orders`) form a *group*, and position
``g M + s`` is *slot* s of group g. With ``F_s[g, j]`` the kept score of group g with column j in its slot s
(:mod:`nmsolve.permute.insertions`), giving every group a column for slot s is one assignment on F_s. Staying
is one of its choices, so that a step never lowers the kept score.

**Windows.** The values of C columns take time as C squared, and an assignment more. Of many columns,
groups are therefore dealt into windows at random, anew for every slot; each window has its own assignment,
and all are one batch. A small window loses some of what one pass gains and takes a fraction of its time,
which further passes make use of (docs/permutation.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nmsolve.errors import NMSolveError
from nmsolve.ops.assignment import assignment
from nmsolve.ops.validation import check_finite, check_scores
from nmsolve.pattern import NMPattern, PatternLike
from nmsolve.permute.insertions import Insertions
from nmsolve.permute.windows import check_window, deal_windows, groups_of, nothing_to_gain

__all__ = ["deal_columns", "ria_permutation", "search_pass"]

# By default so many groups are one window, and more are dealt into windows of so many: assignments of larger
# ones take longer than their values, and further passes gain more in that time.
_WHOLE_GROUPS = 1024
_WINDOW_GROUPS = 512


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


def ria_permutation(
    scores: Tensor,
    n: int | PatternLike,
    m: int | None = None,
    *,
    passes: int = 10,
    window: int | None = None,
) -> Tensor:
    """RIA's channel permutation (arXiv 2402.11299, section 3.2): deal the columns, then refine slot by slot.

    After :func:`deal_columns`, each slot in turn takes the best of all ways to give its columns to the
    groups, by one assignment of ``(C/m, C/m)`` kept scores, or one for each window; see the module's
    docstring. The published method makes one pass, from the slot of the smallest columns on. Without windows
    the first pass is made from either end and the better one taken, so that it never keeps less than that.

    Parameters
    ----------
    scores : Tensor
        ``(..., rows, cols)``, higher = keep; each matrix gets its own permutation. For layers that share
        one permutation, concatenate their scores along the rows.
    n, m : int
        Pattern, or in one piece, as in :func:`nmsolve.transposable_mask`.
    passes : int
        At most how often every slot is refined. More never keep less; it stops when a pass gains nothing.
    window : int, optional
        Columns that are given to groups together, at least two groups; all where they are no more. If left
        out, 512 groups where there are more than 1,024, and else all.

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
    >>> from nmsolve.permute import retained_score
    >>> scores = torch.tensor([[4.0, 3.0, 0.0, 1.0]])
    >>> retained_score(scores, 1, 2, ria_permutation(scores, 1, 2))
    tensor(7., dtype=torch.float64)
    """
    pattern = NMPattern.of(n, m)
    check_scores(scores)
    check_finite(scores)
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 0:
        raise NMSolveError(f"passes: expected an integer of at least 0, got {passes!r}")
    many = scores.shape[-1] // pattern.m > _WHOLE_GROUPS
    size = check_window(window, pattern, _WINDOW_GROUPS if many else _WHOLE_GROUPS)
    if nothing_to_gain(scores, pattern):
        return torch.arange(scores.shape[-1], device=scores.device).expand(
            *scores.shape[:-2], scores.shape[-1]
        )
    dealt = deal_columns(scores, pattern.m)
    permutation = dealt.reshape(-1, dealt.shape[-1]).clone()
    for matrix, order in zip(scores.detach().reshape(-1, *scores.shape[-2:]), permutation, strict=True):
        groups = groups_of(order, pattern.m)
        groups.copy_(_refined(Insertions(matrix, pattern), groups, passes, size))
    return permutation.view(dealt.shape)


def _refined(values: Insertions, groups: Tensor, passes: int, size: int) -> Tensor:
    """The groups ``(G, m)`` after at most so many passes, in windows of at most ``size`` groups."""
    generator = torch.Generator().manual_seed(0)
    slots = range(values.m)
    for turn in range(passes):
        shuffled = groups
        if turn:
            # The order within a group does not count: dealing columns to other slots opens other moves.
            within = torch.rand(groups.shape, generator=generator).argsort(dim=-1)
            shuffled = groups.gather(-1, within.to(groups.device))
        refined, gain = search_pass(values, shuffled, slots, size, generator)
        if turn == 0 and size >= len(groups):
            published = search_pass(values, groups, slots[::-1], size, generator)
            refined, gain = max((refined, gain), published, key=lambda found: found[1])
        if gain <= 0:
            break
        groups = refined
    return groups


def search_pass(
    values: Insertions, groups: Tensor, slots: range, size: int, generator: torch.Generator
) -> tuple[Tensor, float]:
    """The groups after one assignment for every slot and window, and what they keep more."""
    groups, gained = groups.clone(), groups.new_zeros((), dtype=torch.float64)
    for slot in slots:
        windows = deal_windows(len(groups), size, generator).to(groups.device)
        kept = values.of_slot(groups[windows], slot)
        chosen = assignment(kept)
        stay = kept.diagonal(dim1=1, dim2=2).sum(1)
        gain = kept.gather(2, chosen.unsqueeze(2)).sum((1, 2)) - stay
        # Another order of equal columns may differ by rounding.
        made = gain > values.rounding * stay.abs()
        columns = groups[windows, slot]
        groups[windows, slot] = torch.where(made[:, None], columns.gather(1, chosen), columns)
        gained += torch.where(made, gain, 0).sum()
    return groups, float(gained)
