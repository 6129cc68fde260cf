"""The best of all 90 transposable 2:4 patterns, by exhaustive search.

Hu, Zhao, Huang, Chen, Zhu: Accelerating Transformer Pre-training with 2:4 Sparsity (ICML 2024, arXiv
2404.01847): a convolution of stride 4 with the 90 patterns as its kernels gives the score of
each, the largest one decides. On blocks that are there side by side the convolution is a matrix product.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

CHUNK = 1 << 13  # blocks whose 90 scores stay in the cache


@functools.cache
def patterns() -> Tensor:
    """bool ``(90, 4, 4)``: every mask with two in each row and column."""
    rows = [[i in pair for i in range(4)] for pair in itertools.combinations(range(4), 2)]
    masks = torch.tensor(list(itertools.product(rows, repeat=4)))
    return masks[(masks.sum(1) == 2).all(1)]


def best_pattern(blocks: Tensor) -> Tensor:
    """Optimal bool masks of ``(B, 4, 4)`` scores."""
    kernels = patterns().flatten(1).to(blocks).T.contiguous()
    best = torch.empty(len(blocks), dtype=torch.int64, device=blocks.device)
    flat = blocks.flatten(1)
    for start in range(0, len(blocks), CHUNK):
        part = slice(start, start + CHUNK)
        torch.argmax(flat[part] @ kernels, 1, out=best[part])
    return patterns().to(blocks.device).index_select(0, best)
