"""A model for the tests of sparse training, and a loop that does by hand what SparseTraining does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import nmsolve

STEPS = 8
GRADIENTS = ("straight-through", "masked", "sr-ste")
NAMES = ["up.weight", "down.weight"]


class Net(nn.Module):
    """Two linear layers and a norm, ``(B, 16) -> (B, 16)``."""

    def __init__(self, hidden: int = 32, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.up = nn.Linear(16, hidden, dtype=dtype)
        self.norm = nn.LayerNorm(hidden, dtype=dtype)
        self.down = nn.Linear(hidden, 16, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.norm(self.up(x))))


def network(seed: int = 0, **changes: object) -> Net:
    torch.manual_seed(seed)
    return Net(**changes)


def batches(steps: int = STEPS, size: int = 8) -> Iterator[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield torch.randn(size, 16, generator=g), torch.randn(size, 16, generator=g)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Iterator[tuple[Tensor, Tensor]] | None = None,
    after: Callable[[], object] = lambda: None,
    clip: float = math.inf,
) -> list[float]:
    losses = []
    for x, y in batches() if data is None else data:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        after()
        losses.append(loss.item())
    return losses


def by_hand(
    model: Net,
    optimizer: torch.optim.Optimizer,
    gradient: str,
    decay: float,
    refresh: int,
    n: int = 2,
    m: int = 4,
    clip: float = math.inf,
) -> tuple[list[float], list[int]]:
    """Losses and flips of a run whose masked products, gradients and decay are written out."""
    weights = [model.up.weight, model.down.weight]
    losses, flips, masks = [], [], solved(weights, n, m)
    for step, (x, y) in enumerate(batches(), 1):
        optimizer.zero_grad()
        operands = [(w.detach() * s).requires_grad_() for w, s in zip(weights, masks, strict=True)]
        hidden = nn.functional.linear(x, operands[0], model.up.bias)
        loss = (nn.functional.linear(torch.tanh(model.norm(hidden)), operands[1]) - y).square().mean()
        loss.backward()
        for weight, operand, mask in zip(weights, operands, masks, strict=True):
            weight.grad = operand.grad * mask if gradient == "masked" else operand.grad
        nn.utils.clip_grad_norm_(model.parameters(), clip)  # decay is none of the loss's gradient
        for weight, mask in zip(weights, masks, strict=True):
            if gradient == "sr-ste":
                weight.data -= optimizer.param_groups[0]["lr"] * decay * weight.data * ~mask
            else:
                weight.grad += decay * weight.data * ~mask
        optimizer.step()
        losses.append(loss.item())
        if step % refresh == 0:
            new = solved(weights, n, m)
            flips.append(sum(int((a != b).sum()) for a, b in zip(new, masks, strict=True)))
            masks = new
    return losses, flips


def solved(weights: list[Tensor], n: int, m: int) -> list[Tensor]:
    return [nmsolve.transposable_mask(weight.detach().abs(), n, m, backend="torch") for weight in weights]


class Watched:
    """The weights that products of masked layers see, caught in their calls."""

    def __init__(self, monkeypatch: object) -> None:
        self.operands: list[Tensor] = []
        linear = nn.functional.linear

        def caught(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            self.operands.append(weight.detach().clone())
            return linear(x, weight, bias)

        monkeypatch.setattr(nn.functional, "linear", caught)  # type: ignore[attr-defined]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def adamw(model: nn.Module, **options: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1, **options)


def layers() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    return {
        "linear": (nn.Linear(12, 8), torch.randn(3, 5, 12)),
        "odd linear": (nn.Linear(10, 7, bias=False), torch.randn(3, 10)),
        "conv1d": (nn.Conv1d(8, 12, 3, padding=1), torch.randn(2, 8, 9)),
        "conv2d": (nn.Conv2d(8, 16, 3, stride=2, padding="valid"), torch.randn(2, 8, 9, 9)),
        "grouped": (nn.Conv2d(16, 8, (1, 3), groups=2, padding_mode="circular"), torch.randn(2, 16, 5, 5)),
        "gpt2": (Conv1D(12, 8), torch.randn(3, 5, 8)),
    }
