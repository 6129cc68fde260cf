r"""The module that learns an order of channels, and the pruned weight as a function of it.

One matrix of logits for each block of channels: :func:`nmsolve.sinkhorn` makes it a doubly stochastic plan P
and :func:`nmsolve.assignment` a permutation H. Position is the row, channel the column: the reordered weight
is ``W P^T``, and ``P`` takes a mask back to the channels' own order. With the N:M mask M of the reordered
scores:

* **"permllm"** (arXiv 2510.10136): blocks of 64, the forward pass uses H and the gradient that of P
  (straight-through). The layer's weight is ``W * (M H)``; M follows the scores through the softmax of each
  group.
* **"cost-matrix"** (arXiv 2601.22980): four blocks, the soft plan itself in training: the weight is
  ``(M * (W P^T)) P``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nmsolve.errors import NMSolveError
from nmsolve.ops.assignment import assignment
from nmsolve.ops.masks import nm_mask, transposable_mask
from nmsolve.ops.sinkhorn import sinkhorn
from nmsolve.ops.validation import check_finite
from nmsolve.pattern import NMPattern

__all__ = [
    "STRATEGIES",
    "LearnableChannelPermutation",
    "Strategy",
    "check_strategy",
    "kept_in_order",
    "pruned_in_order",
]

Strategy = Literal["permllm", "cost-matrix"]


@dataclass(frozen=True)
class _Constants:
    """A strategy's row: Sinkhorn iterations, temperatures, start of the identity, learning rate.

    ``soft`` tells that it trains with the soft plan, in few large blocks, for the task's loss.
    """

    iterations: int
    temperature: tuple[float, float]
    lead: float
    learning_rate: float
    soft: bool


STRATEGIES: Mapping[str, _Constants] = {
    "permllm": _Constants(iterations=5, temperature=(1.0, 0.1), lead=0.25, learning_rate=0.1, soft=False),
    "cost-matrix": _Constants(iterations=20, temperature=(0.1, 0.03), lead=1.0, learning_rate=0.4, soft=True),
}

_BLOCK = 64
_GROUPS = 4

# Of the first logits, as a share of the identity's lead: the order of the start stays on top.
_NOISE = 0.05


def check_strategy(strategy: str) -> None:
    """Raise NMSolveError unless ``strategy`` is a key of ``STRATEGIES``."""
    if strategy not in STRATEGIES:
        raise NMSolveError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")


class LearnableChannelPermutation(nn.Module):
    """A permutation of channels, block by block, that gradients can change.

    Parameters
    ----------
    channels : int
    strategy : {"permllm", "cost-matrix"}
        Blocks of 64 with hard plans, or 4 blocks with soft plans.
    block : int, optional
        Channels of a block; divides ``channels``. By default the largest divisor up to 64, or a quarter.
    heads : int
        Independent sets of ``channels`` channels.
    seed : int
        Of the logits' noise.

    Attributes
    ----------
    logits : Parameter
        float32 ``(heads * channels / block, block, block)``; the cost matrix is their negative.
    temperature : float
        Of the plan; annealed by :func:`learn_permutation`.

    Examples
    --------
    >>> module = LearnableChannelPermutation(128)
    >>> torch.equal(module.permutation(), torch.arange(128))
    True
    >>> module.plan().shape
    torch.Size([2, 64, 64])
    """

    def __init__(
        self,
        channels: int,
        *,
        strategy: Strategy = "permllm",
        block: int | None = None,
        heads: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_strategy(strategy)
        self.constants = STRATEGIES[strategy]
        if block is None:
            limit = max(1, channels // _GROUPS) if self.constants.soft else _BLOCK
            block = next(size for size in range(min(limit, channels), 0, -1) if channels % size == 0)
        if block < 1 or channels % block:
            raise NMSolveError(f"block: expected a divisor of channels={channels}, got {block!r}")
        self.strategy = strategy
        self.channels, self.block, self.heads = channels, block, heads
        self.temperature = self.constants.temperature[0]
        generator = torch.Generator().manual_seed(seed)
        noise = torch.rand(heads * channels // block, block, block, generator=generator) - 0.5
        self.logits = nn.Parameter(self.constants.lead * (torch.eye(block) + _NOISE * noise))

    def plan(self) -> Tensor:
        """The doubly stochastic plans ``(blocks, block, block)``: share of each channel at each position."""
        return sinkhorn(self.logits, temperature=self.temperature, iterations=self.constants.iterations)

    def forward(self) -> Tensor:
        """The plans to train with: hard with the gradient of the soft ones, or soft ones."""
        plan = self.plan()
        if self.constants.soft:
            return plan
        return F.one_hot(assignment(plan.detach()), self.block).to(plan.dtype) + plan - plan.detach()

    @torch.no_grad()
    def hard(self) -> Tensor:
        """The permutation matrices ``(blocks, block, block)`` nearest to the plans."""
        return F.one_hot(assignment(self.plan()), self.block).to(self.logits.dtype)

    @torch.no_grad()
    def permutation(self) -> Tensor:
        """int64 ``(channels,)``, or ``(heads, channels)`` for several heads."""
        found = self._order(assignment(self.plan()))
        return found[0] if self.heads == 1 else found

    def _order(self, within: Tensor) -> Tensor:
        """``(heads, channels)`` from the orders ``(blocks, block)`` inside the blocks."""
        start = torch.arange(0, self.channels, self.block, device=within.device).view(1, -1, 1)
        return (within.view(self.heads, -1, self.block) + start).flatten(1)

    def _split(self, matrix: Tensor) -> Tensor:
        """``(rows, heads, repeats, blocks of a head, block)``, a view."""
        return matrix.unflatten(-1, (self.heads, -1, self.channels // self.block, self.block))

    def _products(self, ordered: Tensor, own: Tensor) -> Tensor:
        """``ordered^T own`` in every block, of two matrices as :meth:`reorder` takes them."""
        products = torch.einsum("ohrgk,ohrgj->hgkj", self._split(ordered), self._split(own))
        return products.flatten(0, 1)

    def reorder(self, matrix: Tensor, plan: Tensor, *, back: bool = False) -> Tensor:
        """``(rows, heads * repeats * channels)`` with the plan applied to its columns, or its transpose."""
        plan = plan.to(matrix.dtype).view(self.heads, -1, self.block, self.block)
        equation = "ohrgk,hgkj->ohrgj" if back else "ohrgj,hgkj->ohrgk"
        return torch.einsum(equation, self._split(matrix), plan).flatten(1)

    def masked(
        self, weight: Tensor, scores: Tensor, plan: Tensor, pattern: NMPattern, transposable: bool
    ) -> Tensor:
        """The pruned weight in the channels' own order, differentiable in ``plan`` and ``weight``.

        ``weight`` and ``scores`` are ``(out, in)``, columns ``(heads, repeats, channels)``.
        """
        if self.constants.soft:
            mask = _mask(self.reorder(scores, plan.detach()), pattern, transposable)
            return self.reorder(self.reorder(weight, plan) * mask, plan, back=True)
        order = self._order(plan.detach().argmax(-1)).unsqueeze(1)
        repeats = weight.shape[1] // (self.heads * self.channels)
        start = torch.arange(self.heads * repeats, device=order.device).view(self.heads, repeats, 1)
        index = (start * self.channels + order).flatten()
        result: Tensor = _StraightThrough.apply(plan, weight, scores, index, self, pattern, transposable)
        return result


class _StraightThrough(torch.autograd.Function):
    """``weight * (M H)`` with the mask M of the reordered scores; see the module's docstring.

    With ``D = gradient * weight`` the plan's gradient is ``M^T D + E^T scores`` in every block, E being the
    gradient ``D H^T`` of the mask taken through ``n * softmax(scores / spread)`` of each group.
    """

    @staticmethod
    def forward(
        ctx: Any,
        plan: Tensor,
        weight: Tensor,
        scores: Tensor,
        index: Tensor,
        module: LearnableChannelPermutation,
        pattern: NMPattern,
        transposable: bool,
    ) -> Tensor:
        mask = _mask(scores.index_select(1, index), pattern, transposable)
        ctx.save_for_backward(plan, weight, scores, index, mask)
        ctx.settings = module, pattern
        return weight * mask.index_select(1, index.argsort())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        plan, weight, scores, index, mask = ctx.saved_tensors
        module, pattern = ctx.settings
        d_plan = d_weight = None
        if ctx.needs_input_grad[0]:
            d_mask = (gradients[0] * weight).to(scores.dtype)
            d_ordered = _through_softmax(scores, d_mask, index, pattern)
            d_plan = module._products(mask.to(d_mask.dtype), d_mask) + module._products(d_ordered, scores)
            d_plan = d_plan.to(plan.dtype)
        if ctx.needs_input_grad[1]:
            d_weight = gradients[0] * mask.index_select(1, index.argsort())
        return d_plan, d_weight, None, None, None, None, None


def _through_softmax(scores: Tensor, d_mask: Tensor, index: Tensor, pattern: NMPattern) -> Tensor:
    """Gradient of the reordered scores, where each group's mask stands for ``n * softmax(scores / spread)``.

    The spread is the groups' root mean variance.
    """
    full = len(index) // pattern.m * pattern.m
    # Slots before groups, so that a group's entries lie in different rows and every operation is a long one.
    slots = index[:full].view(-1, pattern.m).T.flatten()
    ordered, gradient = (t.index_select(1, slots).unflatten(1, (pattern.m, -1)) for t in (scores, d_mask))
    variance = ordered.square().mean() - ordered.mean(1).square().mean()
    spread = variance.clamp_min(torch.finfo(scores.dtype).tiny).sqrt()
    soft = (ordered / spread).softmax(1)
    inner = soft * (gradient - (soft * gradient).sum(1, keepdim=True)) * (pattern.n / spread)
    return F.pad(inner.transpose(1, 2).flatten(1), (0, len(index) - full))


def pruned_in_order(
    weight: Tensor, scores: Tensor, index: Tensor, pattern: NMPattern, transposable: bool
) -> Tensor:
    """``weight`` times the mask that ``scores`` give its columns in the order ``index``."""
    mask = _mask(scores.index_select(1, index), pattern, transposable)
    return weight * mask.index_select(1, index.argsort())


def kept_in_order(scores: Tensor, index: Tensor, pattern: NMPattern, transposable: bool) -> float:
    """What the mask of the columns in the order ``index`` keeps."""
    ordered = scores.index_select(1, index)
    return float((ordered * _mask(ordered, pattern, transposable)).sum(dtype=torch.float64))


def _mask(scores: Tensor, pattern: NMPattern, transposable: bool) -> Tensor:
    check_finite(scores)
    if transposable:
        return transposable_mask(scores, pattern.n, pattern.m)
    return nm_mask(scores, pattern.n, pattern.m)
