"""RIA's channel permutation, written from its paper: deal the columns, then one assignment for every slot.

Plug-and-Play (Zhang et al., arXiv 2402.11299, section 3.2): columns are sorted by their sums, the smallest
first, and dealt to and fro into the M slots; then each slot in turn, beginning with that of the smallest, is
given to the groups anew. As in the published program, the kept scores of a group with every column are made
group by group from sorted scores, and SciPy assigns them. Nothing here uses nmsolve.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

__all__ = ["ria_channels"]


def ria_channels(scores: Tensor, n: int, m: int) -> Tensor:
    """The order of the columns, int64 ``(cols,)``; m divides them."""
    count = scores.shape[1] // m
    slots = scores.sum(0).argsort().view(m, count)
    groups = torch.stack([line.flip(0) if k % 2 else line for k, line in enumerate(slots)], dim=1)
    for slot in range(m):
        moved = scores[:, groups[:, slot]]
        values = torch.empty(count, count)
        for g, columns in enumerate(groups):
            others = scores[:, columns[[k for k in range(m) if k != slot]]]
            trial = torch.cat([others[:, None].expand(-1, count, -1), moved[:, :, None]], dim=2)
            values[g] = trial.topk(n, dim=2).values.sum((0, 2))
        chosen = linear_sum_assignment(values.numpy(), maximize=True)[1]
        groups[:, slot] = groups[torch.from_numpy(chosen), slot]
    return groups.flatten()
