"""A model in training: some of its weights pruned, as long as that is wanted, in the orders being learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nmsolve.ops.columns import permute_columns
from nmsolve.pattern import NMPattern
from nmsolve.permute.couplings import Coupling, Site
from nmsolve.permute.module import LearnableChannelPermutation, kept_in_order, pruned_in_order

__all__ = ["Part", "PrunedModel"]


@dataclass
class Part:
    """One coupling in training: its order at the start, its module, its logits at the start.

    ``average`` is the running mean of their gradient, ``plan`` what the present step takes; without it the
    hard permutation is taken.
    """

    coupling: Coupling
    base: Tensor
    module: LearnableChannelPermutation
    first: Tensor = field(init=False)
    average: Tensor = field(init=False)
    plan: Tensor | None = None

    def __post_init__(self) -> None:
        self.first = self.module.logits.detach().clone()
        self.average = torch.zeros_like(self.first)

    def permutation(self) -> Tensor:
        learned = self.module.permutation()
        return self.base.gather(-1, learned)


class PrunedModel:
    """A model whose weights are pruned in the parts' orders while ``sparse`` is set.

    ``scores`` has those of every consumer's weight, in the weight's own shape.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[Part],
        scores: Mapping[str, Tensor],
        pattern: NMPattern,
        transposable: bool,
    ) -> None:
        self.model, self.parts, self.scores = model, parts, scores
        self.pattern, self.transposable = pattern, transposable
        self.sparse = False
        self.total = sum(float(scores[site.tensor].double().sum()) for _, site in self._sites())

    def _sites(self) -> Iterator[tuple[Part, Site]]:
        for part in self.parts:
            for site in part.coupling.consumers:
                yield part, site

    def permutations(self) -> dict[str, Tensor]:
        """The present order of every coupling."""
        return {part.coupling.name: part.permutation() for part in self.parts}

    def kept(self, orders: Mapping[str, Tensor]) -> float:
        """Share of all scores that masks in these orders keep."""
        kept = 0.0
        for part, site in self._sites():
            index = part.coupling.index(orders[part.coupling.name], site)
            scores = self.scores[site.tensor].movedim(site.axis, 1)
            kept += kept_in_order(scores, index, self.pattern, self.transposable)
        return kept / self.total

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Puts the parametrisations in place, and takes them away."""
        done: list[nn.Module] = []
        try:
            for part, site in self._sites():
                layer = self.model.get_submodule(site.tensor.removesuffix(".weight"))
                parametrize.register_parametrization(layer, "weight", _Masked(self, part, site), unsafe=True)
                done.append(layer)
            yield
        finally:
            self.sparse = False
            for layer in done:
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


class _Masked(nn.Module):
    """The parametrisation that puts the pruned weight in the dense one's place."""

    def __init__(self, model: PrunedModel, part: Part, site: Site) -> None:
        super().__init__()
        # Kept from the module tree: the permutations are no part of the model.
        self._owners = (model, part, site)
        index = part.coupling.index(part.base, site)
        scores = model.scores[site.tensor].movedim(site.axis, 1)
        self.scores: Tensor
        self.index: Tensor
        self.inverse: Tensor
        self.register_buffer("scores", scores.index_select(1, index), persistent=False)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("inverse", index.argsort(), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """The dense weight, or the pruned one: differentiable in the plans, or for the hard permutations."""
        model, part, site = self._owners
        if not model.sparse:
            return weight
        matrix = weight.movedim(site.axis, 1).index_select(1, self.index)
        if part.plan is None:
            order = part.coupling.index(part.module.permutation(), site)
            pruned = pruned_in_order(matrix, self.scores, order, model.pattern, model.transposable)
        else:
            pruned = part.module.masked(matrix, self.scores, part.plan, model.pattern, model.transposable)
        return permute_columns(pruned, self.inverse).movedim(1, site.axis)
