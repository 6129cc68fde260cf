"""Masks of all weights at once: all of a pattern are solved in one call, and all are written or none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from nmsolve.errors import NMSolveError, WorkFailed
from nmsolve.ops.distributed import shard_of
from nmsolve.ops.masks import nm_mask, transposable_masks
from nmsolve.ops.validation import check_all_finite
from nmsolve.train.arguments import TrainSettings
from nmsolve.train.weights import MaskedWeight

__all__ = ["check_finite", "solve_masks", "write_masks"]


def solve_masks(weights: Sequence[MaskedWeight], settings: TrainSettings) -> dict[int, Tensor]:
    """Index of a weight -> the mask that keeps its largest magnitudes, ``(..., out, in)`` as
    :meth:`MaskedWeight.matrices`; none where this process holds nothing of a weight.

    Raises
    ------
    WorkFailed
        If weights are not finite.
    """
    found: dict[int, Tensor] = {}
    for pattern in dict.fromkeys(weight.pattern for weight in weights):
        members = [k for k, weight in enumerate(weights) if weight.pattern == pattern]
        members = [k for k in members if weights[k].local.numel()]
        scores = [weights[k].matrices(weights[k].local.abs()) for k in members]
        n, m, backend = pattern.n, pattern.m, settings.backend
        try:
            check_all_finite(scores)  # an infinite weight is no wish to keep it
            if settings.transposable:
                masks = transposable_masks(scores, n, m, backend=backend)
            else:
                masks = [nm_mask(matrix, n, m, backend=backend) for matrix in scores]
        except NMSolveError:
            check_finite([(weights[k].name, weights[k].local) for k in members])
            raise
        found.update(zip(members, masks, strict=True))
    return found


def write_masks(weights: Sequence[MaskedWeight], found: Mapping[int, Tensor]) -> Tensor:
    """Takes the masks of :func:`solve_masks`; returns how many entries of each weight changed, int64."""
    flips = []
    for k, weight in enumerate(weights):
        flips.append(torch.zeros((), dtype=torch.int64))
        if k in found:
            mask = weight.from_matrices(found[k])
            flips[k] = (mask != weight.mask).sum()
            weight.write(mask)
    return torch.stack([count.to(flips[0].device) for count in flips])


def check_finite(weights: Iterable[tuple[str, Tensor]]) -> None:
    """Raises WorkFailed with the first weight that has NaN or infinite entries."""
    for name, weight in weights:
        local = shard_of(weight)
        wrong = local.numel() - int(torch.isfinite(local).sum())
        if wrong:
            raise WorkFailed(
                f"model: {name}: expected finite values, got {wrong} NaN or infinite of {local.numel()}"
            )
