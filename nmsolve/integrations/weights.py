"""Masks of weights in the shapes that layers store them in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nmsolve.errors import NMSolveError
from nmsolve.prune.layerwise.problem import Pruned
from nmsolve.prune.layerwise.sparsegpt import sparsegpt
from nmsolve.prune.rule import MaskRule

__all__ = ["sparsegpt_weight", "weight_mask"]


def weight_mask(
    scores: Tensor,
    rule: MaskRule,
    *,
    groups: int = 1,
    input_first: bool = False,
    allowed: Tensor | None = None,
) -> Tensor:
    """The mask of a linear layer's or a convolution's weight.

    Parameters
    ----------
    scores : Tensor
        ``(out, in)``, or ``(out, in / groups, *kernel)``: a matrix for each group and kernel position.
        Non-negative.
    rule : MaskRule
        Pattern and solver.
    groups : int
        Groups of a convolution.
    input_first : bool
        Whether the weight is stored ``(in, out)``, as that of transformers' Conv1D is.
    allowed : Tensor, optional
        bool, an earlier mask: what is False there is not kept, so that lines may keep fewer than N.

    Returns
    -------
    Tensor
        bool, contiguous, shape and device of the scores, True = keep.

    Raises
    ------
    NMSolveError
        If the scores have fewer than two dimensions, or are not what the mask functions take.

    Examples
    --------
    >>> mask = weight_mask(torch.rand(8, 4, 3, 3), MaskRule("2:4"))
    >>> mask[:4, :, 1, 2].sum(0), mask[0, :, 1, 2].sum()
    (tensor([2, 2, 2, 2]), tensor(2))
    """
    if scores.ndim < 2:
        raise NMSolveError(
            f"weight: expected at least two dimensions (out, in), got shape {tuple(scores.shape)}"
        )
    if scores.ndim > 2 or groups > 1:

        def matrices(entries: Tensor) -> Tensor:
            return entries.unflatten(0, (groups, -1)).movedim((1, 2), (-2, -1))

        keep = rule.choose(matrices(scores), None if allowed is None else matrices(allowed))
        keep = keep.movedim((-2, -1), (1, 2)).flatten(0, 1)
    elif input_first:
        keep = rule.choose(scores.T, None if allowed is None else allowed.T).T
    else:
        keep = rule.choose(scores, allowed)
    return keep.contiguous()


def sparsegpt_weight(
    weight: Tensor, hessian: Tensor, rule: MaskRule, *, damping: float, allowed: Tensor | None = None
) -> Pruned:
    """SparseGPT on the weight of a linear layer or a convolution without groups.

    Parameters
    ----------
    weight : Tensor
        ``(out, in, *kernel)``.
    hessian : Tensor
        ``(in * kernel, in * kernel)``, undamped, in the order of ``weight.flatten(1)``; any multiple will do.
    rule, damping
        As in :func:`nmsolve.prune.sparsegpt`.
    allowed : Tensor, optional
        bool, an earlier mask in the weight's shape.

    Returns
    -------
    Pruned
        Weight in the Hessian's dtype and bool mask, both in the weight's shape.

    Examples
    --------
    >>> inputs = torch.randn(90, 4 * 9, generator=torch.Generator().manual_seed(0))
    >>> pruned = sparsegpt_weight(torch.ones(8, 4, 3, 3), inputs.T @ inputs, MaskRule("2:4"), damping=0.01)
    >>> pruned.mask.sum((0, 1))
    tensor([[16, 16, 16],
            [16, 16, 16],
            [16, 16, 16]])
    """
    channels, positions = weight.shape[1], math.prod(weight.shape[2:])
    # Channels of one kernel position next to each other.
    order = torch.arange(channels * positions, device=weight.device).view(channels, positions).T.flatten()
    pruned = sparsegpt(
        weight.flatten(1)[:, order],
        hessian[order][:, order],
        rule,
        damping=damping,
        positions=positions,
        allowed=None if allowed is None else allowed.flatten(1)[:, order],
    )
    back = order.argsort()
    return Pruned(*(part[:, back].reshape(weight.shape) for part in pruned))
