"""Row-wise N:M, then column-wise N:M of what is left: "Bi-NM", a baseline of TSENOR (arXiv 2505.23949).

It goes back to the masks of Zhang, Luo, Lin, Zhong, Xie, Chao, Ji: Bi-directional Masks for Efficient N:M
Sparse Training (ICML 2023, arXiv 2302.06058), where the backward mask is computed on the forward one's
weights. No line holds more than n; many rows hold fewer.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_then_column(blocks: Tensor, n: int) -> Tensor:
    """bool masks of ``(B, m, m)`` scores, which must be positive."""
    rows = _largest(blocks, n, 2)
    return _largest(blocks * rows, n, 1) & rows


def _largest(blocks: Tensor, n: int, dim: int) -> Tensor:
    taken = blocks.topk(n, dim=dim, sorted=False).indices
    return torch.zeros_like(blocks, dtype=torch.bool).scatter_(dim, taken, True)
