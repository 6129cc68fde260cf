"""What the tests of several clients share."""

from __future__ import annotations

from collections.abc import Iterator

import oracles
import torch
from torch import Tensor, nn


def linears(model: nn.Module, head: bool = False) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of a model, with or without its head."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (head or name != "lm_head"):
            yield name, module


def check_counts(mask: Tensor, n: int, m: int) -> None:
    """That an ``(out, in)`` mask is n:m along rows and columns, counted without nmsolve."""
    oracles.check_mask_counts(mask[None], n, m)


def best_score(scores: Tensor, n: int, m: int) -> float:
    """What a transposable mask of non-negative ``(out, in)`` scores can keep, by min-cost flow."""
    return sum(oracles.min_cost_flow(block, n) for _, _, block in oracles.blocks_of(scores, m))


def best_score_within(scores: Tensor, n: int, m: int) -> float:
    """What a mask with at most N in each line can keep of non-negative scores, 0 where nothing may be kept.

    Further lines, whose scores are 0, take what a line of the block keeps less than N.
    """
    padded = (nn.functional.pad(block, (0, m, 0, m)) for _, _, block in oracles.blocks_of(scores, m))
    return sum(oracles.min_cost_flow(block, n) for block in padded)


def kept(scores: Tensor, mask: Tensor) -> float:
    """The sum of the scores that a mask keeps, in float64."""
    return float(scores.detach().double()[mask].sum())


def inputs_of(model: nn.Module, name: str, batches: Tensor) -> Tensor:
    """``(tokens, in)``: what a layer is called on when the model sees the rows of ``batches`` one by one."""
    seen = []
    layer = model.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, -2)))
    with torch.no_grad():
        for row in batches:
            model(row[None])
    hook.remove()
    return torch.cat(seen)
