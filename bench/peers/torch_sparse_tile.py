"""The greedy 2:4 tiles of ``torch.sparse``: PyTorch's own training kernels choose their masks so.

``torch._sparse_semi_structured_tile`` runs on CUDA only. What PyTorch has for the CPU is a Python function
with the same algorithm: the 16 entries of a tile by descending value, each kept while its row and its
column hold fewer than two. It is the 2-approximation at 2:4 and leaves the same lines short.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import _sparse_semi_structured_tile


def sparse_tile(blocks: Tensor) -> Tensor:
    """bool masks of ``(B, 4, 4)`` scores, which must be positive."""
    strip = blocks.transpose(0, 1).reshape(4, -1).clone()
    kept = _sparse_semi_structured_tile(strip) != 0
    return kept.reshape(4, -1, 4).transpose(0, 1).contiguous()


def packed_tiles(matrix: Tensor) -> tuple[Tensor, ...]:
    """PyTorch's CUDA kernel on a float16 or bfloat16 matrix, sides multiples of 128; first, what it keeps.

    It packs the matrix and its transpose for sparse tensor cores in the same launch, and no mask leaves it.
    """
    return torch._sparse_semi_structured_tile(matrix, algorithm="", use_cutlass=True)  # type: ignore[attr-defined]
