"""The greedy 2-approximation for transposable masks, as it was published.

Hubara, Chmiel, Island, Banner, Naor, Soudry: Accelerated Sparse Neural Training: A Provable and Efficient
Method to Find N:M Transposable Masks (NeurIPS 2021), algorithm 1. The entries of a block are sorted once
and then looked at one after another: an entry is taken while its row and its column hold fewer than n.
Their PyTorch code does that for all blocks at once, so it takes m*m steps; it also sums the mask's rows and
columns anew in each step. This version keeps running counts instead, which is faster.

Nothing fills the lines that end up short: not every row and column of the result holds n.
"""

from __future__ import annotations

import torch
from torch import Tensor


def two_approximation(blocks: Tensor, n: int) -> Tensor:
    """bool masks of ``(B, m, m)`` scores."""
    batch, m, _ = blocks.shape
    order = blocks.reshape(batch, -1).argsort(dim=1, descending=True).T.contiguous()
    in_row = torch.zeros(batch * m, dtype=torch.int32, device=blocks.device)
    in_col = torch.zeros(batch * m, dtype=torch.int32, device=blocks.device)
    mask = torch.zeros(m * m, batch, dtype=torch.bool, device=blocks.device)
    first = torch.arange(batch, device=blocks.device) * m
    for entry in order:
        row, col = first + entry // m, first + entry % m
        take = (in_row[row] < n) & (in_col[col] < n)
        in_row[row] += take
        in_col[col] += take
        mask.scatter_(0, entry.unsqueeze(0), take.unsqueeze(0))
    return mask.T.reshape(batch, m, m)
