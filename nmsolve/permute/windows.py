"""Groups of columns, and how they are dealt into windows that a search looks at one at a time.

torch is imported where there is work for it: arguments are checked without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nmsolve.errors import NMSolveError
from nmsolve.pattern import NMPattern

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["check_window", "deal_windows", "groups_of", "nothing_to_gain"]


def check_window(window: object, pattern: NMPattern, default: int) -> int:
    """The groups of a window of so many columns, or ``default`` groups where it is None.

    Raises
    ------
    NMSolveError
        If it is not an integer that holds two groups.
    """
    if window is None:
        return default
    if isinstance(window, bool) or not isinstance(window, int) or window < 2 * pattern.m:
        raise NMSolveError(
            f"window: expected columns of at least two groups, {2 * pattern.m} for {pattern}, got {window!r}"
        )
    return window // pattern.m


def deal_windows(count: int, size: int, generator: torch.Generator) -> Tensor:
    """``(W, G)`` int64: groups dealt at random into windows of at most ``size``, and at least two.

    There are as few windows as possible, all equally large; groups that are left over are in none. Where one
    window holds all groups they stay in their order.
    """
    import torch

    if size >= count:
        return torch.arange(count)[None]
    # One group alone has nobody to exchange columns with.
    windows = min(-(-count // size), count // 2)
    dealt = torch.randperm(count, generator=generator)
    return dealt[: min(size, count // windows) * windows].view(windows, -1)


def groups_of(permutation: Tensor, m: int) -> Tensor:
    """``(..., G, m)``: the full groups of a permutation, as a view that can be written to."""
    full = permutation.shape[-1] // m * m
    return permutation[..., :full].unflatten(-1, (-1, m))


def nothing_to_gain(scores: Tensor, pattern: NMPattern) -> bool:
    """Every order keeps the same: all or nothing is kept, or there are not two full groups."""
    return pattern.n in (0, pattern.m) or scores.shape[-1] // pattern.m < 2 or scores.numel() == 0
