"""One layer to prune: weight and inputs, what a pruned weight loses, and a rule of the reference backend."""

from __future__ import annotations

import torch

from nmsolve.prune import MaskRule


def problem(out: int, size: int, tokens: int = 200, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and correlated inputs of different energy, float64."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=g, dtype=torch.float64) / size**0.5 + torch.eye(size)
    scale = torch.randn(size, generator=g, dtype=torch.float64).exp()
    inputs = torch.randn(tokens, size, generator=g, dtype=torch.float64) @ mix * scale
    return torch.randn(out, size, generator=g, dtype=torch.float64), inputs


def error(weight: torch.Tensor, pruned: torch.Tensor, inputs: torch.Tensor) -> float:
    return float((inputs @ (weight - pruned).T).square().sum() / (inputs @ weight.T).square().sum())


def rule(pattern: str, transposable: bool) -> MaskRule:
    return MaskRule(pattern, transposable, backend="torch")
