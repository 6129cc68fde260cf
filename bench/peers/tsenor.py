"""TSENOR in PyTorch, step by step as the paper gives it.

Meng, Makni, Mazumder: TSENOR: Highly-Efficient Algorithm for Finding Transposable N:M Sparse Masks (arXiv
2505.23949). Algorithm 1 (Dykstra's projections for entropic optimal transport, in the log domain) and
algorithm 2 (greedy selection, then local search). Lines may stay short when the local search's steps run
out.

This is a program of ours from the paper, not the authors' code. Its choices where the paper leaves them open:
scores are divided by the largest of their block, and all blocks go together.
"""

from __future__ import annotations

import math

import torch
from peers.two_approximation import two_approximation
from torch import Tensor

TAU = 150.0
ITERATIONS = 300
STEPS = 10


def tsenor(blocks: Tensor, n: int, search: bool = True) -> Tensor:
    """bool masks of ``(B, m, m)`` scores, with the local search or as the greedy selection leaves them."""
    greedy = two_approximation(dykstra(blocks, n), n)
    return local_search(blocks, greedy, n) if search else greedy


def dykstra(blocks: Tensor, n: int) -> Tensor:
    """log of the fractional plan: rows to sum n, columns to sum n, entries to at most 1, again and again."""
    log_s = blocks * (TAU / blocks.amax((1, 2), keepdim=True))
    log_q = torch.zeros_like(log_s)
    log_n = math.log(n)
    for _ in range(ITERATIONS):
        log_s = log_s - torch.logsumexp(log_s, 2, keepdim=True) + log_n
        log_s = log_s - torch.logsumexp(log_s, 1, keepdim=True) + log_n
        raised = log_s + log_q
        log_s = raised.clamp(max=0)
        log_q = raised - log_s
    return log_s


def local_search(blocks: Tensor, mask: Tensor, n: int) -> Tensor:
    """Up to STEPS swaps a block, each filling one short row i and one short column j.

    The swap drops a kept (i', j') and keeps (i, j') and (i', j); the best one is made while it gains.
    """
    mask = mask.clone()
    m = mask.shape[1]
    open_ = torch.arange(len(mask), device=mask.device)
    for _ in range(STEPS):
        rows, cols = mask[open_].sum(2) < n, mask[open_].sum(1) < n
        open_ = open_[rows.any(1)]
        if not len(open_):
            break
        short = rows.any(1)
        i, j = rows[short].int().argmax(1), cols[short].int().argmax(1)
        a, s, b = blocks[open_], mask[open_], torch.arange(len(open_), device=mask.device)
        here, there = a[b, i].unsqueeze(1), a[b, :, j].unsqueeze(2)
        legal = s & ~s[b, i].unsqueeze(1) & ~s[b, :, j].unsqueeze(2)
        gain, best = torch.where(legal, here + there - a, -math.inf).flatten(1).max(1)
        gains = gain > 0
        block, row, col = open_[gains], best[gains] // m, best[gains] % m
        mask[block, row, col] = False
        mask[block, i[gains], col] = True
        mask[block, row, j[gains]] = True
        open_ = block
    return mask
