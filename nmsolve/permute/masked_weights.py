"""A model whose weights are masked in given orders, and what is known of its loss at every weight.

Unlike :mod:`nmsolve.permute.pruned_model` nothing is differentiated through an order: the pruned weights are
leaves, and their gradient says what the loss would be if an entry were kept or pruned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nmsolve.ops.masks import nm_mask
from nmsolve.pattern import NMPattern
from nmsolve.permute.couplings import Coupling, Site
from nmsolve.permute.heuristics import search_pass
from nmsolve.permute.insertions import Insertions
from nmsolve.permute.windows import groups_of

__all__ = ["MaskedModel", "MaskedWeight", "Reordered"]


class MaskedWeight:
    """One consumer's weight under its mask.

    ``inputs`` and ``outputs`` are running sums, over tokens, of the layer's squared inputs and of the squared
    gradient of its outputs; the leaf's ``grad`` is that of the loss, a running mean as well.
    """

    def __init__(self, layer: nn.Module, site: Site, scores: Tensor) -> None:
        self.layer, self.site = layer, site
        self.dense = layer._parameters["weight"]
        assert self.dense is not None
        self.scores = scores.movedim(site.axis, 1)
        self.pruned = nn.Parameter(torch.empty_like(self.dense))
        self.pruned.grad = torch.zeros_like(self.dense)
        self.mask = torch.ones_like(self.scores, dtype=torch.bool)
        outs, ins = self.scores.shape
        self.inputs, self.outputs = (self.scores.new_zeros(count) for count in (ins, outs))

    def new_mask(self, index: Tensor, pattern: NMPattern) -> Tensor:
        """The mask that the columns have in the order ``index``, in their own order."""
        mask = nm_mask(self.scores.index_select(1, index), pattern.n, pattern.m)
        return mask.index_select(1, index.argsort())

    @torch.no_grad()
    def put(self, mask: Tensor) -> None:
        assert self.dense is not None
        self.mask = mask
        self.pruned.copy_(self.dense * mask.movedim(1, self.site.axis))

    def first_order(self) -> Tensor:
        """What the loss falls by, to first order, where an entry is kept: ``(out, in)``."""
        assert self.dense is not None
        assert self.pruned.grad is not None
        return -(self.pruned.grad.float() * self.dense.float()).movedim(self.site.axis, 1)

    def curvature(self) -> Tensor:
        """What changing an entry costs in second order, from the layer's inputs and gradients apart."""
        assert self.dense is not None
        return self.dense.float().movedim(self.site.axis, 1).square() * self.outputs[:, None] * self.inputs

    def watch(self, share: float) -> list[Any]:
        """Hooks that add ``share`` of what the next passes show to the running sums."""

        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            x = inputs[0].detach().flatten(0, -2).float()
            self.inputs.add_(x.square().sum(0), alpha=share)

            def add(gradient: Tensor) -> None:
                g = gradient.detach().flatten(0, -2).float()
                self.outputs.add_(g.square().sum(0), alpha=share)

            output.register_hook(add)

        return [self.layer.register_forward_hook(hook)]


class Reordered:
    """A coupling, the order of its channels int64 ``(heads, size)``, and its consumers' weights.

    ``window`` is the number of groups that exchange columns with each other.
    """

    def __init__(
        self,
        coupling: Coupling,
        order: Tensor,
        weights: Sequence[MaskedWeight],
        pattern: NMPattern,
        window: int,
    ) -> None:
        self.coupling, self.weights, self.window = coupling, list(weights), window
        self.order = order.reshape(coupling.heads, coupling.size).clone()
        scores = self.stacked([weight.scores for weight in self.weights])
        self.total = float(scores.sum(dtype=torch.float64))
        self.columns = [Insertions(matrix, pattern) for matrix in scores]

    def stacked(self, matrices: Sequence[Tensor]) -> Tensor:
        """Matrices ``(out, in)`` of the consumers as one ``(heads, rows, size)``."""
        tensors = {
            weight.site.tensor: matrix.movedim(1, weight.site.axis)
            for weight, matrix in zip(self.weights, matrices, strict=True)
        }
        return self.coupling.scores(tensors).view(self.coupling.heads, -1, self.coupling.size)

    def permutation(self) -> Tensor:
        return self.order.view(self.coupling.shape).clone()

    def masks(self, order: Tensor, pattern: NMPattern) -> Iterator[Tensor]:
        for weight in self.weights:
            yield weight.new_mask(self.coupling.index(order, weight.site), pattern)


class MaskedModel:
    """A model with the consumers of some couplings pruned, as long as that is wanted.

    Parameters
    ----------
    model : nn.Module
    couplings : sequence of Coupling
        All of whose consumers are linear layers.
    orders : sequence of Tensor
        Theirs at the start.
    scores : mapping of str to Tensor
        Of every consumer's weight, in the weight's own shape.
    pattern : NMPattern
    windows : sequence of int
        Groups that exchange columns, for each coupling (:mod:`nmsolve.permute.windows`).
    """

    def __init__(
        self,
        model: nn.Module,
        couplings: Sequence[Coupling],
        orders: Sequence[Tensor],
        scores: Mapping[str, Tensor],
        pattern: NMPattern,
        windows: Sequence[int],
    ) -> None:
        self.pattern = pattern
        self.parts = []
        for coupling, order, window in zip(couplings, orders, windows, strict=True):
            weights = [
                MaskedWeight(
                    model.get_submodule(site.tensor.removesuffix(".weight")), site, scores[site.tensor]
                )
                for site in coupling.consumers
            ]
            self.parts.append(Reordered(coupling, order, weights, pattern, window))
        self.total = sum(part.total for part in self.parts)

    def weights(self) -> Iterator[MaskedWeight]:
        for part in self.parts:
            yield from part.weights

    def permutations(self) -> dict[str, Tensor]:
        """The present order of every coupling."""
        return {part.coupling.name: part.permutation() for part in self.parts}

    def kept(self) -> float:
        """Share of all scores that the masks keep."""
        kept = sum(torch.where(w.mask, w.scores, 0).sum(dtype=torch.float64) for w in self.weights())
        return float(kept) / self.total

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Puts the pruned weights in the dense ones' place, and these back."""
        try:
            for part in self.parts:
                self.reorder(part, part.order)
            self.show(dense=False)
            yield
        finally:
            self.show(dense=True)

    def show(self, *, dense: bool) -> None:
        """Lets the model compute with its dense weights, or with the pruned ones."""
        for weight in self.weights():
            weight.layer._parameters["weight"] = weight.dense if dense else weight.pruned

    def reorder(self, part: Reordered, order: Tensor) -> None:
        part.order = order
        for weight, mask in zip(part.weights, part.masks(order, self.pattern), strict=True):
            weight.put(mask)

    @contextmanager
    def watched(self, share: float) -> Iterator[None]:
        """Running means move on by ``share`` of what a pass in between shows; its loss is to be taken so
        often.
        """
        for weight in self.weights():
            assert weight.pruned.grad is not None
            for mean in (weight.pruned.grad, weight.inputs, weight.outputs):
                mean.mul_(1 - share)
        handles = [handle for weight in self.weights() for handle in weight.watch(share)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def better(self, part: Reordered, damping: float, generator: torch.Generator) -> tuple[Tensor, float]:
        """An order whose masks lower the loss by the most, to first order and less what changes cost.

        Returns it and by how much the loss falls to first order. One pass of RIA's search with these values:
        each slot takes the best of all ways to give its columns to the groups.
        """
        first = [weight.first_order() for weight in part.weights]
        values = [
            gain + damping * torch.where(weight.mask, 1, -1) * weight.curvature()
            for gain, weight in zip(first, part.weights, strict=True)
        ]
        order, slots = part.order.clone(), range(self.pattern.m)
        for own, matrix, columns in zip(order, part.stacked(values), part.columns, strict=True):
            groups = groups_of(own, self.pattern.m)
            within = torch.rand(groups.shape, generator=generator).argsort(dim=-1).to(groups.device)
            shuffled = groups.gather(-1, within)
            found, _ = search_pass(columns.weighed(matrix), shuffled, slots, part.window, generator)
            groups.copy_(found)
        fall = 0.0
        for weight, gain, mask in zip(part.weights, first, part.masks(order, self.pattern), strict=True):
            fall += float((gain * (mask.float() - weight.mask.float())).sum(dtype=torch.float64))
        return order, fall
