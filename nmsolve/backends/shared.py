"""What more than one backend does the same way."""

from __future__ import annotations

import torch
from torch import Tensor

from nmsolve.solution import BlockResult

__all__ = ["assignment_of", "permute_columns", "rms_norm_permute"]


def assignment_of(scores: Tensor, result: BlockResult, want_solution: bool) -> tuple[Tensor, ...]:
    """What a backend's ``assignment`` returns, from the 1:M masks of blocks as large as the matrices."""
    permutation = result.mask.view(torch.uint8).argmax(2)
    if not want_solution:
        return (permutation,)
    _, u, v, objective, bound = result
    assert u is not None and v is not None and objective is not None and bound is not None  # noqa: PT018
    scale = scores.gather(2, permutation.unsqueeze(2)).double().abs().sum((1, 2))
    return permutation, u[:, 0, 0].double(), v[:, 0, 0].double(), objective[:, 0, 0], bound[:, 0, 0], scale


def permute_columns(x: Tensor, permutation: Tensor) -> Tensor:
    """``x[:, permutation]`` of ``(rows, cols)``; on a CPU as fast as memory."""
    return x.index_select(1, permutation)


def rms_norm_permute(x: Tensor, weight: Tensor, permutation: Tensor, eps: float) -> Tensor:
    """``(x / sqrt(mean(x^2) + eps) * weight)[:, permutation]``, in float32 at least, rounded once."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (wide.square().mean(1, keepdim=True) + eps).rsqrt()
    return (wide * scale * weight.to(wide.dtype)).to(x.dtype).index_select(1, permutation)
