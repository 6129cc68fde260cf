"""The metrics of a run from its weights and masks, over all processes that share them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nmsolve.train.metrics import LayerMetrics, SparseMetrics
from nmsolve.train.weights import MaskedWeight

__all__ = ["measure"]


def measure(
    weights: Sequence[MaskedWeight],
    reasons: Mapping[str, str],
    flips: Tensor | None,
    looked_back: int | None,
    step: int,
    phase: str,
    refreshes: int,
) -> SparseMetrics:
    """Communicates where weights are sharded.

    ``reasons`` tells by name why operands are dense.
    ``flips`` (weights,) int64 counts the mask entries of this process that the last refresh changed, and
    ``looked_back`` is the number of optimizer steps before it; None before there was one.
    """
    columns = []
    for k, weight in enumerate(weights):
        magnitude = weight.local.abs()
        total = magnitude.sum(dtype=torch.float64)
        kept = magnitude.masked_fill_(~weight.mask, 0).sum(dtype=torch.float64)
        flipped = torch.zeros_like(total) if flips is None else flips[k].to(total)
        numbers = torch.stack([flipped, kept, total])
        for group in weight.groups_that_share():
            torch.distributed.all_reduce(numbers, group=group)
        columns.append(numbers.cpu())
    flipped_of, kept_of, total_of = (row.tolist() for row in torch.stack(columns).T)
    sizes = [weight.parameter.numel() for weight in weights]

    def rates(count: float, size: int) -> tuple[float | None, float | None]:
        return (None, None) if looked_back is None else (count / size, count / size / looked_back)

    return SparseMetrics(
        step,
        phase,
        refreshes,
        *rates(sum(flipped_of), sum(sizes)),
        _share(sum(kept_of), sum(total_of)),
        tuple(
            LayerMetrics(
                weight.name,
                str(weight.pattern),
                *rates(f, size),
                _share(k, t),
                "dense" if reasons[weight.name] else "sparse24",
                reasons[weight.name],
            )
            for weight, f, size, k, t in zip(weights, flipped_of, sizes, kept_of, total_of, strict=True)
        ),
    )


def _share(kept: float, total: float) -> float:
    return kept / total if total else 1.0
