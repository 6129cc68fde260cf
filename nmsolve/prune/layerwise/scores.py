r"""Scores that need no update of the kept weights: magnitude, Wanda and RIA.

With the weight :math:`W` of shape (out, in) and :math:`X_j` the calibration values of input j,

===========  =====================================================================  =======================
magnitude    :math:`|W_{ij}|`
Wanda        :math:`|W_{ij}| \cdot \|X_j\|_2`                                       arXiv 2306.11695, eq. 1
RIA          :math:`\left(\frac{|W_{ij}|}{\sum_i |W_{ij}|} +
             \frac{|W_{ij}|}{\sum_j |W_{ij}|}\right) \cdot \|X_j\|_2^{\,a}`         ICLR 2024, eq. 3, a = 0.5
===========  =====================================================================  =======================

All are non-negative, and a weight that is zero scores zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["magnitude_scores", "ria_scores", "wanda_scores"]

RIA_POWER = 0.5


def magnitude_scores(weight: Tensor) -> Tensor:
    """``|W|``: ``(out, in)`` to scores of the same shape."""
    return weight.abs()


def wanda_scores(weight: Tensor, norms: Tensor) -> Tensor:
    """``|W_ij| * norms_j`` with the 2-norms ``(in,)`` of the inputs.

    Examples
    --------
    >>> wanda_scores(torch.tensor([[1.0, -2.0]]), torch.tensor([3.0, 1.0]))
    tensor([[3., 2.]])
    """
    return weight.abs() * norms


def ria_scores(weight: Tensor, norms: Tensor, power: float = RIA_POWER) -> Tensor:
    """``(|W_ij| / column sum + |W_ij| / row sum) * norms_j ** power``; a line of zeros scores zero.

    Examples
    --------
    >>> ria_scores(torch.tensor([[1.0, 3.0], [1.0, 1.0]]), torch.tensor([4.0, 1.0]))
    tensor([[1.5000, 1.5000],
            [2.0000, 0.7500]])
    """
    size = weight.abs()
    tiny = torch.finfo(size.dtype).tiny
    share = size / size.sum(-2, keepdim=True).clamp_min(tiny) + size / size.sum(-1, keepdim=True).clamp_min(
        tiny
    )
    return share * norms**power
