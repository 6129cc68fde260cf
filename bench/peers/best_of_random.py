"""The best of 1000 random masks for each block: "Max1000", a baseline of TSENOR (arXiv 2505.23949).

All blocks choose from the same masks, so that the scores of all are one matrix product. A mask starts as a
circulant with rows and columns in random order and goes through random swaps: where rows i, i' and columns
j, j' hold a checkerboard, it is turned over, which keeps all counts (Ryser 1957) and reaches every such
mask.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

TRIES = 1000
CHUNK = 1 << 22  # kept scores looked at together


def best_of_random(blocks: Tensor, n: int, tries: int = TRIES) -> Tensor:
    """bool masks of ``(B, m, m)`` scores."""
    masks = random_masks(n, blocks.shape[1], tries)
    weights = masks.flatten(1).to(blocks.dtype).T
    best = [(part.flatten(1) @ weights).argmax(1) for part in blocks.split(max(1, CHUNK // tries))]
    return masks[torch.cat(best)] if best else torch.zeros_like(blocks, dtype=torch.bool)


@functools.cache
def random_masks(n: int, m: int, tries: int = TRIES, seed: int = 0) -> Tensor:
    """bool ``(tries, m, m)``, each with n in every row and column."""
    g = torch.Generator().manual_seed(seed)
    lines = torch.arange(m)
    circulant = (lines.unsqueeze(0) - lines.unsqueeze(1)) % m < n
    rows, cols = (torch.rand(tries, m, generator=g).argsort(1) for _ in range(2))
    masks = circulant[rows.unsqueeze(2), cols.unsqueeze(1)]
    if m == 1:
        return masks
    t = torch.arange(tries)
    for _ in range(4 * m * m):
        (i, k), (j, h) = (torch.rand(tries, m, generator=g).topk(2, dim=1).indices.T for _ in range(2))
        corners = (masks[t, i, j], masks[t, k, h], ~masks[t, i, h], ~masks[t, k, j])
        first = corners[0]
        board = (corners[1] == first) & (corners[2] == first) & (corners[3] == first)
        for row, col, other in ((i, j, False), (k, h, False), (i, h, True), (k, j, True)):
            masks[t, row, col] = torch.where(board, first if other else ~first, masks[t, row, col])
    return masks
