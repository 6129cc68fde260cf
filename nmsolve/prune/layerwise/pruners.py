"""How a method prunes layers that see the same inputs, once it has made what it needs of their Hessian.

Weights are ``(groups, out, positions * in)``: a matrix for each group of a convolution, whose kernel
positions lie one after the other with all their channels; see :mod:`nmsolve.prune.layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nmsolve.prune.layerwise.problem import Pruned
from nmsolve.prune.rule import MaskRule

__all__ = ["ScorePruner", "SystemPruner", "input_norms"]


def input_norms(diagonal: Tensor) -> Tensor:
    """The 2-norms of the inputs, ``(groups, 1, in)``, of the diagonal ``(groups, in)`` of a Hessian."""
    return diagonal.sqrt().unsqueeze(-2)


class ScorePruner:
    """Keeps the mask of largest score, and the weights that stay as they are.

    ``scores`` maps weights to scores of their shape.
    """

    def __init__(self, scores: Callable[[Tensor], Tensor]) -> None:
        self.scores = scores

    def __call__(self, dense: Tensor, rule: MaskRule, positions: int, allowed: Tensor | None) -> Pruned:
        def split(entries: Tensor) -> Tensor:
            return entries.unflatten(2, (positions, -1)).transpose(1, 2)

        chosen = rule.choose(split(self.scores(dense)), None if allowed is None else split(allowed))
        mask = chosen.transpose(1, 2).flatten(2)
        return Pruned(dense * mask, mask)


class SystemPruner:
    """Solves for weights and mask together, in one system of equations for each group.

    ``solve`` is called as :func:`nmsolve.prune.sparsegpt` is, with a system in place of the Hessian.
    """

    def __init__(self, solve: Callable[..., Pruned], systems: Sequence[Any]) -> None:
        self.solve = solve
        self.systems = systems

    def __call__(self, dense: Tensor, rule: MaskRule, positions: int, allowed: Tensor | None) -> Pruned:
        found = [
            self.solve(
                dense[g], system, rule, positions=positions, allowed=None if allowed is None else allowed[g]
            )
            for g, system in enumerate(self.systems)
        ]
        if len(found) == 1:
            return Pruned(*(part.unsqueeze(0) for part in found[0]))
        return Pruned(*(torch.stack(parts) for parts in zip(*found, strict=True)))
