"""Wanda's published rule in plain PyTorch, and perplexity from transformers' own loss.

Written from the paper (arXiv 2306.11695, section 3): the score of a weight is ``|W_ij| * ||X_j||_2``,
compared within each output row; for N:M, of every M consecutive inputs the M - N lowest scores are zeroed.
One-shot: the norms are those of the dense model's inputs. Nothing here uses nmsolve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the model's blocks."""
    return {name: x for name, x in model.model.layers.named_modules() if isinstance(x, nn.Linear)}


@torch.no_grad()
def input_norms(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """``||X_j||_2`` ``(in,)`` for every linear layer, over all tokens of the batches."""
    squares = {name: torch.zeros(layer.in_features) for name, layer in block_linears(model).items()}

    def gather(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def hook(layer: nn.Module, args: tuple[Tensor]) -> None:
            squares[name] += args[0].square().sum((0, 1))

        return hook

    hooks = [x.register_forward_pre_hook(gather(name)) for name, x in block_linears(model).items()]
    for batch in batches:
        model(batch)
    for hook in hooks:
        hook.remove()
    return {name: square.sqrt() for name, square in squares.items()}


@torch.no_grad()
def prune(model: nn.Module, norms: dict[str, Tensor], n: int, m: int) -> None:
    """Zeroes the M - N lowest scores of every group of M inputs, in place."""
    for name, layer in block_linears(model).items():
        weight = layer.weight
        metric = weight.abs() * norms[name]
        for start in range(0, weight.shape[1], m):
            lowest = metric[:, start : start + m].topk(m - n, dim=1, largest=False).indices
            weight.scatter_(1, start + lowest, 0)


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor, window: int, windows: int) -> float:
    """``exp`` of the mean of the model's own loss over the first windows."""
    parts = tokens[: window * windows].view(windows, 1, window)
    return math.exp(sum(float(model(part, labels=part).loss) for part in parts) / windows)
